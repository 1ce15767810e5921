"""Rounds: a machine's memory is written down while its guest runs, so that it stands for the rest only.

All of it once, then what has been written meanwhile, again and again until that is little, or does not get less: as
live migration does it (QEMU's migration/ram.c). But what is written is told by the kernel's page tables (write_log.pyx)
and not by KVM's dirty log, which knows nothing of what devices write.
"""

from __future__ import annotations

from pyvmm.discard_log import DiscardLog
from pyvmm.memory_pages import data_runs
from pyvmm.snapshot_piece import joined
from pyvmm.write_log import WriteLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Protocol, Self

    from pyvmm.guest_memory import RamRegion
    from pyvmm.machine_state import MachineState

    class Saving(Protocol):
        """Where memory goes: a file (snapshot.py), or another process (migration.py)."""

        def write_memory(self, regions: Sequence[RamRegion]) -> None: ...
        def rewrite(self, region: RamRegion, runs: Iterable[tuple[int, int]]) -> int: ...
        def clear(self, region: RamRegion, runs: Iterable[tuple[int, int]]) -> int: ...

# For so much the guest may stand: that is a few milliseconds, into the page cache.
REST_BYTES = 2 << 20
MOST_ROUNDS = 16
# A round that finds more than this part of what the one before found will not be followed by a better one.
LEAST_GAIN = 0.8


class MemoryWhileItRuns:
    """``with MemoryWhileItRuns(saving, state) as the_rest``: most of it is written as the block begins, and
    ``the_rest()`` writes what has changed since: call it while the machine stands. Where it does not run, where what
    is changed can't be told (an older kernel, a back end in another process), and where it is differences from a base
    and not the ``whole``, that writes nothing and all is left for ``saving.take``.
    """

    def __init__(self, saving: Saving, state: MachineState, *, whole: bool = True) -> None:
        self._saving = saving
        self._regions = state.memory()
        self._log: WriteLog | None = None
        if whole and state.runs() and not state.others_write():
            try:
                self._log = WriteLog(self._regions)
            except OSError:
                return
            self._discards = DiscardLog(self._regions)

    def __enter__(self) -> Self:
        try:
            self._run()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _run(self) -> None:
        if self._log is None:
            return
        self._saving.write_memory(self._regions)
        before = sum(region.size_bytes for region in self._regions)
        for _ in range(MOST_ROUNDS):
            found = self()
            if found <= REST_BYTES or found > LEAST_GAIN * before:
                return
            before = found

    def __call__(self) -> int:
        """Write what has changed since the last time: how many bytes that is."""
        return sum(self._changed(region) for region in self._regions)

    def _changed(self, region: RamRegion) -> int:
        if self._log is None:
            return 0
        discarded = self._discards.take(region)  # first: what is written after its discard is in the log now or later
        written = self._log.take(region)
        data: list[tuple[int, int]] = []
        zeros: list[tuple[int, int]] = []
        if region.fd >= 0:
            zeros += discarded  # not looked at: where a file shows holes, a look fills them
        else:
            written = joined([*discarded, *written])
        for start, size in written:
            found = data_runs(region, None, start, size)
            data += found
            zeros += gaps(found, start, size)
        return self._saving.clear(region, zeros) + self._saving.rewrite(region, data)

    def __exit__(self, *exc: object) -> None:
        if self._log is not None:
            self._log.close()
            self._discards.close()


def gaps(found: Iterable[tuple[int, int]], start: int, size: int) -> list[tuple[int, int]]:
    """What of these ``size`` bytes from ``start`` on is none of ``found``, which are inside and in order."""
    between = []
    at = start
    for first, length in [*found, (start + size, 0)]:
        if first > at:
            between.append((at, first - at))
        at = first + length
    return between
