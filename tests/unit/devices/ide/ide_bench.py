"""An ATA channel on a port bus with guest memory and nobody behind it, and backends that do as the test says."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Sequence
from errno import ECANCELED, EIO
from functools import cache
from typing import Any

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.ide.atapi import AtapiDrive
from pyvmm.devices.ide.channel import IdeChannel
from pyvmm.devices.ide.disk import IdeDisk
from pyvmm.guest_memory import GuestMemory
from pyvmm.irq import IrqLine

RAM_BYTES = (2 << 20) + 0x3000  # no multiple of 64 KiB
SECTOR = 512

DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(0x1F0, 0x1F8)
FEATURES, REASON, COMMAND = ERROR, COUNT, STATUS
CONTROL = 0x3F6
BM = 0xC000
BM_STATUS, BM_TABLE = BM + 2, BM + 4
PRD_TABLE = 0x8000
LAST = 0x8000_0000

BSY, DRDY, DSC, DRQ, ERR = 0x80, 0x40, 0x10, 0x08, 0x01
UNC, IDNF, ABRT = 0x40, 0x10, 0x04


@cache
def noise(sectors: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(sectors * SECTOR)


def pattern(sectors: int, seed: int = 1) -> bytearray:
    """So many sectors of what looks like nothing else."""
    return bytearray(noise(sectors, seed))


class FakeRequest:
    def __init__(self, what: str, sector: int, count: int, run: Callable[[], int], cb: Callable[[int], object]) -> None:
        self.what, self.sector, self.count = what, sector, count
        self.run, self.cb = run, cb
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeBackend:
    """An image in memory. ``held`` requests wait for ``release``; sectors in ``bad`` can't be read or written."""

    def __init__(self, data: bytearray, *, read_only: bool = False) -> None:
        self.data = data
        self.sectors = -(-len(data) // SECTOR)
        self.size_bytes = len(data)
        self.read_only = read_only
        self.inserted = True
        self.bad: set[int] = set()
        self.flush_ret = 0
        self.discard_ret = 0
        self.held = False
        self.waiting: list[FakeRequest] = []
        self.log: list[tuple[str, int, int]] = []
        self.discarded: list[tuple[int, int]] = []
        self.stable = bytes(data)  # what the last flush has made durable

    def _submit(
        self, what: str, sector: int, count: int, run: Callable[[], int], cb: Callable[[int], object]
    ) -> FakeRequest:
        request = FakeRequest(what, sector, count, run, cb)
        self.log.append((what, sector, count))
        if self.held:
            self.waiting.append(request)
        else:
            cb(run())
        return request

    def release(self, count: int = 1) -> None:
        """Let so many requests that are held end, oldest first; what their ends submit is held again."""
        for _ in range(count):
            request = self.waiting.pop(0)
            request.cb(-ECANCELED if request.cancelled else request.run())

    def _wrong(self, sector: int, count: int) -> int:
        if sector < 0 or sector + count > self.sectors or self.bad & set(range(sector, sector + count)):
            return -EIO
        return 0

    def aio_readv(self, sector: int, iov: Sequence[memoryview], cb: Callable[[int], object]) -> FakeRequest:
        size = sum(map(len, iov))
        assert size % SECTOR == 0 and len(iov) <= 1024

        def run() -> int:
            ret = self._wrong(sector, size // SECTOR)
            at = sector * SECTOR
            for view in iov if ret == 0 else ():
                view[:] = self.data[at : at + len(view)]
                at += len(view)
            return ret

        return self._submit("read", sector, size // SECTOR, run, cb)

    def aio_writev(self, sector: int, iov: Sequence[memoryview], cb: Callable[[int], object]) -> FakeRequest:
        size = sum(map(len, iov))
        assert size % SECTOR == 0 and len(iov) <= 1024

        def run() -> int:
            ret = self._wrong(sector, size // SECTOR)
            if ret == 0:
                self.data[sector * SECTOR : sector * SECTOR + size] = b"".join(iov)
            return ret

        return self._submit("write", sector, size // SECTOR, run, cb)

    def aio_flush(self, cb: Callable[[int], object]) -> FakeRequest:
        def run() -> int:
            if self.flush_ret == 0:
                self.stable = bytes(self.data)
            return self.flush_ret

        return self._submit("flush", 0, 0, run, cb)

    def aio_discard(self, sector: int, count: int, cb: Callable[[int], object]) -> FakeRequest:
        def run() -> int:
            assert self._wrong(sector, 0) == 0
            self.discarded.append((sector, count))
            return self.discard_ret

        return self._submit("discard", sector, count, run, cb)


class Bench:
    """``irqs`` logs the levels of the interrupt line."""

    def __init__(
        self,
        master: IdeDisk | AtapiDrive | None = None,
        slave: IdeDisk | AtapiDrive | None = None,
        *,
        ram_bytes: int = RAM_BYTES,
    ) -> None:
        self.memory = GuestMemory(ram_bytes)
        self.clock = VirtualClock()
        self.irqs: list[int] = []
        self.irq = IrqLine(self.irqs.append)
        self.channel = IdeChannel(self.irq, self.clock, (master, slave), self.memory)
        self.pio = AddressSpace("pio", 0x10000)
        channel = self.channel
        self.pio.add(DATA, channel.data)
        self.pio.add(ERROR, channel.region)
        self.pio.add(CONTROL, channel.control)
        self.pio.map(BM, 8, channel.bus_master)

    # -- ports ---------------------------------------------------------------------------------------------------------

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.pio.write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.pio.read(port, 1)

    def alt(self) -> int:
        """The status, interrupt untouched."""
        return self.inb(CONTROL)

    def status(self) -> int:
        return self.inb(STATUS)

    def pull(self, size: int, width: int = 2) -> bytes:
        """``size`` bytes through the data port."""
        return b"".join(self.pio.read(DATA, width).to_bytes(width, "little") for _ in range(size // width))

    def push(self, data: bytes | bytearray, width: int = 2) -> None:
        for at in range(0, len(data), width):
            self.pio.write(DATA, width, int.from_bytes(data[at : at + width], "little"))

    # -- commands ------------------------------------------------------------------------------------------------------

    def select(self, unit: int = 0) -> None:
        self.out(DEVICE, 0xA0 | unit << 4)

    def command(self, opcode: int, lba: int = 0, count: int = 1, *, features: int = 0, unit: int = 0) -> None:
        """With 28 bits of address."""
        self.out(DEVICE, 0xE0 | unit << 4 | lba >> 24 & 15)
        self.out(FEATURES, features)
        self.out(COUNT, count & 0xFF)
        self.out(LOW, lba & 0xFF)
        self.out(MID, lba >> 8 & 0xFF)
        self.out(HIGH, lba >> 16 & 0xFF)
        self.out(COMMAND, opcode)

    def command_ext(self, opcode: int, lba: int = 0, count: int = 1, *, features: int = 0, unit: int = 0) -> None:
        """With 48 bits: the upper byte of each first."""
        self.out(DEVICE, 0xE0 | unit << 4)
        self.out(FEATURES, features >> 8, features & 0xFF)
        self.out(COUNT, count >> 8 & 0xFF, count & 0xFF)
        self.out(LOW, lba >> 24 & 0xFF, lba & 0xFF)
        self.out(MID, lba >> 32 & 0xFF, lba >> 8 & 0xFF)
        self.out(HIGH, lba >> 40 & 0xFF, lba >> 16 & 0xFF)
        self.out(COMMAND, opcode)

    def lba(self) -> int:
        """The address in the registers, 28 bits."""
        return self.inb(LOW) | self.inb(MID) << 8 | self.inb(HIGH) << 16 | (self.inb(DEVICE) & 15) << 24

    def lba_ext(self) -> int:
        self.out(CONTROL, 0x80)
        high = self.inb(LOW) | self.inb(MID) << 8 | self.inb(HIGH) << 16
        self.out(CONTROL, 0)
        return high << 24 | self.inb(LOW) | self.inb(MID) << 8 | self.inb(HIGH) << 16

    def read_pio(self, opcode: int, lba: int, count: int, block: int = 1) -> bytes:
        """READ SECTORS and its like, by the book: one interrupt a DRQ block."""
        self.command(opcode, lba, count)
        data = b""
        left = count
        while left:
            assert self.irq.level == 1
            assert self.status() == DRDY | DSC | DRQ
            assert self.irq.level == 0
            n = min(block, left)
            data += self.pull(n * SECTOR, 4)
            left -= n
        assert self.alt() == DRDY | DSC
        assert self.irq.level == 0
        return data

    def write_pio(self, opcode: int, lba: int, data: bytes | bytearray, block: int = 1) -> None:
        count = len(data) // SECTOR
        self.command(opcode, lba, count)
        assert self.irq.level == 0
        at = 0
        while at < len(data):
            assert self.alt() == DRDY | DSC | DRQ
            size = min(block * SECTOR, len(data) - at)
            self.push(data[at : at + size], 4)
            at += size
            assert self.irq.level == 1
            expected = DRDY | DSC | (DRQ if at < len(data) else 0)
            assert self.status() == expected

    # -- DMA -----------------------------------------------------------------------------------------------------------

    def prd(self, *entries: tuple[int, int], table: int = PRD_TABLE, last: bool = True) -> None:
        """Write a PRD table of (address, bytes) and point the bus master to it."""
        raw = bytearray()
        for n, (address, size) in enumerate(entries):
            flag = LAST if last and n == len(entries) - 1 else 0
            raw += struct.pack("<II", address, size & 0xFFFF | flag)
        self.memory.write(table, raw)
        self.pio.write(BM_TABLE, 4, table)

    def start(self, to_memory: bool = True) -> None:
        self.out(BM, 8 if to_memory else 0)
        self.out(BM_STATUS, 0x66)  # forget old results
        self.out(BM, 9 if to_memory else 1)

    def bm_status(self) -> int:
        """ACTIVE 1, ERROR 2, INTERRUPT 4."""
        return self.inb(BM_STATUS) & 7

    # -- packets -------------------------------------------------------------------------------------------------------

    def packet(self, cdb: Sequence[int] | bytes, limit: int = 0xFFFE, *, dma: bool = False, unit: int = 0) -> None:
        self.out(DEVICE, 0xA0 | unit << 4)
        self.out(FEATURES, int(dma))
        self.out(MID, limit & 0xFF)
        self.out(HIGH, limit >> 8)
        self.out(COMMAND, 0xA0)
        assert self.alt() & (BSY | DRQ | ERR) == DRQ
        assert self.inb(REASON) & 3 == 1
        self.push(bytes(cdb).ljust(12, b"\0"))

    def packet_in(self, limit: int) -> bytes:
        """What the drive sends, by PIO, to the end."""
        data = b""
        while self.status() & DRQ:
            assert self.inb(REASON) & 3 == 2
            size = self.inb(MID) | self.inb(HIGH) << 8
            assert 0 < size <= limit
            data += self.pull(size + size % 2)[:size]
        assert self.inb(REASON) & 3 == 3
        return data


def disk(data: bytearray | None = None, **options: Any) -> tuple[IdeDisk, FakeBackend]:
    backend = FakeBackend(pattern(1024) if data is None else data, **options)
    return IdeDisk(backend), backend  # type: ignore[arg-type]


def new_bench(sectors: int = 1024, **options: Any) -> tuple[Bench, FakeBackend]:
    drive, backend = disk(pattern(sectors), **options)
    return Bench(drive), backend


def image(directory: os.PathLike[str] | str, data: bytes, name: str = "disk.img") -> str:
    path = os.path.join(directory, name)
    with open(path, "wb") as file:
        file.write(data)
    return path
