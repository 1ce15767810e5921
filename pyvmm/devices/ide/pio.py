"""PIO transfers of a disk: sectors through the data port, a DRQ block at a time (ATA/ATAPI-6, 9.5 and 9.6).

A DRQ block is one sector, or for the MULTIPLE commands as many as SET MULTIPLE says. One interrupt goes with each: when
a block can be read; when the next one can be written, or all has been. The image is asked for up to 256 sectors at
once, so that between most blocks there is nothing to do but to move the window on.
"""

from __future__ import annotations

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.devices.ide.activity import Activity
from pyvmm.devices.ide.chain import Flush, Mover
from pyvmm.devices.ide.pio_buffer import BUFFER_BYTES, CHUNK_SECTORS
from pyvmm.devices.ide.registers import ABRT, BUSY, DATA, IDNF, MAX_MULTIPLE, READY, UNC
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.ide.activity import DiskSide, DriveSide


class PioTransfer(Activity):
    """What reading and writing have in common.

    Of the chunk in the buffer ``_next`` sectors have had their window, the open one among them; it began at
    sector ``_begin``. ``_lba`` and ``_left`` say what the image has yet to be asked for. After that comes the end, or
    an error: ``_error``, for the sector at ``_error_lba``, ``_error_left`` before the end of the command.
    """

    __slots__ = (
        "_backend",
        "_begin",
        "_block",
        "_buffer",
        "_chunk",
        "_data",
        "_disk",
        "_error",
        "_error_lba",
        "_error_left",
        "_lba",
        "_left",
        "_memory",
        "_next",
    )

    def __init__(self, disk: DiskSide) -> None:
        super().__init__(disk)
        self._disk = disk
        self._backend = disk.backend
        self._data = disk.channel.data
        self._begin = self._next = self._chunk = 0
        self._error = self._error_lba = self._error_left = 0

    def _set_up(self, lba: int, count: int, block: int) -> bool:
        """Whether there is anything to move. What reaches past the end of the disk is left out, with its whole block.

        Sectors in front of the first bad one are moved, as many as make whole blocks.
        """
        disk = self._disk
        self._take_buffer()
        self._lba = lba
        self._left = count
        self._block = block
        self._error = self._error_lba = self._error_left = 0
        self._chunk = self._begin = self._next = 0
        if lba + count > disk.sectors:
            good = max(0, disk.sectors - lba)
            self._left = good - good % block
            self._fail_later(IDNF, lba + good, count - good)
            if not self._left:
                self._report()
                return False
        disk.activity = self
        return True

    def _take_buffer(self) -> None:
        self._buffer = self.channel.buffer
        self._memory = self._buffer.memory

    def _fail_later(self, error: int, lba: int, left: int) -> None:
        self._error = error
        self._error_lba = lba
        self._error_left = left

    def _report(self) -> None:
        disk = self._disk
        disk.set_lba(self._error_lba)
        disk.set_count(self._error_left)
        disk.fail(self._error)

    STATE = {
        "_lba": 48,
        "_left": range(0x10001),
        "_block": range(1, MAX_MULTIPLE + 1),
        "_chunk": range(CHUNK_SECTORS + 1),
        "_begin": range(CHUNK_SECTORS + 1),
        "_next": range(CHUNK_SECTORS + 1),
        "_waiting": "flag",
        "_error": 8,
        "_error_lba": 48,
        "_error_left": range(0x10001),
        "_moved": range(BUFFER_BYTES + 1),
        "_content": ("bytes", 0, BUFFER_BYTES),
    }

    @property
    def _content(self) -> bytes:
        """What is in the buffer and counts."""
        return bytes(self._memory[: self._content_bytes(self._moved)])

    @_content.setter
    def _content(self, content: bytes) -> None:
        self._memory[: len(content)] = content

    def _content_bytes(self, moved: int) -> int:
        """How much that is, with so many bytes of the open window through."""
        raise NotImplementedError

    def _window(self) -> tuple[int, int]:
        """Where in the buffer the rest of the open window begins, and its length, in bytes."""
        moved = self._skipped
        return self._begin * SECTOR_BYTES + moved, (self._next - self._begin) * SECTOR_BYTES - moved

    def load(self, state: dict[str, Any]) -> None:
        self._take_buffer()
        super().load(state)
        if len(state["content"]) != self._content_bytes(self._skipped):
            raise StateError(f"{self.KIND}: content is {len(state['content'])} bytes, of {self._chunk} sectors")

    def wrong(self) -> str:
        if self._lba + self._left > self._disk.sectors:
            return "lba and left reach past the end of the disk"
        if self._waiting:
            return ""
        if not self._begin <= self._next <= self._chunk:
            return "begin, next and chunk are not in this order"
        return "" if self._window()[1] > 0 else "moved is not less than the open window"


