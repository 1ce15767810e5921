"""Whole transfers of an image's file, tables and data alike: what comes back short goes on, and behind a file's end are
zeros. Failed ends a request from however deep in the format's code.
"""

from __future__ import annotations

from errno import ENOSPC

from pyvmm.block.iov import IovSlice, fill_zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.driver import Iov, ProtocolDriver


class Failed(Exception):
    """A request fails with ``number``, an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def co_read(file: ProtocolDriver, at: int, iov: Iov, length: int) -> int:
    """0, or a negative errno."""
    done = await file.co_preadv(at, iov, length)
    if done == length:
        return 0
    while 0 < done < length:
        with IovSlice(iov, done, length) as rest:
            count = await file.co_preadv(at + done, rest, length - done)
        if count < 0:
            return count
        if not count:
            break
        done += count
    if done >= 0:
        fill_zeros(iov, done, length)
    return min(done, 0)


async def co_write(file: ProtocolDriver, at: int, iov: Iov, length: int) -> int:
    """0, or a negative errno."""
    done = await file.co_pwritev(at, iov, length, False)
    while 0 < done < length:
        with IovSlice(iov, done, length) as rest:
            count = await file.co_pwritev(at + done, rest, length - done, False)
        if count <= 0:
            return count or -ENOSPC
        done += count
    return -ENOSPC if not done else min(done, 0)


async def co_load(file: ProtocolDriver, at: int, length: int) -> bytearray:
    """Bytes of a table. Failed where they can't be read."""
    data = bytearray(length)
    with memoryview(data) as view:
        ret = await co_read(file, at, [view], length)
    if ret < 0:
        raise Failed(-ret)
    return data


async def co_store(file: ProtocolDriver, at: int, data: bytes | bytearray | memoryview) -> None:
    """Failed where they can't be written."""
    with memoryview(data) as view:
        ret = await co_write(file, at, [view], len(view))
    if ret < 0:
        raise Failed(-ret)


class Dirty:
    """Which bytes of a table have still to be written: one range, of whole ``unit`` bytes."""

    __slots__ = ("high", "low")

    UNIT = 4096  # what a disk writes at once, whatever was changed

    def __init__(self) -> None:
        self.low = self.high = 0

    def __bool__(self) -> bool:
        return self.high > 0

    def add(self, begin: int, end: int, most: int) -> None:
        """These bytes of a table of ``most``."""
        begin -= begin % self.UNIT
        end = min(most, end + -end % self.UNIT)
        if self.high:
            self.low, self.high = min(self.low, begin), max(self.high, end)
        else:
            self.low, self.high = begin, end

    def clear(self) -> None:
        self.low = self.high = 0
