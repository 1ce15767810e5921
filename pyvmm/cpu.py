"""Cpu: one vCPU, its loop, and the thread around it."""

from __future__ import annotations

from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.errors import StateError
from pyvmm.light import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.kvm.system import CpuidEntry
    from pyvmm.kvm.vcpu import Vcpu
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

    # -- state, while parked -------------------------------------------------------------------------------

    def _require_parked(self) -> None:
        # Off its thread a running vCPU's state can't be had: KVM would make the caller wait for its next exit.
        if not self.parked and not self.on_own_thread:
            raise StateError(f"vCPU {self.index} is running: pause() the machine first")

    @property
    def regs(self) -> dict[str, int]:
        """General registers, rip and rflags. Assign a dict, whole or in part. StateError while the vCPU runs."""
        self._require_parked()
        return self.vcpu.regs

    @regs.setter
    def regs(self, values: dict[str, int]) -> None:
        self._require_parked()
        self.vcpu.regs = values

    @property
    def sregs(self) -> dict[str, Any]:
        """Segments, descriptor tables and control registers, in KVM's field names."""
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
            self._thread = Thread(self._main)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StateError(f"vCPU {self.index}: {error}: raise ulimit -u, or close machines") from None

    def join(self) -> None:
        """Wait for the thread's end; not from the thread itself."""
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        try:
            CpuExec.prepare_thread(self.index)
            while self._control.enter(self):
                self._stay()
        except BaseException as error:
            # Nobody is above to hear it. start() makes another thread.
            self._thread = None
            self._control.fail(error)

    def _stay(self) -> None:
        """One stay in the loop, from the green light to the next reason to park."""
        try:
            try:
                reason = self.exec.run()
                if reason is not StopReason.KICKED:
                    self._on_stop(self, reason, None)
            except BaseException as error:
                self._on_stop(self, StopReason.DEVICE_RAISED, error)
        except BaseException as error:
            # Telling failed too: the dump met an error of its own, say.
            self._control.fail(error)
        finally:
            self._control.leave(self)
