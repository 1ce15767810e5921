"""An image that is no whole number of sectors: whatever IDENTIFY offers keeps what a successful write wrote.

Where the file may become longer, a write completes its last sector, as QEMU's drives do. Where it may not, that sector
is not offered.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
from collections.abc import Callable, Iterator
from errno import EACCES, EIO
from pathlib import Path

import pytest
from block_drives import ENGINES, SECTOR, Result, flush, read, takes_direct, write

from pyvmm.block import BlockBackend

Open = Callable[..., BlockBackend]
SIZES = [513, 1000, 1023, 2660, 4095, 4097, 8191, 65536 + 511]
CACHES = ["writeback", "writethrough", "none", "directsync", "unsafe"]


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    direct = request.param in ("none", "directsync")
    return "writeback" if direct and not takes_direct(tmp_path) else str(request.param)


def odd(path: Path, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return content


def zeroes(backend: BlockBackend, sector: int, count: int) -> int:
    result = Result()
    backend.aio_write_zeroes(sector, count, result)
    return result.wait()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", SIZES)
def test_the_last_sector_outlives_its_drive(drive: Open, tmp_path: Path, engine: str, cache: str, size: int) -> None:
    path = tmp_path / "odd.img"
    content = bytearray(odd(path, size))
    first = drive(path, aio=engine, cache=cache)
    last = first.sectors - 1
    assert first.sectors == size // SECTOR + 1
    data = random.Random(1).randbytes(SECTOR)
    assert write(first, last, data) == 0
    assert flush(first) == 0
    content[last * SECTOR :] = data
    first.close()
    assert path.read_bytes() == content
    again = drive(path, aio=engine, cache=cache)
    assert (again.sectors, read(again, 0, last + 1)) == (last + 1, content)


@pytest.mark.parametrize("size", SIZES)
def test_zeros_complete_it_too(drive: Open, tmp_path: Path, cache: str, size: int) -> None:
    path = tmp_path / "odd.img"
    content = odd(path, size)
    backend = drive(path, cache=cache, detect_zeroes="unmap")
    assert zeroes(backend, 0, backend.sectors) == 0
    assert path.read_bytes() == bytes(backend.sectors * SECTOR)
    path.write_bytes(content)
    backend.close()
    backend = drive(path, cache=cache, detect_zeroes="unmap")
    last = backend.sectors - 1
    assert write(backend, last, bytes(SECTOR)) == 0
    assert path.read_bytes() == content[: last * SECTOR] + bytes(SECTOR)


def test_nobody_writes_nothing_grows(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    content = odd(path, 2660)
    backend = drive(path)
    assert read(backend, 5, 1) == content[2560:] + bytes(412)
    assert write(backend, 4, b"x" * SECTOR) == 0
    backend.close()
    assert path.stat().st_size == 2660


@pytest.mark.parametrize("offset", [200, 512])
def test_a_window_to_the_end_of_the_file_grows_with_it(drive: Open, tmp_path: Path, cache: str, offset: int) -> None:
    path = tmp_path / "odd.img"
    content = odd(path, 2660)
    backend = drive(path, offset=offset, cache=cache)
    last = (2660 - offset) // SECTOR
    assert backend.sectors == last + 1
    assert write(backend, last, b"w" * SECTOR) == 0
    assert path.read_bytes() == content[: offset + last * SECTOR] + b"w" * SECTOR


# -- where it may not grow ----------------------------------------------------------------------------------------


def only_whole_sectors(backend: BlockBackend, content: bytes) -> None:
    whole = len(content) // SECTOR
    assert (backend.sectors, backend.size_bytes) == (whole, whole * SECTOR)
    assert read(backend, 0, whole) == content[: whole * SECTOR]
    result = Result()
    backend.aio_readv(whole, [memoryview(bytearray(SECTOR))], result)
    assert result.values == [-EIO]


@pytest.mark.parametrize(("offset", "size"), [(0, None), (100, None), (0, 2100), (512, 1000)])
def test_a_read_only_drive_shows_all_there_is(
    drive: Open, tmp_path: Path, cache: str, offset: int, size: int | None
) -> None:
    """With zeros behind it, as under QEMU; there is no write to lose."""
    path = tmp_path / "odd.img"
    content = odd(path, 2660)
    window = content[offset:] if size is None else content[offset : offset + size]
    backend = drive(path, read_only=True, cache=cache, offset=offset, size=size)
    sectors = -(-len(window) // SECTOR)
    assert backend.sectors == sectors
    assert read(backend, 0, sectors) == window.ljust(sectors * SECTOR, b"\0")
    assert write(backend, sectors - 1, bytes(SECTOR)) == -EACCES


def test_a_window_with_a_size(drive: Open, tmp_path: Path, cache: str) -> None:
    """Behind it is what is not the drive's, or the user has said that it ends there."""
    path = tmp_path / "odd.img"
    content = odd(path, 2660)
    for offset, size in ((512, 1000), (100, 2560), (0, 2660)):
        backend = drive(path, offset=offset, size=size, cache=cache)
        only_whole_sectors(backend, content[offset : offset + size])
        assert write(backend, backend.sectors - 1, read(backend, backend.sectors - 1, 1)) == 0
        backend.close()
    assert path.read_bytes() == content


def test_a_file_that_is_sealed_against_growth(drive: Open) -> None:
    content = random.Random(3).randbytes(2660)
    fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        backend = drive(f"/proc/self/fd/{fd}")
        only_whole_sectors(backend, content)
        assert write(backend, 4, b"x" * SECTOR) == 0
        backend.close()
        assert os.pread(fd, 4096, 0) == content[:2048] + b"x" * SECTOR + content[2560:]
    finally:
        os.close(fd)


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Over before the test is: pytest may write its own output to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("limit", "sectors"), [(2660, 5), (3071, 5), (3072, 6)])
def test_a_process_that_may_write_no_longer_files(drive: Open, tmp_path: Path, limit: int, sectors: int) -> None:
    path = tmp_path / "odd.img"
    odd(path, 2660)
    with file_size_limit(limit):
        backend = drive(path)
        assert backend.sectors == sectors
        assert write(backend, sectors - 1, b"z" * SECTOR) == 0
        assert read(backend, sectors - 1, 1) == b"z" * SECTOR


def test_a_cd_has_whole_blocks(drive: Open, tmp_path: Path) -> None:
    from pyvmm.devices.ide.atapi import AtapiDrive

    path = tmp_path / "odd.iso"
    # The sectors that the image touches, by four, as in QEMU's hw/ide/atapi.c: three of them are no block.
    for size, blocks in ((2048, 1), (3584, 1), (3585, 2), (4095, 2), (4096 + 1536, 2), (6144, 3)):
        content = odd(path, size)
        backend = drive(path, media="cdrom")
        assert AtapiDrive(backend).blocks == blocks
        assert read(backend, 0, 4 * blocks) == content[: 2048 * blocks].ljust(2048 * blocks, b"\0")
        backend.close()
