"""What a disk does for a command without moving data to or from the host."""

from __future__ import annotations

from pyvmm.devices.ide.activity import Activity
from pyvmm.devices.ide.chain import Flush, Mover
from pyvmm.devices.ide.pio_buffer import CHUNK_SECTORS
from pyvmm.devices.ide.registers import ABRT, BUSY, POWERS, UNC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.ide.activity import DiskSide


class FlushTask(Activity):
    """FLUSH CACHE, and what includes it; ``power`` is the state the disk is in afterwards, None for no change."""

    __slots__ = ("_disk", "_power")

    def __init__(self, disk: DiskSide, power: int | None = None) -> None:
        super().__init__(disk)
        self._disk = disk
        self._power = power

    def start(self) -> None:
        disk = self._disk
        disk.activity = self
        disk.status = BUSY
        flush = Flush(self.channel.lock, disk.backend, lambda: self._flushed(flush))
        self.pending = flush
        flush.start()

    def _flushed(self, flush: Flush) -> None:
        if not self.came_back():
            return
        if flush.ret < 0:
            self._disk.fail(ABRT)
            return
        if self._power is not None:
            self._disk.power = self._power
        self._disk.finish()

    KIND = "flush"
    STATE = {"_power": ("or none", POWERS)}

    def go_on(self) -> None:
        self.start()


class VerifyTask(Activity):
    """READ VERIFY: the sectors are read, and that is all."""

    __slots__ = ("_count", "_disk", "_lba")

    def __init__(self, disk: DiskSide, lba: int = 0, count: int = 0) -> None:
        super().__init__(disk)
        self._disk = disk
        self._lba = lba
        self._count = count

    def start(self) -> None:
        disk = self._disk
        disk.activity = self
        disk.status = BUSY
        iov = self.channel.buffer.iov(CHUNK_SECTORS) * -(-self._count // CHUNK_SECTORS)  # all to the same place
        lock = self.channel.lock
        mover = Mover(lock, disk.backend.aio_readv, self._lba, iov, self._count, lambda: self._read(mover))
        self.pending = mover
        mover.start()

    def _read(self, mover: Mover) -> None:
        if not self.came_back():
            return
        disk = self._disk
        disk.set_lba(self._lba + mover.moved)
        disk.set_count(self._count - mover.moved)
        if mover.moved < self._count:
            disk.fail(UNC)
        else:
            disk.finish()

    KIND = "verify"
    STATE = {"_lba": 48, "_count": range(1, 0x10001)}

    def wrong(self) -> str:
        return "" if self._lba + self._count <= self._disk.sectors else "lba and count reach past the end of the disk"

    def go_on(self) -> None:
        self.start()
