"""Cpu: one vCPU, its loop, and the thread around it."""

from __future__ import annotations

from _weakref import ref
from os import getpid

from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.errors import StateError
from pyvmm.light import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.kvm.system import CpuidEntry
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.light import Condition
    from pyvmm.run_control import RunControl


class Cpu:
    """``on_stop(cpu, reason, error)`` is called on the vCPU's thread for every stop but a kick, before it parks."""

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        exec_: CpuExec,
        control: RunControl,
        on_stop: Callable[[Cpu, StopReason, BaseException | None], None],
        cpuid: list[CpuidEntry],
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        self.exec = exec_
        self.cpuid = cpuid
        self.parked = True
        self._control = control
        self._on_stop = on_stop
        self._thread: Thread | None = None
        self._pid = getpid()

    # -- state, while parked -------------------------------------------------------------------------------

    def _require_parked(self) -> None:
        if getpid() != self._pid:
            raise StateError(f"vCPU {self.index} in a child of fork: the VM is its parent's")
        # Off its thread a running vCPU's state can't be had: KVM would make the caller wait for its next exit.
        if not self.parked and not self.on_own_thread:
            raise StateError(f"vCPU {self.index} is running: pause() the machine first")

    @property
    def regs(self) -> dict[str, int]:
        """General registers, rip and rflags: a copy, and a change in it is no write.

        Assign what is to change: ``cpu.regs = {"rip": 0x1000}``. What is left out stays; ConfigError for a name that
        does not exist. StateError while the vCPU runs.
        """
        self._require_parked()
        return self.vcpu.regs

    @regs.setter
    def regs(self, values: dict[str, int]) -> None:
        self._require_parked()
        self.vcpu.regs = values

    @property
    def sregs(self) -> dict[str, Any]:
        """Segments, descriptor tables and control registers, in KVM's field names: a copy, as ``regs``.

        Parts of parts may be assigned too: ``cpu.sregs = {"cs": {"base": 0}, "cr3": 0x2000}``.
        """
        self._require_parked()
        return self.vcpu.sregs

    @sregs.setter
    def sregs(self, values: dict[str, Any]) -> None:
        self._require_parked()
        self.vcpu.sregs = values

    # -- the thread ----------------------------------------------------------------------------------------

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller runs on this vCPU's thread: a device's handler, say."""
        return self._thread is not None and self._thread.is_current

    def start(self) -> None:
        """Start the thread, once; it parks until the machine runs."""
        if self._thread is None:
            lock, cond = self._control.parking
            # Nothing in these refers to the Cpu: see main().
            me, index = ref(self), self.index
            self._thread = Thread(lambda: main(me, index, lock, cond))
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StateError(f"vCPU {self.index}: {error}") from None

    def join(self) -> None:
        """Wait for the thread's end; not from the thread itself."""
        if self._thread is not None:
            self._thread.join()

    def _stay(self) -> bool:
        """One stay in the loop, from the green light to the next reason to park. False: the thread is to end."""
        pid = getpid()
        error: BaseException | None = None
        try:
            reason = self.exec.run()
        except BaseException as raised:
            reason, error = StopReason.DEVICE_RAISED, raised
        if getpid() != pid:
            # A handler has forked, and this is the child: all that it has is this thread, and the VM is its parent's.
            if error is not None:
                import traceback

                traceback.print_exception(error)
            return False
        try:
            if reason is not StopReason.KICKED:
                self._tell(reason, error)
        except BaseException as worse:
            self._control.fail(worse)
        finally:
            del error
            self._control.leave(self)
        return True

    def _tell(self, reason: StopReason, error: BaseException | None) -> None:
        try:
            self._on_stop(self, reason, error)
        except BaseException as raised:
            if error is not None:
                raise  # telling failed too: the dump met an error of its own, say
            self._on_stop(self, StopReason.DEVICE_RAISED, raised)

    def _thread_failed(self, error: BaseException) -> None:
        # Nobody is above to hear it. start() makes another thread.
        self._thread = None
        self._control.fail(error)


def main(me: ref[Cpu], index: int, lock: Any, cond: Condition) -> None:
    """A vCPU's thread.

    While it is parked it holds on to nothing but the lock it waits at: a machine that nobody else refers to can then be
    freed, and ends the thread as it goes (Machine.__del__).
    """
    try:
        CpuExec.prepare_thread(index)
        while (cpu := admitted(me, lock, cond)) is not None:
            Thread.follow_threading()
            if not cpu._stay():
                return
            cpu = None
    except BaseException as error:
        if (cpu := me()) is not None:
            cpu._thread_failed(error)


def admitted(me: ref[Cpu], lock: Any, cond: Condition) -> Cpu | None:
    """Park until the light is green: the vCPU, to run its guest. None: the thread's time is over."""
    with lock:
        while (cpu := me()) is not None:
            admission = cpu._control.admit(cpu)
            if admission is not None:
                return cpu if admission else None
            cpu = None
            cond.wait()
        return None
