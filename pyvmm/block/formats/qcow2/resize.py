"""Another size for the disk of a qcow2 image that is open: its L1 table moves where it has to become longer."""

from __future__ import annotations

from errno import EFBIG

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.block.formats.qcow2.entries import ENTRY_BYTES, MOST_L1_BYTES
from pyvmm.block.formats.qcow2.refcounts import as_big_endian
from pyvmm.block.formats.qcow2.transfer import Failed, co_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.formats.qcow2.open_disk import SizedDisk

SIZE_AT, L1_AT = 24, 36  # in the header: size; l1_size and l1_table_offset


async def co_grow(disk: SizedDisk, size: int) -> None:
    """``size`` bytes, more than before, and zeros behind what was there. Failed where that can't be."""
    before = disk.size_bytes
    await disk.co_with_tables(lambda: co_lengthen(disk, size))
    backing = disk.backing
    end = min(size, backing.size_bytes) if backing is not None else 0
    try:
        if before < end:
            # What lay behind the disk's end was none of its own, and must not show now.
            disk.size_bytes = size
            ret = await disk.co_write_zeroes(before, end - before, True, False)
            if ret < 0:
                raise Failed(-ret)
        await disk.co_with_tables(lambda: co_store(disk.file, SIZE_AT, size.to_bytes(8, "big")))
    except Failed:
        disk.size_bytes = before
        raise
    disk.header.size = disk.size_bytes = size


async def co_lengthen(disk: SizedDisk, size: int) -> None:
    """An L1 table that is long enough. The image's mutex is held, and nothing is left to be written."""
    header, tables, refcounts = disk.header, disk.tables, disk.refcounts
    needed = -(-size // header.table_bytes)
    if size % SECTOR_BYTES or size >> 63 or needed * ENTRY_BYTES > MOST_L1_BYTES:
        raise Failed(EFBIG)
    if needed <= len(tables.l1):
        return
    clusters = -(-needed * ENTRY_BYTES // disk.cluster)
    first = await co_take_in_a_row(disk, clusters)
    refcounts.check_tables(first, clusters)
    entries = tables.l1[:]
    entries.extend([0] * (clusters * disk.cluster // ENTRY_BYTES - len(entries)))
    try:
        await co_store(disk.file, first * disk.cluster, as_big_endian(entries))
        await disk.co_write_back()
        await disk.co_barrier()
    except Failed:
        await refcounts.co_give_back(first, clusters)
        raise
    before = header.l1_offset // disk.cluster, -(-header.l1_entries * ENTRY_BYTES // disk.cluster)
    await co_store(disk.file, L1_AT, needed.to_bytes(4, "big") + (first * disk.cluster).to_bytes(8, "big"))
    header.l1_offset, header.l1_entries = first * disk.cluster, needed
    tables.grow(needed, header.l1_offset)
    refcounts.guard_tables(first, clusters)
    refcounts.free(*before)


async def co_take_in_a_row(disk: SizedDisk, clusters: int) -> int:
    """So many clusters, one behind the other."""
    refcounts = disk.refcounts
    if clusters + 2 > refcounts.per_block:
        raise Failed(EFBIG)  # at each block's beginning is the block itself
    taken: list[tuple[int, int]] = []
    while True:
        first, count = await refcounts.co_take(clusters)
        while count < clusters:
            following, more = await refcounts.co_take(clusters - count)
            if following != first + count:
                break
            count += more
        else:
            break
        taken += [(first, count), (following, more)]
    for each in taken:
        await refcounts.co_give_back(*each)
    return first


async def co_shrink(disk: SizedDisk, size: int) -> None:
    """``size`` bytes, fewer than before: what is behind them is given back first."""
    before = disk.size_bytes
    end = size + -size % disk.cluster
    ret = 0
    if size < end:
        ret = await disk.co_write_zeroes(size, min(end, before) - size, False, False)  # nor does it show after a growth
    tables = end + -end % disk.header.table_bytes  # what whole tables map goes with them
    if ret == 0 and end < min(tables, before):
        ret = await disk.co_write_zeroes(end, min(tables, before) - end, True, False)
    if ret < 0:
        raise Failed(-ret)
    for index in range(tables // disk.header.table_bytes, len(disk.tables.l1)):
        if disk.tables.l1[index]:
            await disk.co_drop_table(index)
    await disk.co_with_tables(lambda: co_store(disk.file, SIZE_AT, size.to_bytes(8, "big")))
    disk.header.size = disk.size_bytes = size
