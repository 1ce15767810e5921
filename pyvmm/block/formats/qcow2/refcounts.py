"""Refcounts: which clusters of the file are in use, and by how many (qcow2.txt, "Host cluster management").

Blocks are kept in memory, a bounded number of them. A count goes up in memory at once, and down only when nothing on
stable storage leads to the cluster any more (``free``, ``co_apply_freed``). So a block may be written at any time:
what is lost in between is a leak, and nobody takes a cluster that something still leads to.

Everything here is called with the image's CoMutex held.
"""

from __future__ import annotations

import sys
from errno import EFBIG, EIO

from pyvmm.block.formats.qcow2.entries import ENTRY_BYTES, MOST_HOST_OFFSET, MOST_REFCOUNT_TABLE_BYTES
from pyvmm.block.formats.qcow2.transfer import Dirty, Failed, co_load, co_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Awaitable, Callable

    from pyvmm.block.driver import ProtocolDriver
    from pyvmm.block.formats.qcow2.cluster_map import ClusterMap
    from pyvmm.block.formats.qcow2.header import Header

CACHE_BYTES = 4 << 20
LEAST_BLOCKS = 4
TABLE_PLACE = 48  # of refcount_table_offset and refcount_table_clusters in the header


def big_endian(data: bytes | bytearray) -> array[int]:
    """64-bit numbers out of a file."""
    from array import array

    numbers = array("Q", bytes(data))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def as_big_endian(numbers: array[int]) -> bytes:
    numbers = numbers[:]
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


