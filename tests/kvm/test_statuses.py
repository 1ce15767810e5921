"""Every way a run can stop has its own status: 0 is the guest's power-off and nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, PORT, Guest, Recorder

import pyvmm
from pyvmm import ExitStatus, RunState

SPIN = "mov $DEVICE_PORT, %edx\n 1: outb %al, %dx\n jmp 1b"
README = Path(__file__).parents[2] / "README.md"


class Calls(pyvmm.Device):
    def __init__(self, verb: Callable[[], object]) -> None:
        self.verb = verb

    def write(self, offset: int, size: int, value: int) -> None:
        self.verb()


def how(guest: Guest) -> tuple[int, str]:
    """By run(), and the same by resume() and wait()."""
    status = guest.run()
    assert guest.machine.status is status
    assert guest.machine.error is None
    return int(status), status.reason


def test_paused_by_a_handler(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Calls(guest.machine.pause))
    assert guest.machine.status is None
    assert how(guest) == (12, "paused")
    assert guest.machine.state is RunState.PAUSED
    assert how(guest) == (12, "paused")


def test_stopped(boot: Callable[..., Guest]) -> None:
    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Calls(guest.machine.stop))
    assert how(guest) == (16, "stopped")
    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Calls(lambda: guest.machine.stop(0, "as I say")))
    assert how(guest) == (0, "as I say")


def test_power_off(boot: Callable[..., Guest]) -> None:
    assert how(boot("power_off")) == (0, "shutdown")


def test_a_single_step(boot: Callable[..., Guest]) -> None:
    from pyvmm.kvm.vcpu import GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP

    guest = boot("nop\n nop\n finish")
    guest.machine.cpus[0].vcpu.set_guest_debug(GUESTDBG_ENABLE | GUESTDBG_SINGLESTEP)
    assert how(guest) == (14, "debug")


def test_nobody_waited(boot: Callable[..., Guest]) -> None:
    guest = boot("finish 5")
    guest.machine.resume()
    assert guest.machine.wait(60)
    assert (guest.machine.status, guest.machine.error) == (11, None)
    guest.machine.reset()
    assert guest.machine.status == 12
    guest.machine.resume()
    assert guest.machine.wait(60)
    guest.machine.close()
    assert guest.machine.status == 11


def test_nobody_waited_and_a_device_raised(boot: Callable[..., Guest]) -> None:
    def verb() -> None:
        raise LookupError("wrong")

    guest = boot(SPIN)
    guest.machine.pio.map(PORT, 1, Calls(verb))
    guest.machine.resume()
    assert guest.machine.wait(60)
    error = guest.machine.error
    assert isinstance(error, pyvmm.DeviceError)
    assert "rip" in error.dump
    assert guest.machine.status == 8
    assert "LookupError: wrong" in guest.machine.status.reason
    guest.machine.reset()
    assert guest.machine.error is None


@pytest.mark.native
def test_nobody_waited_and_kvm_gave_up(boot: Callable[..., Guest]) -> None:
    """PVM's emulator does not know CMPXCHG16B; a KVM that runs it ends at the finish."""
    guest = boot("mov $0x200000, %edi\n lock cmpxchg16b (%rdi)\n finish")
    guest.machine.resume()
    assert guest.machine.wait(60)
    if guest.machine.status == PASSED:
        return
    assert guest.machine.status == 4
    assert isinstance(guest.machine.error, pyvmm.GuestError)
    assert "EMULATION" in guest.machine.error.dump


def test_while_it_runs_there_is_none(boot: Callable[..., Guest]) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n 1: inb %dx, %al\n jmp 1b")
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    assert guest.machine.status is None
    guest.machine.pause()
    assert guest.machine.status == 12


def test_a_status_can_be_copied_and_sent() -> None:
    status = ExitStatus(7, "debug-exit")
    for other in (pickle.loads(pickle.dumps(status)), copy.copy(status), copy.deepcopy(status)):
        assert (other, other.reason, repr(other)) == (7, "debug-exit", "<ExitStatus 7: debug-exit>")


def test_they_are_told_where_they_are_looked_for() -> None:
    table = README.read_text().split("| exit status of")[1].split("\n\n")[0]
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.M)}
    assert rows >= {0, 2, 4, 6, 8, 10, 12, 14, 16, 124}
    doc = inspect.getdoc(ExitStatus) or ""  # Python 3.13's compiler takes the indentation away itself
    assert {int(n) for n in re.findall(r"^(\d+) ", doc, re.M)} == rows - {2, 124}
