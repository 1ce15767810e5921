"""snapshot=on: the image stays as it is, the guest sees its own writes, and in the end they are gone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from errno import EFBIG, EIO, ENOSPC
from pathlib import Path

import pytest
from block_drives import ENGINES, SECTOR, MemoryProtocol, Result, flush, read, run, takes_direct, write
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from test_block_engines import DiskModel

from pyvmm.block import BlockBackend
from pyvmm.block.formats import snapshot
from pyvmm.block.formats.raw import RawDriver
from pyvmm.block.formats.snapshot import SnapshotDriver, cluster_size
from pyvmm.errors import ConfigError

Open = Callable[..., BlockBackend]
CLUSTER = 64 << 10


@pytest.fixture(params=["writeback", "none", "writethrough", "unsafe"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "writeback" if request.param == "none" and not takes_direct(tmp_path) else str(request.param)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_image_stays_as_it_is(drive: Open, image: Path, engine: str, cache: str) -> None:
    before, status = image.read_bytes(), image.stat()
    backend = drive(snapshot=True, aio=engine, cache=cache)
    content = bytearray(before)
    generator = random.Random(4)
    for _ in range(30):
        sector = generator.randrange(2048)
        data = generator.randbytes(generator.randint(1, min(300, 2048 - sector)) * SECTOR)
        assert write(backend, sector, data) == 0
        content[sector * SECTOR : sector * SECTOR + len(data)] = data
    assert flush(backend) == 0
    assert read(backend, 0, 2048) == content
    backend.close()
    assert image.read_bytes() == before
    assert image.stat().st_mtime_ns == status.st_mtime_ns
    assert read(drive(), 0, 2048) == before


def zeroes(backend: BlockBackend, sector: int, count: int, discard: bool = False) -> int:
    result = Result()
    (backend.aio_discard if discard else backend.aio_write_zeroes)(sector, count, result)
    return result.wait()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("sector", "count"),
    [(0, 2048), (0, 1), (127, 2), (128, 128), (100, 400), (2047, 1), (1920, 128), (130, 20), (1, 127)],
)
@pytest.mark.parametrize("written", [False, True])
def test_zeros(drive: Open, image: Path, engine: str, sector: int, count: int, written: bool) -> None:
    before = image.read_bytes()
    backend = drive(snapshot=True, aio=engine)
    content = bytearray(before)
    if written:
        content[:] = random.Random(2).randbytes(len(content))
        assert write(backend, 0, bytes(content)) == 0
    assert zeroes(backend, sector, count) == 0
    content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
    assert read(backend, 0, 2048) == content
    assert image.read_bytes() == before


def test_a_discard_never_brings_back_what_was_written_over(drive: Open, image: Path) -> None:
    backend = drive(snapshot=True)
    secret = read(backend, 64, 512)
    assert write(backend, 64, bytes([7]) * (512 * SECTOR)) == 0
    assert zeroes(backend, 0, 2048, discard=True) == 0
    now = read(backend, 64, 512)
    for n in range(512):
        assert now[n * SECTOR : (n + 1) * SECTOR] != secret[n * SECTOR : (n + 1) * SECTOR]
    assert read(backend, 1024, 128) == image.read_bytes()[1024 * SECTOR : 1152 * SECTOR]  # as it was: an advice


def test_a_discard_gives_room_back(image: Path) -> None:
    base, top = MemoryProtocol(image.read_bytes()), MemoryProtocol(bytes(1 << 20))
    driver = SnapshotDriver(RawDriver(base, 0, 1 << 20), RawDriver(top, 0, 1 << 20))
    assert run(driver.co_writev(CLUSTER, [memoryview(b"x" * CLUSTER)], CLUSTER, False)) == 0
    assert run(driver.co_discard(0, 1 << 20)) == 0
    assert [call for call in top.calls if call[0] == "discard"] == [("discard", CLUSTER, CLUSTER)]
    assert not [call for call in base.calls if call[0] != "read"]
    driver.close()
    assert base.closed
    assert top.closed


def test_an_odd_image_keeps_its_last_sector(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"o" * 2660)
    backend = drive(path, snapshot=True)
    assert backend.sectors == 6
    assert read(backend, 5, 1) == b"o" * 100 + bytes(412)
    assert write(backend, 5, b"n" * SECTOR) == 0
    assert read(backend, 4, 2) == b"o" * SECTOR + b"n" * SECTOR
    assert path.read_bytes() == b"o" * 2660


def test_a_window(drive: Open, image: Path) -> None:
    before = image.read_bytes()
    backend = drive(snapshot=True, offset=777, size=100 * SECTOR)
    assert write(backend, 99, b"w" * SECTOR) == 0
    assert read(backend, 0, 100) == before[777 : 777 + 99 * SECTOR] + b"w" * SECTOR
    assert image.read_bytes() == before


def test_many_may_have_it_but_no_writer(drive: Open, image: Path) -> None:
    one, two = drive(snapshot=True), drive(snapshot=True)
    assert write(one, 0, b"1" * SECTOR) == write(two, 0, b"2" * SECTOR) == 0
    assert (read(one, 0, 1), read(two, 0, 1)) == (b"1" * SECTOR, b"2" * SECTOR)
    drive(read_only=True)
    with pytest.raises(ConfigError, match="is in use by"):
        drive()


def test_an_image_that_may_not_be_written(drive: Open, image: Path) -> None:
    image.chmod(0o444)
    backend = drive(snapshot=True)
    assert write(backend, 0, b"1" * SECTOR) == 0


def test_what_the_guest_may_not_write_needs_no_file(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    drive(snapshot=True, read_only=True)
    drive(snapshot=True, media="cdrom")


def files_under(directory: Path) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(f"{directory}/"):
            found.append(target)
    return found


@pytest.mark.parametrize("unnamed", [True, False])
def test_the_file_has_no_name(
    drive: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    """By O_TMPFILE; or with a name for a moment, where the file system has none of that."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what an old file system makes of it: EISDIR
    backend = drive(snapshot=True)
    assert write(backend, 0, b"1" * SECTOR) == 0
    assert list(directory.iterdir()) == []
    assert len(files_under(directory)) == 1
    assert all(target.endswith(" (deleted)") for target in files_under(directory))
    backend.close()
    assert files_under(directory) == []


