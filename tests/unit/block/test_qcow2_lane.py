"""The lane of a qcow2 disk: what it moves at once, what it leaves, and that nobody meets it where he should not."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_drives import SECTOR, Result, read, write
from qcow2_trials import qemu_img, qemu_io, whole

from pyvmm.block import BlockBackend
from pyvmm.block.image_tool import create
from pyvmm.block.lane import READS, WRITES, Lane

MIB = 1 << 20
CLUSTER = 65536
Open = Callable[..., BlockBackend]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: there writes wait for nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(str(tmp_path / "disk"), "qcow2", 4 * MIB)
    return tmp_path / "disk"


def lane_of(backend: BlockBackend) -> Lane:
    lane = backend.lane()
    assert lane is not None
    return lane


def through(lane: Lane, at: int, length: int, pieces: int = 3) -> bytes | int:
    """Read into so many pieces."""
    data = bytearray(length)
    edges = sorted({0, length, *(random.Random(at).randrange(length) for _ in range(pieces - 1))})
    with memoryview(data) as view:
        ret = lane.readv(at, [view[a:b] for a, b in itertools.pairwise(edges)])
    return bytes(data) if ret == length else ret


def test_it_moves_data_zeros_and_what_lies_below(drive: Open, tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    content = bytearray(random.Random(1).randbytes(3 * MIB))
    base.write_bytes(content)
    create(str(middle), "qcow2", 4 * MIB, backing="base", backing_format="raw")
    qemu_io(middle, "write -P 1 100k 200k", "write -z 1M 128k", "write -P 2 3500k 64k")
    create(str(top), "qcow2", 4 * MIB, backing="middle")
    qemu_io(top, "write -P 3 150k 20k", "write -z 2M 64k", "write -P 4 1100k 8k")
    model = content + bytes(MIB)
    for byte, at, length in (
        (1, 100, 200), (0, 1024, 128), (2, 3500, 64), (3, 150, 20), (0, 2048, 64), (4, 1100, 8)
    ):  # fmt: skip
        model[at << 10 : (at + length) << 10] = bytes([byte]) * (length << 10)
    backend = drive(top)
    lane = lane_of(backend)
    assert lane.kinds == READS | WRITES
    assert through(lane, 0, MIB) == -11  # EAGAIN: no table is in memory
    assert read(backend, 0, 4 * MIB // SECTOR) == model
    rng = random.Random(2)
    for _ in range(300):
        count = rng.choice((1, 8, 300, 2000))
        sector = rng.randrange(4 * MIB // SECTOR - count)
        at = sector * SECTOR
        found = through(lane, at, count * SECTOR)
        # Half of a file's end is another's to fill.
        assert found == model[at : at + count * SECTOR] or found < count * SECTOR  # type: ignore[operator]
        if at + count * SECTOR <= 3 * MIB or at >= 3 * MIB:
            assert found == model[at : at + count * SECTOR]


def test_it_writes_where_there_is_a_cluster_of_its_own(drive: Open, path: Path) -> None:
    backend = drive(path)
    lane = lane_of(backend)
    assert lane.writev(0, [b"x" * SECTOR]) == -11
    assert write(backend, 0, b"a" * SECTOR) == 0
    assert lane.writev(512, [b"x" * SECTOR]) == SECTOR
    assert lane.writev(CLUSTER - 512, [b"y" * 1024]) == 512  # and no further
    assert backend.stats.write.operations == 2
    assert read(backend, 0, 3) == b"a" * SECTOR + b"x" * SECTOR + bytes(SECTOR)
    result = Result()
    backend.aio_discard(0, CLUSTER // SECTOR, result)
    assert result.wait() == 0
    assert lane.writev(512, [b"x" * SECTOR]) == -11
    assert through(lane, 0, CLUSTER) == bytes(CLUSTER)


def test_it_does_not_write_what_a_snapshot_shares(drive: Open, path: Path) -> None:
    qemu_io(path, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", path)
    backend = drive(path)
    lane = lane_of(backend)
    assert read(backend, 0, 1) == b"\1" * SECTOR
    assert through(lane, 0, MIB) == b"\1" * MIB
    assert lane.writev(0, [b"x" * SECTOR]) == -11
    assert write(backend, 0, b"2" * SECTOR) == 0
    assert lane.writev(0, [b"3" * SECTOR]) == SECTOR
    backend.close()
    assert whole(path, 4 * MIB, internal_snapshot="one")[:MIB] == b"\1" * MIB


def test_nobody_is_met_in_a_cluster_that_was_given_back(drive: Open, path: Path) -> None:
    """Threads write through the lane to what others discard and take anew: all keep to their own."""
    backend = drive(path, cache="unsafe")
    lane = lane_of(backend)
    clusters = 4 * MIB // CLUSTER
    for n in range(clusters):
        assert write(backend, n * CLUSTER // SECTOR, bytes([n + 1]) * CLUSTER) == 0
    over = threading.Event()

    def hammer(mine: int) -> None:
        data = bytes([mine + 1]) * 4096
        while not over.is_set():
            lane.writev(mine * CLUSTER + 8192, [data])

    threads = [threading.Thread(target=hammer, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    rng = random.Random(3)
    for _ in range(150):
        n = rng.randrange(8)
        result = Result()
        backend.aio_discard(n * CLUSTER // SECTOR, CLUSTER // SECTOR, result)
        assert result.wait() == 0
        if rng.random() < 0.5:
            backend.drain()  # counts go down, and the space is free
        assert write(backend, n * CLUSTER // SECTOR, bytes([n + 1]) * CLUSTER) == 0
    over.set()
    for thread in threads:
        thread.join()
    assert read(backend, 0, 4 * MIB // SECTOR) == b"".join(bytes([n + 1]) * CLUSTER for n in range(clusters))
    backend.close()
    assert "No errors" in qemu_img("check", path).stdout


def test_it_stays_inside_of_its_disk(drive: Open, path: Path) -> None:
    backend = drive(path)
    lane = lane_of(backend)
    assert write(backend, 4 * MIB // SECTOR - 1, b"e" * SECTOR) == 0
    assert lane.writev(4 * MIB - SECTOR, [b"f" * SECTOR]) == SECTOR
    assert lane.writev(4 * MIB - SECTOR, [b"f" * 2 * SECTOR]) == -11
    assert lane.writev(4 * MIB, [b"f" * SECTOR]) == -11
    assert lane.readv(1 << 63, [bytearray(SECTOR)]) == -11


def test_a_read_only_disk_has_one_for_reads(drive: Open, path: Path) -> None:
    backend = drive(path, read_only=True)
    assert read(backend, 0, 1) == bytes(SECTOR)
    lane = lane_of(backend)
    assert lane.kinds == READS
    assert lane.writev(0, [b"x" * SECTOR]) == -11
