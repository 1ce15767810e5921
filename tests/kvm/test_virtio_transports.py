"""A guest drives the entropy device natively, by interrupts: over virtio-mmio on a microvm, virtio-pci on a pc."""

from __future__ import annotations

import struct
from collections.abc import Callable
from time import monotonic

import pytest
from guests import PASSED, TIMEOUT_S, Guest

ROUNDS = 20

# Offers a buffer, rings the doorbell, waits for the interrupt; `wanted` times. `ack` and `ring` are the transport's.
LOOP = """
again:
    offer
    mov     irqs, %ebx
    ring
    sti
1:  pause
    cmp     %ebx, irqs
    je      1b
    mov     irqs, %ebx
    movzwl  USED + 2, %eax              # as many as were offered; else it was an interrupt too many, as after a load
    cmp     %ax, AVAIL + 2
    jne     1b
    cli
    cmpl    $BUFFER_BYTES, USED + 8     # of the first element: how many bytes were written
    jne     failed
    incl    rounds
    mov     wanted, %eax
    cmp     %eax, rounds
    jb      again
    finish
failed:
    finish 9
irqs: .long 0
rounds: .long 0
wanted: .long 20
"""

MMIO = """
    .include "interrupts64.inc"
    .include "virtio64.inc"
    .set VIRTIO, 0xfeb00000
    .macro register offset, value
    movl    $\\value, \\offset(%rbp)
    .endm
    .macro ring
    movl    $0, 0x50(%rbp)
    .endm
    set_gate 0x25, on_irq               # ISA interrupt 5, the first that is given out
    load_idt
    program_pic 0xdf
    clear_ring
    mov     $VIRTIO, %ebp
    register 0x70, 1
    register 0x70, 3
    register 0x24, 1                    # VERSION_1 and nothing else
    register 0x20, 1
    register 0x70, 11
    cmpl    $11, 0x70(%rbp)
    jne     failed
    register 0x30, 0
    register 0x38, QUEUE_SIZE
    register 0x80, QUEUE_BASE
    register 0x90, AVAIL
    register 0xa0, USED
    register 0x44, 1
    register 0x70, 15
""" + LOOP + """
on_irq:
    push    %rax
    mov     0x60(%rbp), %eax            # InterruptStatus
    mov     %eax, 0x64(%rbp)
    incl    irqs
    end_of_interrupt
    pop     %rax
    iretq
"""

# Configuration mechanism 1, then the modern structures in BAR 4, which stands where the board has put it.
PCI = """
    .include "interrupts64.inc"
    .include "virtio64.inc"
    .set MSIX_CONTROL, 0x42             # the first capability is at 0x40
    .macro config register
    mov     $0x80001000 + (\\register & 0xfc), %eax   # slot 2
    mov     $0xcf8, %edx
    outl    %eax, %dx
    mov     $0xcfc + (\\register & 3), %edx
    .endm
    .macro ring
    movw    $0, 0x3000(%rbp)
    .endm
    set_gate 0x51, on_irq
    load_idt
    program_pic 0xff
    enable_apic
    clear_ring
    config  0
    inl     %dx, %eax
    cmp     $0x10051af4, %eax           # the transitional entropy device
    jne     failed
    config  0x20                        # BAR 4
    inl     %dx, %eax
    and     $~15, %eax
    mov     %eax, %ebp
    config  0x14                        # BAR 1: vector 1 of the table is the queue's
    inl     %dx, %eax
    mov     %eax, %edi
    movl    $0xfee00000, 0x10(%rdi)
    movl    $0, 0x14(%rdi)
    movl    $0x51, 0x18(%rdi)
    movl    $0, 0x1c(%rdi)
    config  MSIX_CONTROL
    mov     $0x8000, %eax
    outw    %ax, %dx
    movb    $1, 20(%rbp)
    movb    $3, 20(%rbp)
    movl    $1, 8(%rbp)
    movl    $1, 12(%rbp)
    movb    $11, 20(%rbp)
    cmpb    $11, 20(%rbp)
    jne     failed
    movw    $0, 22(%rbp)
    movw    $QUEUE_SIZE, 24(%rbp)
    movw    $1, 26(%rbp)
    movl    $QUEUE_BASE, 32(%rbp)
    movl    $AVAIL, 40(%rbp)
    movl    $USED, 48(%rbp)
    movw    $1, 28(%rbp)
    movb    $15, 20(%rbp)
""" + LOOP + """
on_irq:
    push    %rdi
    incl    irqs
    mov     $APIC, %edi
    movl    $0, APIC_EOI(%rdi)
    pop     %rdi
    iretq
"""

