"""What a handler or a callback may not ask of its own machine: it would wait for itself. It is a StateError there, and
the machine is as whole as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, PORT, Guest, Recorder

import pyvmm
from pyvmm import RunState, StateError

ASK_THEN_PASS = "mov $DEVICE_PORT, %edx\n mov $7, %eax\n outb %al, %dx\n finish"
SPIN = "1: jmp 1b"
VERBS = {
    "close": lambda machine: machine.close(),
    "run": lambda machine: machine.run(),
    "run for a time": lambda machine: machine.run(5),
    "wait": lambda machine: machine.wait(),
    "leave": lambda machine: machine.__exit__(None, None, None),
}


def refused(verb: str, machine: pyvmm.Machine) -> str:
    with pytest.raises(StateError) as caught:
        VERBS[verb](machine)
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_handler(boot: Callable[..., Guest], verb: str) -> None:
    guest = boot(ASK_THEN_PASS)
    said: list[str] = []

    class Careless(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            said.append(refused(verb, guest.machine))

    guest.machine.pio.map(PORT, 1, Careless())
    assert guest.run() == PASSED
    assert len(said) == 1
    assert "call stop() or pause() there" in said[0]
    guest.machine.reset()
    assert guest.run() == PASSED  # it is all still there


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_console_s_callable(boot: Callable[..., Guest], verb: str) -> None:
    said: list[str] = []
    guest = boot(
        "mov $0x3f8, %edx\n mov $'x, %al\n outb %al, %dx\n finish",
        serial=lambda data: said.append(refused(verb, guest.machine)),
    )
    assert guest.run() == PASSED
    assert len(said) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_timer_s_callback(boot: Callable[..., Guest], verb: str) -> None:
    guest = boot(SPIN)
    said: list[str] = []

    def tick() -> None:
        said.append(refused(verb, guest.machine))
        guest.machine.stop(33)

    guest.machine.clock.timer(tick).arm(0)
    assert guest.run() == 33
    assert len(said) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_descriptor_s_callback(boot: Callable[..., Guest], verb: str) -> None:
    guest = boot(SPIN)
    said: list[str] = []

    def ready() -> None:
        said.append(refused(verb, guest.machine))
        guest.machine.stop(33)

    guest.start()
    guest.machine.event_loop.call_soon(ready)
    guest.wait()
    assert guest.machine.status == 33
    assert len(said) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_device_s_reset(boot: Callable[..., Guest], verb: str) -> None:
    """It is part of a request, which has every vCPU parked and the caller of reset() waiting."""
    guest = boot("finish")
    said: list[str] = []

    class Careless(Recorder):
        def reset(self) -> None:
            said.append(refused(verb, guest.machine))

    guest.machine.pio.map(PORT, 1, Careless())
    guest.machine.reset()
    assert len(said) == 1
    assert guest.run() == PASSED


def test_what_is_not_caught_there_ends_the_run(boot: Callable[..., Guest]) -> None:
    guest = boot(ASK_THEN_PASS)

    class Careless(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            guest.machine.close()

    guest.machine.pio.map(PORT, 1, Careless())
    with pytest.raises(pyvmm.DeviceError) as caught:
        guest.run()
    assert isinstance(caught.value.__cause__, StateError)
    assert guest.machine.state is RunState.INTERNAL_ERROR


def test_another_machine_s_methods_are_free(boot: Callable[..., Guest]) -> None:
    """A handler may run a machine of its own from start to end."""
    guest, other = boot(ASK_THEN_PASS), boot("finish 4")
    ended: list[int] = []

    class Nested(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            ended.append(other.run())
            other.machine.close()

    guest.machine.pio.map(PORT, 1, Nested())
    assert guest.run() == PASSED
    assert ended == [9]


def test_a_second_closer_waits_for_the_first(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN)
    guest.start()
    inside, go_on = threading.Event(), threading.Event()
    torn: list[int] = []

    def slowly() -> None:
        inside.set()
        assert go_on.wait(60)
        torn.append(1)

    guest.machine.board.chassis.closers.call(slowly)
    first, second = (threading.Thread(target=guest.machine.close) for _ in range(2))
    first.start()
    assert inside.wait(60)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert torn == [1]


def test_closed_by_another_thread_while_it_runs(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n 1: jmp 1b")
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    said: list[object] = []

    def run() -> None:
        try:
            said.append(guest.run())
        except StateError as error:
            said.append(str(error))

    runner = threading.Thread(target=run)
    runner.start()
    device.wait_for(1)
    guest.machine.close()
    runner.join(60)
    assert said == ["the machine was closed while it ran"]


def test_a_close_that_is_interrupted_takes_nothing_from_a_running_guest(
    boot: Callable[..., Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while close() waits for a vCPU: nothing is freed under it, and the next close() ends it all."""
    from pyvmm.cpu import Cpu

    guest = boot(SPIN)
    guest.start()

    def interrupted(self: Cpu) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cpu, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            guest.machine.close()
    assert guest.machine.cpus[0].regs["rip"] == guest.program.address  # the vCPU is there, parked, with its registers
    guest.machine.close()
    assert guest.machine.state is RunState.CLOSED


def test_a_console_that_raises_at_the_end_keeps_nothing_open(boot: Callable[..., Guest]) -> None:
    """What it has still to say, it is told as the machine closes."""

    def console(data: bytes) -> None:
        raise ValueError("nobody listens")

    fds = len(list(Path("/proc/self/fd").iterdir()))
    guest = boot("mov $0x402, %edx\n mov $'x, %al\n outb %al, %dx\n finish", debugcon=console)
    assert guest.run() == PASSED
    with pytest.raises(ValueError, match="nobody listens"):
        guest.machine.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    guest.machine.close()
