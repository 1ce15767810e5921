"""irqchip="off": the local APIC and the I/O APIC in Python, with the guest's own CR8 and IA32_APIC_BASE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

SETUP = """
    .include "interrupts64.inc"
    .set APIC_TPR,      0x80
    .set APIC_LINT0,    0x350
    .set APIC_TIMER,    0x320
    .set APIC_INITIAL,  0x380
    .set APIC_DIVIDE,   0x3e0
    .set IOAPIC,        0xfec00000
# apic REGISTER, VALUE: clobbers EDI.
.macro apic register, value
    mov     $APIC, %edi
    movl    $\\value, \\register(%rdi)
.endm
# route PIN, ENTRY: a redirection entry for processor 0. Clobbers EDI.
.macro route pin, entry
    mov     $IOAPIC, %edi
    movl    $0x11 + 2 * \\pin, (%rdi)
    movl    $0, 0x10(%rdi)
    movl    $0x10 + 2 * \\pin, (%rdi)
    movl    $\\entry, 0x10(%rdi)
.endm
"""


def test_the_processor_has_a_plain_apic(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $1, %eax\n cpuid\n mov %edx, %ebx\n mov %ecx, %ebp\n finish", irqchip="off")
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] & 1 << 9
    assert not guest.regs()["rbp"] & (1 << 21 | 1 << 24)  # x2APIC, TSC deadline


@pytest.mark.parametrize("wait", ["hlt", "pause"])
def test_the_timer(boot: Callable[..., Guest], wait: str) -> None:
    guest = boot(
        f"""{SETUP}
        set_gate 0x40, on_tick
        load_idt
        program_pic 0xff
        apic    APIC_SPURIOUS, 0x1ff
        apic    APIC_DIVIDE, 0xb
        apic    APIC_TIMER, 0x20040             # periodic
        apic    APIC_INITIAL, 2000000           # 2 ms
        sti
    1:  {wait}
        cmpl    $50, ticks
        jb      1b
        cli
        finish
    on_tick:
        push    %rdi
        incl    ticks
        apic    APIC_EOI, 0
        pop     %rdi
        iretq
    ticks: .long 0
        """,
        irqchip="off",
    )
    assert guest.run() == PASSED
    assert guest.value("ticks") >= 50
    assert (guest.exits("HLT") > 0) == (wait == "hlt")


def test_a_level_through_the_ioapic(boot: Callable[..., Guest]) -> None:
    """The handler lowers the line at the device, then ends the interrupt: one interrupt for each rise."""
    guest = boot(
        f"""{SETUP}
        set_gate 0x45, on_irq
        load_idt
        program_pic 0xff
        apic    APIC_SPURIOUS, 0x1ff
        apic    APIC_LINT0, 0x10000             # the PIC is shut out
        route   11, 0x8045
        sti
        mov     $DEVICE_PORT, %edx
    1:  mov     irqs, %ebx
        mov     $1, %al
        outb    %al, %dx                        # raises the line
    2:  pause
        cmp     irqs, %ebx
        je      2b
        cmpl    $20, irqs
        jb      1b
        cli
        finish
    on_irq:
        push    %rax
        push    %rdi
        incl    irqs
        mov     $0, %al
        outb    %al, %dx                        # lowers it
        apic    APIC_EOI, 0
        pop     %rdi
        pop     %rax
        iretq
    irqs: .long 0
        """,
        irqchip="off",
    )
    line = guest.machine.irq_line(11)

    class Requester(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            line.set(value)

    guest.machine.pio.map(PORT, 1, Requester())
    assert guest.run() == PASSED
    assert guest.value("irqs") == 20


def test_the_pit_through_the_ioapic(boot: Callable[..., Guest]) -> None:
    """Its wire goes to pin 2."""
    guest = boot(
        f"""{SETUP}
        set_gate 0x42, on_tick
        load_idt
        program_pic 0xff
        apic    APIC_SPURIOUS, 0x1ff
        apic    APIC_LINT0, 0x10000
        route   2, 0x42
        start_timer 500
        sti
    1:  hlt
        cmpl    $20, ticks
        jb      1b
        cli
        finish
    on_tick:
        push    %rdi
        incl    ticks
        apic    APIC_EOI, 0
        pop     %rdi
        iretq
    ticks: .long 0
        """,
        irqchip="off",
    )
    assert guest.run() == PASSED
    assert guest.value("ticks") >= 20


PRIORITY = """
    set_gate 0x51, on_irq
    load_idt
    program_pic 0xff
    apic    APIC_SPURIOUS, 0x1ff
    sti
    {raise_it}
    apic    APIC_ICR_LOW, 0x40051           # to itself
    mov     $1000, %ecx
1:  pause
    loop    1b
    mov     irqs, %ebx                      # none yet
    {lower_it}
2:  pause
    cmpl    $1, irqs
    jne     2b
    cli
    finish
on_irq:
    push    %rdi
    incl    irqs
    apic    APIC_EOI, 0
    pop     %rdi
    iretq
