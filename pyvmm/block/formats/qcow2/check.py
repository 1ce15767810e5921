"""Whether a qcow2 image agrees with itself: what its tables lead to, against its refcounts.

A leak is a cluster that counts as used more often than it is; an error is one that is used more often than it counts,
or an entry that leads nowhere. Repair makes refcounts and COPIED bits what the tables say. What leads nowhere is
reported and stays: nobody but the user can say what was there.
"""

from __future__ import annotations

from pyvmm.block.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    ENTRY_BYTES,
    OFFSET_MASK,
    ZERO,
    compressed_at,
)
from pyvmm.block.formats.qcow2.header import BITMAPS, CORRUPT, DIRTY
from pyvmm.block.formats.qcow2.refcounts import as_big_endian, big_endian
from pyvmm.block.formats.qcow2.snapshots import read_snapshots
from pyvmm.block.formats.qcow2.transfer import Failed, co_load, co_store
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.formats.qcow2.open_disk import OpenDisk

PART_BITS = 8  # counts are kept in parts, of which only those exist that something leads to
MOST_PARTS = 1 << 19  # 512 MiB: clusters of 64 KiB in 8 TiB
MOST_COUNT = (1 << 32) - 1  # where an image leads to a cluster more often, this is what counts
MOST_WRONG = 1 << 20  # counts that one repair changes, some 100 MiB
MOST_TOLD = 50
INCOMPATIBLE_AT = 72


class Counts:
    """How often something leads to each cluster of the file."""

    def __init__(self) -> None:
        self._parts: dict[int, array[int]] = {}

    def add(self, cluster: int, count: int = 1) -> None:
        """ConfigError where the image spreads over more of its file than can be looked at."""
        for one in range(cluster, cluster + count):
            part = self._parts.get(one >> PART_BITS)
            if part is None:
                from array import array

                if len(self._parts) >= MOST_PARTS:
                    raise ConfigError("the image's clusters are too far apart to be checked: convert it")
                part = self._parts[one >> PART_BITS] = array("I", bytes(array("I").itemsize << PART_BITS))
            place = one & (1 << PART_BITS) - 1
            if part[place] < MOST_COUNT:
                part[place] += 1

    def get(self, cluster: int) -> int:
        part = self._parts.get(cluster >> PART_BITS)
        return 0 if part is None else part[cluster & (1 << PART_BITS) - 1]

    def __iter__(self) -> Iterator[int]:
        """Clusters that something leads to, in order."""
        for number in sorted(self._parts):
            for at, count in enumerate(self._parts[number]):
                if count:
                    yield (number << PART_BITS) + at


class Findings:
    """What a check has found. ``leaks`` and ``errors`` count clusters and entries, of which some are ``_repaired``;
    ``told`` has the first of them in words. Clusters of the disk: ``allocated``, ``compressed``, all ``total``.
    """

    def __init__(self) -> None:
        self.leaks = self.errors = 0
        self.leaks_repaired = self.errors_repaired = 0
        self.allocated = self.compressed = self.total = 0
        self.end_offset = 0
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        if len(self.told) < MOST_TOLD:
            self.told.append(text)

    def error(self, text: str) -> None:
        self.errors += 1
        self.tell(f"ERROR {text}")

    def as_dict(self) -> dict[str, int | list[str]]:
        """As of qemu-img check --output=json, where that has a word for it."""
        return {
            "check-errors": 0,
            "corruptions": self.errors,
            "leaks": self.leaks,
            "corruptions-fixed": self.errors_repaired,
            "leaks-fixed": self.leaks_repaired,
            "allocated-clusters": self.allocated,
            "compressed-clusters": self.compressed,
            "total-clusters": self.total,
            "image-end-offset": self.end_offset,
            "messages": self.told,
        }


