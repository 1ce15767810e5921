"""Tables: an image's L1 table and those of its L2 tables that are in memory, a bounded number of bytes.

What has changed is written by ``co_write``; the driver sees to the order (driver.py). Everything here that awaits is
called with the image's CoMutex held.
"""

from __future__ import annotations

from errno import EIO

from pyvmm.block.formats.qcow2.cluster_map import ClusterMap
from pyvmm.block.formats.qcow2.entries import COPIED, ENTRY_BYTES, OFFSET_MASK, SECTOR
from pyvmm.block.formats.qcow2.refcounts import big_endian
from pyvmm.block.formats.qcow2.transfer import Dirty, Failed, co_load, co_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Awaitable, Callable

    from pyvmm.block.driver import ProtocolDriver
    from pyvmm.block.formats.qcow2.header import Header
    from pyvmm.block.formats.qcow2.refcounts import Refcounts

CACHE_BYTES = 32 << 20  # the tables of 256 GiB in clusters of 64 KiB
LEAST_TABLES = 4


class Table:
    """An L2 table in memory; ``offset``: where it is in the file, 0 of one that is not there and maps nothing."""

    __slots__ = ("data", "dirty", "offset")

    def __init__(self, data: bytearray, offset: int) -> None:
        self.data = data
        self.offset = offset
        self.dirty = Dirty()


class Tables:
    """``l1``: the bytes of the L1 table at ``l1_offset``. ``co_write_back`` brings all that has changed into the file,
    in order.
    """

    def __init__(
        self,
        file: ProtocolDriver,
        header: Header,
        l1: bytes,
        l1_offset: int,
        co_write_back: Callable[[], Awaitable[None]],
    ) -> None:
        self._file = file
        self.refcounts: Refcounts | None = None  # of an image that may be written
        self._co_write_back = co_write_back
        self.cluster = header.cluster_bytes
        self.per_table = self.cluster // ENTRY_BYTES
        self.l1: array[int] = big_endian(l1)
        self.l1_offset = l1_offset
        self.map = ClusterMap(len(self.l1), header.cluster_bits, header.external)
        self._nothing = bytearray(self.cluster)  # stands for tables that are not there
        self._tables: dict[int, Table] = {}
        self._hand: list[int] = []  # whose turn it is to be given up
        self._most = max(LEAST_TABLES, CACHE_BYTES // self.cluster)
        self.l1_dirty: set[int] = set()
        self._changed: set[int] = set()  # tables that have still to be written

    @property
    def dirty(self) -> bool:
        return bool(self.l1_dirty or self._changed)

    def place(self, offset: int) -> tuple[int, int]:
        """(number of the L2 table, of the entry in it) of the disk's byte ``offset``."""
        return divmod(offset // self.cluster, self.per_table)

    # -- looking ---------------------------------------------------------------------------------------------------

    async def co_table(self, index: int) -> Table:
        """The L2 table of that number, in memory and in the map. Failed where it can't be read."""
        table = self._tables.get(index)
        if table is not None:
            return table
        offset = self.offset_of(index)
        await self._co_make_room()
        if not offset:
            table = Table(self._nothing, 0)
            self._keep(index, table, True)
            return table
        table = Table(await co_load(self._file, offset, self.cluster), offset)
        self._keep(index, table, self.map.vet(table.data))
        return table

    def offset_of(self, index: int) -> int:
        """Where the file has that table; 0: nowhere. Failed for what can't be."""
        if index >= len(self.l1):
            raise Failed(EIO)
        entry = self.l1[index]
        offset = entry & OFFSET_MASK
        if entry & ~(COPIED | OFFSET_MASK) or offset % self.cluster or (offset and not self.in_file(offset)):
            raise Failed(EIO)
        return offset

    def in_file(self, offset: int) -> bool:
        """Whether a whole cluster of tables may be there."""
        refcounts = self.refcounts
        return offset + self.cluster <= max(self._file.size_bytes, refcounts.end if refcounts is not None else 0)

    def _keep(self, index: int, table: Table, trusted: bool) -> None:
        self._tables[index] = table
        self.map.put(index, table.data, trusted)

    async def _co_make_room(self) -> None:
        """Second chance: one that nobody has looked at since the last round is given up."""
        while len(self._tables) >= self._most:
            if not self._hand:
                self._hand = list(reversed(self._tables))
            index = self._hand.pop()
            table = self._tables.get(index)
            if table is None or not self.map.unused(index):
                continue
            if index in self._changed or index in self.l1_dirty:
                await self._co_write_back()
            self.map.drop(index)
            del self._tables[index]

    # -- changing ----------------------------------------------------------------------------------------------------

    async def co_own_table(self, index: int) -> Table:
        """As ``co_table``, one that only the active L1 table leads to: its entries may be changed."""
        table = await self.co_table(index)
        if table.offset and self.l1[index] & COPIED:
            return table
        assert self.refcounts is not None
        first, _ = await self.refcounts.co_take(1)
        self.refcounts.check_tables(first)
        self.refcounts.guard_tables(first)
        own = Table(bytearray(table.data), first * self.cluster)
        own.dirty.add(0, self.cluster, self.cluster)
        self._changed.add(index)
        self._keep(index, own, table.offset == 0 or self.map.vet(own.data))
        self.l1[index] = own.offset | COPIED
        self.l1_dirty.add(index)
        if table.offset:
            self.refcounts.free(table.offset // self.cluster)
        return own

    def set_entry(self, index: int, place: int, entry: int) -> None:
        """Of a table that ``co_own_table`` has given, with no await between."""
        self.map.set_entry(index, place, entry)
        self._changed.add(index)
        self._tables[index].dirty.add(place * ENTRY_BYTES, (place + 1) * ENTRY_BYTES, self.cluster)

    def drop(self, index: int) -> None:
        """The L1 table leads to it no more."""
        self.map.drop(index)
        del self._tables[index]
        self._changed.discard(index)
        self.l1[index] = 0
        self.l1_dirty.add(index)

    async def co_write(self) -> None:
        """L2 tables that have changed."""
        for index in sorted(self._changed):
            table = self._tables[index]
            low, high = table.dirty.low, table.dirty.high
            with memoryview(table.data)[low:high] as part:
                await co_store(self._file, table.offset + low, part)
            table.dirty.clear()
            self._changed.discard(index)

    async def co_write_l1(self) -> None:
        """Sectors of the L1 table that have changed."""
        per_sector = SECTOR // ENTRY_BYTES
        for sector in sorted({index // per_sector for index in self.l1_dirty}):
            entries = self.l1[sector * per_sector : (sector + 1) * per_sector]
            data = b"".join(entry.to_bytes(ENTRY_BYTES, "big") for entry in entries)
            await co_store(self._file, self.l1_offset + sector * SECTOR, data)
        self.l1_dirty.clear()

    def grow(self, entries: int, offset: int) -> None:
        """The L1 table has so many entries now, and is in the file at ``offset``."""
        self.map.resize(entries)
        self.l1.extend([0] * (entries - len(self.l1)))
        self.l1_offset = offset

    def close(self) -> None:
        self.map.clear()
        self._tables.clear()