# The legacy registers in I/O space, 4.1.4.10: where the ring's parts are follows from its size (2.7.2).
LEGACY = PCI[: PCI.index("    config  0x20 ")].replace(
    '.include "virtio64.inc"',
    '.include "virtio64.inc"\n    .set QUEUE_SIZE, 64\n    .set AVAIL, QUEUE_BASE + 0x400\n'
    "    .set USED, QUEUE_BASE + 0x1000",
).replace("movw    $0, 0x3000(%rbp)", "legacy  16, ax, 0") + """
    .macro legacy register, width, value
    mov     $\\value, %eax
    lea     \\register(%rbp), %edx
    out     %\\width, %dx
    .endm
    config  0x10                        # BAR 0
    inl     %dx, %eax
    and     $~3, %eax
    mov     %eax, %ebp
""" + PCI[PCI.index("    config  0x14 ") : PCI.index("    movb    $1, 20(%rbp)")] + """
    config  0x20                        # no BAR 4, and no capability but MSI-X
    inl     %dx, %eax
    test    %eax, %eax
    jne     failed
    config  0x41
    inb     %dx, %al
    test    %al, %al
    jne     failed
    legacy  18, al, 1
    legacy  18, al, 3
    legacy  4, eax, 0                   # features: none
    legacy  14, ax, 0
    lea     12(%rbp), %edx
    inw     %dx, %ax
    cmp     $QUEUE_SIZE, %ax
    jne     failed
    legacy  22, ax, 1                   # the queue's vector
    legacy  8, eax, QUEUE_BASE >> 12
    legacy  18, al, 7
""" + PCI[PCI.index(LOOP) :]


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ({"virtio_disable_legacy": "on"}, PCI.replace("0x10051af4", "0x10441af4")),
        ({"virtio_disable_legacy": "off"}, PCI),
        ({"virtio_disable_modern": "on"}, LEGACY),
    ],
    ids=["modern", "transitional", "legacy"],
)
@pytest.mark.parametrize("ioeventfd", ["on", "off"])
def test_each_interface_alone(
    boot: Callable[..., Guest], options: dict[str, str], source: str, ioeventfd: str
) -> None:
    guest = boot(source, machine="pc", rng=True, virtio_ioeventfd=ioeventfd, **options)
    assert guest.run() == PASSED
    assert guest.machine.devices["rng"].faults == 0  # type: ignore[attr-defined]
    assert guest.machine.memory.read(0x30000, 64) != bytes(64)
    assert guest.value("rounds") == ROUNDS


def want(guest: Guest, rounds: int) -> None:
    guest.machine.memory.write(guest.program.symbols["wanted"], struct.pack("<I", rounds))


def goes_on_elsewhere(make: Callable[[], Guest], moves: int) -> None:
    """It is moved, each time after some rounds more, and then does ROUNDS to its end. No kick, no buffer and no
    interrupt is lost: the guest would wait for it for ever.
    """
    guest = make()
    want(guest, 0xFFFF_FFFF)
    for n in range(moves):
        end = monotonic() + TIMEOUT_S
        enough = guest.value("rounds") + 4
        guest.start()
        while not guest.machine.wait(0.003 * (n % 8)) and guest.value("rounds") < enough:
            assert monotonic() < end
        guest.machine.pause()
        state = guest.machine.save_state()
        guest.close()
        guest = make()
        guest.machine.load_state(state)
    rounds = guest.value("rounds") + ROUNDS
    want(guest, rounds)
    assert guest.run() == PASSED
    assert guest.value("rounds") == rounds


def test_a_legacy_driver_goes_on_elsewhere(boot: Callable[..., Guest]) -> None:
    goes_on_elsewhere(lambda: boot(LEGACY, machine="pc", rng=True, virtio_disable_modern="on"), 4)


@pytest.mark.parametrize("irqfd", ["on", "off"])
@pytest.mark.parametrize("ioeventfd", ["on", "off"])
@pytest.mark.parametrize(("machine", "source"), [("microvm", MMIO), ("pc", PCI)], ids=["mmio", "pci"])
def test_buffers_are_filled(
    boot: Callable[..., Guest], machine: str, source: str, ioeventfd: str, irqfd: str
) -> None:
    guest = boot(source, machine=machine, rng=True, virtio_ioeventfd=ioeventfd, virtio_irqfd=irqfd)
    guest.machine.board.chassis.join_background()
    before = guest.exits("MMIO")
    assert guest.run() == PASSED
    device = guest.machine.devices["rng"]
    assert device.faults == 0  # type: ignore[attr-defined]
    assert guest.machine.memory.read(0x30000, 64) != bytes(64)
    assert guest.value("rounds") == ROUNDS
    # Each doorbell is an exit, or none of them is; and on mmio each interrupt is two.
    exits = guest.exits("MMIO") - before
    others = 40 if machine == "pc" else 20 + 2 * guest.value("irqs")
    assert exits < others + (ROUNDS if ioeventfd == "off" else 0)
    assert (exits >= ROUNDS) or ioeventfd == "on"


BOTH = pytest.mark.parametrize(("machine", "source"), [("microvm", MMIO), ("pc", PCI)], ids=["mmio", "pci"])


@BOTH
@pytest.mark.parametrize("irqfd", ["on", "off"])
def test_it_goes_on_elsewhere_from_any_moment(
    boot: Callable[..., Guest], machine: str, source: str, irqfd: str
) -> None:
    goes_on_elsewhere(lambda: boot(source, machine=machine, rng=True, virtio_irqfd=irqfd), 8)


@BOTH
def test_resets_while_buffers_are_under_way(boot: Callable[..., Guest], machine: str, source: str) -> None:
    source = source.replace("wanted: .long 20", "wanted: .long 100")
    guest = boot(source, machine=machine, rng=True)
    for n in range(8):
        guest.start()
        guest.machine.wait(0.002 * n)
        guest.machine.reset()
    guest.start()
    guest.wait()
    assert guest.machine.status == PASSED
