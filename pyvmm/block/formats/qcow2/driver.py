"""Qcow2Driver: a disk in a qcow2 image.

Where a guest's byte is stands in tables (tables.py). What of them is in memory and plain is answered by the map,
without a lock and mostly without Python (cluster_lane.pyx). All else is here, under the image's CoMutex wherever tables
change or are loaded; data moves outside of it. The backend keeps requests apart that share a cluster (``alignment``),
so a cluster that one is copying, filling or giving up is no other one's.

The order of writes, so that an end at any moment (kill -9, a power cut) leaves at most leaks:

1. A new cluster is counted in memory, and filled, whole. Then its entry changes in memory. Nothing is written yet.
2. ``co_write_back``, at a flush, when the machine comes to rest or a cache is full: refcounts; a barrier, which brings
   the data too; L2 tables; where there are new ones a barrier, and the L1 table.
3. Only after one more barrier the counts of what nothing leads to any more go down, and the space is given back.

Lazy refcounts may be postponed, and are not: they are exact, and the dirty bit is never set. One that another program
has left set is repaired before the first write.
"""

from __future__ import annotations

from errno import EIO

from pyvmm.block.formats.qcow2.cluster_map import ASK, BELOW, HERE, ZEROS
from pyvmm.block.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, compressed_at
from pyvmm.block.formats.qcow2.header import (
    RAW_EXTERNAL,
)
from pyvmm.block.formats.qcow2.image import Qcow2Image
from pyvmm.block.formats.qcow2.refcounts import Corrupt
from pyvmm.block.formats.qcow2.resize import co_grow, co_shrink
from pyvmm.block.formats.qcow2.transfer import Failed, co_load, co_read, co_write
from pyvmm.block.iov import IovSlice, fill_zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from pyvmm.block.driver import Iov
    from pyvmm.block.options import DriveOptions

PACKED = 4  # beside HERE, ZEROS, BELOW and ASK: a compressed cluster
MOST_UNPACKED_BYTES = 4 << 20
MOST_FREED = 4096  # ranges that wait for their counts to go down
MOST_ZEROS_BYTES = 1 << 20