def test_nowhere_to_keep_it(drive: Open, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no temporary file in .*none.*: set TMPDIR to a directory that may be"):
        drive(snapshot=True)
    monkeypatch.delenv("TMPDIR")
    drive()  # and the image is free again


def test_a_disk_that_is_too_large() -> None:
    assert cluster_size(1) == cluster_size(4 << 40) == CLUSTER
    assert cluster_size((4 << 40) + 1) == 2 * CLUSTER
    assert cluster_size(64 << 40) == 1 << 20
    with pytest.raises(ConfigError, match=r"snapshot=on takes disks up to 64 TiB"):
        cluster_size((64 << 40) + 512)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_large_disk_costs_what_is_touched(drive: Open, tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    path.touch()
    os.truncate(path, 8 << 40)
    before = resident_bytes()
    backend = drive(path, snapshot=True)
    assert resident_bytes() - before < 8 << 20
    last = backend.sectors - 1
    ret = write(backend, last, b"l" * SECTOR)
    assert ret == 0 or -ret in (EFBIG, ENOSPC)  # as far as the file system of the temporary file goes
    assert read(backend, last, 1) == (b"l" * SECTOR if ret == 0 else bytes(SECTOR))


def pair(size: int = 4 * CLUSTER) -> tuple[SnapshotDriver, MemoryProtocol, MemoryProtocol]:
    base, top = MemoryProtocol(b"b" * size), MemoryProtocol(bytes(size))
    return SnapshotDriver(RawDriver(base, 0, size), RawDriver(top, 0, size)), base, top


def get(driver: SnapshotDriver, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    assert run(driver.co_readv(offset, [memoryview(buffer)], length)) == 0
    return bytes(buffer)


def test_a_part_of_a_cluster_brings_the_rest_along() -> None:
    driver, base, top = pair()
    assert run(driver.co_writev(CLUSTER + 512, [memoryview(b"w" * 512)], 512, True)) == 0
    assert top.data[CLUSTER : 2 * CLUSTER] == b"b" * 512 + b"w" * 512 + b"b" * (CLUSTER - 1024)
    assert top.calls == [("write", CLUSTER, CLUSTER, False)]  # in one go
    top.calls.clear()
    base.calls.clear()
    assert run(driver.co_writev(CLUSTER + 2048, [memoryview(b"v" * 512)], 512, True)) == 0
    assert (base.calls, top.calls) == ([], [("write", CLUSTER + 2048, 512, False)])


@pytest.mark.parametrize("which", ["base", "top"])
def test_a_write_that_fails_leaves_the_bases_bytes(which: str) -> None:
    driver, base, top = pair()
    (base if which == "base" else top).results = [-EIO]
    assert run(driver.co_writev(512, [memoryview(b"w" * 512)], 512, False)) == -EIO
    assert get(driver, 0, CLUSTER) == b"b" * CLUSTER
    assert run(driver.co_writev(512, [memoryview(b"w" * 512)], 512, False)) == 0
    assert get(driver, 0, 1536) == b"b" * 512 + b"w" * 512 + b"b" * 512
    assert not [call for call in base.calls if call[0] != "read"]


def test_zeros_that_fail_leave_the_bases_bytes() -> None:
    driver, _, top = pair()
    top.results = [-EIO]
    assert run(driver.co_write_zeroes(0, CLUSTER, True, False)) == -EIO
    assert get(driver, 0, CLUSTER) == b"b" * CLUSTER


def test_flushes_cost_nothing() -> None:
    driver, base, top = pair()
    assert run(driver.co_writev(0, [memoryview(b"w" * CLUSTER)], CLUSTER, True)) == 0
    assert run(driver.co_flush()) == 0
    assert ("flush",) not in base.calls + top.calls


class SnapshotModel(DiskModel):
    """As test_block_engines has it, but that the image never changes, and a discard is no write of zeros."""

    def look_at_the_image(self) -> None:
        assert self.path.read_bytes() == self.before + bytes(self.size) + self.after

    @rule(where=st.integers(0, 100), count=st.integers(1, 12), discard=st.just(False))
    def zero(self, where: int, count: int, discard: bool) -> None:
        sector, count = self.place(where, count)
        self.drive.aio_write_zeroes(sector, count, self.callback())
        self.put(sector, bytes(count * SECTOR))


@pytest.mark.parametrize("engine", ENGINES)
def test_against_a_model(engine: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "CLUSTER_BYTES", 2048)

    class Model(SnapshotModel):
        options = {"aio": engine, "cache": cache, "snapshot": True}
        path = tmp_path / "model.img"

    run_state_machine_as_test(Model, settings=settings(max_examples=15, stateful_step_count=25, deadline=None))
