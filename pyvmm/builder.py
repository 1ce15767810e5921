"""The recipe: from a Spec to a machine that is paused at its first instruction, top to bottom."""

from __future__ import annotations

from pyvmm.chassis import Chassis
from pyvmm.closers import Closers
from pyvmm.guest_memory import GuestMemory
from pyvmm.images import Images
from pyvmm.platform import KvmPlatform, NoCpuPlatform, Platform
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.boards.board import Board
    from pyvmm.origin import Origin
    from pyvmm.spec import Spec

    class MemorySource(Protocol):
        """Of a Snapshot, whose file is mapped, or a ServedMemory."""

        def sources(self) -> dict[int, tuple[int, int]]: ...
        def origin(self) -> Origin: ...


def build(
    config: Spec,
    kind: type[Board] | None,
    owner: object,
    snapshot: MemorySource | None = None,
    *,
    fresh: bool = True,
    later: bool = False,
    late: bool = False,
) -> tuple[Chassis, Board, Platform]:
    """All of it; ``kind`` of board, where it is not the one that ``config.machine`` names; with memory out of
    ``snapshot``. One that is not ``fresh`` has no guest loaded: its state follows. ``later``: another process has its
    drives' images, until Drives.claim. ``late``: the devices are made when somebody looks (Board.install_late); so
    are those of a fresh one that can begin without. What was made before an error is closed again.
    """
    kind = kind or board_kind(config)
    kind.check(config)
    closers = Closers()
    try:
        memory = make_memory(config, closers, snapshot)
        images = closers.add(Images())
        runs_guests = config.accel == "kvm"
        make_clock = (KvmPlatform if runs_guests else NoCpuPlatform).clock
        chassis = Chassis(config, memory, closers, make_clock, owner)
        chassis.drives.later = later
        if snapshot is not None:
            chassis.origin = closers.add(snapshot.origin())
        board = kind(config, chassis, images, runs_guests=runs_guests)
        memory_map = board.lay_out_memory()
        platform = KvmPlatform(config, memory_map, chassis) if runs_guests else NoCpuPlatform(chassis)
        closers.add(chassis.loop)
        if late or (fresh and kind.begins_late(config)):
            board.install_late(platform)
        else:
            board.install(platform)
        boot = board.load_guest() if fresh else None
        platform.make_cpus(chassis)
        platform.enter(boot)
        platform.finish_in_background(chassis)
        attach_power(chassis, board, platform)
        if not runs_guests:
            chassis.consoles.start()  # no resume() will
            chassis.io_threads.resume()
        closers.add(chassis.io_threads)  # the first to end: what they use is there until then
        closers.call(chassis.tell_last)
        return chassis, board, platform
    except BaseException:
        closers.close()
        raise


def attach_power(chassis: Chassis, board: Board, platform: Platform) -> None:
    """Most machines never see a reset: the recipes of restart.py are imported with the first one."""

    def reset() -> None:
        from pyvmm import restart

        board.arrive()
        restart.reset(chassis, board, platform)

    def wake(events: int) -> None:
        from pyvmm import restart

        board.arrive()
        restart.wake(chassis, board, platform, events)

    chassis.power.attach(reset, wake)


def board_kind(config: Spec) -> type[Board]:
    if config.machine == "pc":
        from pyvmm.boards.pc import Pc

        return Pc
    from pyvmm.boards.microvm import Microvm

    return Microvm


def make_memory(config: Spec, closers: Closers, snapshot: MemorySource | None) -> GuestMemory:
    size_bytes = config.memory_mib * layout.MIB
    sources = {}
    if snapshot is not None and not config.shared_memory and config.huge_pages in (None, "transparent"):
        sources = snapshot.sources()
    memory = GuestMemory(size_bytes, shared=config.shared_memory, huge_pages=config.huge_pages, sources=sources)
    closers.call(memory.close, memory.close)
    return memory
