"""Interrupts by Irqchip, with KVM's controllers and with ours: MSIs and irqfds as a guest takes them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from guests import MSI_ADDRESS, MSI_DATA, PASSED, PORT, RING_FOR_MSIS, TIMEOUT_S, Guest, Recorder

from pyvmm import KvmError
from pyvmm.irqchip import KvmIrqchip
from pyvmm.irqfd import IrqFd

both = pytest.mark.parametrize("irqchip", ["kernel", "off"])

NOBODY = 0xFEE0_5000
ALL_ONES = (1 << 64) - 1


class Caller(Recorder):
    """Does something at each write."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act
        self.answers: list[object] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.answers.append(self.act())


@both
def test_an_msi_that_is_fired(boot: Callable[..., Guest], irqchip: str) -> None:
    guest = boot(RING_FOR_MSIS, irqchip=irqchip)
    device = Caller(guest.machine.irqchip.msi(MSI_ADDRESS, MSI_DATA).fire)
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert guest.value("msis") == 20
    assert device.answers == [True] * 20


@both
def test_an_msi_by_an_irqfd(boot: Callable[..., Guest], irqchip: str) -> None:
    """Of a message that is changed first: KVM's route is, too."""
    guest = boot(RING_FOR_MSIS, irqchip=irqchip)
    msi = guest.machine.irqchip.msi(MSI_ADDRESS, 0x77)
    irqfd = guest.machine.irqchip.irqfd(msi)
    msi.change(MSI_ADDRESS, MSI_DATA)
    guest.machine.pio.map(PORT, 1, Caller(irqfd.signal))
    assert guest.run() == PASSED
    assert guest.value("msis") == 20


@both
def test_a_message_to_nobody_is_no_error(boot: Callable[..., Guest], irqchip: str) -> None:
    """A guest chooses the address: whatever it is, the host goes on, and nobody is interrupted."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .set    IRR_0X40, 0x220                 # of the local APIC: vectors 0x40 to 0x5f
        mov     $APIC, %edi
        movl    $0x1ff, APIC_SPURIOUS(%rdi)
        mov     $DEVICE_PORT, %edx
        outb    %al, %dx
    1:  mov     IRR_0X40(%rdi), %ebx
        test    $1 << 0x12, %ebx                # the last of them, 0x52, is for us
        jz      1b
        finish
        """,
        irqchip=irqchip,
    )
    chip = guest.machine.irqchip
    for_nobody = ((NOBODY, MSI_DATA), (0, MSI_DATA), (1 << 32 | MSI_ADDRESS, MSI_DATA), (ALL_ONES, MSI_DATA))
    messages = [chip.msi(address, data) for address, data in for_nobody]
    mine = chip.msi(0, MSI_DATA)
    irqfd = chip.irqfd(mine)

    def act() -> list[bool]:
        fired = [msi.fire() for msi in messages]
        for address, data in for_nobody:
            mine.change(address, data)
            irqfd.signal()
        mine.change(MSI_ADDRESS, MSI_DATA + 1)
        irqfd.signal()
        return fired

    device = Caller(act)
    guest.machine.pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert device.answers == [[False] * len(for_nobody)]
    assert guest.regs()["rbx"] == 1 << 0x12


def test_gsis_of_messages(boot: Callable[..., Guest]) -> None:
    """Given out above the pins, given back, and what KVM has is the whole table."""
    chip = boot("finish").machine.irqchip
    assert isinstance(chip, KvmIrqchip)
    messages = [chip.msi(MSI_ADDRESS, 0x50 + n, f"card {n}") for n in range(3)]
    irqfds = [chip.irqfd(msi) for msi in messages]
    assert [msi.gsi for msi in messages] == [24, 25, 26]
    assert [chip.routes.owner(gsi) for gsi in (9, 24, 26)] == ["KVM's IOAPIC and PIC", "card 0", "card 2"]
    irqfds[1].close()
    assert messages[1].gsi == -1
    another = chip.msi(MSI_ADDRESS, 0x60, "another card")
    chip.irqfd(another)
    assert another.gsi == 25
    assert chip.routes.table[-3:] == [
        (24, "msi", MSI_ADDRESS, 0x50),
        (25, "msi", MSI_ADDRESS, 0x60),
        (26, "msi", MSI_ADDRESS, 0x52),
    ]


def test_kvm_takes_as_many_routes_as_it_says(boot: Callable[..., Guest]) -> None:
    """What GsiRoutes refuses before it asks is what KVM would refuse."""
    machine = boot("finish").machine
    limit = machine.kvm.check_extension("KVM_CAP_IRQ_ROUTING")
    full = [(gsi, "msi", MSI_ADDRESS, 0x51) for gsi in range(limit)]
    machine.vm.set_gsi_routing(full)
    with pytest.raises(KvmError):
        machine.vm.set_gsi_routing([*full, (limit, "msi", MSI_ADDRESS, 0x51)])


