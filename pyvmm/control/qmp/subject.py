"""What of a Machine (machine.py) QMP asks and changes, and what a command is given. For type checkers only."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Protocol

    from pyvmm.address_space import AddressSpace
    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.board import Board
    from pyvmm.breakpoints import Breakpoints
    from pyvmm.chardev import Chardev
    from pyvmm.control.socket import SocketServer
    from pyvmm.cpu import Cpu
    from pyvmm.device import Device
    from pyvmm.drives import Drives
    from pyvmm.events import Events
    from pyvmm.exit_stats import ExitStat
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irqchip import Irqchip
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory_map import MemoryMap
    from pyvmm.run_control import ExitStatus, RunControl
    from pyvmm.run_state import RunState
    from pyvmm.spec import Spec

    class Machine(Protocol):
        config: Spec
        board: Board
        pio: AddressSpace
        mmio: AddressSpace
        memory: GuestMemory
        memory_map: MemoryMap
        control: RunControl
        events: Events
        drives: Drives
        backends: Mapping[str, BlockBackend]
        consoles: Mapping[str, Chardev]
        cpus: list[Cpu]
        irqchip: Irqchip

        @property
        def devices(self) -> Mapping[str, Device]: ...
        @property
        def vm(self) -> Vm: ...
        @property
        def breakpoints(self) -> Breakpoints | None: ...
        @property
        def state(self) -> RunState: ...
        @property
        def status(self) -> ExitStatus | None: ...
        @property
        def chardevs(self) -> Sequence[Chardev]: ...
        def resume(self) -> None: ...
        def pause(self) -> None: ...
        def reset(self) -> None: ...
        def powerdown(self) -> None: ...
        def wakeup(self) -> None: ...
        def nmi(self, cpu: int = 0) -> None: ...
        def change_medium(
            self, drive: str, file: str | None, *, format: str | None = None, force: bool = False
        ) -> bool: ...
        def block_resize(self, drive: str, size_bytes: int | None = None) -> int: ...
        def set_limits(self, drive: str, **limits: int) -> None: ...
        def stop(self, status: int = 0, reason: str = "") -> None: ...
        def load(self, path: str) -> None: ...
        def save(self, path: str, *, base: Any = None) -> Any: ...
        def migrate_to(self, address: str) -> Any: ...
        def cancel_migration(self) -> None: ...
        def exit_stats(self) -> list[ExitStat]: ...
        def exit_stats_table(self) -> str: ...

    class Served(Protocol):
        """The server, as commands have it."""

        @property
        def machine(self) -> Machine: ...
        @property
        def closing(self) -> bool: ...
        kvm_stats: Any
        migration: dict[str, Any]
        migrating: Any
        sockets: SocketServer

        def tell(self, line: bytes) -> None: ...
