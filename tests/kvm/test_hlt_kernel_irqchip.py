"""HLT with the interrupt controllers in KVM: the timer wakes the guest, and user space hears nothing of it."""

from __future__ import annotations

from collections.abc import Callable

from guests import PASSED, Guest

from pyvmm import RunState


def test_the_pit_through_the_pic(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x20, on_tick
        load_idt
        program_pic 0xfe
        start_timer 1000
        sti
    1:  hlt
        cmpl    $20, ticks
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
    )
    assert guest.run() == PASSED
    assert guest.value("ticks") >= 20
    assert guest.exits("HLT") == 0
    # The three accesses that make KVM's PIT, and finish: the PIC, the PIT and HLT are KVM's own.
    assert guest.exits("IO") == 3 + 1


def test_the_local_apic_s_timer(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        .include "interrupts64.inc"
        .set APIC_LVT_TIMER, 0x320
        .set APIC_INITIAL_COUNT, 0x380
        .set APIC_DIVIDE, 0x3e0
        set_gate 0x40, on_timer
        load_idt
        mov     $APIC, %edi
        movl    $0x1ff, APIC_SPURIOUS(%rdi)
        movl    $0xb, APIC_DIVIDE(%rdi)             # by 1
        movl    $0x20040, APIC_LVT_TIMER(%rdi)      # periodic, vector 0x40
        movl    $1000000, APIC_INITIAL_COUNT(%rdi)
        sti
    1:  hlt
        cmpl    $10, ticks
        jb      1b
        cli
        finish
    on_timer:
        push    %rdi
        incl    ticks
        mov     $APIC, %edi
        movl    $0, APIC_EOI(%rdi)
        pop     %rdi
        iretq
    ticks: .long 0
        """
    )
    assert guest.run() == PASSED
    assert guest.value("ticks") >= 10
    assert guest.exits("MMIO") == 0


def test_a_line_of_a_python_device(boot: Callable[..., Guest]) -> None:
    """An edge on IRQ 5 wakes a guest that sleeps without a timer; the line is raised from outside the vCPU's thread."""
    from guests import PORT, Recorder

    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x25, on_irq
        load_idt
        program_pic 0xdf
        mov     $DEVICE_PORT, %edx
    1:  outb    %al, %dx                # ready for the next one
        sti
    2:  hlt
        cli
        cmpl    $0, fresh
        jne     3f
        sti
        jmp     2b
    3:  movl    $0, fresh
        incl    irqs
        cmpl    $50, irqs
        jb      1b
        finish
    on_irq:
        push    %rax
        incl    fresh
        end_of_interrupt
        pop     %rax
        iretq
    fresh: .long 0
    irqs: .long 0
        """
    )
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    line = guest.machine.irq_line(5)
    guest.start()
    for n in range(50):
        device.wait_for(n + 1)
        # The edge may come before or after the HLT: it must wake the guest either way.
        line.pulse()
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert guest.value("irqs") == 50


def test_a_guest_that_halted_for_good_can_be_looked_at_and_closed(boot: Callable[..., Guest]) -> None:
    """Its vCPU never comes out of KVM_RUN by itself, and some ioctls on it would wait for that."""
    from guests import PORT, Recorder

    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        outb    %al, %dx
        cli
    1:  hlt
        jmp     1b
        """
    )
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    assert guest.exits("IO") in (0, 1)  # the books on that exit may still be open
    guest.close()
    assert guest.machine.state is RunState.CLOSED
