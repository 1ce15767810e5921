"""The raw format: the image's bytes are the disk's, or a window of them is.

The rule for short transfers lives here, above every protocol. A read that comes back short goes on; one that brings
nothing is past the end of the file, and the rest is zeros. A write that comes back short goes on; one that makes no
progress is -ENOSPC.

A disk that may be written is whole sectors (``window_size`` sees to it). Where the file ends inside the last one, the
bytes that are not there read as zeros, and a write to that sector makes the file longer, up to the sector's end. A
read-only disk may end inside a sector, the rest of which reads as zeros.

An image that nobody has said to be raw stays one: a write that would give it the beginning of another format is -EPERM,
as in QEMU. Or a guest could write a header that names any file of the host's as its backing file, and read that file
when it starts the next time.
"""

from __future__ import annotations

from errno import ENOSPC, ENOTSUP, EPERM

from pyvmm.block.driver import SECTOR_BYTES, FormatDriver
from pyvmm.block.iov import ZEROS, IovSlice, fill_zeros
from pyvmm.block.probe import HEAD_BYTES, disk_format
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.driver import Iov, ProtocolDriver
    from pyvmm.block.lane import Lane
    from pyvmm.block.options import DriveOptions

CD_BLOCK_BYTES = 2048


class RawDriver(FormatDriver):
    """``size_bytes`` bytes of ``file`` from ``offset`` on: the caller has checked that they are there, but for a part
    of the last sector where the file may grow."""

    def __init__(self, file: ProtocolDriver, offset: int, size_bytes: int, *, probed: bool = False) -> None:
        """``probed``: nobody has said that it is raw."""
        self._file = file
        self._guard_bytes = max(0, HEAD_BYTES - offset) if probed and not file.read_only else 0
        self._offset = offset
        self.size_bytes = size_bytes
        self.read_only = file.read_only
        self.alignment = file.alignment
        self.skew = offset % file.alignment
        self._incomplete = offset + size_bytes > file.size_bytes  # the file ends inside the last sector

    def claim(self) -> None:
        self._file.claim()

    def give_up(self) -> None:
        self._file.give_up()

    def plug(self) -> None:
        self._file.plug()

    def unplug(self) -> None:
        self._file.unplug()

    async def co_readv(self, offset: int, iov: Iov, length: int) -> int:
        if offset + length <= self.size_bytes:
            done = await self._file.co_preadv(self._offset + offset, iov, length)
            if done == length:
                return 0
            inside = length
        else:
            inside = max(0, self.size_bytes - offset)
            done = 0
            fill_zeros(iov, inside, length)
        if done < 0:
            return done
        while done < inside:
            with IovSlice(iov, done, inside) as rest:
                count = await self._file.co_preadv(self._offset + offset + done, rest, inside - done)
            if count < 0:
                return count
            if count == 0:
                fill_zeros(iov, done, inside)
                return 0
            done += count
        return 0

    async def co_writev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        if offset < self._guard_bytes and self._would_become_another(offset, iov, length):
            return -EPERM
        done = 0
        if offset + length <= self.size_bytes:
            done = await self._file.co_pwritev(self._offset + offset, iov, length, fua)
            if done == length:
                return 0
            if done <= 0:
                return done or -ENOSPC
        else:
            length = max(0, self.size_bytes - offset)
        while done < length:
            with IovSlice(iov, done, length) as rest:
                count = await self._file.co_pwritev(self._offset + offset + done, rest, length - done, fua)
            if count <= 0:
                return count or -ENOSPC
            done += count
        return 0

    async def co_flush(self) -> int:
        return await self._file.co_flush()

    async def co_discard(self, offset: int, length: int) -> int:
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return 0
        ret = await self._file.co_pdiscard(self._offset + offset, length)
        return 0 if ret == -ENOTSUP else ret

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        length = min(length, self.size_bytes - offset)
        if length <= 0:
            return 0
        if self._incomplete and offset + length == self.size_bytes:
            # The last sector is written as data: fallocate would not make the file longer.
            length -= SECTOR_BYTES
            with memoryview(ZEROS)[:SECTOR_BYTES] as zeros:
                ret = await self.co_writev(offset + length, [zeros], SECTOR_BYTES, fua)
            if ret < 0 or not length:
                return ret
        return await self._file.co_pwrite_zeroes(self._offset + offset, length, may_unmap, fua)

    def grow(self, options: DriveOptions, size_bytes: int | None) -> None:
        self._file.measure(0 if size_bytes is None else self._offset + size_bytes)
        self.size_bytes = max(self.size_bytes, window_size(options, self._file))  # of a file cut short the end is zeros
        self._incomplete = self._offset + self.size_bytes > self._file.size_bytes

    def shrink(self, size_bytes: int) -> None:
        end = self._offset + size_bytes
        self._file.shorten(end)
        self.size_bytes = size_bytes
        self._incomplete = end > self._file.size_bytes

    def _would_become_another(self, offset: int, iov: Iov, length: int) -> bool:
        """Whether a write makes the image one of another format, to whoever looks at it the next time."""
        at = self._offset + offset
        with IovSlice(iov, 0, min(length, HEAD_BYTES - at)) as parts:
            head = b"".join(map(bytes, parts))
        return disk_format(self._file.peek(0, at) + head, b"") is not None

    def lane(self) -> Lane | None:
        lane = self._file.lane(self._offset, self.size_bytes)
        if lane is not None:
            lane.guard(self._guard_bytes)
        return lane

    def peek(self, offset: int, length: int) -> bytes:
        return self._file.peek(self._offset + offset, min(length, self.size_bytes - offset))

    def ending(self) -> None:
        self._file.ending()

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        self._file.abandon()


def window_size(options: DriveOptions, file: ProtocolDriver) -> int:
    """How many bytes of the image are the disk. Where the guest may write: whole sectors, of which the last may end
    behind the file's end if a write may complete it. ConfigError where the window is not inside the image, or less than
    one sector.
    """
    least = CD_BLOCK_BYTES if options.media == "cdrom" else SECTOR_BYTES
    file_bytes = file.size_bytes
    there = file_bytes - options.offset
    if options.size is not None and options.size > there:
        raise ConfigError(
            f"the image {options.file} has {file_bytes} bytes, and offset={options.offset}, size={options.size} ask for"
            f" {options.offset + options.size}: give a window that is inside"
        )
    size_bytes = there if options.size is None else options.size
    if file_bytes == 0:
        give = "make it as large as the disk, with truncate -s SIZE"
        if options.media == "cdrom":
            give = "give a whole CD image, or a drive without a disc: --drive media=cdrom"
        raise ConfigError(f"the image {options.file} is empty: {give}")
    if size_bytes < least:
        raise ConfigError(
            f"the image {options.file} is too small: {max(0, size_bytes)} bytes are not one sector of {least} bytes"
        )
    part = size_bytes % SECTOR_BYTES
    if not part:
        return size_bytes
    whole = size_bytes - part
    completed = whole + SECTOR_BYTES
    if options.read_only:
        return size_bytes  # what is missing of a sector reads as zeros, and nobody writes it
    if options.size is None and (options.keeps_writes or file.may_grow_to(options.offset + completed)):
        return completed
    return whole
