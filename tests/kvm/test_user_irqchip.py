"""irqchip="off": PIC and PIT in Python, interrupts by KVM_INTERRUPT, interrupt-window exits, HLT exits that sleep."""

from __future__ import annotations

import resource
from collections.abc import Callable

from guests import PASSED, PORT, Guest, Recorder

TICKS = """
    .include "interrupts64.inc"
    set_gate 0x20, on_tick
    load_idt
    program_pic 0xfe
    start_timer {hz}
    sti
1:  {wait}
    cmpl    ${ticks}, ticks
    jb      1b
    cli
    finish
on_tick:
    push    %rax
    incl    ticks
    end_of_interrupt
    pop     %rax
    iretq
ticks: .long 0
"""


def test_ticks_wake_a_sleeping_guest(boot: Callable[..., Guest]) -> None:
    guest = boot(TICKS.format(hz=500, wait="hlt", ticks=50), irqchip="off")
    assert guest.run() == PASSED
    assert guest.value("ticks") >= 50
    # One HLT can be skipped when a tick comes just before it, not many.
    assert guest.exits("HLT") >= 25


def test_ticks_interrupt_a_busy_guest(boot: Callable[..., Guest]) -> None:
    guest = boot(TICKS.format(hz=500, wait="pause", ticks=50), irqchip="off")
    assert guest.run() == PASSED
    assert guest.exits("HLT") == 0


def test_the_interrupt_window(boot: Callable[..., Guest]) -> None:
    """An interrupt that comes while the guest has them off waits for its STI: KVM says when, by IRQ_WINDOW_OPEN."""
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x25, on_irq
        load_idt
        program_pic 0xdf
        mov     $DEVICE_PORT, %edx
    1:  outb    %al, %dx                # raises IRQ 5, while interrupts are off
        mov     irqs, %ecx
        cmp     %ecx, rounds
        jne     bad                     # it must not have come yet
        incl    rounds
        sti
    2:  pause
        mov     irqs, %ecx
        cmp     %ecx, rounds
        jne     2b
        cli
        cmp     $20, %ecx
        jb      1b
        finish
    bad:
        finish  9
    on_irq:
        push    %rax
        incl    irqs
        end_of_interrupt
        pop     %rax
        iretq
    rounds: .long 0
    irqs: .long 0
        """,
        irqchip="off",
    )
    line = guest.machine.irq_line(5)

    class Raiser(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            line.pulse()

    guest.machine.pio.map(PORT, 1, Raiser())
    assert guest.run() == PASSED
    assert guest.value("irqs") == 20
    assert guest.exits("IRQ_WINDOW_OPEN") >= 20


def test_real_mode_interrupts(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        xor     %ax, %ax
        mov     %ax, %ds
        movw    $on_tick, 8 * 4         # IRQ 0 where the PC's BIOS leaves it
        movw    $0, 8 * 4 + 2
        mov     $0x11, %al
        outb    %al, $0x20
        mov     $8, %al
        outb    %al, $0x21
        mov     $4, %al
        outb    %al, $0x21
        mov     $1, %al
        outb    %al, $0x21
        mov     $0xfe, %al
        outb    %al, $0x21
        mov     $0x34, %al
        outb    %al, $0x43
        mov     $1193182 / 500, %ax
        outb    %al, $0x40
        mov     %ah, %al
        outb    %al, $0x40
        sti
    1:  hlt
        cmpw    $20, ticks
        jb      1b
        cli
        finish
    on_tick:
        push    %ax
        incw    ticks
        mov     $0x20, %al
        outb    %al, $0x20
        pop     %ax
        iret
    ticks: .word 0
        """,
        "real16",
        irqchip="off",
    )
    assert guest.run() == PASSED
    assert guest.value("ticks", 2) >= 20


def test_sleep_costs_no_processor_time(boot: Callable[..., Guest]) -> None:
    """Interrupts off and HLT: the thread sleeps, until it is stopped."""
    guest = boot("mov $DEVICE_PORT, %edx\n cli\n outb %al, %dx\n 1: hlt\n jmp 1b", irqchip="off")
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    while not guest.exits("HLT"):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert not guest.machine.wait(0.5)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 0.1
    guest.machine.pause()
    assert guest.exits("HLT") == 1
    # It sleeps on after a pause: a vCPU that was halted is still halted.
    guest.machine.resume()
    assert not guest.machine.wait(0.05)
    guest.machine.pause()
    assert guest.regs()["rip"] >= guest.program.address


def test_pauses_while_ticks_come(boot: Callable[..., Guest]) -> None:
    """Guest time stands still with the guest: after a pause the ticks go on."""
    guest = boot(TICKS.format(hz=500, wait="hlt", ticks=100), irqchip="off")
    guest.start()
    for _ in range(50):
        guest.machine.pause()
        ticks, now_ns = guest.value("ticks"), guest.machine.clock.now_ns()
        assert (guest.value("ticks"), guest.machine.clock.now_ns()) == (ticks, now_ns)
        guest.machine.resume()
    guest.wait()
    assert guest.machine.control.status == PASSED


def test_the_serial_port_s_interrupt(boot: Callable[..., Guest]) -> None:
    """COM1's line, IRQ 4, through the Python PIC: the guest echoes what it receives and ends at a q."""
    from pyvmm.chardev import CallableChardev

    heard = bytearray()
    line = CallableChardev(heard.extend)
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x24, on_serial
        load_idt
        program_pic 0xef
        mov     $0x3fc, %edx            # MCR: OUT2 lets the interrupt out
        mov     $0x08, %al
        outb    %al, %dx
        mov     $0x3f9, %edx            # IER: received data
        mov     $0x01, %al
        outb    %al, %dx
        sti
    1:  hlt
        cmpb    $'q', last
        jne     1b
        finish
    on_serial:
        push    %rax
        push    %rdx
    2:  mov     $0x3fd, %edx
        inb     %dx, %al
        test    $1, %al
        jz      3f
        mov     $0x3f8, %edx
        inb     %dx, %al
        mov     %al, last
        outb    %al, %dx
        jmp     2b
    3:  end_of_interrupt
        pop     %rdx
        pop     %rax
        iretq
    last: .byte 0
        """,
        irqchip="off",
        serial=line,
    )
    guest.start()
    line.feed(b"typed input, and q")
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert heard == b"typed input, and q"
