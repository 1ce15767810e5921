from collections.abc import Callable
from typing import Any, ClassVar

from typing_extensions import Buffer, disjoint_base

from pyvmm.address_space import AddressSpace, ViewUser
from pyvmm.device import DeviceLock
from pyvmm.exit_stats import ExitStats
from pyvmm.kvm.vcpu import Vcpu

class StopReason(int):
    name: str
    KICKED: ClassVar[StopReason]
    SHUTDOWN: ClassVar[StopReason]
    SYSTEM_EVENT: ClassVar[StopReason]
    DEBUG: ClassVar[StopReason]
    INTERNAL_ERROR: ClassVar[StopReason]
    FAIL_ENTRY: ClassVar[StopReason]
    UNKNOWN: ClassVar[StopReason]
    EXCEPTION: ClassVar[StopReason]
    MEMORY_FAULT: ClassVar[StopReason]
    UNHANDLED: ClassVar[StopReason]
    RUN_FAILED: ClassVar[StopReason]
    DEVICE_RAISED: ClassVar[StopReason]

STOP_REASONS: list[StopReason]

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
    on_tpr: Callable[[], None] | None
    cr8: int
    halted: bool
    @property
    def detail(self) -> dict[str, Any]: ...
    @property
    def error_number(self) -> int: ...
    @property
    def apic_base(self) -> int: ...
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
    def abandon(self) -> None: ...
    def coalesced_ring(self, page_offset: int, lock: DeviceLock) -> None: ...
    def kick(self) -> None: ...
    def _poke(self) -> None: ...
    def drain(self) -> None: ...
    def cancel_kick(self) -> None: ...
    def interrupt(self, level: int) -> None: ...
    @staticmethod
    def prepare_thread(index: int = 0) -> None: ...
    def run(self) -> StopReason: ...
    def handle_exit(self) -> StopReason | None: ...
    def complete(self) -> None: ...
