"""A lane: transfers past the coroutines, when the backend gives leave for them, and that they count as its own."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from errno import EAGAIN, EBADF, EIO
from pathlib import Path

import pytest
from block_drives import IO_URING_REFUSAL, SECTOR, ManualDrive, Result, flush, read, takes_direct, write

from pyvmm.block import BlockBackend
from pyvmm.block.lane import READS, WRITES, Lane

BOTH = READS | WRITES
Open = Callable[..., BlockBackend]


@pytest.fixture
def image() -> Iterator[Path]:
    """As in conftest.py, in memory: there writes wait for nothing either, which ext4 says of none of its own."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(b"".join(number.to_bytes(4, "little") * 128 for number in range(2048)))
        file.flush()
        yield Path(file.name)


def lane_of(backend: BlockBackend) -> Lane:
    lane = backend.lane()
    assert lane is not None
    assert backend.lane() is lane
    return lane


def through(lane: Lane, sector: int, count: int = 1) -> bytes | int:
    buffer = bytearray(count * SECTOR)
    done = lane.readv(sector * SECTOR, [buffer])
    return bytes(buffer) if done == len(buffer) else done


def test_it_moves_the_disks_bytes(drive: Open, image: Path) -> None:
    backend = drive(offset=3 * SECTOR, size=8 * SECTOR)
    lane = lane_of(backend)
    assert through(lane, 2, 2) == read(backend, 2, 2) == image.read_bytes()[5 * SECTOR : 7 * SECTOR]
    assert lane.writev(7 * SECTOR, [b"a" * 100, b"b" * 412]) == SECTOR
    assert image.read_bytes()[10 * SECTOR : 11 * SECTOR] == b"a" * 100 + b"b" * 412


@pytest.mark.parametrize("at", [8 * SECTOR, 7 * SECTOR + 1, 1 << 62, (1 << 64) - SECTOR])
def test_nothing_beyond_the_disk_is_touched(drive: Open, image: Path, at: int) -> None:
    lane = lane_of(drive(offset=3 * SECTOR, size=8 * SECTOR))
    before = image.read_bytes()
    assert lane.readv(at, [bytearray(SECTOR)]) == -EAGAIN
    assert lane.writev(at, [bytes(SECTOR)]) == -EAGAIN
    assert image.read_bytes() == before


def test_more_pieces_than_a_system_call_takes(drive: Open) -> None:
    lane = lane_of(drive(format="raw"))
    assert lane.readv(0, [bytearray(1)] * 1024) == 1024
    assert lane.readv(0, [bytearray(1)] * 1025) == -EAGAIN


def test_its_requests_are_counted_as_the_drives(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    through(lane, 0, 3)
    read(backend, 0, 1)
    lane.writev(SECTOR, [bytes(2 * SECTOR)])
    assert (backend.stats.read.operations, backend.stats.read.bytes) == (2, 4 * SECTOR)
    assert (backend.stats.write.operations, backend.stats.write.bytes) == (1, 2 * SECTOR)
    assert backend.stats.read.operations == 2  # folded once
    assert backend.stats.max_in_flight == 1
    assert backend.stats.in_flight == 0


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, BOTH),
        ({"cache": "unsafe"}, BOTH),
        ({"read_only": True}, READS),
        ({"cache": "writethrough"}, READS),
        ({"detect_zeroes": "on"}, READS),
        ({"throttle_iops": 1000}, None),
        ({"throttle_bps_write": 1 << 20}, None),
        ({"snapshot": True}, None),
    ],
)
def test_what_a_drives_options_leave_of_it(drive: Open, options: dict[str, object], kinds: int | None) -> None:
    lane = drive(**options).lane()
    assert (None if lane is None else lane.kinds) == kinds


def test_io_uring_has_one_too(drive: Open) -> None:
    if not IO_URING_REFUSAL:  # the summary of these tests says where it can't be
        assert lane_of(drive(aio="io_uring")).kinds == BOTH


