"""ioeventfd: a guest's write signals a descriptor and is no exit. irqfd: a descriptor raises an interrupt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from guests import MMIO, PASSED, PORT, Guest, Recorder

from pyvmm import EventRegion, MemoryRegion
from pyvmm.address_space import AddressSpace
from pyvmm.devices.pci.device import PciDevice
from pyvmm.errors import KindError


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def go_live(guest: Guest) -> None:
    """Until KVM has been told what the machine was made with: it is told at once of what comes from then on."""
    guest.machine.board.chassis.join_background()


def exits_at(guest: Guest, address: int) -> int:
    return sum(row.count for row in guest.machine.exit_stats() if row.address == address)


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


# 6 and 7 in two bytes, 7 in one and in four, and 7 in two bytes further on.
WRITES = {
    "pio": """
        mov     $DEVICE_PORT, %edx
        mov     $6, %eax
        outw    %ax, %dx
        mov     $7, %eax
        outw    %ax, %dx
        outb    %al, %dx
        outl    %eax, %dx
        inc     %edx
        inc     %edx
        outw    %ax, %dx
        finish
        """,
    "mmio": """
        mov     $DEVICE_MMIO, %edi
        movw    $6, (%rdi)
        movw    $7, (%rdi)
        movb    $7, (%rdi)
        movl    $7, (%rdi)
        movw    $7, 2(%rdi)
        finish
        """,
}


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_datamatch_and_size(boot: Callable[..., Guest], event: int, kind: str) -> None:
    """Only a 2-byte write of 7 signals; another value or size is an exit."""
    guest = boot(WRITES[kind])
    machine = guest.machine
    space, base = (machine.pio, PORT) if kind == "pio" else (machine.mmio, MMIO)
    device = Recorder()
    space.map(base, 4, device)
    machine.vm.ioeventfd(event, base, 2, pio=kind == "pio", datamatch=7)
    assert guest.run() == PASSED
    assert count(event) == 1
    assert device.log == [("write", 0, 2, 6), ("write", 0, 1, 7), ("write", 0, 4, 7), ("write", 2, 2, 7)]


def test_any_size(boot: Callable[..., Guest], event: int) -> None:
    """Length 0 (KVM_CAP_IOEVENTFD_ANY_LENGTH) takes a write of any size."""
    guest = boot("mov $DEVICE_MMIO, %edi\n movb $1, (%rdi)\n movw $1, (%rdi)\n movl $1, (%rdi)\n finish")
    guest.machine.vm.ioeventfd(event, MMIO, 0)
    assert guest.run() == PASSED
    assert count(event) == 3
    assert guest.exits("MMIO") == 0


@pytest.mark.parametrize("by_kvm", [True, False])
def test_an_event_region_is_an_ioeventfd_and_does_the_same_in_user_space(
    boot: Callable[..., Guest], event: int, by_kvm: bool
) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n outl %eax, %dx\n finish")
    guest.machine.kvm_listener.ioeventfds = by_kvm
    region = guest.machine.pio.add(PORT, EventRegion(4, event))
    go_live(guest)
    assert guest.run() == PASSED
    assert count(event) == 2
    assert exits_at(guest, PORT) == region.count == (0 if by_kvm else 2)


@pytest.mark.parametrize("by_kvm", [True, False])
@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_an_event_region_for_one_value_of_one_size(
    boot: Callable[..., Guest], event: int, kind: str, by_kvm: bool
) -> None:
    """Other values, sizes and addresses of it are lost, by whomever."""
    guest = boot(WRITES[kind])
    machine = guest.machine
    space, base = (machine.pio, PORT) if kind == "pio" else (machine.mmio, MMIO)
    machine.kvm_listener.ioeventfds = by_kvm
    region = space.add(base, EventRegion(4, event, write_size=2, datamatch=7))
    go_live(guest)
    assert guest.run() == PASSED
    assert count(event) == 1
    assert region.count == (4 if by_kvm else 5)


def test_a_region_that_is_unmapped_signals_no_more(boot: Callable[..., Guest], event: int) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish")
    pio = guest.machine.pio
    region = pio.add(PORT, EventRegion(1, event))
    go_live(guest)
    pio.unmap(region)
    device = Recorder()
    pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert count(event) == 0
    assert len(device.writes) == 1


def test_the_owner_of_a_descriptor_may_close_it_first(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish")
    pio = guest.machine.pio
    mine = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    region = pio.add(PORT, EventRegion(1, mine))
    go_live(guest)
    os.close(mine)
    pio.unmap(region)
    device = Recorder()
    pio.map(PORT, 1, device)
    assert guest.run() == PASSED
    assert len(device.writes) == 1


def test_what_is_no_eventfd_is_refused_and_not_mapped(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    go_live(guest)
    ends = os.pipe()
    try:
        with pytest.raises(KindError, match=r"pio 0x700: what should be signalled there is no open eventfd"):
            guest.machine.pio.add(PORT, EventRegion(1, ends[1]))
        assert guest.machine.pio.find(PORT) is None
    finally:
        for end in ends:
            os.close(end)


PC_PORT = 0x7A0  # a pc has something of its own at PORT


class Bell(PciDevice):
    """A function whose BAR 0 has a doorbell, and behind it a register that Python answers."""

    def __init__(self, mmio: AddressSpace, fd: int) -> None:
        super().__init__(device_id=0x1234, class_code=0xFF0000)
        self.add_memory_bar(
            0,
            0x1000,
            mmio,
            [
                (0, lambda: EventRegion(4, fd, write_size=4)),
                (0x800, lambda: MemoryRegion(4, self)),
            ],
        )


def test_a_doorbell_in_a_bar_that_moves(boot: Callable[..., Guest], event: int) -> None:
    """An ioeventfd wherever the guest puts the BAR, none where it was, and none when it is switched off."""
    bars = [0xE000_0000, 0xE100_0000, 0xE000_0000]
    guest = boot(
        f"""
        .macro  config register, value
        mov     $0x80002800 + \\register, %eax         # bus 0, slot 5, function 0
        mov     $0xcf8, %edx
        outl    %eax, %dx
        mov     $0xcfc, %edx
        mov     $\\value, %eax
        outl    %eax, %dx
        .endm
        .macro  ring
        mov     ${bars[0]:#x}, %edi
        movl    $1, (%rdi)
        mov     ${bars[1]:#x}, %edi
        movl    $1, (%rdi)
        mov     ${PC_PORT:#x}, %edx
        outb    %al, %dx
        .endm
        config  0x10, {bars[0]:#x}
        config  0x04, 2                 # memory space on
        ring
        config  0x10, {bars[1]:#x}
        ring
        config  0x10, {bars[2]:#x}
        ring
        config  0x04, 0
        ring
        finish
        """,
        machine="pc",
    )
    machine = guest.machine
    bell = Bell(machine.mmio, event)
    machine.devices["pci"].add(bell, 5, 0)
    go_live(guest)
    seen: list[tuple[int, int]] = []

    class Looker(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            seen.append((count(event), guest.exits("MMIO")))

    machine.pio.map(PC_PORT, 1, Looker())
    assert guest.run() == PASSED
    # Each time one of two doorbells is there: one signal, and one exit for the other address; at the end two exits.
    assert seen == [(1, 1), (1, 2), (1, 3), (0, 5)]


def test_a_reset_takes_the_doorbell_with_the_bar(boot: Callable[..., Guest], event: int) -> None:
    guest = boot("mov $DEVICE_MMIO, %edi\n movl $1, (%rdi)\n finish", machine="pc")
    machine = guest.machine
    bell = Bell(machine.mmio, event)
    machine.devices["pci"].add(bell, 5, 0)
    go_live(guest)
    with machine.devices["pci"].lock:
        bell.config_write(0x10, 4, MMIO)
        bell.config_write(0x04, 2, 2)
    assert guest.run() == PASSED
    assert (count(event), guest.exits("MMIO")) == (1, 0)
    machine.reset()
    assert guest.run() == PASSED
    assert (count(event), guest.exits("MMIO")) == (0, 1)


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
        set_gate 0x40, on_irq
        load_idt
        program_pic 0xff                        # the line goes there too
        enable_apic
        route_level 10, 0x40
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
