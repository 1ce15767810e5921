"""Storms of kicks from several threads: the guest computes on, nothing is lost, nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder

# Adds the device's answers, 1, 2, 3, ..., until it gives zero.
SUM = """
    mov     $DEVICE_PORT, %edx
    xor     %ebx, %ebx
1:  inl     %dx, %eax
    add     %rax, %rbx
    test    %eax, %eax
    jnz     1b
    finish
"""


KICKS = 2000


def storm(guest: Guest, threads: int) -> None:
    """KICKS of every vCPU from each of so many threads, as fast as may be; returns when they are over."""

    def kick() -> None:
        for _ in range(KICKS):
            for cpu in guest.machine.cpus:
                cpu.exec.kick()

    kickers = [threading.Thread(target=kick) for _ in range(threads)]
    for kicker in kickers:
        kicker.start()
    for kicker in kickers:
        kicker.join(TIMEOUT_S)
        assert not kicker.is_alive()


def test_a_loop_of_in_under_a_storm(boot: Callable[..., Guest]) -> None:
    guest = boot(SUM)
    over = False
    given = 0

    def answer(offset: int, size: int) -> int:
        nonlocal given
        given += 0 if over else 1
        return 0 if over else given

    device = Recorder(answer)
    guest.machine.pio.map(PORT, 4, device)
    guest.start()
    for _ in range(5):
        device.wait_for(len(device.log) + 100)
        storm(guest, 3)
    over = True
    guest.wait()
    assert guest.machine.control.status == PASSED
    assert guest.regs()["rbx"] == given * (given + 1) // 2


def test_a_sleeping_vcpu_under_a_storm(boot: Callable[..., Guest]) -> None:
    """HLT goes on after a kick; the timer still wakes the guest."""
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x20, on_tick
        load_idt
        program_pic 0xfe
        start_timer 500
        sti
    1:  hlt
        cmpb    $0, stop
        je      1b
        cmpl    $10, ticks
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
    stop: .byte 0
        """
    )
    guest.start()
    for _ in range(5):
        storm(guest, 2)
    guest.machine.memory.write(guest.program.symbols["stop"], b"\1")
    guest.wait()
    assert guest.machine.control.status == PASSED


def test_kicks_of_a_parked_vcpu_do_not_end_its_next_stay(boot: Callable[..., Guest]) -> None:
    guest = boot(SUM)
    numbers = iter([*range(1, 101), 0])
    guest.machine.pio.map(PORT, 4, Recorder(lambda offset, size: next(numbers)))
    for _ in range(1000):
        guest.machine.cpus[0].exec.kick()
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == 5050