# A level at IOAPIC pin 10. A write to DEVICE_PORT gives the device so many things to tell; the handler reads one, or 0
# where there is none, and ends the interrupt. When all are told no more interrupts come.
LEVEL = """
    .include "interrupts64.inc"
    set_gate 0x40, on_irq
    load_idt
    program_pic 0xff
    enable_apic
    route_level 10, 0x40
    mov     $DEVICE_PORT, %edx
    sti
    mov     $5, %al
    outb    %al, %dx
1:  pause
    cmpl    $5, told
    jb      1b
    mov     $2, %ebx                        # the first time round one may still be on its way
2:  mov     irqs, %ebp
    mov     $50000, %ecx
3:  dec     %ecx
    jnz     3b
    dec     %ebx
    jnz     2b
    cli
    cmp     irqs, %ebp
    jne     4f
    finish
4:  finish  1
on_irq:
    push    %rax
    push    %rdi
    incl    irqs
    inb     %dx, %al
    cmp     $0, %al
    je      5f
    incl    told
5:  mov     $APIC, %edi
    movl    $0, APIC_EOI(%rdi)
    pop     %rdi
    pop     %rax
    iretq
irqs: .long 0
told: .long 0
"""


class Teller(Recorder):
    """A device whose interrupt is a level, on the far side of an irqfd: it asks again while it has more to tell."""

    def __init__(self, irqfd: IrqFd) -> None:
        super().__init__()
        self.irqfd = irqfd
        self.left = 0
        self.quiet = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def write(self, offset: int, size: int, value: int) -> None:
        self.left = value
        self.irqfd.signal()

    def read(self, offset: int, size: int) -> int:
        told, self.left = self.left, max(0, self.left - 1)
        return told

    def _listen(self) -> None:
        os.set_blocking(self.irqfd.resample_fd, True)
        while not self.quiet.is_set():
            os.eventfd_read(self.irqfd.resample_fd)
            if self.left:
                self.irqfd.signal()
            else:
                self.quiet.set()


@both
def test_a_level_that_is_raised_again_while_the_device_wants_it(boot: Callable[..., Guest], irqchip: str) -> None:
    guest = boot(LEVEL, irqchip=irqchip)
    teller = Teller(guest.machine.irqchip.irqfd(10, resample=True))
    guest.machine.pio.map(PORT, 1, teller)
    assert guest.run() == PASSED
    assert teller.quiet.wait(TIMEOUT_S)
    assert guest.value("told") == 5
    # Software KVM signals an end of interrupt too many now and then: the handler finds nothing to do once more.
    assert guest.value("irqs") >= 5 if irqchip == "kernel" else guest.value("irqs") == 5


@both
def test_a_line_beside_it_keeps_the_level_up(boot: Callable[..., Guest], irqchip: str) -> None:
    """The end of interrupt lowers what the irqfd made of the level, not what a line does."""
    guest = boot(LEVEL, irqchip=irqchip)
    chip = guest.machine.irqchip
    irqfd, line = chip.irqfd(10, resample=True), chip.line(10)

    class Device(Recorder):
        left = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.left = value
            line.raise_()
            irqfd.signal()

        def read(self, offset: int, size: int) -> int:
            told, self.left = self.left, max(0, self.left - 1)
            if self.left == 0:
                line.lower()
            return told

    guest.machine.pio.map(PORT, 1, Device())
    assert guest.run() == PASSED
    assert guest.value("told") == 5
    assert os.eventfd_read(irqfd.resample_fd) >= 5


@both
def test_closed_irqfds_interrupt_no_more(boot: Callable[..., Guest], irqchip: str) -> None:
    guest = boot(RING_FOR_MSIS, irqchip=irqchip)
    chip = guest.machine.irqchip
    closed, msi = chip.irqfd(chip.msi(MSI_ADDRESS, MSI_DATA)), chip.msi(MSI_ADDRESS, MSI_DATA)
    copy = os.dup(closed.fd)
    closed.close()

    def ring() -> None:
        os.eventfd_write(copy, 1)
        msi.fire()

    try:
        guest.machine.pio.map(PORT, 1, Caller(ring))
        assert guest.run() == PASSED
        assert guest.value("msis") == 20
    finally:
        os.close(copy)


@both
def test_irqfds_end_with_the_machine(boot: Callable[..., Guest], irqchip: str) -> None:
    guest = boot("finish", irqchip=irqchip)
    chip = guest.machine.irqchip
    irqfds = [chip.irqfd(10, resample=True), chip.irqfd(11), chip.irqfd(chip.msi(MSI_ADDRESS, MSI_DATA))]
    assert guest.run() == PASSED
    guest.close()
    assert [irqfd.fd for irqfd in irqfds] == [-1, -1, -1]
    irqfds[0].close()
