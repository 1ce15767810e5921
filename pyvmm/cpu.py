"""Cpu: one vCPU, its loop, and the thread around it."""

from __future__ import annotations

import threading

from pyvmm.cpu_exec import CpuExec, StopReason
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.run_state import RunControl


class Cpu:
    """``on_stop(cpu, reason, error)`` is called on the vCPU's thread for every stop but a kick, before it parks."""

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        exec_: CpuExec,
        control: RunControl,
        on_stop: Callable[[Cpu, StopReason, BaseException | None], None],
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        self.exec = exec_
        self.parked = True
        self.thread_id = 0
        self._control = control
        self._on_stop = on_stop
        self._thread: threading.Thread | None = None

    # -- state, while parked -------------------------------------------------------------------------------

    def _require_parked(self) -> None:
        # Off its thread a running vCPU's state can't be had: KVM would make the caller wait for its next exit.
        if not self.parked and self.thread_id != threading.get_ident():
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

    def start(self) -> None:
        """Start the thread, once; it parks until the machine runs."""
        if self._thread is None:
            # A daemon: a machine that was never closed must not keep the interpreter from ending.
            self._thread = threading.Thread(target=self._main, name=f"pyvmm-cpu{self.index}", daemon=True)
            self._thread.start()

    def join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _main(self) -> None:
        self.thread_id = threading.get_ident()
        CpuExec.prepare_thread()
        control = self._control
        while control.enter(self):
            try:
                reason = self.exec.run()
                if reason is not StopReason.KICKED:
                    self._on_stop(self, reason, None)
            except BaseException as error:
                self._on_stop(self, StopReason.DEVICE_RAISED, error)
            finally:
                control.leave(self)
        self.thread_id = 0
