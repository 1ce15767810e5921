"""pause, resume, reset and stop from several threads at once, in random orders from fixed seeds, on a running guest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
from guests import PORT, TIMEOUT_S, Guest, Recorder

from pyvmm import RunState
from pyvmm.errors import StateError

# Two vCPUs that hammer a device and each other's memory, for ever.
BUSY = """
    .include "interrupts64.inc"
    .include "smp64.inc"
    start_others
    xor     %edi, %edi
other_main:
    mov     $DEVICE_PORT, %edx
1:  inb     %dx, %al
    lock incl shared
    jmp     1b
shared: .long 0
"""


def act(guest: Guest, seed: int, steps: int, errors: list[BaseException]) -> None:
    machine = guest.machine
    chance = random.Random(seed)
    try:
        for _ in range(steps):
            verb = chance.choice(["pause", "pause", "resume", "resume", "resume", "reset", "stop"])
            try:
                if verb == "stop":
                    machine.stop(0x21)
                else:
                    getattr(machine, verb)()
            except StateError:
                # resume() of a machine that another thread has ended: reset it, as the message says.
                machine.reset()
    except BaseException as error:
        errors.append(error)


@pytest.mark.parametrize("seed", range(5))
def test_random_verbs_from_three_threads(boot: Callable[..., Guest], seed: int) -> None:
    guest = boot(BUSY, cpus=2)
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    errors: list[BaseException] = []
    threads = [threading.Thread(target=act, args=(guest, seed * 10 + n, 25, errors)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a verb hangs"
    assert not errors
    # Whatever state that left: it can be paused, reset and run again, and both vCPUs are in the guest.
    machine = guest.machine
    machine.pause()
    assert all(cpu.parked for cpu in machine.cpus)
    machine.reset()
    assert machine.state is RunState.PAUSED
    calls = len(device.log)
    machine.resume()
    device.wait_for(calls + 100)
    machine.pause()
    assert machine.state is RunState.PAUSED


def test_close_under_a_running_guest(boot: Callable[..., Guest]) -> None:
    for _ in range(10):
        guest = boot(BUSY, cpus=2)
        device = Recorder()
        guest.machine.pio.map(PORT, 1, device)
        guest.start()
        device.wait_for(5)
        guest.close()
        calls = len(device.log)
        assert guest.machine.state is RunState.CLOSED
        assert len(device.log) == calls
        with pytest.raises(StateError):
            guest.machine.resume()


def test_a_handler_may_pause_stop_and_reset(boot: Callable[..., Guest]) -> None:
    """On the vCPU's own thread each takes effect when the handler has returned."""
    guest = boot("mov $DEVICE_PORT, %edx\n 1: mov $7, %eax\n outb %al, %dx\n inc %rbx\n jmp 1b")
    machine = guest.machine
    verbs = iter(["pause", "stop"])

    class Caller(Recorder):
        def write(self, offset: int, size: int, value: int) -> None:
            super().write(offset, size, value)
            verb = next(verbs)
            if verb == "stop":
                machine.stop(5, "enough")
            else:
                machine.pause()

    device = Caller()
    machine.pio.map(PORT, 1, device)
    guest.start()
    guest.wait()
    assert machine.state is RunState.PAUSED
    assert len(device.log) == 1
    status = guest.run()
    assert (status, status.reason) == (5, "enough")
    assert len(device.log) == 2