def test_none_with_o_direct_and_none_through_a_filter(drive: Open, image: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("[inject-error]\nevent = \"none\"\niotype = \"read\"\nsector = \"5\"\n")
    assert drive(f"blkdebug:{rules}:{image}").lane() is None
    if takes_direct(tmp_path):
        assert drive(cache="none", locking=False).lane() is None


def test_the_guest_turns_the_write_cache_off_and_on(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    backend.write_cache = False
    assert lane.kinds == READS
    assert lane.writev(0, [bytes(SECTOR)]) == -EAGAIN
    backend.write_cache = True
    assert lane.kinds == BOTH


def test_a_write_through_it_has_to_be_flushed(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    flush(backend)
    assert not synced  # nothing was written
    lane.writev(0, [bytes(SECTOR)])
    assert backend.save()["unflushed"]
    flush(backend)
    flush(backend)
    assert len(synced) == 1
    assert not backend.save()["unflushed"]
    lane.writev(0, [bytes(SECTOR)])
    flush(backend)
    assert len(synced) == 2


def test_nothing_goes_past_a_request_that_was_put_aside() -> None:
    manual = ManualDrive(werror="stop", rerror="stop")
    lane = Lane(-1, 0, 0, 1 << 20)
    manual.driver.lane = lambda: lane  # type: ignore[method-assign]
    assert manual.backend.lane() is lane
    assert lane.kinds == BOTH
    result = manual.write(0)
    manual.finish(-EIO)
    assert manual.backend.stalled == 1
    assert lane.kinds == 0
    manual.backend.resume()
    assert lane.kinds == BOTH
    manual.finish(-EIO)
    assert lane.kinds == 0
    manual.backend.drop_stalled()
    assert lane.kinds == BOTH
    assert not result.done


def test_a_request_that_was_put_aside_is_cancelled() -> None:
    manual = ManualDrive(rerror="stop")
    lane = Lane(-1, 0, 0, 1 << 20)
    manual.driver.lane = lambda: lane  # type: ignore[method-assign]
    manual.backend.lane()
    result = manual.read(0)
    manual.finish(-EIO)
    assert lane.kinds == 0
    result.request.cancel()  # type: ignore[attr-defined]
    assert lane.kinds == BOTH
    manual.loop.run()
    assert result.done


def test_none_while_a_state_is_loaded(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    state = backend.save()
    backend.load(state)
    assert lane.kinds == 0
    waits = Result()
    backend.aio_readv(0, [memoryview(bytearray(SECTOR))], waits)
    backend.after_load()
    assert lane.kinds == 0  # what was asked again waits for resume()
    backend.resume()
    assert lane.kinds == BOTH
    assert waits.wait() == 0


def test_a_loaded_state_remembers_what_is_not_flushed(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    lane.writev(0, [bytes(SECTOR)])
    backend.load(backend.save())
    assert backend.save()["unflushed"]
    flush_state = backend.save()
    backend.load({**flush_state, "unflushed": False})
    assert not backend.save()["unflushed"]


def test_none_of_a_drive_that_is_closed(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    backend.close()
    assert lane.kinds == 0
    assert through(lane, 0) == -EAGAIN


def test_none_in_a_child_of_fork(drive: Open) -> None:
    backend = drive(format="raw")
    lane = lane_of(backend)
    assert write(backend, 0, bytes(SECTOR)) == 0
    child = os.fork()
    if not child:
        backend.abandon()
        os._exit(lane.kinds)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lane.kinds == BOTH


def test_an_error_is_told_and_nothing_is_counted() -> None:
    lane = Lane(-1, 0, 0, SECTOR)
    assert lane.readv(0, [bytearray(SECTOR)]) == -EAGAIN
    lane.grant(BOTH)
    assert lane.readv(0, [bytearray(SECTOR)]) == -EBADF
    assert lane.writev(0, [bytes(SECTOR)]) == -EBADF
    assert lane.writes == 0
    assert lane.kinds == BOTH


def test_what_the_file_system_does_not_know_is_not_tried_again(tmp_path: Path) -> None:
    fd = os.open("/proc/self/stat", os.O_RDONLY)
    try:
        lane = Lane(fd, os.RWF_NOWAIT, 0, SECTOR)
        lane.grant(BOTH)
        assert lane.readv(0, [bytearray(16)]) < 0
        assert lane.kinds == WRITES
    finally:
        os.close(fd)


def test_leave_that_is_taken_back_is_over_when_it_settles(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    lane = Lane(fd, 0, 0, 1 << 20)
    lane.grant(BOTH)
    going, stop = threading.Event(), threading.Event()

    def move() -> None:
        while not stop.is_set():
            lane.writev(0, [b"x" * (256 << 10)])
            going.set()

    threads = [threading.Thread(target=move) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert going.wait(20)
            lane.close()
            before = lane.writes
            os.pwrite(fd, bytes(SECTOR), 0)
            assert lane.writes == before
            assert os.pread(fd, 1, 0) == b"\0"
            going.clear()
            lane.grant(BOTH)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        os.close(fd)
