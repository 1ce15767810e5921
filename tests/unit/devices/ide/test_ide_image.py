"""The channel on a real BlockBackend: an image file, the thread pool, the event loop; and the host's own errors."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ide_bench import BSY, COMMAND, CONTROL, DRDY, DRQ, DSC, ERR, ERROR, HIGH, MID, SECTOR, Bench, image, pattern

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.devices.ide.atapi import AtapiDrive
from pyvmm.devices.ide.disk import IdeDisk
from pyvmm.event_loop import EventLoop

DONE = DRDY | DSC
SECTORS = 4096


class Real:
    """A channel with one drive on a file, and a loop that runs."""

    def __init__(self, path: str, **options: object) -> None:
        self.errors: list[BaseException] = []
        self.loop = EventLoop(self.errors.append)
        self.path = path
        self.backend: BlockBackend = open_drive(DriveOptions(path, **options), loop=self.loop, clock=self.loop.clock)
        drive = AtapiDrive(self.backend) if options.get("media") == "cdrom" else IdeDisk(self.backend)
        self.bench = Bench(drive)

    def wait(self) -> int:
        """The guest polls the status until the drive is not busy."""
        end = time.monotonic() + 20
        while (status := self.bench.alt()) & BSY:
            assert time.monotonic() < end
            self.backend.drain()
        return status

    def content(self, lba: int, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(lba * SECTOR)
            return file.read(count * SECTOR)

    def close(self) -> None:
        self.backend.close()
        self.loop.close()
        assert self.errors == []


@pytest.fixture(params=["writeback", "none", "writethrough", "directsync", "unsafe"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Real]:
    it = Real(image(tmp_path, pattern(SECTORS)), cache=request.param)
    yield it
    it.close()


def read(real: Real, lba: int, count: int, opcode: int = 0x20, block: int = 1) -> bytes:
    real.bench.command(opcode, lba, count)
    data = b""
    while real.wait() & DRQ:
        data += real.bench.pull(min(block, count - len(data) // SECTOR) * SECTOR, 4)
    return data


def write(real: Real, lba: int, data: bytes | bytearray, opcode: int = 0x30, block: int = 1) -> None:
    real.bench.command(opcode, lba, len(data) // SECTOR)
    at = 0
    while real.wait() & DRQ:
        real.bench.push(data[at : at + block * SECTOR], 4)
        at += block * SECTOR
    assert real.bench.status() == DONE


def test_pio(real: Real) -> None:
    assert read(real, 100, 256) == pattern(SECTORS)[100 * SECTOR : 356 * SECTOR]
    assert read(real, 7, 40, 0xC4, 16) == pattern(SECTORS)[7 * SECTOR : 47 * SECTOR]
    data = pattern(256, seed=8)
    write(real, 100, data)
    write(real, 1000, data, 0xC5, 16)
    real.bench.command(0xE7)
    real.wait()
    assert real.content(100, 256) == real.content(1000, 256) == data


def test_dma(real: Real) -> None:
    bench = real.bench
    bench.prd(*((0x10000 + n * 0x10000, 0) for n in range(16)))
    bench.start()
    bench.command_ext(0x25, 1000, 2048)
    assert real.wait() == DONE
    assert bench.bm_status() == 4
    assert bench.memory.read(0x10000, 2048 * SECTOR) == real.content(1000, 2048)
    bench.memory.write(0x10000, pattern(2048, seed=3))
    bench.start(False)
    bench.out(0xC000, 0)
    bench.start(False)
    bench.command_ext(0x3D, 2000, 2048)
    assert real.wait() == DONE
    assert real.content(2000, 2048) == pattern(2048, seed=3)


def test_dma_of_odd_pieces(real: Real) -> None:
    """O_DIRECT does not take them as they are."""
    bench = real.bench
    bench.prd((0x10002, 1022), (0x20004, 6), (0x30006, 3068))
    bench.start()
    bench.command(0xC8, 5, 8)
    assert real.wait() == DONE
    parts = bench.memory.read(0x10002, 1022), bench.memory.read(0x20004, 6), bench.memory.read(0x30006, 3068)
    assert b"".join(parts) == real.content(5, 8)


def test_random_commands_against_a_model(real: Real) -> None:
    rng = random.Random(5)
    model = pattern(SECTORS)
    bench = real.bench
    bench.prd((0x20000, 0), (0x30000, 0))
    for n in range(120):
        count = rng.choice((1, 2, 8, 100))
        lba = rng.randrange(SECTORS - count)
        size = count * SECTOR
        what = rng.randrange(6)
        expected = bytes(model[lba * SECTOR : lba * SECTOR + size])
        if what == 0:
            assert read(real, lba, count) == expected
        elif what == 1:
            assert read(real, lba, count, 0xC4, 16) == expected
        elif what < 4:
            data = pattern(count, seed=n)
            write(real, lba, data, *((0x30, 1) if what == 2 else (0xC5, 16)))
            model[lba * SECTOR : lba * SECTOR + size] = data
        else:
            if what == 5:
                bench.memory.write(0x20000, pattern(count, seed=n))
                model[lba * SECTOR : lba * SECTOR + size] = pattern(count, seed=n)
            bench.out(0xC000, 0)
            bench.start(what == 4)
            bench.command(0xC8 if what == 4 else 0xCA, lba, count)
            assert real.wait() == DONE
            assert what == 5 or bench.memory.read(0x20000, size) == expected
    bench.command(0xE7)
    real.wait()
    assert real.content(0, SECTORS) == model


def test_trim_punches_holes(tmp_path: Path) -> None:
    real = Real(image(tmp_path, pattern(SECTORS)))
    real.bench.memory.write(0x2000, (64 | 1024 << 48).to_bytes(8, "little").ljust(512, b"\0"))
    real.bench.prd((0x2000, 512))
    real.bench.start(False)
    real.bench.command_ext(0x06, 0, 1, features=1)
    assert real.wait() == DONE
    assert real.content(0, 64) == pattern(SECTORS)[: 64 * SECTOR]
    assert real.content(1088, 100) == pattern(SECTORS)[1088 * SECTOR : 1188 * SECTOR]
    if os.stat(real.path).st_blocks < SECTORS:  # where the file system has holes
        assert real.content(64, 1024) == bytes(1024 * SECTOR)
    real.close()


def test_a_disk_whose_last_sector_is_not_all_there(tmp_path: Path) -> None:
    data = bytes(pattern(8)[:-100])
    real = Real(image(tmp_path, data))
    assert real.bench.channel.drives[0].sectors == 8  # type: ignore[attr-defined]
    assert read(real, 7, 1) == data[7 * SECTOR :] + bytes(100)
    write(real, 7, pattern(1, seed=2))
    assert os.path.getsize(real.path) == 8 * SECTOR
    assert real.content(7, 1) == pattern(1, seed=2)
    real.close()


def test_cd(tmp_path: Path) -> None:
    data = bytes(pattern(4 * 300))
    real = Real(image(tmp_path, data), media="cdrom")
    cdb = bytes((0xA8, 0, 0, 0, 0, 10, 0, 0, 0, 200))
    real.bench.packet(cdb, 0x8000)
    got = b""
    while real.wait() & DRQ:
        got += real.bench.pull(real.bench.inb(MID) | real.bench.inb(HIGH) << 8, 4)
    assert got == data[10 * 2048 : 210 * 2048]
    real.bench.prd(*((0x10000 + n * 0x10000, 0) for n in range(8)))
    real.bench.start()
    real.bench.packet(cdb, dma=True)
    assert real.wait() == DONE
    assert real.bench.memory.read(0x10000, 200 * 2048) == got
    real.close()


@pytest.mark.parametrize("opcode", [0x20, 0xC8])
def test_a_file_that_became_shorter(tmp_path: Path, opcode: int) -> None:
    """What is not there any more reads as zeros."""
    real = Real(image(tmp_path, pattern(64)))
    os.truncate(real.path, 32 * SECTOR)
    real.bench.prd((0x2000, 512))
    real.bench.start()
    real.bench.command(opcode, 40, 1)
    real.wait()
    data = real.bench.pull(SECTOR) if opcode == 0x20 else real.bench.memory.read(0x2000, SECTOR)
    assert data == bytes(SECTOR)
    assert real.bench.status() == DONE
    real.close()


def test_a_host_error_names_its_sector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector as a disk of the host has it: EIO for whatever touches it."""
    from pyvmm.block.protocols import file_posix

    real = Real(image(tmp_path, pattern(SECTORS)))
    bad = 137 * SECTOR
    preadv = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "a bad sector")
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(file_posix, "preadv", failing)
    real.bench.command(0x20, 100, 64)
    for n in range(37):
        assert real.wait() == DONE | DRQ
        assert real.bench.pull(SECTOR, 4) == real.content(100 + n, 1)
    assert real.wait() == DONE | ERR
    assert (real.bench.inb(ERROR), real.bench.lba()) == (0x40, 137)
    real.close()


def test_resets_in_the_middle_of_everything(tmp_path: Path) -> None:
    """With real threads behind it: what comes late hits nothing."""
    real = Real(image(tmp_path, pattern(SECTORS)), cache="none")
    rng = random.Random(1)
    bench = real.bench
    bench.prd((0x20000, 0), (0x30000, 0))
    for _ in range(150):
        bench.out(0xC000, 0)
        bench.start()
        bench.command(rng.choice((0x20, 0xC8, 0xE7, 0xC4, 0x40)), rng.randrange(3000), rng.randrange(256))
        if rng.randrange(2):
            bench.pull(100)
        if rng.randrange(3):
            bench.out(CONTROL, 4, 0)
        else:
            bench.channel.reset()
        bench.out(COMMAND, 0xEC)  # perhaps lost
    assert real.wait() in (DONE, DONE | DRQ)
    bench.out(CONTROL, 4, 0)
    assert read(real, 5, 8) == pattern(SECTORS)[5 * SECTOR : 13 * SECTOR]
    real.close()
