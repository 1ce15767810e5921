"""Qcow2Image: a qcow2 image that is open, with its tables: what driver.py's requests stand on.

It is opened and claimed, given up and closed here, and what has changed of its tables is brought into the file, in the
order that driver.py tells of.
"""

from __future__ import annotations

from errno import ECANCELED, EIO

from pyvmm.block.co_lock import CoMutex
from pyvmm.block.driver import SECTOR_BYTES, FormatDriver
from pyvmm.block.formats.qcow2.check import repair
from pyvmm.block.formats.qcow2.compressed import unpacker
from pyvmm.block.formats.qcow2.entries import ENTRY_BYTES
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
from pyvmm.block.formats.qcow2.snapshots import chosen, read_snapshots
from pyvmm.block.formats.qcow2.tables import Tables
from pyvmm.block.formats.qcow2.transfer import Failed, co_store
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.driver import ProtocolDriver
    from pyvmm.block.formats.qcow2.cluster_lane import ClusterLane
    from pyvmm.block.formats.qcow2.cluster_map import ClusterMap
    from pyvmm.block.formats.qcow2.header import Header
    from pyvmm.block.formats.qcow2.snapshots import InternalSnapshot
    from pyvmm.block.lane import Lane

INCOMPATIBLE_AT, AUTOCLEAR_AT = 72, 88  # in the header
USUAL_HEADER_BYTES, USUAL_CLUSTER_BITS = 65536, b"\0\0\0\x10"  # and its field's bytes
FILE_LANE_BYTES = 1 << 62


class Qcow2Image(FormatDriver):
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

    def about(self) -> dict[str, Any]:
        return self.header.about()

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
            (header.snapshots_offset, snapshots[-1].end - header.snapshots_offset if snapshots else header.snapshots),
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
        if file is None or file.waits:
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

    # -- what every change begins and ends with ------------------------------------------------------------------

    async def _co_lock(self) -> None:
        ret = await self._mutex.acquire()
        if ret < 0:
            raise Failed(-ret)

    async def _co_own(self) -> None:
        """The mutex, whatever comes: what was begun has to be ended, also of a request that is cancelled."""
        while True:
            ret = await self._mutex.acquire()
            if ret != -ECANCELED:
                return

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

    def _check_writable(self) -> None:
        if self._broken or not self._writable:
            raise Failed(EIO)

    @staticmethod
    def _check(ret: int) -> None:
        if ret < 0:
            raise Failed(-ret)

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

    # -- the end ------------------------------------------------------------------------------------------------

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