class Qcow2Driver(Qcow2Image):
    """A disk in a qcow2 image: requests, cut at where the format has them. Made as Qcow2Image."""

    # -- reading ---------------------------------------------------------------------------------------------

    async def co_readv(self, offset: int, iov: Iov, length: int) -> int:
        host = self.map.lookup(False, offset, length)
        if host >= 0 and offset + length <= self.size_bytes:
            return await co_read(self._data, host, iov, length)
        inside = max(0, min(length, self.size_bytes - offset))
        if inside < length:
            fill_zeros(iov, inside, length)  # as the part of an overlay behind this one's end
        try:
            at = 0
            while at < inside:
                kind, host, run = self.map.runs(False, offset + at, inside - at)
                if kind == ASK:
                    kind, host, run = await self._co_look(offset + at, inside - at)
                with IovSlice(iov, at, at + run) as part:
                    ret = await self._co_read_run(kind, host, offset + at, part, run)
                if ret < 0:
                    return ret
                at += run
        except Failed as failed:
            return -failed.number
        return 0

    async def _co_look(self, offset: int, length: int) -> tuple[int, int, int]:
        """As ClusterMap.runs, with the table loaded; PACKED has the entry in the place of a host offset. Failed."""
        index, place = self.tables.place(offset)
        await self._co_lock()
        try:
            await self.tables.co_table(index)
            kind, host, run = self.map.runs(False, offset, length)
            if kind != ASK:
                return kind, host, run
            entry = self.map.entry(index, place)
        finally:
            self._mutex.release()
        if not entry & COMPRESSED or self.header.external:
            raise Failed(EIO)
        return PACKED, entry, min(length, self.cluster - offset % self.cluster)

    async def _co_read_run(self, kind: int, host: int, offset: int, iov: Iov, length: int) -> int:
        if kind == HERE:
            return await co_read(self._data, host, iov, length)
        if kind == PACKED:
            await self._co_read_packed(host, offset % self.cluster, iov)
            return 0
        there = 0
        if kind == BELOW and self.backing is not None:
            there = max(0, min(length, self.backing.size_bytes - offset))
        if there:
            with IovSlice(iov, 0, there) as part:
                ret = await self.backing.co_readv(offset, part, there)  # type: ignore[union-attr]
            if ret < 0:
                return ret
        fill_zeros(iov, there, length)
        return 0

    async def _co_read_packed(self, entry: int, into: int, iov: Iov) -> None:
        data = self._unpacked.get(entry)
        if data is None:
            offset, length = compressed_at(entry, self.header.cluster_bits)
            if offset >= self.map.end:
                raise Failed(EIO)
            data = self._read_packed(await co_load(self.file, offset, length), self.cluster)
            with self._context.lock:
                while len(self._unpacked) >= max(1, MOST_UNPACKED_BYTES // self.cluster):
                    del self._unpacked[next(iter(self._unpacked))]
                self._unpacked[entry] = data
        for view in iov:
            view[:] = data[into : into + len(view)]
            into += len(view)

    # -- writing ---------------------------------------------------------------------------------------------

    async def co_writev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        host = self.map.lookup(True, offset, length)
        if host >= 0:
            ret = await co_write(self._data, host, iov, length)
        else:
            ret = await self.co_changed(self._co_write(offset, iov, length))
        if ret < 0 or not fua:
            return ret
        return await self.co_flush()

    async def _co_write(self, offset: int, iov: Iov, length: int) -> None:
        at = 0
        while at < length:
            at += await self._co_write_run(offset + at, iov, at, length)

    async def _co_write_run(self, offset: int, iov: Iov, at: int, length: int) -> int:
        """Write the bytes of ``iov`` from ``at`` on, as far as their clusters lie in a row: how many."""
        await self._co_lock()
        try:
            index, place = self.tables.place(offset)
            await self.tables.co_table(index)
            self._check_writable()
            kind, host, run = self.map.runs(True, offset, length - at)
            if kind != HERE:
                place_host, clusters, taken = await self._co_take(index, place, offset, length - at)
        finally:
            self._mutex.release()
        if kind == HERE:
            with IovSlice(iov, at, at + run) as part:
                self._check(await co_write(self._data, host, part, run))
            return run
        begin = offset - offset % self.cluster
        run = min(length - at, begin + clusters * self.cluster - offset)
        try:
            await self._co_fill(begin, place_host, clusters, offset, iov, at, run)
            await self._co_link(index, place, place_host, clusters)
        except Failed:
            await self._co_give_back(place_host, taken)
            raise
        return run

    async def _co_take(self, index: int, place: int, offset: int, length: int) -> tuple[int, int, int]:
        """(host offset, clusters, how many of them are new) for the first clusters of these bytes, which can't be
        written where they are. The mutex is held.
        """
        want = -(-(offset % self.cluster + length) // self.cluster)
        want = min(want, self.tables.per_table - place)
        entry = self.map.entry(index, place)
        self._check_entry(entry, offset - offset % self.cluster)
        if self.header.external:
            return offset - offset % self.cluster, 1, 0
        if entry & COPIED and entry & ZERO and entry & OFFSET_MASK and not entry & COMPRESSED:
            return entry & OFFSET_MASK, 1, 0  # space that was kept for it
        count = 1
        while count < want:
            entry = self.map.entry(index, place + count)
            if entry & COPIED:
                break
            self._check_entry(entry, 0)
            count += 1
        first, count = await self.refcounts.co_take(count)
        self.map.end = max(self.map.end, (first + count) * self.cluster)
        return first * self.cluster, count, count

    def _check_entry(self, entry: int, cluster: int) -> None:
        """Corrupt where an entry is none, or leads to the image's own tables."""
        if entry & COMPRESSED:
            if self.header.external or entry & COPIED:
                raise Corrupt
            return
        host = entry & OFFSET_MASK
        if entry & ~(COPIED | OFFSET_MASK | ZERO) or host % self.cluster:
            raise Corrupt
        if entry & ZERO and self.header.version < 3:
            raise Corrupt
        if self.header.external:
            if host and host != cluster:
                raise Corrupt
        elif host and (host >= self.map.end or self.map.guarded(host)):
            raise Corrupt

    async def _co_fill(
        self, begin: int, host: int, clusters: int, offset: int, iov: Iov, at: int, length: int
    ) -> None:
        """Whole clusters: the guest's bytes, with what was there before and behind."""
        end = begin + clusters * self.cluster
        if self.header.external:
            end = max(offset + length, min(end, self.size_bytes))  # that file is not made longer than the disk
        with memoryview(bytearray(offset - begin)) as before, memoryview(bytearray(end - offset - length)) as behind:
            for piece, where in ((before, begin), (behind, offset + length)):
                if len(piece):
                    self._check(await self.co_readv(where, [piece], len(piece)))
            with IovSlice(iov, at, at + length) as part:
                whole = [*([before] if len(before) else ()), *part, *([behind] if len(behind) else ())]
                self._check(await co_write(self._data, host, whole, end - begin))

    async def _co_give_back(self, host: int, taken: int) -> None:
        if not taken:
            return
        await self._co_own()
        try:
            await self.refcounts.co_give_back(host // self.cluster, taken)
        finally:
            self._mutex.release()

    async def _co_link(self, index: int, place: int, host: int, clusters: int) -> None:
        """The clusters are filled: the table leads to them from now on."""
        await self._co_own()
        try:
            await self.tables.co_own_table(index)
            for n in range(clusters):
                before = self.map.entry(index, place + n)
                self.tables.set_entry(index, place + n, (host + n * self.cluster) | COPIED)
                if before & OFFSET_MASK != host + n * self.cluster or before & COMPRESSED:
                    self._free(before)
        finally:
            self._mutex.release()

    def _free(self, entry: int) -> None:
        """No entry of the active tables is this one any more."""
        if self.header.external:
            return
        if entry & COMPRESSED:
            offset, length = compressed_at(entry, self.header.cluster_bits)
            first, last = offset // self.cluster, (offset + length - 1) // self.cluster
            for cluster in range(first, last + 1):
                self.refcounts.free(cluster)
        elif entry & OFFSET_MASK:
            self.refcounts.free((entry & OFFSET_MASK) // self.cluster)

    # -- zeros and discards ----------------------------------------------------------------------------------

    async def co_discard(self, offset: int, length: int) -> int:
        """Whole clusters are given back, and read as zeros from then on; others stay as they are."""
        begin, end = self._whole(offset, length)
        if begin >= end:
            return 0
        if self.header.autoclear & RAW_EXTERNAL:
            await self._data.co_pdiscard(begin, end - begin)
            return 0
        if self.header.version < 3 and self.backing is not None:
            return 0  # what is below would show again
        ret = await self.co_changed(self._co_empty(begin, end, True))
        if ret == 0 and self.header.external:
            await self._data.co_pdiscard(begin, end - begin)
        return ret

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """(begin, end) of the clusters that are all inside; the disk's end ends one."""
        end = min(offset + length, self.size_bytes)
        if end < self.size_bytes:
            end -= end % self.cluster
        return offset + -offset % self.cluster, end

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return 0
        ret = await self.co_changed(self._co_zero(offset, length, may_unmap))
        return await self.co_flush() if fua and ret >= 0 else ret

    async def _co_zero(self, offset: int, length: int, may_unmap: bool) -> None:
        begin, end = self._whole(offset, length)
        as_data = self.header.autoclear & RAW_EXTERNAL or (self.header.version < 3 and self.backing is not None)
        if as_data or begin >= end:
            await self._co_write_zeros(offset, offset + length)
            return
        await self._co_write_zeros(offset, begin)
        # Without a zero bit (version 2) a cluster that is not there is one of zeros.
        await self._co_empty(begin, end, may_unmap or self.header.version < 3)
        await self._co_write_zeros(end, offset + length)

    async def _co_write_zeros(self, offset: int, end: int) -> None:
        """As data, but for clusters that read so anyway."""
        while offset < end:
            length = min(MOST_ZEROS_BYTES, end - offset)
            kind, _, run = self.map.runs(False, offset, length)
            if kind == ZEROS or (kind == BELOW and self.backing is None):
                offset += run
                continue
            with memoryview(bytes(length)) as zeros:
                self._check(await self.co_writev(offset, [zeros], length, False))
            offset += length

    async def _co_empty(self, begin: int, end: int, give_back: bool) -> None:
        """Clusters that read as zeros from now on."""
        while begin < end:
            await self._co_lock()
            try:
                begin = await self._co_empty_some(begin, end, give_back)
                if len(self.refcounts.freed) > MOST_FREED:
                    await self.co_write_back()
            finally:
                self._mutex.release()

    async def _co_empty_some(self, begin: int, end: int, give_back: bool) -> int:
        """Those of one table: where the next one's begin. The mutex is held."""
        self._check_writable()
        index, place = self.tables.place(begin)
        last = min(self.tables.per_table, place + -(-(end - begin) // self.cluster))
        table = await self.tables.co_table(index)
        empty = ZERO if self.header.version >= 3 and self.backing is not None else 0
        if not empty and not table.offset:
            return begin + (last - place) * self.cluster  # nothing is there
        await self.tables.co_own_table(index)
        for n in range(place, last):
            entry = self.map.entry(index, n)
            self._check_entry(entry, begin + (n - place) * self.cluster)
            keeps = not give_back and entry & COPIED and entry & OFFSET_MASK and not entry & COMPRESSED
            wanted = entry | ZERO if keeps else empty
            if entry == wanted:
                continue
            self.tables.set_entry(index, n, wanted)
            if not keeps:
                self._free(entry)
        return begin + (last - place) * self.cluster

    async def co_drop_table(self, index: int) -> None:
        """An L2 table and all that it maps is given back: the disk is about to end before."""
        await self.co_with_tables(lambda: self._co_dropped(index))

    async def _co_dropped(self, index: int) -> None:
        self._check_writable()
        table = await self.tables.co_table(index)
        for place in range(self.tables.per_table):
            entry = self.map.entry(index, place)
            self._check_entry(entry, (index * self.tables.per_table + place) * self.cluster)
            self._free(entry)
        self.tables.drop(index)
        if table.offset:
            self.refcounts.free(table.offset // self.cluster)

    # -- its size --------------------------------------------------------------------------------------------

    def grow(self, options: DriveOptions, size_bytes: int | None) -> None:
        if size_bytes is None or size_bytes <= self.size_bytes:
            return
        self._resized(co_grow(self, size_bytes))

    def shrink(self, size_bytes: int) -> None:
        self._resized(co_shrink(self, size_bytes))

    def _resized(self, change: Coroutine[Any, Any, None]) -> None:
        ret = self._context.run(self.co_changed(change))
        if ret < 0:
            from os import strerror

            raise OSError(-ret, strerror(-ret))

    def peek(self, offset: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, self.size_bytes - offset)))
        with memoryview(data) as view:
            ret = self._context.run(self.co_readv(offset, [view], len(data))) if data else 0
        return bytes(data) if ret >= 0 else b""
