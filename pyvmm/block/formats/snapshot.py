"""snapshot=on: a disk that keeps what the guest writes apart from the image, which stays as it is.

Two disks of one size: ``base``, the image, and ``top``, a sparse file for what was written. A byte a cluster says which
of the two has it; where a write fills a cluster of top only in part, the rest of it comes from base first. So the map's
size goes by the disk's and not by what the guest does, and where a byte is in top needs no looking up. Nothing in top
outlives its process, so flushes are done at once (QEMU's -snapshot ignores them too).

The backend keeps requests that share a cluster apart (``alignment``), so none fills a cluster while another writes to
it.
"""

from __future__ import annotations

import mmap
import os

from pyvmm.block.driver import FormatDriver
from pyvmm.block.iov import ZEROS, IovSlice
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.block.driver import Iov

CLUSTER_BYTES = 64 << 10  # qcow2's
MAX_CLUSTER_BYTES = 1 << 20
MAX_MAP_BYTES = 64 << 20  # 4 TiB in the smallest clusters, 64 TiB in the largest
DEFAULT_DIRECTORY = "/var/tmp"  # the file may become large, and /tmp may be memory

BASE, TOP = b"\0", b"\1"  # who has a cluster


def temporary_directory() -> str:
    return os.environ.get("TMPDIR") or DEFAULT_DIRECTORY


def cluster_size(size_bytes: int) -> int:
    """The least power of two with which the map is small enough. ConfigError where that is too much."""
    cluster = CLUSTER_BYTES
    while -(-size_bytes // cluster) > MAX_MAP_BYTES:
        cluster *= 2
    if cluster > MAX_CLUSTER_BYTES:
        most_tib = MAX_MAP_BYTES * MAX_CLUSTER_BYTES >> 40
        raise ConfigError(f"snapshot=on takes disks up to {most_tib} TiB, not {size_bytes} bytes: leave it out")
    return cluster


class SnapshotDriver(FormatDriver):
    """``base`` is never written. Both drivers belong to this one, and have its size."""

    def __init__(self, base: FormatDriver, top: FormatDriver) -> None:
        self._base = base
        self._top = top
        self.size_bytes = base.size_bytes
        self.format = base.format
        self.alignment = self._cluster = cluster_size(base.size_bytes)
        # Memory that nobody has touched costs nothing.
        self._map = mmap.mmap(-1, -(-base.size_bytes // self._cluster))

    # -- where a byte is --------------------------------------------------------------------------------------

    def _in_top(self, offset: int) -> bool:
        cluster = offset // self._cluster
        return self._map[cluster : cluster + 1] == TOP

    def _runs(self, offset: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """(top has it, begin, end) of the pieces of a range that are in one of the two."""
        while offset < end:
            in_top = self._in_top(offset)
            last = -(-end // self._cluster)
            other = self._map.find(BASE if in_top else TOP, offset // self._cluster, last)
            upto = end if other < 0 else other * self._cluster
            yield in_top, offset, upto
            offset = upto

    def _give_to_top(self, offset: int, end: int) -> None:
        first, last = offset // self._cluster, -(-end // self._cluster)
        self._map[first:last] = TOP * (last - first)

    def _lacks(self, offset: int, end: int) -> tuple[int, int]:
        """(begin, end) of the range, with the parts of its first and last cluster that have to come from base first."""
        begin, past = offset, end
        if offset % self._cluster and not self._in_top(offset):
            begin -= offset % self._cluster
        if end % self._cluster and end < self.size_bytes and not self._in_top(end):
            past = min(self.size_bytes, end + -end % self._cluster)
        return begin, past

    # -- requests ---------------------------------------------------------------------------------------------

    async def co_readv(self, offset: int, iov: Iov, length: int) -> int:
        end = offset + length
        for in_top, begin, upto in self._runs(offset, end):
            driver = self._top if in_top else self._base
            if upto - begin == length:
                return await driver.co_readv(offset, iov, length)
            with IovSlice(iov, begin - offset, upto - offset) as part:
                ret = await driver.co_readv(begin, part, upto - begin)
            if ret < 0:
                return ret
        return 0

    async def co_writev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        end = offset + length
        begin, past = self._lacks(offset, end)
        with memoryview(bytearray(offset - begin)) as before, memoryview(bytearray(past - end)) as behind:
            for piece, at in ((before, begin), (behind, end)):
                if len(piece):
                    ret = await self._base.co_readv(at, [piece], len(piece))
                    if ret < 0:
                        return ret
            whole = [*([before] if len(before) else ()), *iov, *([behind] if len(behind) else ())]
            ret = await self._top.co_writev(begin, whole, past - begin, False)
        if ret < 0:
            return ret
        self._give_to_top(begin, past)
        return 0

    async def co_flush(self) -> int:
        return 0

    async def co_discard(self, offset: int, length: int) -> int:
        """The space of what top has of it is given back, but it stays top's, as a hole: bytes of base that the guest
        has overwritten must not show again.
        """
        for in_top, begin, upto in self._runs(offset, offset + length):
            if in_top:
                ret = await self._top.co_discard(begin, upto - begin)
                if ret < 0:
                    return ret
        return 0

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        """Holes in top, for whole clusters and for the parts of those that it has; the other parts are written."""
        end = offset + length
        begin, past = self._lacks(offset, end)
        inner = offset if begin == offset else min(end, offset + -offset % self._cluster)
        last = end if past == end else max(inner, end - end % self._cluster)
        for at, upto in ((offset, inner), (last, end)):
            if at < upto:
                ret = await self._write_zeros(at, upto - at)
                if ret < 0:
                    return ret
        if inner >= last:
            return 0
        ret = await self._top.co_write_zeroes(inner, last - inner, True, False)
        if ret >= 0:
            self._give_to_top(inner, last)
        return ret

    async def _write_zeros(self, offset: int, length: int) -> int:
        """Write less than a cluster of zeros, as data."""
        iov = [memoryview(ZEROS)[: min(len(ZEROS), length - at)] for at in range(0, length, len(ZEROS))]
        try:
            return await self.co_writev(offset, iov, length, False)
        finally:
            for view in iov:
                view.release()

    def peek(self, offset: int, length: int) -> bytes:
        """Before the guest runs all of it is base's."""
        return self._base.peek(offset, length)

    def ends_with_process(self) -> bool:
        return self._map.find(TOP) >= 0

    def ending(self) -> None:
        self._base.ending()

    def close(self) -> None:
        self._base.close()
        self._top.close()
        self._map.close()

    def abandon(self) -> None:
        self._base.abandon()
        self._top.abandon()
        self._map.close()
