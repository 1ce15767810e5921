from collections.abc import Callable
from enum import IntEnum
from typing import Any

from typing_extensions import Buffer

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

class CpuExec(ViewUser):
    stats: ExitStats
    pio: AddressSpace
    mmio: AddressSpace
    vcpu: Vcpu | None
    acknowledge: Callable[[], int] | None
    msr_handler: Any
    on_hypercall: Callable[[int, list[int]], int] | None
    on_eoi: Callable[[int], None] | None
    halted: bool
    detail: dict[str, Any]
    error_number: int
    wake_fd: int
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