class PioReader(PioTransfer):
    """To the host."""

    __slots__ = ()

    def start(self, lba: int, count: int, block: int) -> None:
        if self._set_up(lba, count, block):
            self._fetch()

    def _fetch(self) -> None:
        """Ask the image for the next chunk. With that in the host's page cache it is there on return."""
        self._chunk = count = min(self._left, CHUNK_SECTORS)
        self._disk.status = BUSY
        self._waiting = True
        request = self._backend.aio_readv(self._lba, self._buffer.iov(count), self._fetched)
        if self._waiting and self.pending is None:
            self.pending = request

    def _fetched(self, ret: int) -> None:
        with self.channel.lock:
            self._waiting = False
            if ret == 0 and not self.dropped:  # came_back, without its call: most reads come this way
                self.pending = None
                if self.channel.latched:
                    self.channel.unlatch()
                self._lba += self._chunk
                self._left -= self._chunk
                self._next = 0
                self._show()
            elif self.came_back():
                mover = Mover(
                    self.channel.lock,
                    self._backend.aio_readv,
                    self._lba,
                    self._buffer.iov(self._chunk),
                    self._chunk,
                    lambda: self._searched(mover),
                    bad=True,
                )
                self._waiting = True
                self.pending = mover
                mover.start()

    def _searched(self, mover: Mover) -> None:
        """Reading it all at once has failed; now it is known how far one gets."""
        self._waiting = False
        if not self.came_back():
            return
        good = mover.moved
        if good < self._chunk:
            self._fail_later(UNC, self._lba + good, self._left - good)
            good -= good % self._block
            self._left = good
        self._chunk = good
        self._lba += good
        self._left -= good
        self._next = 0
        if good:
            self._show()
        else:
            self._report()

    def _show(self) -> None:
        """The next DRQ block."""
        self._begin = begin = self._next
        self._next = end = min(begin + self._block, self._chunk)
        self._data.open_read(self._memory, begin * SECTOR_BYTES, (end - begin) * SECTOR_BYTES)
        disk = self._disk
        disk.status = DATA
        self.channel.interrupt(disk)

    def on_end(self) -> None:
        self._skipped = 0
        if self._next < self._chunk:
            self._show()
        elif self._left:
            self._fetch()
        elif self._error:
            self._report()
        else:
            disk = self._disk
            disk.activity = None
            disk.status = READY
            disk.set_lba(self._lba)
            disk.set_count(0)

    KIND = "pio-in"

    def _content_bytes(self, moved: int) -> int:
        return 0 if self._waiting else self._chunk * SECTOR_BYTES

    def wrong(self) -> str:
        return "left is 0, and there is no more to wait for" if self._waiting and not self._left else super().wrong()

    def go_on(self) -> None:
        if self._waiting:
            self._fetch()
        else:
            self._data.open_read(self._memory, *self._window())


