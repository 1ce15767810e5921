"""DMA transfers of a disk: sectors straight between the image and the guest's memory (ATA/ATAPI-6, 9.7).

The command waits for the bus master to be started, or finds it started. A transfer that the host's page cache serves is
over, interrupt and all, before the guest's write to the one or the other register has returned.
"""

from __future__ import annotations

from errno import ECANCELED
from struct import Struct

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.devices.ide.activity import Activity
from pyvmm.devices.ide.chain import IOV_MAX, REQUEST_SECTORS, Discards, Flush, Mover
from pyvmm.devices.ide.registers import ABRT, BUSY, DATA, MAX_TRIM_BLOCKS, UNC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.ide.activity import DiskSide
    from pyvmm.devices.ide.chain import Aio

ENTRY = Struct("<Q")


class DmaTransfer(Activity):
    """``count`` sectors from ``lba`` on, all of which the disk has."""

    __slots__ = ("_count", "_disk", "_flush", "_iov", "_lba", "_more", "_read")

    def __init__(self, disk: DiskSide, read: bool = False, lba: int = 0, count: int = 0, flush: bool = False) -> None:
        """``read``: to the guest's memory. ``flush``: the command ends when the data is on the medium."""
        super().__init__(disk)
        self._disk = disk
        self._read = read
        self._lba = lba
        self._count = count
        self._flush = flush
        self._more = False
        self._iov: list[memoryview] = []

    @property
    def to_memory(self) -> bool:  # type: ignore[override]  # it knows only now
        return self._read

    def start(self) -> None:
        disk = self._disk
        disk.activity = self
        disk.status = DATA  # ready for the bus master: a driver may look for that before it starts it
        self.channel.bus_master.attach(self)

    def begin(self) -> None:
        self._disk.status = BUSY
        gathered = self.channel.bus_master.gather(self._count * SECTOR_BYTES, self._read)
        if gathered is None:
            self.channel.bus_master.end(self)
            self._disk.halt()
            return
        self._iov, self._more = gathered
        if self._count > REQUEST_SECTORS or len(self._iov) > IOV_MAX:
            self._move_in_parts(False)
            return
        self._waiting = True
        request = self._aio(self._lba, self._iov, self._moved_at_once)
        if self._waiting and self.pending is None:
            self.pending = request

    @property
    def _aio(self) -> Aio:
        backend = self._disk.backend
        return backend.aio_readv if self._read else backend.aio_writev

    def _moved_at_once(self, ret: int) -> None:
        with self.channel.lock:
            self._waiting = False
            if not self.came_back():
                return
            if ret == 0:
                self._all_moved()
            elif ret == -ECANCELED:
                self._fail(0, ret)
            else:
                self._move_in_parts(True)

    def _move_in_parts(self, bad: bool) -> None:
        """``bad``: moving it all at once has failed, so which sector is it?"""
        mover = Mover(
            self.channel.lock,
            self._aio,
            self._lba,
            self._iov,
            self._count,
            lambda: self._moved_in_parts(mover),
            bad=bad,
        )
        self.pending = mover
        mover.start()

    def _moved_in_parts(self, mover: Mover) -> None:
        if not self.came_back():
            return
        if mover.moved < self._count:
            self._fail(mover.moved, mover.ret)
        else:
            self._all_moved()

    def _fail(self, moved: int, ret: int) -> None:
        disk = self._disk
        self.channel.bus_master.end(self)
        disk.set_lba(self._lba + moved)
        disk.set_count(self._count - moved)
        disk.fail(UNC if self._read and ret != -ECANCELED else ABRT)

    def _all_moved(self) -> None:
        if self._flush:
            flush = Flush(self.channel.lock, self._disk.backend, lambda: self._flushed(flush))
            self.pending = flush
            flush.start()
        else:
            self._end()

    def _flushed(self, flush: Flush) -> None:
        if not self.came_back():
            return
        if flush.ret < 0:
            self.channel.bus_master.end(self)
            self._disk.fail(ABRT)
        else:
            self._end()

    def _end(self) -> None:
        disk = self._disk
        disk.set_lba(self._lba + self._count)
        disk.set_count(0)
        self.channel.bus_master.end(self, self._more)
        disk.finish()

    KIND = "dma"
    STATE = {"_read": "flag", "_lba": 48, "_count": range(1, 0x10001), "_flush": "flag"}

    def wrong(self) -> str:
        return "" if self._lba + self._count <= self._disk.sectors else "lba and count reach past the end of the disk"

    def go_on(self) -> None:
        """From its beginning: moving the same sectors once more does no harm."""
        self.channel.bus_master.go_on(self)


class Trim(Activity):
    """DATA SET MANAGEMENT with TRIM (ATA8-ACS, 7.5): blocks of ranges come by DMA, and the image may forget them.

    A range is 48 bits of LBA and 16 bits of length, which may be 0. One that reaches past the end fails the command
    before any sector is forgotten.
    """

    __slots__ = ("_blocks", "_disk", "_more")

    def __init__(self, disk: DiskSide, blocks: int = 0) -> None:
        super().__init__(disk)
        self._disk = disk
        self._blocks = blocks
        self._more = False

    def start(self) -> None:
        self._disk.activity = self
        self._disk.status = DATA
        self.channel.bus_master.attach(self)

    def begin(self) -> None:
        self._disk.status = BUSY
        gathered = self.channel.bus_master.gather(self._blocks * SECTOR_BYTES, False)
        if gathered is None:
            self.channel.bus_master.end(self)
            self._disk.halt()
            return
        iov, self._more = gathered
        ranges = []
        for (entry,) in ENTRY.iter_unpack(b"".join(iov)):
            lba, count = entry & (1 << 48) - 1, entry >> 48
            if lba + count > self._disk.sectors:
                self._end(ABRT)
                return
            if count:
                ranges.append((lba, count))
        if not ranges:
            self._end(0)
            return
        discards = Discards(self.channel.lock, self._disk.backend, ranges, lambda: self._discarded(discards))
        self.pending = discards
        discards.start()

    def _discarded(self, discards: Discards) -> None:
        if self.came_back():
            self._end(ABRT if discards.ret < 0 else 0)

    def _end(self, error: int) -> None:
        self.channel.bus_master.end(self, self._more and not error)
        if error:
            self._disk.fail(error)
        else:
            self._disk.finish()

    KIND = "trim"
    STATE = {"_blocks": range(1, MAX_TRIM_BLOCKS + 1)}

    def go_on(self) -> None:
        self.channel.bus_master.go_on(self)
