"""ServedMemory: a machine's memory that comes out of its snapshot page by page, when somebody touches it.

In the place of a mapping of the file it is memory of the machine's own, which a thread fills by userfaultfd
(page_server.pyx). What that is good for: where the file can't be read any more, in a network's file system say, the
machine ends with a sentence; of a mapping that would be a SIGBUS, and the end of the process. It costs more for each
page that is touched, and machines of one snapshot share nothing.
"""

from __future__ import annotations

from _heapq import heappop, heappush
from posix import strerror

from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.origin import Origin
from pyvmm.page_server import PageServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyvmm.chassis import Chassis
    from pyvmm.guest_memory import RamRegion
    from pyvmm.snapshot import Snapshot
    from pyvmm.snapshot_piece import SnapshotPiece
    from pyvmm.spec import Spec

    Piece = tuple[int, int, int, int]  # offset in memory, size, descriptor, offset in the file

READ_AHEAD_BYTES = 4 << 20
KVM_RUN = 0xAE80  # <linux/kvm.h>: the ioctl in which a vCPU's thread holds no GIL


def check(config: Spec) -> None:
    """ConfigError where that memory can't be served."""
    if config.shared_memory:
        raise ConfigError("userfaultfd: memory that other processes have too can't be served: leave userfaultfd out")
    if config.huge_pages not in (None, "transparent"):
        raise ConfigError(f"userfaultfd: huge_pages={config.huge_pages!r} can't be served: leave one of the two out")


class ServedMemory(Origin):
    """Made before the machine, like any origin of its memory; ``begin`` when that is there. It ends after all that
    touches memory.
    """

    def __init__(self, source: Snapshot) -> None:
        self._server = PageServer(KVM_RUN)
        super().__init__(None)  # it is no mapping of anything
        self._source = source.hold()
        self._whole = False

    def sources(self) -> dict[int, tuple[int, int]]:
        """Nothing to map."""
        return {}

    def origin(self) -> ServedMemory:
        return self

    def begin(self, regions: Sequence[RamRegion], chassis: Chassis) -> None:
        """What of these the snapshot has as RAM is missing from here on; the rest is read."""
        self._source.check_memory(regions)
        ram = {region.gpa for region in chassis.memory.ram if not region.readonly}
        for region in regions:
            piece = self._source.pieces[region.gpa]
            if region.gpa in ram:
                self._server.serve(region, pieces_of(piece))
            else:
                piece.read(region)
        loop, fd = chassis.loop, self._server.failed_fd

        def failed() -> None:
            loop.remove_reader(fd)
            chassis.control.fail_late(self._error())
            # From now on no vCPU enters, and those inside have been kicked: none goes on with what it finds.
            self._server.give_up()

        loop.add_reader(fd, failed)
        self._server.start()

    def check(self) -> None:
        """HostError or StateError where something could not be read by now."""
        if self._server.failure is not None:
            raise self._error()

    def _error(self) -> HostError | StateError:
        assert self._server.failure is not None
        errno, fd, where = self._server.failure
        if fd < 0:
            return HostError(f"userfaultfd: {strerror(errno)}: give the host more memory")
        path = self._path_of(fd)
        if not errno:
            return StateError(f"snapshot {path} is damaged: it was cut off while a machine had its memory there")
        why = f"{strerror(errno)} at {where:#x}: keep it where it can be read, or restore with eager"
        return HostError(f"snapshot {path}: {why}")

    def _path_of(self, fd: int) -> str:
        source: Snapshot | None = self._source
        while source is not None and not source.has(fd):
            source = source.base
        return self._source.path if source is None else source.path

    def complete(self) -> None:
        """All of it is read: it is memory like any other's then. HostError and StateError where it can't be."""
        if self._whole:
            return
        self.check()
        if not self._server.complete():
            self.check()
            raise StateError("the machine is closed")
        self._whole = True
        self._source.close()

    def read_ahead_beside(self, regions: Iterable[RamRegion], goes_on: Callable[[], bool]) -> Callable[[], None]:
        """What has all that the saved machine had in use put there, as Snapshot's."""
        known = [(self._source.pieces[region.gpa].used, region) for region in regions]

        def work() -> None:
            for used, region in known:
                for start, size in used:
                    for at in range(start, start + size, READ_AHEAD_BYTES):
                        part = min(READ_AHEAD_BYTES, start + size - at)
                        if not goes_on() or not self._server.fetch(region, at, part):
                            return

        return work

    @property
    def faults(self) -> int:
        """How often somebody has waited for a page."""
        return self._server.faults

    @property
    def copied_bytes(self) -> int:
        """Of the snapshot, by now: also of what nobody has touched yet."""
        return self._server.copied_bytes

    @property
    def zeroed_bytes(self) -> int:
        """That the snapshot has no page of."""
        return self._server.zeroed_bytes

    def close(self) -> None:
        self._server.close()
        if not self._whole:
            self._whole = True
            self._source.close()
        super().close()

    def abandon(self) -> None:
        self._server.abandon()
        if not self._whole:
            self._source.abandon()
        super().abandon()


def pieces_of(piece: SnapshotPiece) -> list[Piece]:
    """What is no zero of it, in order: of a difference the upper one where both have a page."""
    layers: list[Piece] = []
    bottom = piece
    while bottom.base is not None:
        bottom = bottom.base
    fd, offset = bottom.source
    layers += [(start, size, fd, offset + start) for start, size in bottom.data()]
    upper: list[SnapshotPiece] = []
    while piece.base is not None:
        upper.append(piece)
        piece = piece.base
    for each in reversed(upper):
        layers += [(start, size, each.file.fd, place) for start, size, place in each.runs]
    return topmost(layers)


def topmost(layers: Sequence[Piece]) -> list[Piece]:
    """These, each of which covers those before it, as pieces that do not overlap, in order."""
    found: list[Piece] = []
    by_start = sorted(range(len(layers)), key=lambda n: layers[n][0])
    edges = sorted({edge for start, size, _fd, _place in layers for edge in (start, start + size)})
    there: list[tuple[int, int]] = []  # (-n, end) of those that have begun
    at = 0
    for number, following in enumerate(edges[1:]):
        edge = edges[number]
        while at < len(by_start) and layers[by_start[at]][0] <= edge:
            n = by_start[at]
            heappush(there, (-n, layers[n][0] + layers[n][1]))
            at += 1
        while there and there[0][1] <= edge:
            heappop(there)
        if not there:
            continue
        start, _size, fd, place = layers[-there[0][0]]
        begins = place + edge - start
        if (
            found
            and found[-1][2] == fd
            and (found[-1][0] + found[-1][1], found[-1][3] + found[-1][1]) == (edge, begins)
        ):
            found[-1] = (found[-1][0], found[-1][1] + following - edge, fd, found[-1][3])
        else:
            found.append((edge, following - edge, fd, begins))
    return found
