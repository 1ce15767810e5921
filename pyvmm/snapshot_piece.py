"""SnapshotPiece: a piece of a machine's memory in a snapshot's file, and how a piece of memory gets there."""

from __future__ import annotations

import posix
from zlib import crc32

from pyvmm.errors import HostError, StateError
from pyvmm.guest_memory import GPA_END, PAGE_BYTES, RamRegion
from pyvmm.memory_pages import data_runs, touched_runs
from pyvmm.snapshot_file import SnapshotFile, Writer, file_data
from pyvmm.state import check_names, shown, value_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    Run = tuple[int, int]  # offset and size, in whole pages

# As many runs of a difference are mapped one by one; each is a mapping of the process, which may have 65,530.
MAPPED_RUNS = 1024
ENTRY_BYTES = 8  # of /proc/self/pagemap, a page each
PAGEMAP_BYTES = 1 << 20
# Of what was in use: runs that are so near to each other are one, and there are no more than that.
NEAR_BYTES = 64 << 10
MOST_RUNS = 4096
READ_AHEAD_BYTES = 4 << 20
ZEROS = bytes(1 << 16)
SUM_BYTES = 1 << 20  # a checksum is of so much
CRC_BYTES = 4


class SnapshotPiece:
    """A piece of memory in a snapshot: ``size`` bytes that stand at ``gpa`` in the guest.

    ``used`` are the pages that the saved machine had touched since it began, or went on from a snapshot itself.
    """

    def __init__(self, file: SnapshotFile, entry: object, base: SnapshotPiece | None) -> None:
        check_names(entry, ("gpa", "size", "offset", "runs", "sums", "used"))
        assert isinstance(entry, dict)
        self.file = file
        self.base = base
        self.gpa = pages(entry["gpa"], "gpa", 0)
        self.size = pages(entry["size"], "size", PAGE_BYTES)
        self.offset = 0
        self.runs: list[tuple[int, int, int]] = []
        if base is None:
            self.offset = file.check_range(entry["offset"], self.size)
        else:
            self.runs = [self._checked_run(run) for run in listed(entry["runs"], "runs")]
            if (base.gpa, base.size) != (self.gpa, self.size):
                raise StateError(f"snapshot {file.path} is damaged: it has other memory than its base")
        self.used = [self._checked_used(run) for run in listed(entry["used"], "used")[:MOST_RUNS]]
        size = self.size if base is None else len(self.runs) * PAGE_BYTES
        self._sums: bytes = value_of(("bytes", 0, sums_bytes(size, base is not None)), entry["sums"], "sums")

    def again(self, file: SnapshotFile) -> SnapshotPiece:
        """The same, where it has no base, in another opening of the snapshot, or a copy. StateError where the file ends
        before it does.
        """
        made = SnapshotPiece.__new__(SnapshotPiece)
        made.__dict__.update(self.__dict__)
        made.file = file
        file.check_range(self.offset, self.size)
        return made

    def _checked_used(self, run: object) -> Run:
        start, size = value_of(("list", 63, 2), run, "used")
        pages(start, "used", 0)
        pages(size, "used", PAGE_BYTES)
        if start + size > self.size:
            raise StateError(f"snapshot {self.file.path} is damaged: a run leaves its memory")
        return start, size

    def _checked_run(self, run: object) -> tuple[int, int, int]:
        start, size, offset = value_of(("list", 63, 3), run, "run")
        pages(start, "run", 0)
        pages(size, "run", PAGE_BYTES)
        if start + size > self.size:
            raise StateError(f"snapshot {self.file.path} is damaged: a run leaves its memory")
        return start, size, self.file.check_range(offset, size)

    @property
    def source(self) -> tuple[int, int]:
        """Descriptor and offset of what is mapped first; ``complete`` does the rest."""
        return (self.file.fd, self.offset) if self.base is None else self.base.source

    def complete(self, region: RamRegion) -> None:
        """Into a region that has ``source`` already: what differs from the base."""
        if self.base is None:
            return
        self.base.complete(region)
        for start, size, offset in self.runs[:MAPPED_RUNS]:
            region.overlay(start, size, (self.file.fd, offset))
        view = memoryview(region)
        for start, size, offset in self.runs[MAPPED_RUNS:]:
            read_into(self.file, view[start : start + size], offset)

    def read(self, region: RamRegion) -> None:
        """All of it into a region that is zeros: nothing of the file is needed then."""
        view = memoryview(region)
        if self.base is None:
            for start, size in self.data():
                read_into(self.file, view[start : start + size], self.offset + start)
            return
        self.base.read(region)
        for start, size, offset in self.runs:
            read_into(self.file, view[start : start + size], offset)

    def read_over(self, region: RamRegion) -> None:
        """All of it into a region that has been in use, wherever that is mapped from."""
        view = memoryview(region)
        at = 0
        for start, size in [*self.data(), (self.size, 0)]:
            for gap in range(at, start, len(ZEROS)):
                here = view[gap : min(gap + len(ZEROS), start)]
                if here.tobytes() != ZEROS[: len(here)]:  # what nobody has touched stays untouched
                    here[:] = ZEROS[: len(here)]
            at = max(at, start + size)
        self.read(region)

    def check(self) -> None:
        """StateError where what is in the file is not what was written there, or was written without checksums."""
        if self.base is not None:
            self.base.check()
            sums = run_sums(self.file.fd, self.runs)
        else:
            sums = piece_sums(self.file.fd, self.offset, self.size)
        if sums != self._sums:
            raise StateError(f"snapshot {self.file.path} is damaged: the memory at {self.gpa:#x} has been changed")

    def read_ahead(self, region: RamRegion, goes_on: Callable[[], bool]) -> None:
        """Have the pages in ``used`` read, and mapped, for as long as ``goes_on()``."""
        for start, size in self.used:
            for at in range(start, start + size, READ_AHEAD_BYTES):
                if not goes_on() or not region.read_ahead(at, min(READ_AHEAD_BYTES, start + size - at)):
                    return

    def map(self) -> RamRegion:
        """A mapping of its own."""
        region = RamRegion(self.gpa, self.size, name="snapshot", source=self.source)
        self.complete(region)
        return region

    def data(self) -> list[Run]:
        """Where something may be that is not zero."""
        if self.base is not None:
            return joined([*self.base.data(), *((start, size) for start, size, _ in self.runs)])
        return [(at - self.offset, size) for at, size in self.file.data(self.offset, self.size)]


