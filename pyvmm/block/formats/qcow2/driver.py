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

from errno import ECANCELED, EIO

from pyvmm.block.co_lock import CoMutex
from pyvmm.block.driver import SECTOR_BYTES, FormatDriver
from pyvmm.block.formats.qcow2.check import repair
from pyvmm.block.formats.qcow2.cluster_map import ASK, BELOW, HERE, ZEROS
from pyvmm.block.formats.qcow2.compressed import unpacker
from pyvmm.block.formats.qcow2.entries import COMPRESSED, COPIED, ENTRY_BYTES, OFFSET_MASK, ZERO, compressed_at
from pyvmm.block.formats.qcow2.header import (
    BITMAPS,
    CORRUPT,
    DIRTY,
    MOST_HEADER_BYTES,
    RAW_EXTERNAL,
    Wrong,
    read_header,
)
from pyvmm.block.formats.qcow2.refcounts import Corrupt, Refcounts
from pyvmm.block.formats.qcow2.resize import co_grow, co_shrink
from pyvmm.block.formats.qcow2.snapshots import chosen, read_snapshots
from pyvmm.block.formats.qcow2.tables import Tables
from pyvmm.block.formats.qcow2.transfer import Failed, co_load, co_read, co_store, co_write
from pyvmm.block.iov import IovSlice, fill_zeros
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.driver import Iov, ProtocolDriver
    from pyvmm.block.formats.qcow2.cluster_lane import ClusterLane
    from pyvmm.block.formats.qcow2.cluster_map import ClusterMap
    from pyvmm.block.formats.qcow2.header import Header
    from pyvmm.block.formats.qcow2.snapshots import InternalSnapshot
    from pyvmm.block.lane import Lane
    from pyvmm.block.options import DriveOptions

PACKED = 4  # beside HERE, ZEROS, BELOW and ASK: a compressed cluster
INCOMPATIBLE_AT, AUTOCLEAR_AT = 72, 88  # in the header
USUAL_HEADER_BYTES, USUAL_CLUSTER_BITS = 65536, b"\0\0\0\x10"  # and its field's bytes
MOST_UNPACKED_BYTES = 4 << 20
MOST_FREED = 4096  # ranges that wait for their counts to go down
MOST_ZEROS_BYTES = 1 << 20
FILE_LANE_BYTES = 1 << 62


