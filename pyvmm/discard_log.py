"""DiscardLog: which pages of a machine's memory have gone back to the host since the last look.

Such a page is zeros afterwards, or what a file has behind it, and a guest may count on the zeros (free page reporting,
OASIS virtio 1.2, 5.5.6.7), but nobody has written it: the kernel's page tables, which a WriteLog looks at, do not
always tell (of memory that a file is behind they do not). So who gives memory back does: GuestMemory.discard.
"""

from __future__ import annotations

from pyvmm.guest_memory import PAGE_BYTES
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from pyvmm.guest_memory import RamRegion

MARK = b"\1"


class DiscardLog:
    """Of these RamRegions, from now until ``close``. A byte for each page of a region of which something went back: a
    guest may give the same pages again and again.
    """

    def __init__(self, regions: Sequence[RamRegion]) -> None:
        self._lock = Lock()
        self._marks: dict[int, bytearray] = {}  # by gpa
        self._regions = list(regions)
        for region in self._regions:
            region.hear_discards(self._note)

    def _note(self, region: RamRegion, offset: int, size: int) -> None:
        first, count = offset // PAGE_BYTES, size // PAGE_BYTES
        with self._lock:
            if region.gpa not in self._marks:
                self._marks[region.gpa] = bytearray(region.size_bytes // PAGE_BYTES)
            self._marks[region.gpa][first : first + count] = MARK * count

    def take(self, region: RamRegion) -> list[tuple[int, int]]:
        """(offset, size) in bytes of each run of pages since the last call for this region, or since the beginning."""
        with self._lock:
            marks = self._marks.pop(region.gpa, b"")
        runs = []
        start = marks.find(MARK)
        while start >= 0:
            end = marks.find(b"\0", start)
            end = len(marks) if end < 0 else end
            runs.append((start * PAGE_BYTES, (end - start) * PAGE_BYTES))
            start = marks.find(MARK, end)
        return runs

    def close(self) -> None:
        """Nobody is told any more; again is no harm."""
        for region in self._regions:
            region.hear_no_discards(self._note)
        self._regions = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
