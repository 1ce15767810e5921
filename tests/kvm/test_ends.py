"""How a guest ends a run by itself: ACPI power-off and isa-debug-exit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import Guest

from pyvmm import RunState
from pyvmm.errors import StateError

MODES = ("real16", "protected32", "long64")


@pytest.mark.parametrize("mode", MODES)
def test_acpi_power_off(boot: Callable[..., Guest], mode: str) -> None:
    guest = boot("power_off", mode)
    status = guest.run()
    assert (status, status.reason) == (0, "shutdown")
    assert guest.machine.state is RunState.SHUTDOWN
    with pytest.raises(StateError, match="reset"):
        guest.machine.resume()


@pytest.mark.parametrize(("code", "status"), [(0, 1), (1, 3), (0x2A, 0x55), (0x7F, 0xFF)])
def test_debug_exit(boot: Callable[..., Guest], code: int, status: int) -> None:
    guest = boot(f"finish {code}")
    ended = guest.run()
    assert (ended, ended.reason) == (status, "debug-exit")


def test_debug_exit_in_wider_writes(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $0x12345, %eax\n outl %eax, $0xf4\n 1: jmp 1b")
    assert guest.run() == 0x12345 << 1 | 1


def test_debug_exit_elsewhere_or_nowhere(boot: Callable[..., Guest]) -> None:
    source = """
        mov     $0x501, %edx
        mov     $5, %al
        outb    %al, $0xf4              # nobody's
        outb    %al, %dx
    1:  jmp     1b
    """
    assert boot(source, debug_exit=0x501).run() == 11
    guest = boot("finish 1 \n", debug_exit=None)
    with pytest.raises(TimeoutError):
        guest.machine.run(timeout_s=0.2)


def test_the_end_comes_once(boot: Callable[..., Guest]) -> None:
    """Two vCPUs end the machine at once with different words: one of them counts, and run() returns."""
    guest = boot(
        """
        .include "interrupts64.inc"
        .include "smp64.inc"
        start_others
        lock incl here
    1:  cmpl    $2, here
        jne     1b
        finish  1
    other_main:
        lock incl here
    2:  cmpl    $2, here
        jne     2b
        finish  2
    here: .long 0
        """,
        cpus=2,
    )
    for _ in range(10):
        assert guest.run() in (3, 5)
        guest.machine.reset()


def test_the_power_button(boot: Callable[..., Guest]) -> None:
    """powerdown() sets PWRBTN_STS and, where it is enabled, raises the SCI: a guest that listens shuts down."""
    guest = boot(
        """
        .include "interrupts64.inc"
        set_gate 0x29, on_sci
        load_idt
        program_pic 0xfb, 0xfd          # the cascade, and IRQ 9 on the second PIC
        mov     $0x602, %edx            # PM1 enable: the power button
        mov     $0x100, %ax
        outw    %ax, %dx
        sti
    1:  hlt
        jmp     1b
    on_sci:
        mov     $0x600, %edx            # PM1 status
        inw     %dx, %ax
        and     $0x100, %ax
        jz      2f
        power_off
    2:  finish  9
        """
    )
    guest.start()
    guest.machine.powerdown()
    guest.wait()
    assert guest.machine.control.status == 0


def test_a_guest_that_has_ended_needs_no_thread(boot: Callable[..., Guest]) -> None:
    """It is gone before the machine is, and a reset brings another one."""
    guest = boot("finish 1")
    machine = guest.machine
    for turn in (1, 2):
        assert guest.run() == 3
        cpu = machine.cpus[0]
        cpu.join()
        assert cpu.thread_id == 0, turn
        machine.reset()
    machine.pause()
    assert machine.state is RunState.PAUSED
    assert machine.run() == 3