class Block:
    """A refcount block: counts of 1 << ``order`` bits each."""

    __slots__ = ("data", "dirty", "order")

    def __init__(self, data: bytearray, order: int) -> None:
        self.data = data
        self.order = order
        self.dirty = Dirty()

    def get(self, place: int) -> int:
        order = self.order
        if order >= 3:
            width = 1 << order - 3
            return int.from_bytes(self.data[place * width : (place + 1) * width], "big")
        byte, shift = place >> 3 - order, (place & (8 >> order) - 1) << order
        return self.data[byte] >> shift & (1 << (1 << order)) - 1

    def set(self, place: int, count: int) -> None:
        order, data = self.order, self.data
        if order >= 3:
            width = 1 << order - 3
            begin, end = place * width, (place + 1) * width
            data[begin:end] = count.to_bytes(width, "big")
        else:
            begin = place >> 3 - order
            end = begin + 1
            shift = (place & (8 >> order) - 1) << order
            mask = (1 << (1 << order)) - 1
            data[begin] = data[begin] & ~(mask << shift) | count << shift
        self.dirty.add(begin, end, len(data))

    def find_free(self, place: int) -> int:
        """The first free cluster from there on; -1 without one."""
        order, data = self.order, self.data
        if order >= 3:
            width = 1 << order - 3
            zero, at = bytes(width), place * width
            while (at := data.find(zero, at)) >= 0:
                if not at % width:
                    return at // width
                at += 1
            return -1
        per_byte = 8 >> order
        while place % per_byte:
            if not self.get(place):
                return place
            place += 1
        at = data.translate(has_room(order)).find(1, place // per_byte)
        if at < 0:
            return -1
        place = at * per_byte
        while self.get(place):
            place += 1
        return place


def has_room(order: int) -> bytes:
    """For each byte of counts 1 where one of them is zero."""
    mask = (1 << (1 << order)) - 1
    return bytes(any(not byte >> (n << order) & mask for n in range(8 >> order)) for byte in range(256))


class Refcounts:
    """``table`` is the refcount table, as it is in the file; ``map`` knows which clusters are the image's tables;
    ``co_barrier`` brings all that was written to stable storage.
    """

    def __init__(
        self,
        file: ProtocolDriver,
        header: Header,
        table: bytes,
        map: ClusterMap,
        co_barrier: Callable[[], Awaitable[None]],
    ) -> None:
        self._file = file
        self._header = header
        self._map = map
        self._co_barrier = co_barrier
        self.cluster = header.cluster_bytes
        self.order = header.refcount_order
        self.per_block = self.cluster * 8 >> self.order
        self.most = min((1 << (1 << self.order)) - 1, sys.maxsize)
        self.table = big_endian(table)
        self._blocks: dict[int, Block] = {}  # the one that was used last is last
        self._most_blocks = max(LEAST_BLOCKS, CACHE_BYTES // self.cluster)
        self._changed: set[int] = set()  # blocks that have still to be written
        self._entries: set[int] = set()  # of the table, that have still to be written
        self._hint = 0  # no cluster before is free
        self.end = 0  # of the file, with what was taken of it, in bytes
        self.freed: list[tuple[int, int]] = []
        """(first cluster, how many): their counts go down when it is safe."""

    @property
    def dirty(self) -> bool:
        return bool(self._entries or self.freed or self._changed)

    # -- blocks ---------------------------------------------------------------------------------------------------

    async def co_block(self, index: int) -> Block | None:
        """None: there is none, all of its counts are 0."""
        block = self._blocks.pop(index, None)
        if block is None:
            if index >= len(self.table) or not self.table[index]:
                return None
            offset = self.table[index]
            if offset % self.cluster or offset + self.cluster > MOST_HOST_OFFSET:
                raise Failed(EIO)
            self._file_has(offset)
            block = Block(await co_load(self._file, offset, self.cluster), self.order)
            await self._co_make_room()
        self._blocks[index] = block
        return block

    def _file_has(self, offset: int) -> None:
        """Failed where a block is said to be where the file ends: that is no block that may be read as free."""
        if offset >= max(self._file.size_bytes, self.end):
            raise Failed(EIO)

    async def _co_make_room(self) -> None:
        while len(self._blocks) >= self._most_blocks:
            index = next(iter(self._blocks))
            await self._co_write_block(index)
            del self._blocks[index]

    async def _co_write_block(self, index: int) -> None:
        if index not in self._changed:
            return
        kept = self._blocks[index]
        dirty = kept.dirty
        low, high = dirty.low, dirty.high
        with memoryview(kept.data)[low:high] as part:
            await co_store(self._file, self.table[index] + low, part)
        dirty.clear()
        self._changed.discard(index)

    async def co_write(self) -> None:
        """Write what has changed, the table behind its blocks."""
        for index in sorted(self._changed):
            await self._co_write_block(index)
        if self._entries:
            await self._co_barrier()
            for index in sorted(self._entries):
                await co_store(
                    self._file,
                    self._header.refcount_table_offset + index * ENTRY_BYTES,
                    self.table[index].to_bytes(ENTRY_BYTES, "big"),
                )
            self._entries.clear()

    def _reaches(self, end: int) -> None:
        """The file is used up to there."""
        self.end = max(self.end, end)
        if self._file.alignment > 1 and self.end > self._file.size_bytes:
            try:
                self._file.measure(self.end)  # O_DIRECT takes no write across the end
            except OSError:
                pass  # the write says what is wrong

    # -- counts ---------------------------------------------------------------------------------------------------

    async def co_get(self, cluster: int) -> int:
        index, place = divmod(cluster, self.per_block)
        block = await self.co_block(index)
        return 0 if block is None else block.get(place)

    async def co_set(self, cluster: int, count: int) -> None:
        """For who knows what it is doing: create, and repair."""
        index, place = divmod(cluster, self.per_block)
        block = await self._co_made_block(index)
        block.set(place, count)
        self._changed.add(index)

    async def co_reach(self, index: int) -> None:
        """The table has an entry for block ``index``."""
        if index >= len(self.table):
            await self._co_grow_table(index)

    async def _co_made_block(self, index: int) -> Block:
        await self.co_reach(index)
        block = await self.co_block(index)
        if block is not None:
            return block
        # The first cluster that it counts is its own: all of them are free.
        block = await self.co_put_block(index, index * self.per_block)
        block.set(0, 1)
        return block

    async def co_put_block(self, index: int, cluster: int) -> Block:
        """A block in that cluster, which nothing else uses, and which has still to be counted. The table reaches it,
        and there was none before.
        """
        offset = cluster * self.cluster
        self.check_tables(cluster)
        block = Block(bytearray(self.cluster), self.order)
        block.dirty.add(0, self.cluster, self.cluster)
        await self._co_make_room()
        self.table[index] = offset
        self._entries.add(index)
        self._changed.add(index)
        self._blocks[index] = block
        self.guard_tables(cluster)
        self._reaches(offset + self.cluster)
        return block

    def _check_free(self, offset: int) -> None:
        """Failed where a cluster that counts as free is one of the image's tables: its refcounts are wrong."""
        if offset + self.cluster > MOST_HOST_OFFSET:
            raise Failed(EFBIG)
        if self._map.guarded(offset):
            raise Corrupt

    def check_tables(self, first: int, count: int = 1) -> None:
        """As that, of clusters that are about to be tables: nor may an entry for data lead there, by which the guest
        would write over them.
        """
        for cluster in range(first, first + count):
            self._check_free(cluster * self.cluster)
        if self._map.leads_into(first * self.cluster, count):
            raise Corrupt

    def guard_tables(self, first: int, count: int = 1) -> None:
        """They are tables, until they are free again."""
        self._map.guard_also(first * self.cluster, count)

    async def co_take(self, want: int) -> tuple[int, int]:
        """(first cluster, how many) of at most ``want`` clusters in a row, which were free and are the caller's now."""
        cluster = self._hint
        while True:
            index, place = divmod(cluster, self.per_block)
            block = await self._co_made_block(index)
            place = block.find_free(place)
            if place >= 0:
                break
            cluster = self._hint = (index + 1) * self.per_block
        first, count = index * self.per_block + place, 0
        while count < want and place + count < self.per_block and not block.get(place + count):
            self._check_free((first + count) * self.cluster)
            block.set(place + count, 1)
            self._changed.add(index)
            count += 1
        self._hint = first + count
        self._reaches(self._hint * self.cluster)
        return first, count

    async def co_give_back(self, first: int, count: int) -> None:
        """Clusters that ``co_take`` gave, and that nothing leads to."""
        for cluster in range(first, first + count):
            await self.co_set(cluster, 0)
        self._hint = min(self._hint, first)

    def free(self, first: int, count: int = 1) -> None:
        """Something leads to these clusters no more, as soon as the tables are on stable storage."""
        if self.freed and sum(self.freed[-1]) == first:
            first, count = self.freed[-1][0], self.freed[-1][1] + count
            self.freed.pop()
        self.freed.append((first, count))

    async def co_apply_freed(self) -> list[tuple[int, int]]:
        """The tables are on stable storage, and nobody is inside of the map: (first, how many) of what is free now."""
        holes: list[tuple[int, int]] = []
        while self.freed:
            first, count = self.freed[-1]
            for cluster in range(first, first + count):
                before = await self.co_get(cluster)
                if not before:
                    self.freed.pop()
                    raise Corrupt
                await self.co_set(cluster, before - 1)
                self.freed[-1] = (cluster + 1, first + count - cluster - 1)
                if before == 1:
                    self._hint = min(self._hint, cluster)
                    self._map.unguard(cluster * self.cluster)
                    if holes and sum(holes[-1]) == cluster:
                        holes[-1] = (holes[-1][0], holes[-1][1] + 1)
                    else:
                        holes.append((cluster, 1))
            self.freed.pop()
        return holes

    # -- a longer table ---------------------------------------------------------------------------------------------

    async def _co_grow_table(self, index: int) -> None:
        """A table with room for block ``index``, half as long again as before. It and the blocks that count it lie in
        clusters that the old one has no counts for, and behind the file's end: what has no counts may be in use all the
        same, in an image that is being repaired.
        """
        per_cluster = self.cluster // ENTRY_BYTES
        first_block = max(len(self.table), -(-self.end // (self.per_block * self.cluster)))
        first = first_block * self.per_block
        clusters = max(self._header.refcount_table_clusters * 3 // 2, index // per_cluster, first_block // per_cluster)
        clusters += 1
        blocks = 1
        while blocks * self.per_block < clusters + blocks:
            blocks += 1
        clusters += -(-blocks // per_cluster)
        blocks += 1
        if clusters * self.cluster > MOST_REFCOUNT_TABLE_BYTES:
            raise Failed(EFBIG)
        self.check_tables(first, blocks + clusters)
        await self.co_write()
        await self._co_store_counts(first, blocks, clusters)
        table = self.table[:]
        table.extend([0] * (first_block - len(table)))
        table.extend([(first + n) * self.cluster for n in range(blocks)])
        table.extend([0] * (clusters * per_cluster - len(table)))
        await co_store(self._file, (first + blocks) * self.cluster, as_big_endian(table))
        await self._co_barrier()
        header = self._header
        before = header.refcount_table_offset // self.cluster, header.refcount_table_clusters
        offset = (first + blocks) * self.cluster
        await co_store(self._file, TABLE_PLACE, offset.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        header.refcount_table_offset, header.refcount_table_clusters = offset, clusters
        self.table = table
        self.guard_tables(first, blocks + clusters)
        self._reaches((first + blocks + clusters) * self.cluster)
        self.free(*before)

    async def _co_store_counts(self, first: int, blocks: int, clusters: int) -> None:
        """Blocks that say one of themselves and of the ``clusters`` behind them, and nothing of what follows."""
        left = blocks + clusters
        for n in range(blocks):
            block = Block(bytearray(self.cluster), self.order)
            for place in range(min(left, self.per_block)):
                block.set(place, 1)
            left -= min(left, self.per_block)
            await co_store(self._file, (first + n) * self.cluster, block.data)


class Corrupt(Failed):
    """The image contradicts itself: it is marked as corrupt, and written no more."""

    def __init__(self) -> None:
        super().__init__(EIO)
