"""ioeventfd: a guest's write signals a descriptor and is no exit. irqfd: a descriptor raises an interrupt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from guests import MMIO, PASSED, PORT, Guest, Recorder


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def count(fd: int) -> int:
    """How often it was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_port(boot: Callable[..., Guest], event: int) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n mov $5, %eax\n mov $30, %ecx\n 1: outl %eax, %dx\n loop 1b\n finish")
    device = Recorder()
    guest.machine.pio.map(PORT, 4, device)
    guest.machine.vm.ioeventfd(event, PORT, 4, pio=True)
    assert guest.run() == PASSED
    assert count(event) == 30
    assert device.log == []
    # Deassigned, the writes are exits again.
    guest.machine.vm.ioeventfd(event, PORT, 4, pio=True, deassign=True)
    guest.machine.reset()
    assert guest.run() == PASSED
    assert count(event) == 0
    assert len(device.log) == 30


def test_address(boot: Callable[..., Guest], event: int) -> None:
    guest = boot("mov $DEVICE_MMIO, %edi\n mov $5, %eax\n mov $30, %ecx\n 1: mov %eax, (%rdi)\n loop 1b\n finish")
    device = Recorder()
    guest.machine.mmio.map(MMIO, 4, device)
    guest.machine.vm.ioeventfd(event, MMIO, 4)
    assert guest.run() == PASSED
    assert count(event) == 30
    assert device.log == []


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_datamatch_and_size(boot: Callable[..., Guest], event: int, kind: str) -> None:
    """Only a 2-byte write of 7 signals; another value or size is an exit."""
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        mov     $6, %eax
        outw    %ax, %dx
        mov     $7, %eax
        outw    %ax, %dx
        outb    %al, %dx
        outl    %eax, %dx
        finish
        """
        if kind == "pio"
        else """
        mov     $DEVICE_MMIO, %edi
        movw    $6, (%rdi)
        movw    $7, (%rdi)
        movb    $7, (%rdi)
        movl    $7, (%rdi)
        finish
        """
    )
    machine = guest.machine
    space, base = (machine.pio, PORT) if kind == "pio" else (machine.mmio, MMIO)
    device = Recorder()
    space.map(base, 4, device)
    machine.vm.ioeventfd(event, base, 2, pio=kind == "pio", datamatch=7)
    assert guest.run() == PASSED
    assert count(event) == 1
    assert device.log == [("write", 0, 2, 6), ("write", 0, 1, 7), ("write", 0, 4, 7)]


def test_any_size(boot: Callable[..., Guest], event: int) -> None:
    """Length 0 (KVM_CAP_IOEVENTFD_ANY_LENGTH) takes a write of any size."""
    guest = boot("mov $DEVICE_MMIO, %edi\n movb $1, (%rdi)\n movw $1, (%rdi)\n movl $1, (%rdi)\n finish")
    guest.machine.vm.ioeventfd(event, MMIO, 0)
    assert guest.run() == PASSED
    assert count(event) == 3
    assert guest.exits("MMIO") == 0


def test_an_event_region_does_the_same_in_user_space(boot: Callable[..., Guest], event: int) -> None:
    from pyvmm import EventRegion

    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n outl %eax, %dx\n finish")
    guest.machine.pio.add(PORT, EventRegion(4, event))
    assert guest.run() == PASSED
    assert count(event) == 2


IRQFD = """
    .include "interrupts64.inc"
    set_gate 0x25, on_irq
    load_idt
    program_pic 0xdf
    mov     $DEVICE_PORT, %edx
1:  mov     irqs, %ecx
    outb    %al, %dx                    # signals the eventfd
    sti
2:  pause
    cmp     %ecx, irqs
    je      2b
    cli
    cmpl    $30, irqs
    jb      1b
    finish
on_irq:
    push    %rax
    incl    irqs
    end_of_interrupt
    pop     %rax
    iretq
irqs: .long 0
"""


def test_irqfd(boot: Callable[..., Guest], event: int) -> None:
    guest = boot(IRQFD)

    class Signaller(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            os.eventfd_write(event, 1)

    guest.machine.pio.map(PORT, 1, Signaller())
    guest.machine.vm.irqfd(event, 5)
    assert guest.run() == PASSED
    assert guest.value("irqs") == 30


def test_ioeventfd_into_irqfd(boot: Callable[..., Guest], event: int) -> None:
    """One descriptor for both: the guest's doorbell rings its own interrupt, and user space sleeps through it."""
    guest = boot(IRQFD)
    guest.machine.vm.ioeventfd(event, PORT, 1, pio=True)
    guest.machine.vm.irqfd(event, 5)
    assert guest.run() == PASSED
    assert guest.value("irqs") == 30
    assert guest.exits("IO") == 1


def test_irqfd_with_resample(boot: Callable[..., Guest], event: int) -> None:
    """A level line through the IOAPIC: the guest's EOI lowers it and signals the other descriptor."""
    resample = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    guest = boot(
        """
        .include "interrupts64.inc"
        .set    IOAPIC, 0xfec00000
        set_gate 0x40, on_irq
        load_idt
        program_pic 0xff                        # the line goes there too
        mov     $APIC, %edi
        movl    $0x1ff, APIC_SPURIOUS(%rdi)
        mov     $IOAPIC, %esi
        movl    $0x10 + 2 * 10 + 1, (%rsi)      # redirection of pin 10: to APIC 0,
        movl    $0, 0x10(%rsi)
        movl    $0x10 + 2 * 10, (%rsi)
        movl    $0x8040, 0x10(%rsi)             # level, vector 0x40
        mov     $DEVICE_PORT, %edx
        sti
        outb    %al, %dx
    1:  pause
        cmpl    $1, irqs
        jne     1b
        cli
        finish
    on_irq:
        push    %rdi
        incl    irqs
        mov     $APIC, %edi
        movl    $0, APIC_EOI(%rdi)
        pop     %rdi
        iretq
    irqs: .long 0
        """
    )
    try:
        guest.machine.vm.ioeventfd(event, PORT, 1, pio=True)
        guest.machine.vm.irqfd(event, 10, resample_fd=resample)
        assert guest.run() == PASSED
        assert guest.value("irqs") == 1
        assert count(resample) == 1
    finally:
        os.close(resample)