class Check:
    """Of one image, open for nobody else. ``progress(done, of)`` hears of L2 tables."""

    def __init__(self, disk: OpenDisk, progress: Callable[[int, int], object] | None = None) -> None:
        self._disk = disk
        self._file = disk.file
        self._header = disk.header
        self._cluster = disk.cluster
        self._progress = progress
        self._counts = Counts()
        self.found = Findings()

    async def co_run(self, repair: bool) -> Findings:
        """Failed where it can't be read or written; ConfigError where its header's tables are none."""
        header, found = self._header, self.found
        found.total = -(-header.size // self._cluster)
        self._counts.add(0)
        self._table(header.refcount_table_offset, header.refcount_table_clusters * self._cluster)
        self._refcount_blocks()
        await self._co_l1(header.l1_offset, header.l1_entries, True)
        if header.snapshots:
            snapshots = read_snapshots(self._disk.path, header, self._file.size_bytes, self._file.peek)
            self._table(header.snapshots_offset, snapshots[-1].end - header.snapshots_offset)
            for one in snapshots:
                await self._co_l1(one.l1_offset, one.l1_entries, False)
        if header.autoclear & BITMAPS and header.bitmaps:
            raise ConfigError(f"the image {self._disk.path} has bitmaps, which pyvmm does not check: use qemu-img")
        await self._co_compare(repair)
        await self._co_copied(repair)
        if repair:
            await self._co_repaired()
        return found

    # -- what leads where ------------------------------------------------------------------------------------

    def _table(self, offset: int, length: int) -> None:
        if length:
            self._counts.add(offset // self._cluster, -(-length // self._cluster))

    def _inside(self, offset: int, what: str) -> bool:
        """Whether a cluster may be there."""
        if offset % self._cluster or offset >= self._file.size_bytes:
            self.found.error(f"{what} at {offset:#x}: it is not aligned, or not inside of the file")
            return False
        return True

    def _refcount_blocks(self) -> None:
        seen = set()
        for index, offset in enumerate(self._disk.refcounts.table):
            if offset and self._inside(offset, f"refcount block {index}"):
                if offset in seen:
                    self.found.error(f"refcount block {index} at {offset:#x} is another one too")
                seen.add(offset)
                self._counts.add(offset // self._cluster)

    async def _co_l1(self, offset: int, entries: int, active: bool) -> None:
        self._table(offset, entries * ENTRY_BYTES)
        for index, entry in enumerate(big_endian(await co_load(self._file, offset, entries * ENTRY_BYTES))):
            if self._progress is not None:
                self._progress(index, entries)
            table = entry & OFFSET_MASK
            if table and self._inside(table, f"L2 table {index}"):
                self._counts.add(table // self._cluster)
                await self._co_l2(table, index, active)
            if entry & ~(COPIED | OFFSET_MASK):
                self.found.error(f"L1 entry {index} is {entry:#x}: reserved bits are set")

    async def _co_l2(self, offset: int, index: int, active: bool) -> None:
        found, cluster_bits = self.found, self._header.cluster_bits
        for place, entry in enumerate(big_endian(await co_load(self._file, offset, self._cluster))):
            if not entry:
                continue
            if entry & COMPRESSED:
                if entry & COPIED or self._header.external:
                    found.error(f"L2 entry {index}:{place} is {entry:#x}: no compressed cluster is so")
                at, length = compressed_at(entry, cluster_bits)
                if at >= self._file.size_bytes:
                    found.error(f"compressed cluster {index}:{place} at {at:#x} is not inside of the file")
                    continue
                first, last = at // self._cluster, (at + length - 1) // self._cluster
                self._counts.add(first, last - first + 1)
                found.compressed += active
                found.allocated += active
                continue
            if entry & ~(COPIED | OFFSET_MASK | ZERO):
                found.error(f"L2 entry {index}:{place} is {entry:#x}: reserved bits are set")
            host = entry & OFFSET_MASK
            found.allocated += active and bool(host)
            if host and not self._header.external and self._inside(host, f"cluster {index}:{place}"):
                self._counts.add(host // self._cluster)

    # -- against the refcounts -------------------------------------------------------------------------------

    async def _co_compare(self, repair: bool) -> None:
        """Each cluster that counts, and each that something leads to."""
        refcounts, found = self._disk.refcounts, self.found
        wrong: list[tuple[int, int]] | None = [] if repair else None
        seen: set[int] = set()
        looked: dict[int, int] = {}  # how many of a block's counts are looked at here; the rest are 0
        last = 0
        for index, offset in enumerate(refcounts.table):
            if not offset or offset % self._cluster or offset >= self._file.size_bytes or offset in seen:
                continue
            seen.add(offset)
            block = await refcounts.co_block(index)
            assert block is not None
            looked[index] = len(block.data.rstrip(b"\0")) * refcounts.per_block // self._cluster
            looked[index] = min(refcounts.per_block, looked[index] + 1)
            first = index * refcounts.per_block
            for place in range(looked[index]):
                count, wanted = block.get(place), self._counts.get(first + place)
                if count:
                    last = first + place + 1
                if count != wanted:
                    self._differs(first + place, count, wanted, wrong)
        for cluster in self._counts:
            index, place = divmod(cluster, refcounts.per_block)
            if place >= looked.get(index, 0):
                self._differs(cluster, 0, self._counts.get(cluster), wrong)
        found.end_offset = last * self._cluster
        if wrong is not None:
            # What is used more often than its refcount can say is no leak, and stays an error.
            right = [(cluster, wanted) for cluster, wanted in wrong if wanted <= refcounts.most]
            for index in sorted({cluster // refcounts.per_block for cluster, wanted in right if wanted}):
                await self._co_new_block(index)
            for cluster, wanted in right:
                await refcounts.co_set(cluster, wanted)
            found.leaks_repaired, found.errors_repaired = found.leaks, len(right) - found.leaks

    async def _co_new_block(self, index: int) -> None:
        """There is a refcount block of that number. A new one comes where nothing leads to: that all of its counts
        were 0 says nothing of an image that is being repaired.
        """
        refcounts, per_block = self._disk.refcounts, self._disk.refcounts.per_block
        await refcounts.co_reach(index)
        if await refcounts.co_block(index) is not None:
            return
        first = index * per_block
        cluster = self._unused(first, first + per_block)
        while cluster < 0:
            behind = -(-refcounts.end // self._cluster)
            if behind // per_block >= len(refcounts.table):
                await refcounts.co_reach(behind // per_block)  # that is behind the end too, and moves it
                continue
            await self._co_new_block(behind // per_block)
            cluster = self._unused(behind, behind + per_block - behind % per_block)
        await refcounts.co_put_block(index, cluster)
        self._counts.add(cluster)
        await refcounts.co_set(cluster, 1)

    def _unused(self, begin: int, end: int) -> int:
        """The first cluster there that nothing leads to; -1 without one."""
        return next((cluster for cluster in range(begin, end) if not self._counts.get(cluster)), -1)

    def _differs(self, cluster: int, count: int, wanted: int, wrong: list[tuple[int, int]] | None) -> None:
        """``wrong`` is what is to be repaired. ConfigError where that is more than is kept."""
        if wrong is not None:
            if len(wrong) >= MOST_WRONG:
                raise ConfigError(
                    f"the image {self._disk.path} has more than {MOST_WRONG} refcounts that are wrong: convert it, what"
                    " can be read of it is in the new one"
                )
            wrong.append((cluster, wanted))
        if count > wanted:
            self.found.leaks += 1
            self.found.tell(f"leaked cluster {cluster}: refcount {count}, used {wanted} times")
        else:
            self.found.error(f"cluster {cluster}: refcount {count}, used {wanted} times")

    async def _co_copied(self, repair: bool) -> None:
        """COPIED is said of what is used once, and of nothing else (in the active tables)."""
        header = self._header
        l1 = self._disk.tables.l1
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset or offset % self._cluster or offset >= self._file.size_bytes:
                continue
            right = self._right(entry, offset)
            if right != entry:
                self.found.error(f"L1 entry {index} is {entry:#x}, and its table is used otherwise")
                if repair:
                    await co_store(self._file, header.l1_offset + index * ENTRY_BYTES, right.to_bytes(8, "big"))
                    l1[index] = right
                    self.found.errors_repaired += 1
            await self._co_copied_in(index, offset, repair)

    def _right(self, entry: int, offset: int) -> int:
        once = self._counts.get(offset // self._cluster) == 1
        return entry | COPIED if once else entry & ~COPIED

    async def _co_copied_in(self, index: int, offset: int, repair: bool) -> None:
        if self._header.external:
            return
        entries = big_endian(await co_load(self._file, offset, self._cluster))
        changed = 0
        for place, entry in enumerate(entries):
            host = entry & OFFSET_MASK
            if not host or entry & COMPRESSED or host % self._cluster or host >= self._file.size_bytes:
                continue
            right = self._right(entry, host)
            if right != entry:
                self.found.error(f"L2 entry {index}:{place} is {entry:#x}, and its cluster is used otherwise")
                entries[place] = right
                changed += 1
        if changed and repair:
            await co_store(self._file, offset, as_big_endian(entries))
            self.found.errors_repaired += changed

    async def _co_repaired(self) -> None:
        """What is mended stands in the file; the bits that say that something is not go where nothing is left."""
        disk, found = self._disk, self.found
        await disk.co_write_back()
        await disk.co_barrier()
        if found.errors > found.errors_repaired:
            return
        self._header.incompatible &= ~(DIRTY | CORRUPT)
        if self._header.version >= 3:
            ret = await disk.co_store_field(INCOMPATIBLE_AT, self._header.incompatible)
            if ret < 0:
                raise Failed(-ret)
        await disk.co_barrier()


def check(
    disk: OpenDisk,
    context: AioContext,
    *,
    repair: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Findings:
    """Look at all of an image that nobody else has open. ConfigError where that can't be."""
    work = Check(disk, progress)

    async def outer() -> int:
        try:
            await work.co_run(repair)
        except Failed as failed:
            return -failed.number
        return 0

    ret = context.run(outer())
    if ret < 0:
        from os import strerror

        raise ConfigError(f"the image {disk.path} can't be checked: {strerror(-ret)}; look at it with qemu-img check")
    return work.found


def repair(disk: OpenDisk, context: AioContext) -> None:
    """Refcounts that another program has left behind its tables are what they should be. ConfigError where they can't.
    """
    found = check(disk, context, repair=True)
    if found.errors > found.errors_repaired:
        raise ConfigError(
            f"the image {disk.path} was not closed, and is broken ({found.told[0]}): read it with read-only=on, and"
            " convert it"
        )