class PioWriter(PioTransfer):
    """From the host. ``flush``: the command ends when the data is on the medium, not in a cache."""

    __slots__ = ("_flush",)

    def start(self, lba: int, count: int, block: int, flush: bool) -> None:
        self._flush = flush
        if self._set_up(lba, count, block):
            self._next_chunk()

    def _next_chunk(self) -> None:
        self._chunk = min(self._left, CHUNK_SECTORS)
        self._next = 0
        self._ask()
        if self.channel.on_data_out is not None:
            self.channel.on_data_out()

    def _ask(self) -> None:
        """For the next DRQ block."""
        self._begin = begin = self._next
        self._next = end = min(begin + self._block, self._chunk)
        self._data.open_write(self._memory, begin * SECTOR_BYTES, (end - begin) * SECTOR_BYTES)
        self._disk.status = DATA

    def on_end(self) -> None:
        self._skipped = 0
        if self._next < self._chunk:
            self._ask()
            self.channel.interrupt(self._disk)
        else:
            self._put()

    def _put(self) -> None:
        """The chunk goes to the image."""
        self._disk.status = BUSY
        self._waiting = True
        request = self._backend.aio_writev(self._lba, self._buffer.iov(self._chunk), self._written)
        if self._waiting and self.pending is None:
            self.pending = request

    def _written(self, ret: int) -> None:
        with self.channel.lock:
            self._waiting = False
            if not self.came_back():
                return
            if ret == 0:
                self._chunk_done(self._chunk)
                return
            mover = Mover(
                self.channel.lock,
                self._backend.aio_writev,
                self._lba,
                self._buffer.iov(self._chunk),
                self._chunk,
                lambda: self._searched(mover),
                bad=True,
            )
            self._waiting = True
            self.pending = mover
            mover.start()

    def _searched(self, mover: Mover) -> None:
        self._waiting = False
        if not self.came_back():
            return
        good = mover.moved
        if good < self._chunk:
            self._fail_later(ABRT, self._lba + good, self._left - good)
            self._report()
        else:
            self._chunk_done(good)

    def _chunk_done(self, count: int) -> None:
        self._lba += count
        self._left -= count
        if self._left:
            self._next_chunk()
            self.channel.interrupt(self._disk)
        elif self._error:
            self._report()
        elif self._flush:
            self._chunk = 0
            self._start_flush()
        else:
            self._end()

    def _start_flush(self) -> None:
        self._waiting = True
        flush = Flush(self.channel.lock, self._backend, lambda: self._flushed(flush))
        self.pending = flush
        flush.start()

    def _flushed(self, flush: Flush) -> None:
        self._waiting = False
        if not self.came_back():
            return
        if flush.ret < 0:
            self._disk.fail(ABRT)
        else:
            self._end()

    def _end(self) -> None:
        disk = self._disk
        disk.set_lba(self._lba)
        disk.set_count(0)
        disk.finish()

    KIND = "pio-out"
    STATE = {**PioTransfer.STATE, "_flush": "flag"}

    def _content_bytes(self, moved: int) -> int:
        return self._chunk * SECTOR_BYTES if self._waiting else self._begin * SECTOR_BYTES + moved

    def wrong(self) -> str:
        return "chunk is more than left" if self._chunk > self._left else super().wrong()

    def go_on(self) -> None:
        if not self._waiting:
            self.channel.open_write(self._memory, *self._window())
        elif self._chunk:
            self._put()
        else:
            self._start_flush()


class PioBlock(Activity):
    """One block of data that is at hand, to the host: IDENTIFY DEVICE and its like."""

    __slots__ = ("_block",)

    KIND = "block"
    STATE = {"_block": ("bytes", 1, SECTOR_BYTES), "_moved": range(SECTOR_BYTES)}

    def __init__(self, drive: DriveSide, block: bytes = b"") -> None:
        super().__init__(drive)
        self._block = block

    def start(self) -> None:
        self.drive.activity = self
        self.drive.status = DATA
        self.go_on()

    def go_on(self) -> None:
        self.channel.data.open_read(self._block, self._skipped)

    def on_end(self) -> None:
        self.drive.activity = None
        self.drive.status = READY

    def wrong(self) -> str:
        return "" if self._skipped < len(self._block) else "moved is not less than the block"
