"""Outcomes: what it means for the run that a vCPU has stopped, or that a device, a callback or a request has raised."""

from __future__ import annotations

from pyvmm.cpu_exec import StopReason
from pyvmm.errors import DeviceError, GuestError, HostError, StateError, describe, traceback_text, whose
from pyvmm.run_control import STATUS_DEBUG, ExitStatus
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.cpu import Cpu
    from pyvmm.dump import Readable
    from pyvmm.power import Power
    from pyvmm.run_control import RunControl


class Outcomes:
    """Turns stops and exceptions into ends of the run, with a dump of the vCPU where there is one.

    ``cpus`` are the machine's, once they are made, and ``vendor()`` is whose hardware exit codes KVM reports.
    """

    def __init__(self, control: RunControl, power: Power, memory: Readable) -> None:
        self._control = control
        self._power = power
        self._memory = memory
        self.cpus: Sequence[Cpu] = ()
        self.vendor: Callable[[], str] = str

    def let_go(self) -> None:
        """All is closed: nobody stops or raises any more."""
        self.cpus = ()
        self.vendor = str
        self._memory = Gone()

    def cpu_stopped(self, cpu: Cpu, reason: StopReason, error: BaseException | None) -> None:
        """On the vCPU's thread, before it parks."""
        if error is not None:
            self._handler_raised(cpu, error)
            return
        detail = cpu.exec.detail
        about = {"cpu": cpu.index, "detail": dict(detail)}
        if reason is StopReason.SHUTDOWN:
            self._power.reset("triple fault", by="a triple fault", about=about)
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "SHUTDOWN":
            self._power.off()
        elif reason is StopReason.SYSTEM_EVENT and detail["event"] == "RESET":
            self._power.reset(by="KVM's system event")
        elif reason is StopReason.DEBUG:
            self._control.end(RunState.DEBUG, ExitStatus(STATUS_DEBUG, "debug", cpu.index), about=about)
        else:
            from pyvmm.dump import dump, reason_text

            text = reason_text(detail, self.vendor())
            failure = GuestError(text, dump(cpu.vcpu, self._memory, f"vCPU {cpu.index}: {text}"))
            self._control.end(RunState.INTERNAL_ERROR, error=failure, about=about)

    def _handler_raised(self, cpu: Cpu, error: BaseException) -> None:
        """A dump with the traceback; then the access that the handler left half done is completed."""
        about = {"cpu": cpu.index}
        if isinstance(error, HostError):  # no fault of the device's, and told in one sentence
            cpu.exec.complete()
            self._control.fail_late(error, about)
            return
        from pyvmm.dump import dump

        text = f"{whose(error)} raised {describe(error)}"
        post_mortem = dump(cpu.vcpu, self._memory, f"vCPU {cpu.index}: {text}")
        failure = DeviceError(text, f"{post_mortem}\n{traceback_text(error)}")
        failure.__cause__ = error
        cpu.exec.complete()
        self._control.fail_late(failure, about)

    def callback_raised(self, error: BaseException) -> None:
        """A timer's or a descriptor's callback, on the event loop's thread; or work in the background."""
        failure = error if isinstance(error, HostError) else callback_failure(error)
        self._control.fail_late(failure)

    # -- dumps that somebody asks for --------------------------------------------------------------------------

    def dump(self, hear: Callable[[str], object], *, wait: bool = False) -> None:
        """``hear(text)`` gets registers and code of every vCPU, taken while all of them stand."""
        self._control.request("dump", lambda: self._dump(hear), self._control.carry_on, wait=wait)

    def _dump(self, hear: Callable[[str], object]) -> None:
        from pyvmm.dump import dump

        title = f"vCPU {{}}, machine {self._control.state}"
        hear("\n".join(dump(cpu.vcpu, self._memory, title.format(cpu.index)) for cpu in self.cpus) + "\n")


class Gone:
    """In place of memory."""

    def read(self, gpa: int, size: int) -> bytes:
        raise StateError("the machine is closed, its memory is gone")


def callback_failure(error: BaseException) -> DeviceError:
    """What a device raised outside of an exit, and so without a dump."""
    text = f"the callback {whose(error)} raised {describe(error)}"
    failure = DeviceError(text, f"{text}\n{traceback_text(error)}")
    failure.__cause__ = error
    return failure
