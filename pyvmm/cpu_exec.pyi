from collections.abc import Callable
from enum import IntEnum
from typing import Any

from typing_extensions import Buffer, disjoint_base

from pyvmm.address_space import AddressSpace, ViewUser
from pyvmm.device import DeviceLock
from pyvmm.exit_stats import ExitStats
from pyvmm.kvm.vcpu import Vcpu

class StopReason(IntEnum):
    KICKED = 0
    SHUTDOWN = 1
    SYSTEM_EVENT = 2
    DEBUG = 3
    INTERNAL_ERROR = 4
    FAIL_ENTRY = 5
    UNKNOWN = 6
    EXCEPTION = 7
    MEMORY_FAULT = 8
    UNHANDLED = 9
    RUN_FAILED = 10
    DEVICE_RAISED = 11

@disjoint_base
class CpuExec(ViewUser):
    @property
    def stats(self) -> ExitStats: ...
    @property
    def pio(self) -> AddressSpace: ...
    @property
    def mmio(self) -> AddressSpace: ...
    @property
    def vcpu(self) -> Vcpu | None: ...
    acknowledge: Callable[[], int] | None
    msr_handler: Any
    on_hypercall: Callable[[int, list[int]], int] | None
    on_eoi: Callable[[int], None] | None
    halted: bool
    @property
    def detail(self) -> dict[str, Any]: ...
    @property
    def error_number(self) -> int: ...
    @property
    def wake_fd(self) -> int: ...
    def __init__(
        self,
        vcpu: Vcpu | None,
        pio: AddressSpace,
        mmio: AddressSpace,
        *,
        page: Buffer | None = None,
        user_irqchip: bool = False,
    ) -> None: ...
    def close(self) -> None: ...
    def coalesced_ring(self, page_offset: int, lock: DeviceLock) -> None: ...
    def kick(self) -> None: ...
    def _poke(self) -> None: ...
    def cancel_kick(self) -> None: ...
    def interrupt(self, level: int) -> None: ...
    @staticmethod
    def prepare_thread() -> None: ...
    def run(self) -> StopReason: ...
    def handle_exit(self) -> StopReason | None: ...
    def complete(self) -> None: ...
