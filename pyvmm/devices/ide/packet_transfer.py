"""The data of packet commands, by PIO and by DMA, to the host and from it (ATA/ATAPI-6, 9.8 and 9.9).

By PIO the drive says how long each DRQ block is: not longer than the byte count limit that the host gave with PACKET,
and even unless it is the last. One interrupt goes with each block, and one with the end.
"""

from __future__ import annotations

from errno import ECANCELED, ENOMEDIUM

from pyvmm.devices.ide.activity import Activity
from pyvmm.devices.ide.atapi import ABORTED_COMMAND, NO_ADDITIONAL_SENSE
from pyvmm.devices.ide.chain import Mover
from pyvmm.devices.ide.pio_buffer import BUFFER_BYTES
from pyvmm.devices.ide.registers import ABRT, BUSY, BYTES_HIGH, BYTES_LOW, DATA, REASON_IO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.devices.ide.activity import DriveSide
    from pyvmm.devices.ide.atapi import AtapiDrive

    class PacketSide(DriveSide, Protocol):
        """PacketDrive, as far as its transfers look."""

        @property
        def device(self) -> AtapiDrive: ...
        def set_reason(self, reason: int) -> None: ...
        def carry_out(self, cdb: bytes, dma: bool) -> None: ...
        def check_condition(self) -> None: ...
        def packet_done(self) -> None: ...
        def data_came(self, data: bytes) -> None: ...

BLOCK_BYTES = 2048
SECTORS_PER_BLOCK = 4
LONGEST_BYTES = 0xFFFE  # FFFFh means this too
LONGEST_LIST_BYTES = 0xFFFF  # of data to the drive, or of its own: lengths have 16 bits


class PacketActivity(Activity):
    """``backend`` is the disc that the packet was about: the drive's user may take it out before the end."""

    __slots__ = ("backend", "packet_drive")

    def __init__(self, drive: PacketSide) -> None:
        super().__init__(drive)
        self.packet_drive = drive
        self.backend: Any = drive.device.backend

    def byte_count_limit(self) -> int:
        regs = self.drive.regs
        return min(LONGEST_BYTES, regs[BYTES_HIGH] << 8 | regs[BYTES_LOW])

    def announce(self, size: int, reason: int) -> None:
        """A DRQ block of ``size`` bytes."""
        drive = self.packet_drive
        drive.regs[BYTES_LOW] = size & 0xFF
        drive.regs[BYTES_HIGH] = size >> 8
        drive.set_reason(reason)
        drive.status = DATA
        self.channel.interrupt(drive)

    def read_failed(self, ret: int, lba: int) -> None:
        """The block at ``lba`` can't be had, because of ``-ret``."""
        if ret == -ECANCELED:
            self.packet_drive.device.fail(ABORTED_COMMAND, NO_ADDITIONAL_SENSE)
        else:
            self.packet_drive.device.read_failed(-ret, lba)
        self.packet_drive.check_condition()


def block_size(left: int, limit: int) -> int:
    """Of the next DRQ block, ``left`` bytes before the end; 0 where the limit allows none."""
    return left if left <= limit else limit & ~1