class Qcow2Driver(FormatDriver):
    """``file`` is the image, ``data`` where its data is, the same or an external file; ``backing`` the disk below, or
    None. They belong to this one. ``later``: somebody else may be writing the image until ``claim``. ``snapshot``: the
    ID or name of an internal one, whose disk this is then. ``barriers``: False where nothing has to be stable.
    """

    format = "qcow2"

    def __init__(
        self,
        path: str,
        file: ProtocolDriver,
        context: AioContext,
        *,
        read_only: bool,
        later: bool = False,
        snapshot: str | None = None,
        barriers: bool = True,
    ) -> None:
        self.path = path
        self.file = self._data = file
        self._context = context
        self.read_only = read_only
        self._snapshot = snapshot
        self._barriers = barriers
        self._mutex = CoMutex(context)
        self.backing: FormatDriver | None = None
        self._lane: ClusterLane | None = None
        self._unpacked: dict[int, bytes] = {}
        self._broken = False  # the image contradicts itself: nothing is written any more
        self._writable = not read_only and not later  # tables may be changed already
        self.header = self._read_header()
        self.alignment = self.cluster = self.header.cluster_bytes
        if file.alignment > self.cluster:
            raise ConfigError(
                f"the image {path} has clusters of {self.cluster} bytes, less than O_DIRECT takes here"
                f" ({file.alignment}): use cache=writeback or writethrough"
            )
        self._load()

    # -- opening ---------------------------------------------------------------------------------------------

    def _read_header(self) -> Header:
        head = self.file.peek(0, USUAL_HEADER_BYTES)
        if head[20:24] > USUAL_CLUSTER_BITS:
            head = self.file.peek(0, MOST_HEADER_BYTES)
        return read_header(self.path, head, self.file.size_bytes)

    def attach(self, backing: FormatDriver | None, data: ProtocolDriver | None) -> None:
        """The disk below, and the external file for the data: they are this one's from here on."""
        self.backing = backing
        if data is not None:
            self._data = data

    def _peek(self, offset: int, length: int, what: str) -> bytes:
        found = self.file.peek(offset, length)
        if len(found) != length:
            raise Wrong(self.path).why(f"its {what} is cut short, or can't be read")
        return found

    def _load(self) -> None:
        """Tables, as they are in the file now. ConfigError for what can't be."""
        header, file = self.header, self.file
        l1_offset, l1_entries, size = header.l1_offset, header.l1_entries, header.size
        if self._snapshot is not None:
            snapshots = read_snapshots(self.path, header, file.size_bytes, file.peek)
            one = chosen(self.path, snapshots, self._snapshot)
            l1_offset, l1_entries, size = one.l1_offset, one.l1_entries, one.size
        self.size_bytes = size - size % SECTOR_BYTES
        l1 = self._peek(l1_offset, l1_entries * ENTRY_BYTES, "L1 table")
        self.tables = Tables(file, header, l1, l1_offset, self.co_write_back)
        self.map: ClusterMap = self.tables.map
        self.map.end = file.size_bytes
        self._read_packed = unpacker(header.zstd)
        table = self._peek(
            header.refcount_table_offset, header.refcount_table_clusters * self.cluster, "refcount table"
        )
        self.refcounts = Refcounts(file, header, table, self.map, self.co_barrier)
        if self.read_only:
            return
        self.tables.refcounts = self.refcounts
        self.refcounts.end = file.size_bytes
        self._guard(l1, table)
        if self._writable:
            self._begin_writing()

    def _guard(self, l1: bytes, table: bytes) -> None:
        """The image's own tables, to which no entry for data may lead."""
        from array import array

        header, cluster = self.header, self.cluster
        own = array("Q", [0])
        snapshots: list[InternalSnapshot] = []
        try:
            snapshots = read_snapshots(self.path, header, self.file.size_bytes, self.file.peek)
        except ConfigError:
            pass  # nobody will read a table that is none
        for offset, length in (
            *((one.l1_offset, one.l1_entries * ENTRY_BYTES) for one in snapshots),
            (header.l1_offset, header.l1_entries * ENTRY_BYTES),
            (header.refcount_table_offset, header.refcount_table_clusters * cluster),
            (header.snapshots_offset, header.snapshots),
        ):
            own.extend(range(offset, offset + length, cluster))
        self.map.guard(own, [l1, table])

    def _begin_writing(self) -> None:
        """The image is ours to write: what another program has left undone is done first."""
        header = self.header
        if header.incompatible & CORRUPT:
            raise ConfigError(
                f"the image {self.path} is marked as corrupt and may only be read: repair it with `pyvmm image check"
                " --repair`, or give read-only=on"
            )
        if header.incompatible & DIRTY:
            repair(self, self._context)
        known = header.autoclear & RAW_EXTERNAL
        if header.version >= 3 and header.autoclear != known:
            # Bitmaps are not kept up to date, and whoever knows the other bits must look anew.
            self._store_now(AUTOCLEAR_AT, known)
            header.autoclear = known
            header.bitmaps = 0 if not header.autoclear & BITMAPS else header.bitmaps

    def _store_now(self, at: int, number: int) -> None:
        """A field of the header, before there are requests. ConfigError where it can't be written."""
        ret = self._context.run(self.co_store_field(at, number))
        if ret < 0:
            from os import strerror

            raise ConfigError(f"the image {self.path} can't be written ({strerror(-ret)}): give read-only=on")

    async def co_store_field(self, at: int, number: int) -> int:
        """One of the header's fields of 64 bits: 0, or a negative errno."""
        try:
            await co_store(self.file, at, number.to_bytes(8, "big"))
        except Failed as failed:
            return -failed.number
        return 0

    def claim(self) -> None:
        """Others may have written it meanwhile: all that is known of it is read anew."""
        self.file.claim()
        if self._data is not self.file:
            self._data.claim()
        if self.backing is not None:
            self.backing.claim()
        try:
            self.file.measure()
        except OSError:
            pass  # it has its size for good
        self.tables.close()
        self._unpacked.clear()
        before = self.header.backing, self.header.data_file, self.header.cluster_bits
        self.header = self._read_header()
        if before != (self.header.backing, self.header.data_file, self.header.cluster_bits):
            raise ConfigError(f"the image {self.path} was changed into another one meanwhile: start again")
        self._writable = not self.read_only
        self._load()
        if self._lane is not None:
            self.lane()

    def give_up(self) -> None:
        """Everything is in the file: the machine has come to rest (``co_settle``)."""
        if self.unsettled():
            raise ConfigError(f"the image {self.path} can't be written: its tables are not up to date")
        if self.backing is not None:
            self.backing.give_up()
        if self._data is not self.file:
            self._data.give_up()
        self.file.give_up()

    # -- the way past all of this ----------------------------------------------------------------------------

    def lane(self) -> Lane | None:
        file = self._data.lane(0, FILE_LANE_BYTES)
        if file is None:
            return None
        from pyvmm.block.formats.qcow2.cluster_lane import ClusterLane
        from pyvmm.block.lane import READS, WRITES

        below, below_bytes = None, 0
        if self.backing is not None:
            below, below_bytes = self.backing.lane(), self.backing.size_bytes
            if below is None and below_bytes:
                return None
            if below is not None:
                below.grant(READS)
        file.grant(READS if self.read_only else READS | WRITES)
        if self._lane is None:
            self._lane = ClusterLane(-1, 0, 0, self.size_bytes)
        self._lane.attach(self.map, file, below, below_bytes)
        return self._lane

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

    async def _co_lock(self) -> None:
        ret = await self._mutex.acquire()
        if ret < 0:
            raise Failed(-ret)

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

    async def co_changed(self, change: Awaitable[None]) -> int:
        """Its result; an image that turns out to contradict itself is marked, and not written any more."""
        try:
            await change
        except Corrupt:
            await self._co_mark_corrupt()
            return -EIO
        except Failed as failed:
            return -failed.number
        return 0

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

    def _check_writable(self) -> None:
        if self._broken or not self._writable:
            raise Failed(EIO)

    @staticmethod
    def _check(ret: int) -> None:
        if ret < 0:
            raise Failed(-ret)

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

    async def _co_own(self) -> None:
        """The mutex, whatever comes: what was begun has to be ended, also of a request that is cancelled."""
        while True:
            ret = await self._mutex.acquire()
            if ret != -ECANCELED:
                return

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

    # -- bringing it all into the file -----------------------------------------------------------------------

    def unsettled(self) -> bool:
        return self._writable and not self._broken and (self.tables.dirty or self.refcounts.dirty)

    async def co_settle(self) -> int:
        if not self.unsettled():
            return 0
        return await self.co_changed(self._co_settled())

    async def _co_settled(self) -> None:
        await self._co_lock()
        try:
            await self.co_write_back()
        finally:
            self._mutex.release()

    async def co_with_tables(self, work: Callable[[], Awaitable[None]]) -> None:
        """Something that changes more than a request does: alone, and with everything in the file before and after."""
        await self._co_lock()
        try:
            await self.co_write_back()
            await work()
            await self.co_write_back()
        finally:
            self._mutex.release()

    async def co_flush(self) -> int:
        ret = await self.co_settle()
        if ret == 0 and self._data is not self.file:
            ret = await self._data.co_flush()
        return await self.file.co_flush() if ret == 0 else ret

    async def co_barrier(self) -> None:
        """What was written before is on stable storage, before anything that is written from now on."""
        if not self._barriers:
            return
        if self._data is not self.file:
            self._check(await self._data.co_flush())
        self._check(await self.file.co_flush())

    async def co_write_back(self) -> None:
        """All that has changed in memory, in the order that is safe. The mutex is held."""
        refcounts, tables = self.refcounts, self.tables
        await refcounts.co_write()
        if tables.dirty:
            await self.co_barrier()
            await tables.co_write()
            if tables.l1_dirty:
                await self.co_barrier()
                await tables.co_write_l1()
        if refcounts.freed:
            await self.co_barrier()
            self.map.settle()  # whoever had looked up one of these clusters is done with it
            with self._context.lock:
                self._unpacked.clear()
            holes = await refcounts.co_apply_freed()
            await refcounts.co_write()
            for first, count in holes:
                await self.file.co_pdiscard(first * self.cluster, count * self.cluster)

    async def _co_mark_corrupt(self) -> None:
        """For whoever opens it next (qcow2.txt, corrupt bit)."""
        self._broken = True
        self.map.freeze()
        if self.header.version >= 3 and not self.header.incompatible & CORRUPT:
            self.header.incompatible |= CORRUPT
            await self.co_store_field(INCOMPATIBLE_AT, self.header.incompatible)

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

    def ending(self) -> None:
        if self.backing is not None:
            self.backing.ending()
        if self._data is not self.file:
            self._data.ending()
        self.file.ending()

    def close(self) -> None:
        self.tables.close()
        if self.backing is not None:
            self.backing.close()
        if self._data is not self.file:
            self._data.close()
        self.file.close()

    def abandon(self) -> None:
        if self.backing is not None:
            self.backing.abandon()
        if self._data is not self.file:
            self._data.abandon()
        self.file.abandon()
