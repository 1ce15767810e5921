"""The cases of ``pyvmm bench exits``: which guest, and what a contender must have ready for it.

Names are those of kvm-unit-tests' vmexit where it has the case; ``vmexit`` names its nearest relative elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

# As guests/exits/exits.inc has them.
DEVICE_PORT = 0xE0
OTHERS_PORT = 0xE8
DEVICE_MMIO = 0xFF00_0000
DOORBELL_PORT = 0xC084
DOORBELL_MMIO = 0xFE00_0801
NOBODY_PORT = 0x1234
UART_SCRATCH = 0x3FF
RTC_INDEX = 0x70
IRQ_PORT = 0x2000
IRQ = 5

# What stands at the device's place in pyvmm; in a loop in Python everything is Python.
PYTHON = "python"  # a Device with `self.count += 1`
COMPILED = "compiled"  # a LatchRegion
FIFO = "fifo"  # a FifoRegion, as the IDE data port is one

# What answers in user space, for the table of pyvmm's own share: (exit reason, port or page).
IO, MMIO = "IO", "MMIO"


class Place(NamedTuple):
    """A port or an address."""

    space: str  # pio or mmio
    address: int

    def __str__(self) -> str:
        return f"{self.space}:{self.address:#x}"


class ExitCase(NamedTuple):
    name: str
    title: str
    guest: str
    vmexit: str = ""  # kvm-unit-tests' name, where ours is another
    device: str = ""  # PYTHON, COMPILED or FIFO at ``at``
    at: Place | None = None  # where the exits go that reach user space
    cpus: int = 1
    doorbell: Place | None = None
    answer: bool = False  # a thread waits for the doorbell and answers in the mailbox
    coalesce: Place | None = None
    irqs: bool = False
    kick: bool = False

    @property
    def threads(self) -> bool:
        """Several threads work at once: they must not be pinned to one CPU."""
        return self.cpus > 1 or self.answer or self.kick

    @property
    def blocks(self) -> bool:
        """The cost is that of a turn of a loop. Where threads meet it is that of single accesses: the host's scheduler
        has its hand in too many of the stretches that are as long as a loop.
        """
        return not self.threads

    @property
    def has_own_share(self) -> bool:
        """Each access is an exit to user space; what is gathered comes in heaps."""
        return self.at is not None and self.coalesce is None


DEVICE = Place("pio", DEVICE_PORT)
MEMORY = Place("mmio", DEVICE_MMIO)
NOBODY = Place("pio", NOBODY_PORT)
UART = Place("pio", UART_SCRATCH)

IO_NO_EVENTFD, MMIO_NO_EVENTFD = "portio-no-eventfd:pci-io", "mmio-no-eventfd:pci-mem"

CASES = (
    # The floor of the floor: exits that KVM answers by itself.
    ExitCase("cpuid", "CPUID, answered by KVM", "cpuid"),
    ExitCase("vmcall", "an unknown hypercall, refused by KVM", "vmcall"),
    ExitCase("inl_from_kernel", "a byte from the PIC in KVM", "inl_from_kernel"),
    ExitCase("outl_to_kernel", "a byte to the PIC in KVM", "outl_to_kernel"),
    # Ports.
    ExitCase("outl_to_qemu", "PIO out to a port that nobody has", "outl_to_qemu", at=NOBODY),
    ExitCase("inl_from_qemu", "PIO in from a port that nobody has", "inl_from_qemu", at=NOBODY),
    ExitCase("outl_to_compiled", "PIO out to a device; pyvmm: a compiled region", "outl_to_device", IO_NO_EVENTFD,
             COMPILED, DEVICE),
    ExitCase("inl_from_compiled", "PIO in from a device; pyvmm: a compiled region", "inl_from_device", "",
             COMPILED, DEVICE),
    ExitCase("outl_to_python", "PIO out to a device; pyvmm: a Python device", "outl_to_device", IO_NO_EVENTFD,
             PYTHON, DEVICE),
    ExitCase("inl_from_python", "PIO in from a device; pyvmm: a Python device", "inl_from_device", "",
             PYTHON, DEVICE),
    ExitCase("outb_to_uart", "PIO out to COM1's scratch register; pyvmm: its Serial", "outb_to_uart", at=UART),
    ExitCase("inb_from_uart", "PIO in from COM1's scratch register; pyvmm: its Serial", "inb_from_uart", at=UART),
    ExitCase("outs_512", "512 bytes out by REP OUTSW; pyvmm: a FIFO window", "outs_512", "", FIFO, DEVICE),
    ExitCase("ins_512", "512 bytes in by REP INSW; pyvmm: a FIFO window", "ins_512", "", FIFO, DEVICE),
    # Memory-mapped registers.
    ExitCase("mmio_write_compiled", "MMIO write; pyvmm: a compiled region", "mmio_write", MMIO_NO_EVENTFD,
             COMPILED, MEMORY),
    ExitCase("mmio_read_compiled", "MMIO read; pyvmm: a compiled region", "mmio_read", "", COMPILED, MEMORY),
    ExitCase("mmio_write_python", "MMIO write; pyvmm: a Python device", "mmio_write", MMIO_NO_EVENTFD, PYTHON, MEMORY),
    ExitCase("mmio_read_python", "MMIO read; pyvmm: a Python device", "mmio_read", "", PYTHON, MEMORY),
    # Doorbells and gathered writes: no exit each.
    ExitCase("portio-wildcard-eventfd", "PIO out to an ioeventfd that nobody waits for", "doorbell_pio",
             "portio-wildcard-eventfd:pci-io", doorbell=Place("pio", DOORBELL_PORT)),
    ExitCase("mmio-wildcard-eventfd", "MMIO write to an ioeventfd that nobody waits for", "doorbell_mmio",
             "mmio-wildcard-eventfd:pci-mem", doorbell=Place("mmio", DOORBELL_MMIO)),
    ExitCase("doorbell_to_thread", "an ioeventfd to a waiting thread, and its answer seen in memory",
             "doorbell_to_thread", doorbell=Place("pio", DOORBELL_PORT), answer=True),
    ExitCase("coalesced_pio", "PIO out, gathered by KVM; with its part of the exits that fetch it", "coalesced_pio",
             at=Place("pio", RTC_INDEX), coalesce=Place("pio", RTC_INDEX)),
    ExitCase("coalesced_mmio", "MMIO write, gathered by KVM; with its part of the exits that fetch it",
             "coalesced_mmio", "", PYTHON, MEMORY, coalesce=MEMORY),
    # Interrupts and kicks.
    ExitCase("irq_injection", "PIO out that raises an interrupt, to its handler; loop: lowered again", "irq_injection",
             at=Place("pio", IRQ_PORT + IRQ), irqs=True),
    ExitCase("kick", "a signal to the vCPU's thread until it is out of KVM_RUN", "kick", kick=True),
    # Several vCPUs at once.
    ExitCase("outl_to_compiled_x2", "as outl_to_compiled, another vCPU at it too", "outl_to_device_smp",
             IO_NO_EVENTFD, COMPILED, DEVICE, cpus=2),
    ExitCase("outl_to_python_x2", "as outl_to_python, another vCPU at a device of its own", "outl_to_device_smp",
             IO_NO_EVENTFD, PYTHON, DEVICE, cpus=2),
    ExitCase("outl_to_python_x4", "as outl_to_python, three more vCPUs at devices of their own", "outl_to_device_smp",
             IO_NO_EVENTFD, PYTHON, DEVICE, cpus=4),
)  # fmt: skip


def find(name: str) -> ExitCase | None:
    return next((case for case in CASES if case.name == name), None)