def whole_pages(size: int) -> int:
    return (size + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


def pages(value: object, name: str, smallest: int) -> int:
    """A hostile number that has to be whole pages inside of a guest's address space."""
    number: int = value_of(63, value, name)
    if number % PAGE_BYTES or not smallest <= number <= GPA_END:
        raise StateError(f"{name} is {number:#x}, no whole pages")
    return number


def listed(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise StateError(f"{name} is {shown(value)}, no list")
    return value


def read_into(file: SnapshotFile, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        try:
            got = posix.preadv(file.fd, [view[done:]], offset + done)
        except OSError as error:
            raise HostError(f"snapshot {file.path}: {error.strerror}") from None
        if not got:
            raise StateError(f"snapshot {file.path} is damaged: it was cut off")
        done += got


def joined(runs: Iterable[Run]) -> list[Run]:
    """In order, those that touch or overlap as one."""
    found: list[Run] = []
    for start, size in sorted(runs):
        if found and start <= found[-1][0] + found[-1][1]:
            first = found[-1][0]
            found[-1] = first, max(found[-1][1], start + size - first)
        else:
            found.append((start, size))
    return found


def touched(region: RamRegion, *, written_only: bool) -> list[Run]:
    """What the process has touched of a region; all of it where the kernel does not tell."""
    try:
        fd = posix.open("/proc/self/pagemap", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return [(0, region.size_bytes)]
    runs: list[Run] = []
    try:
        first, count = region.host_address // PAGE_BYTES, region.size_bytes // PAGE_BYTES
        step = PAGEMAP_BYTES // ENTRY_BYTES
        for at in range(0, count, step):
            entries = posix.pread(fd, min(step, count - at) * ENTRY_BYTES, (first + at) * ENTRY_BYTES)
            if len(entries) < min(step, count - at) * ENTRY_BYTES:
                return [(0, region.size_bytes)]
            runs += [(at * PAGE_BYTES + start, size) for start, size in touched_runs(entries, written_only)]
    finally:
        posix.close(fd)
    return runs


def in_use(region: RamRegion) -> list[Run]:
    """What the process has touched of a region, in no more runs than a manifest has."""
    shared = region.fd >= 0
    runs = file_data(region.fd, 0, region.size_bytes) if shared else touched(region, written_only=False)
    gap = NEAR_BYTES
    while len(runs := nearly_joined(runs, gap)) > MOST_RUNS:
        gap *= 4
    return runs


def nearly_joined(runs: Iterable[Run], gap: int) -> list[Run]:
    """In order, those that are at most ``gap`` apart as one."""
    found: list[Run] = []
    for start, size in joined(runs):
        if found and start - (found[-1][0] + found[-1][1]) <= gap:
            found[-1] = found[-1][0], start + size - found[-1][0]
        else:
            found.append((start, size))
    return found


def candidates(region: RamRegion, origin: SnapshotPiece | None, base: SnapshotPiece | None) -> list[Run]:
    """Where the region may hold something that has to be written: what is no zero, or with ``base`` no page of its.

    ``origin`` is where its memory came from, if it came from a snapshot.
    """
    if region.fd >= 0:
        mine = file_data(region.fd, 0, region.size_bytes)
    elif origin is None:
        mine = touched(region, written_only=False)
    else:
        mine = touched(region, written_only=True)
        if base is not None and base.file is origin.file:
            return mine
        mine = [*mine, *origin.data()]
    return joined([*mine, *(base.data() if base is not None else ())])


def write_piece(
    file: Writer, region: RamRegion, origin: SnapshotPiece | None, base: SnapshotPiece | None
) -> dict[str, Any]:
    """The entry of one region, whose pages are in the file then."""
    used = in_use(region) if file.lasting else []  # before all of it is read
    runs: list[list[int]] = []
    offset = file.reserve(region.size_bytes) if base is None else 0
    before = base.map() if base is not None else None
    for at, size in candidates(region, origin, base):
        for start, length in data_runs(region, before, at, size):
            place = offset + start if base is None else file.reserve(length)
            with memoryview(region)[start : start + length] as view:
                file.write(place, view)
            if base is not None:
                runs.append([start, length, place])
    entry = {"gpa": region.gpa, "size": region.size_bytes, "offset": offset, "runs": runs, "sums": b""}
    return {**entry, "used": [list(run) for run in used]}


# -- checksums ---------------------------------------------------------------------------------------------------------


def sums_bytes(size: int, of_runs: bool) -> int:
    """The most that the checksums of ``size`` bytes take: one for each SUM_BYTES, or one a run, of a page or more."""
    return (size // PAGE_BYTES if of_runs else -(-size // SUM_BYTES)) * CRC_BYTES


def piece_sums(fd: int, offset: int, size: int) -> bytes:
    """A CRC-32 for each SUM_BYTES of a piece, little endian. Holes are zeros, and are not read."""
    sums = {}
    for start, length in file_data(fd, offset, size):
        for n in range((start - offset) // SUM_BYTES, -(-(start + length - offset) // SUM_BYTES)):
            if n not in sums:
                at = n * SUM_BYTES
                sums[n] = crc32(posix.pread(fd, min(SUM_BYTES, size - at), offset + at))
    of_hole = crc32(bytes(SUM_BYTES))
    last = -(-size // SUM_BYTES) - 1
    at_end = crc32(bytes(size - last * SUM_BYTES))
    return b"".join(
        sums.get(n, at_end if n == last else of_hole).to_bytes(CRC_BYTES, "little") for n in range(last + 1)
    )


def run_sums(fd: int, runs: Iterable[Sequence[int]]) -> bytes:
    """A CRC-32 for each run of a difference."""
    sums = []
    for _start, size, offset in runs:
        crc = 0
        for at in range(0, size, SUM_BYTES):
            crc = crc32(posix.pread(fd, min(SUM_BYTES, size - at), offset + at), crc)
        sums.append(crc.to_bytes(CRC_BYTES, "little"))
    return b"".join(sums)