irqs: .long 0
"""
BY_REGISTER = "apic APIC_TPR, 0x{value}0"
BY_CR8 = "mov ${value}, %eax\n mov %rax, %cr8"


@pytest.mark.parametrize("raise_it", [BY_REGISTER, BY_CR8])
# Lowering CR8 makes an exit on hardware; where KVM emulates the instruction it tells nobody.
@pytest.mark.parametrize("lower_it", [BY_REGISTER, pytest.param(BY_CR8, marks=pytest.mark.lab)])
def test_a_priority_holds_interrupts_back(boot: Callable[..., Guest], raise_it: str, lower_it: str) -> None:
    """However it is raised and however it is lowered: the two registers are one."""
    source = PRIORITY.format(raise_it=raise_it.format(value=5), lower_it=lower_it.format(value=4))
    guest = boot(SETUP + source, irqchip="off")
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 0
    assert guest.value("irqs") == 1


def test_the_priority_reads_back_in_both(boot: Callable[..., Guest]) -> None:
    guest = boot(
        f"""{SETUP}
        apic    APIC_TPR, 0x5a
        mov     %cr8, %rbx
        mov     $7, %eax
        mov     %rax, %cr8
        mov     APIC_TPR(%rdi), %ebp
        finish
        """,
        irqchip="off",
    )
    assert guest.run() == PASSED
    assert (guest.regs()["rbx"], guest.regs()["rbp"]) == (5, 0x70)


def test_switched_off_by_its_base_msr(boot: Callable[..., Guest]) -> None:
    """CPUID says that it is gone, its page is empty, and the PIC interrupts the processor directly."""
    guest = boot(
        f"""{SETUP}
        set_gate 0x20, on_tick
        load_idt
        apic    APIC_LINT0, 0x10000
        mov     $0x1b, %ecx                     # IA32_APIC_BASE
        rdmsr
        and     $~0x800, %eax
        wrmsr
        mov     $APIC, %edi
        mov     APIC_ID(%rdi), %ebp
        program_pic 0xfe
        start_timer 500
        sti
    1:  hlt
        cmpl    $5, ticks
        jb      1b
        cli
        mov     $1, %eax
        cpuid
        mov     %edx, %ebx
        finish
    on_tick:
        push    %rax
        incl    ticks
        end_of_interrupt
        pop     %rax
        iretq
    ticks: .long 0
        """,
        irqchip="off",
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbp"] == 0xFFFF_FFFF
    assert not guest.regs()["rbx"] & 1 << 9


def test_a_reset_leaves_no_priority_behind(boot: Callable[..., Guest]) -> None:
    """The second time round CR8 is 0 and the local APIC at power-on."""
    guest = boot(
        f"""{SETUP}
        mov     $DEVICE_PORT, %edx
        mov     %cr8, %rax
        outl    %eax, %dx
        mov     $APIC, %edi
        mov     APIC_SPURIOUS(%rdi), %eax
        outl    %eax, %dx
        apic    APIC_SPURIOUS, 0x1ff
        mov     $9, %eax
        mov     %rax, %cr8
        mov     $6, %al
        mov     $0xcf9, %edx
        outb    %al, %dx
    1:  jmp     1b
        """,
        irqchip="off",
    )
    device = Recorder()
    guest.machine.pio.map(PORT, 4, device)
    guest.start()
    device.wait_for(4)
    guest.machine.pause()
    assert device.writes[:4] == [0, 0xFF, 0, 0xFF]


def test_two_interrupts_that_wait_both_come(boot: Callable[..., Guest]) -> None:
    """One of the PIC and one of the local APIC: KVM takes one at an entry, the other must not take its place."""
    guest = boot(
        f"""{SETUP}
        set_gate 0x25, on_pic
        set_gate 0x51, on_apic
        load_idt
        program_pic 0xdf
        apic    APIC_SPURIOUS, 0x1ff
        apic    APIC_LINT0, 0x700               # ExtINT
        mov     $DEVICE_PORT, %edx
    1:  outb    %al, %dx                        # raises IRQ 5, while interrupts are off
        apic    APIC_ICR_LOW, 0x40051           # to itself
        incl    rounds
        sti
        mov     rounds, %ecx
    2:  pause
        cmp     %ecx, pics
        jne     2b
        cmp     %ecx, apics
        jne     2b
        cli
        cmp     $20, %ecx
        jb      1b
        finish
    on_pic:
        push    %rax
        incl    pics
        end_of_interrupt
        pop     %rax
        iretq
    on_apic:
        push    %rdi
        incl    apics
        apic    APIC_EOI, 0
        pop     %rdi
        iretq
    rounds: .long 0
    pics:   .long 0
    apics:  .long 0
        """,
        irqchip="off",
    )
    line = guest.machine.irq_line(5)

    class Raiser(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            line.pulse()

    guest.machine.pio.map(PORT, 1, Raiser())
    assert guest.run() == PASSED
    assert (guest.value("pics"), guest.value("apics")) == (20, 20)