class PacketIn(PacketActivity):
    """``data`` first, then ``count`` blocks from ``lba`` on, through the channel's buffer.

    The buffer holds what has been fetched from ``_start`` to ``_end``; the window is the first ``_size`` bytes of that.
    """

    __slots__ = (
        "_asked",
        "_end",
        "_failure",
        "_lba",
        "_left",
        "_limit",
        "_memory",
        "_size",
        "_start",
    )

    def __init__(self, drive: PacketSide, data: bytes = b"", lba: int = 0, count: int = 0) -> None:
        super().__init__(drive)
        self._memory = self.channel.buffer.memory
        self._memory[: len(data)] = data
        self._start = 0
        self._end = len(data)
        self._lba = lba  # the next block to fetch
        self._left = count
        self._failure = 0  # what the backend gave for that one
        self._asked = 0
        self._size = 0
        self._limit = self.byte_count_limit()

    def start(self) -> None:
        self.drive.activity = self
        self._go_on()

    def _go_on(self) -> None:
        have = self._end - self._start
        left = have if self._failure else have + self._left * BLOCK_BYTES
        if not left:
            if self._failure:
                self.read_failed(self._failure, self._lba)
            else:
                self.packet_drive.packet_done()
            return
        self._size = size = block_size(left, self._limit)
        if not size:
            self.drive.fail(ABRT)  # a host that allows nothing (8.23.5.3)
        elif size > have:
            self._fetch()
        else:
            self.channel.data.open_read(self._memory, self._start, size)
            self.announce(size, REASON_IO)

    def on_end(self) -> None:
        self._start += self._size
        self._skipped = 0
        self._go_on()

    def _fetch(self) -> None:
        """As many blocks as there is room for, behind what is left of the last ones."""
        if self.backend is None:
            self.read_failed(-ENOMEDIUM, self._lba)
            return
        have = self._end - self._start
        memory = self._memory
        memory[:have] = memory[self._start : self._end]
        self._start, self._end = 0, have
        self._asked = count = min(self._left, (BUFFER_BYTES - have) // BLOCK_BYTES)
        self.drive.status = BUSY
        iov = [memory[have : have + count * BLOCK_BYTES]]
        sectors = count * SECTORS_PER_BLOCK
        mover = Mover(
            self.channel.lock,
            self.backend.aio_readv,
            self._lba * SECTORS_PER_BLOCK,
            iov,
            sectors,
            lambda: self._fetched(mover),
        )
        self._waiting = True
        self.pending = mover
        mover.start()

    def _fetched(self, mover: Mover) -> None:
        self._waiting = False
        if not self.came_back():
            return
        got = mover.moved // SECTORS_PER_BLOCK
        self._end += got * BLOCK_BYTES
        self._lba += got
        self._left -= got
        if got < self._asked:
            self._failure = mover.ret
        self._go_on()

    KIND = "packet-in"
    STATE = {
        "_content": ("bytes", 0, BUFFER_BYTES),
        "_lba": 32,
        "_left": 32,
        "_failure": range(-4095, 1),
        "_limit": range(LONGEST_BYTES + 1),
        "_size": range(LONGEST_BYTES + 1),
        "_waiting": "flag",
        "_moved": range(LONGEST_BYTES + 1),
    }

    @property
    def _content(self) -> bytes:
        return bytes(self._memory[self._start : self._end])

    @_content.setter
    def _content(self, content: bytes) -> None:
        self._memory[: len(content)] = content
        self._start, self._end = 0, len(content)

    def wrong(self) -> str:
        if self._waiting:
            enough = self._left and self._end < LONGEST_BYTES
            return "" if enough else "there is nothing to wait for, or no room for it"
        return "" if self._skipped < self._size <= self._end else "moved, size and content do not fit together"

    def go_on(self) -> None:
        if self._waiting:
            self._fetch()
        else:
            self.channel.data.open_read(self._memory, self._skipped, self._size - self._skipped)


class PacketOut(PacketActivity):
    """``length`` bytes from the host, for the drive's data_out."""

    __slots__ = ("_data", "_limit", "_size", "_start")

    def __init__(self, drive: PacketSide, length: int = 0) -> None:
        super().__init__(drive)
        self._data = bytearray(length)
        self._start = 0
        self._size = 0
        self._limit = self.byte_count_limit()

    def start(self) -> None:
        self.drive.activity = self
        self._go_on()

    def _go_on(self) -> None:
        left = len(self._data) - self._start
        self._size = size = block_size(left, self._limit)
        if not left:
            self.drive.status = BUSY
            self.packet_drive.data_came(bytes(self._data))
        elif not size:
            self.drive.fail(ABRT)
        else:
            self.channel.open_write(self._data, self._start, size)
            self.announce(size, 0)

    def on_end(self) -> None:
        self._start += self._size
        self._skipped = 0
        self._go_on()

    KIND = "packet-out"
    STATE = {
        "_data": ("bytes", 1, LONGEST_LIST_BYTES),
        "_start": range(LONGEST_LIST_BYTES),
        "_size": range(LONGEST_BYTES + 1),
        "_limit": range(LONGEST_BYTES + 1),
        "_moved": range(LONGEST_BYTES + 1),
    }

    def wrong(self) -> str:
        fits = self._skipped < self._size and self._start + self._size <= len(self._data)
        return "" if fits else "moved, size and start do not fit together"

    def go_on(self) -> None:
        self.channel.open_write(self._data, self._start + self._skipped, self._size - self._skipped)


class PacketDma(PacketActivity):
    """Base of the two below: the bus master is to move ``length`` bytes, to memory or from it."""

    __slots__ = ("_length", "_more", "_to_memory")

    def __init__(self, drive: PacketSide, length: int, to_memory: bool) -> None:
        super().__init__(drive)
        self._length = length
        self._to_memory = to_memory
        self._more = False

    def start(self) -> None:
        self.drive.activity = self
        self.drive.status = DATA
        self.channel.bus_master.attach(self)

    def begin(self) -> None:
        self.drive.status = BUSY
        bus_master = self.channel.bus_master
        gathered = bus_master.gather(self._length, self._to_memory)
        if gathered is None:
            bus_master.end(self)
            self.drive.halt()
            return
        iov, self._more = gathered
        self.move(iov)

    def move(self, iov: list[memoryview]) -> None:
        raise NotImplementedError

    def end(self, more: bool) -> None:
        self.channel.bus_master.end(self, more)

    def go_on(self) -> None:
        self.channel.bus_master.go_on(self)


class PacketDmaIn(PacketDma):
    """``data``, or ``count`` blocks from ``lba`` on."""

    __slots__ = ("_count", "_data", "_lba")

    to_memory = True

    def __init__(self, drive: PacketSide, data: bytes = b"", lba: int = 0, count: int = 0) -> None:
        super().__init__(drive, len(data) or count * BLOCK_BYTES, True)
        self._data = data
        self._lba = lba
        self._count = count

    def move(self, iov: list[memoryview]) -> None:
        if self._data:
            at = 0
            for view in iov:
                view[:] = self._data[at : at + len(view)]
                at += len(view)
            self.end(self._more)
            self.packet_drive.packet_done()
            return
        if self.backend is None:
            self.end(False)
            self.read_failed(-ENOMEDIUM, self._lba)
            return
        sectors = self._count * SECTORS_PER_BLOCK
        lba = self._lba * SECTORS_PER_BLOCK
        mover = Mover(self.channel.lock, self.backend.aio_readv, lba, iov, sectors, lambda: self._moved_in_parts(mover))
        self.pending = mover
        mover.start()

    def _moved_in_parts(self, mover: Mover) -> None:
        if not self.came_back():
            return
        if mover.ret < 0:
            self.end(False)
            self.read_failed(mover.ret, self._lba + mover.moved // SECTORS_PER_BLOCK)
        else:
            self.end(self._more)
            self.packet_drive.packet_done()

    KIND = "packet-dma-in"
    STATE = {"_data": ("bytes", 0, LONGEST_LIST_BYTES), "_lba": 32, "_count": 32}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._length = len(self._data) or self._count * BLOCK_BYTES

    def wrong(self) -> str:
        return "" if self._data or self._count else "there is neither data nor count"


class PacketDmaOut(PacketDma):
    __slots__ = ()

    def __init__(self, drive: PacketSide, length: int = 0) -> None:
        super().__init__(drive, length, False)

    def move(self, iov: list[memoryview]) -> None:
        self.end(self._more)
        self.packet_drive.data_came(b"".join(iov))

    KIND = "packet-dma-out"
    STATE = {"_length": range(1, LONGEST_LIST_BYTES + 1)}
