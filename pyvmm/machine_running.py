"""RunningMachine: a machine that is started, held up, asked what it does, and ended."""

from __future__ import annotations

from pyvmm import run_control as states
from pyvmm.errors import ConfigError, StateError
from pyvmm.machine_base import MachineBase
from pyvmm.options import is_int
from pyvmm.run_control import ExitStatus, timeout_or_none
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.cpu import Cpu
    from pyvmm.run_control import ExitStatus


class RunningMachine(MachineBase):
    """What RunControl (run_control.py) does, for whoever holds the machine."""

    @property
    def state(self) -> RunState:
        """What the machine is doing: RunState tells what each value means."""
        return self.control.state

    @property
    def status(self) -> ExitStatus | None:
        """How the last run ended or was held up, whoever waits for it: what ``run`` returns, 4 or 8 where it raises.

        None before the first run and while the machine runs.
        """
        return self.control.status

    @property
    def error(self) -> BaseException | None:
        """What ``run`` raises: GuestError where the guest can't go on, DeviceError where a device raised."""
        return self.control.error

    def run(self, timeout_s: float | None = None) -> ExitStatus:
        """Run until the guest ends, and say how: an int, what ``pyvmm run`` would exit with, with its ``reason``.

        GuestError where the guest can't go on, DeviceError where a device raised; both carry the dump. TimeoutError
        after ``timeout_s`` seconds; the machine is paused then, and also when a signal's exception comes through.
        StateError where another thread closes it, and in a handler or a callback of this machine.
        """
        limit_s = timeout_or_none(timeout_s)
        self._not_from_inside("run")
        before = self.resets.count
        try:
            if not self.control.held:
                self.resume()
            finished = self.control.wait(limit_s)
            if finished and self.control.state is RunState.PRELAUNCH:
                self.resume()  # a debugger came before the guest's beginning, and went without one
                finished = self.control.wait(limit_s)
        except BaseException:
            self.control.pause()
            raise
        if not finished:
            self.control.pause()
            # It may have ended while it was being paused.
            if self.control.held or self.control.state in (RunState.PAUSED, RunState.RUNNING):
                often = self.resets.sentence(before)
                raise TimeoutError(f"the guest was still running after {timeout_s} s" + (often and f": {often}"))
        return self.control.outcome()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the machine stops running, whatever the reason: True; False after ``timeout_s`` seconds.

        ``status`` and ``error`` say how it ended. StateError in a handler or a callback of this machine.
        """
        limit_s = timeout_or_none(timeout_s)
        self._not_from_inside("wait")
        return self.control.wait(limit_s)

    def resume(self) -> None:
        """Start, or go on after a pause, and return at once. StateError where the guest has ended.

        After an io-error the requests that failed are tried again; that is all it does with accel="qtest".
        """
        self._usable("resume")
        if not self.cpus:
            self._retry_drives()
            return
        self._go_on(None)

    def _go_on(self, only: Sequence[Cpu] | None) -> None:
        """With these vCPUs, or all of them."""
        self.drives.claim()
        # Asked before the guest runs: what fails from then on stops the machine again, and is not tried at once.
        held_up = self.drives.held_up()
        for cpu in self.cpus:
            cpu.start()
        self._chassis.consoles.take_terminal()
        self.control.resume(only)
        self._chassis.runs()
        self._chassis.consoles.start()
        # After that: one that fails again stops the machine again.
        self.drives.resume(held_up)

    def _retry_drives(self) -> None:
        """resume() where nothing runs but the drives. StateError where none of them waits."""
        if not self.drives.stalled:
            raise StateError("accel='qtest' has no vCPU to run: drive the devices from outside")
        self.control.go_on_without_cpus()
        self.drives.resume(self.drives.held_up())

    def pause(self) -> None:
        """Park every vCPU, their accesses complete. Returns when they are.

        In a device's handler or a timer's callback it returns at once, and takes effect when that returns.
        """
        self._usable("pause")
        self.control.pause()

    def reset(self) -> None:
        """Power-on state, kernel loaded anew. A running machine goes on running, another is paused at the start."""
        self._usable("reset")
        self._chassis.power.reset_now()
        if self.control.state is RunState.INTERNAL_ERROR and self.control.error is not None:
            raise self.control.error

    def powerdown(self) -> None:
        """Press the ACPI power button: a guest that listens shuts itself down."""
        self._usable("powerdown")
        self.board.press_power_button()
        self.events.tell("powerdown")

    def wakeup(self) -> None:
        """Wake a guest that has suspended to RAM, as by its power button. StateError where it has not.

        From any thread; in a handler or a timer's callback it takes effect when that returns.
        """
        self._usable("wakeup")
        if not self.control.suspended:
            raise StateError(f"the guest is not suspended, the machine is in state {self.control.state}")
        self._chassis.power.wake_now()

    def nmi(self, cpu: int = 0) -> None:
        """Send a non-maskable interrupt to one vCPU; a machine that runs goes on, another has it when it does.

        The vCPUs are parked for it: KVM takes KVM_NMI between two stays in the guest, and a guest may never exit. In a
        handler or a timer's callback it takes effect when that returns.
        """
        self._usable("nmi")
        if not is_int(cpu) or not 0 <= cpu < len(self.cpus):
            raise ConfigError(f"nmi({cpu!r}): give the number of a vCPU, from 0; there are {len(self.cpus)}")
        self.control.request("nmi", self.cpus[cpu].vcpu.nmi, self.control.carry_on, wait=True)

    def stop(self, status: int = states.STATUS_STOPPED, reason: str = "stopped") -> None:
        """End the run with ``status``; callable from devices' handlers. What ``run`` returns.

        Once it has ended, further ends are not looked at; but an exception of the handler that asked still is.
        """
        if not is_int(status) or not isinstance(reason, str):
            raise ConfigError(f"stop({status!r}, {reason!r}): give a whole number and a word or two")
        self._same_process("stop")
        self._chassis.power.stop(status, reason)

    def dump(self) -> str:
        """Registers and code of every vCPU, taken while all of them stand; a machine that runs goes on afterwards.

        StateError in a device's handler or a callback, and where the machine is closed.
        """
        self._usable("dump")
        self._not_from_inside("dump")
        texts: list[str] = []
        self._chassis.outcomes.dump(texts.append, wait=True)
        return "".join(texts)

    def dump_later(self, hear: Callable[[str], object]) -> None:
        """As ``dump``, from anywhere: ``hear`` gets the text, on another thread, as soon as every vCPU stands."""
        self._usable("dump_later")
        self._chassis.outcomes.dump(hear)

    def drain(self) -> None:
        """Return when no drive has a request under way. The caller holds no device's lock."""
        self._same_process("drain")
        self.drives.drain()
