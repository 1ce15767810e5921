"""run() that ends from outside: a time limit, Ctrl-C, a signal handler's exception."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
from guests import PASSED, PORT, Guest, Recorder

from pyvmm import RunState

SPIN = "mov $DEVICE_PORT, %edx\n 1: inb %dx, %al\n cmp $1, %al\n jne 1b\n finish"


def test_time_limit(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            guest.machine.run(timeout_s=0.05)
        assert guest.machine.state is RunState.PAUSED
        assert guest.machine.cpus[0].parked
    device.answer = lambda offset, size: 1
    assert guest.run() == PASSED


def test_time_limit_of_a_guest_that_makes_no_exits(boot: Callable[..., Guest]) -> None:
    for source in ("1: jmp 1b", "cli\n 1: hlt\n jmp 1b"):
        guest = boot(source)
        with pytest.raises(TimeoutError):
            guest.machine.run(timeout_s=0.05)
        assert guest.machine.state is RunState.PAUSED


def test_ctrl_c(boot: Callable[..., Guest]) -> None:
    """SIGINT reaches the thread that waits in run(); the machine is paused and can go on."""
    guest = boot(SPIN)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)

    def interrupt() -> None:
        device.wait_for(10)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        guest.run()
    thread.join()
    assert guest.machine.state is RunState.PAUSED
    calls = len(device.log)
    guest.machine.cpus[0].regs  # noqa: B018  parked: readable
    assert len(device.log) == calls
    device.answer = lambda offset, size: 1
    assert guest.run() == PASSED


def test_an_exception_of_a_signal_handler(boot: Callable[..., Guest]) -> None:
    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Recorder())
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            guest.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert guest.machine.state is RunState.PAUSED


def test_an_exception_at_any_moment_of_the_start(boot: Callable[..., Guest]) -> None:
    """The signal comes while run() is starting the vCPUs, or just has: nothing hangs, and the machine can be paused."""

    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    guest = boot(SPIN)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for n in range(100):
            with pytest.raises(Alarm):
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 5e-6 * n)
                guest.run()
            guest.machine.pause()
            assert guest.machine.state in (RunState.PAUSED, RunState.PRELAUNCH)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    device.answer = lambda offset, size: 1
    assert guest.run() == PASSED


def test_no_signal_handler_is_left_behind(boot: Callable[..., Guest]) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    boot("finish").run()
    changed = [n for n in signal.valid_signals() if signal.getsignal(n) != before[n]]
    # One real-time signal, which nobody else had, is the kick; Python sees its C handler as None.
    assert all(signal.SIGRTMIN <= number <= signal.SIGRTMAX for number in changed)
    assert len(changed) <= 1
