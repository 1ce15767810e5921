"""PIO transfers of a disk: sectors through the data port, a DRQ block at a time (ATA/ATAPI-6, 9.5 and 9.6).

A DRQ block is one sector, or for the MULTIPLE commands as many as SET MULTIPLE says. One interrupt goes with each: when
a block can be read; when the next one can be written, or all has been. The image is asked for up to 256 sectors at
once, so that between most blocks there is nothing to do but to move the window on.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.devices.ide.activity import Activity
from pyvmm.devices.ide.chain import Flush, Mover
from pyvmm.devices.ide.registers import ABRT, BUSY, DATA, IDNF, READY, UNC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.ide.disk import IdeDisk

CHUNK_SECTORS = 256  # a multiple of every DRQ block
BUFFER_BYTES = CHUNK_SECTORS * SECTOR_BYTES


class PioBuffer:
    """The memory behind the data port: whole pages, so that O_DIRECT takes it as it is."""

    __slots__ = ("_iovs", "memory")

    def __init__(self) -> None:
        self.memory = memoryview(mmap(-1, BUFFER_BYTES, MAP_PRIVATE | MAP_ANONYMOUS))
        self._iovs: dict[int, list[memoryview]] = {}

    def iov(self, sectors: int) -> list[memoryview]:
        """Its first ``sectors`` sectors, for a request."""
        iov = self._iovs.get(sectors)
        if iov is None:
            iov = self._iovs[sectors] = [self.memory[: sectors * SECTOR_BYTES]]
        return iov


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
        "_skipped",
        "_waiting",
    )

    def __init__(self, disk: IdeDisk) -> None:
        super().__init__(disk)
        self._disk = disk
        self._backend = disk.backend
        self._data = disk.channel.data
        self._waiting = False
        self._begin = self._next = self._chunk = 0
        self._skipped = 0  # bytes of the open window that were moved before its state was saved and loaded

    def _set_up(self, lba: int, count: int, block: int) -> bool:
        """Whether there is anything to move. What reaches past the end of the disk is left out, with its whole block.

        Sectors in front of the first bad one are moved, as many as make whole blocks.
        """
        disk = self._disk
        self._buffer = self.channel.buffer
        self._memory = self._buffer.memory
        self._lba = lba
        self._left = count
        self._block = block
        self._error = 0
        self._chunk = self._next = 0
        if lba + count > disk.sectors:
            good = max(0, disk.sectors - lba)
            self._left = good - good % block
            self._fail_later(IDNF, lba + good, count - good)
            if not self._left:
                self._report()
                return False
        disk.activity = self
        return True

    def _fail_later(self, error: int, lba: int, left: int) -> None:
        self._error = error
        self._error_lba = lba
        self._error_left = left

    def _report(self) -> None:
        disk = self._disk
        disk.set_lba(self._error_lba)
        disk.set_count(self._error_left)
        disk.fail(self._error)

    def save(self) -> dict[str, Any]:
        state = {
            name: getattr(self, f"_{name}")
            for name in ("lba", "left", "block", "chunk", "begin", "next", "waiting", "error")
        }
        if self._error:
            state.update(error_lba=self._error_lba, error_left=self._error_left)
        if self._chunk:
            state["moved"] = self._skipped + self._data.position
            state["buffer"] = bytes(self._memory[: self._chunk * SECTOR_BYTES])
        return state

    def _load(self, state: dict[str, Any]) -> None:
        self._buffer = self.channel.buffer
        self._memory = self._buffer.memory
        for name in ("lba", "left", "block", "chunk", "begin", "next", "error"):
            setattr(self, f"_{name}", state[name])
        if self._error:
            self._fail_later(self._error, state["error_lba"], state["error_left"])
        if self._chunk:
            self._memory[: len(state["buffer"])] = state["buffer"]
        self._disk.activity = self


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

    def save(self) -> dict[str, Any]:
        state = {"kind": "pio-in", **super().save()}
        if self._waiting:
            state["chunk"] = 0
            del state["buffer"]
        return state

    def resume(self, state: dict[str, Any]) -> None:
        self._load(state)
        if state["waiting"]:
            self._fetch()
        else:
            self._skipped = moved = state["moved"]
            size = (self._next - self._begin) * SECTOR_BYTES
            self._data.open_read(self._memory, self._begin * SECTOR_BYTES + moved, size - moved)


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

    def save(self) -> dict[str, Any]:
        return {"kind": "pio-out", "flush": self._flush, **super().save()}

    def resume(self, state: dict[str, Any]) -> None:
        self._load(state)
        self._flush = state["flush"]
        if not state["waiting"]:
            self._skipped = moved = state["moved"]
            size = (self._next - self._begin) * SECTOR_BYTES
            self.channel.open_write(self._memory, self._begin * SECTOR_BYTES + moved, size - moved)
        elif self._chunk:
            self._put()
        else:
            self._start_flush()


class PioBlock(Activity):
    """One block of data that is at hand, to the host: IDENTIFY DEVICE and its like."""

    __slots__ = ("_block", "_moved")

    def start(self, block: bytes, moved: int = 0) -> None:
        """``moved`` bytes of it are gone already."""
        self._block = block
        self._moved = moved
        self.drive.activity = self
        self.drive.status = DATA
        self.channel.data.open_read(block, moved)

    def on_end(self) -> None:
        self.drive.activity = None
        self.drive.status = READY

    def save(self) -> dict[str, Any]:
        return {"kind": "block", "block": self._block, "moved": self._moved + self.channel.data.position}
