"""machine.events with a guest: what is told of a stop, a resume, a reset, an end, and to whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from guests import PORT, SPIN_ON_BOTH, TIMEOUT_S, Guest, Recorder

import pyvmm
from pyvmm import RunState

SPIN = "mov $DEVICE_PORT, %edx\n 1: outb %al, %dx\n jmp 1b"
TRIPLE_FAULT = "lidt nothing(%rip)\n ud2\n nothing: .quad 0\n .word 0"


class Ear:
    """Notes all events of a machine; ``wait_for`` waits until that many have come."""

    def __init__(self, machine: pyvmm.Machine, *names: str) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        machine.events.listen(self, *names)

    def __call__(self, event: pyvmm.Event) -> None:
        with self._changed:
            self.heard.append((event.name, event.data))
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.heard) >= count, TIMEOUT_S), self.heard

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


def test_a_run_and_its_end(boot: Callable[..., Guest]) -> None:
    guest = boot("finish 5")
    first, second = Ear(guest.machine), Ear(guest.machine, "stop")
    assert guest.run() == 11
    guest.machine.events.flush()
    assert first.names == ["resume", "shutdown", "stop"]
    assert second.names == ["stop"]
    assert first.heard[0][1] == {"state": RunState.PRELAUNCH}
    data = first.heard[2][1]
    assert (data["state"], data["status"], data["error"], data["cpu"]) == (RunState.SHUTDOWN, 11, None, None)


def test_close_waits_until_all_have_been_told(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    ear = Ear(guest.machine)
    guest.run()
    guest.close()
    assert ear.names == ["resume", "shutdown", "stop"]


def test_from_a_handler_with_its_lock_held(boot: Callable[..., Guest]) -> None:
    """The listener takes the lock of the device whose handler paused the machine, and resumes it."""
    guest = boot("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish 3")
    machine = guest.machine

    class Pauses(pyvmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            machine.pause()

    device = Pauses()
    machine.pio.map(PORT, 1, device)

    def go_on(event: pyvmm.Event) -> None:
        if event.data["state"] is RunState.PAUSED:
            with device.lock:
                machine.resume()

    machine.events.listen(go_on, "stop")
    ear = Ear(machine)
    machine.resume()
    ear.wait_for(5)
    assert ear.names == ["resume", "stop", "resume", "shutdown", "stop"]
    assert ear.heard[2][1] == {"state": RunState.PAUSED}
    assert machine.wait(TIMEOUT_S)
    assert machine.status == 7


def test_a_breakpoint_says_which_vcpu(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN_ON_BOTH, cpus=2)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    guest.machine.pause()
    guest.machine.events.flush()
    ear = Ear(guest.machine, "stop")
    status = guest.machine.cpus[1].step()
    guest.machine.events.flush()
    assert (status.reason, status.cpu) == ("debug", 1)
    [(_, data)] = ear.heard
    assert (data["state"], data["cpu"], data["detail"]["exit"]) == (RunState.DEBUG, 1, "DEBUG")


def test_resets_by_the_guest_and_by_hand(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $6, %al\n mov $0xcf9, %edx\n outb %al, %dx\n 1: jmp 1b")
    ear = Ear(guest.machine, "reset")
    guest.start()
    ear.wait_for(1)
    guest.machine.pause()
    guest.machine.events.flush()
    assert all(data["guest"] and "0xcf9" in data["by"] for _, data in ear.heard)
    count = len(ear.heard)
    guest.machine.reset()
    guest.machine.events.flush()
    assert ear.heard[count:] == [("reset", {"guest": False, "by": ""})]


def test_a_triple_fault_that_ends_it(boot: Callable[..., Guest]) -> None:
    guest = boot(TRIPLE_FAULT, no_reboot=True)
    ear = Ear(guest.machine, "stop")
    assert guest.run() == 6
    guest.machine.events.flush()
    assert ear.heard[0][1]["cpu"] == 0
    assert ear.heard[0][1]["status"].reason == "triple fault"


def test_a_device_that_raises(boot: Callable[..., Guest]) -> None:
    class Broken(pyvmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            raise LookupError("wrong")

    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Broken())
    ear = Ear(guest.machine, "stop", "shutdown")
    with pytest.raises(pyvmm.DeviceError):
        guest.run()
    guest.machine.events.flush()
    [(name, data)] = ear.heard
    assert (name, data["state"], data["cpu"]) == ("stop", RunState.INTERNAL_ERROR, 0)
    assert data["error"] is guest.machine.error


def test_what_a_listener_raises_is_the_machine_s_error(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)

    def broken(event: pyvmm.Event) -> None:
        raise LookupError("mine")

    guest.machine.events.listen(broken, "resume")
    with pytest.raises(pyvmm.DeviceError, match="broken raised LookupError: mine"):
        guest.run()


def test_a_machine_for_itself_may_not_be_waited_for(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    said: list[str] = []

    def listener(event: pyvmm.Event) -> None:
        for verb in (guest.machine.close, guest.machine.wait):
            try:
                verb()
            except pyvmm.StateError as error:
                said.append(str(error)[:7])

    guest.machine.events.listen(listener, "stop")
    guest.run()
    guest.machine.events.flush()
    assert said == ["close()", "wait() "]
