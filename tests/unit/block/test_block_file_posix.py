"""The host's file: the road that does not wait, and one rule each for what system calls may say."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from errno import EAGAIN, ECANCELED, EDQUOT, EINVAL, EIO, ENOSPC, EOPNOTSUPP
from pathlib import Path

import pytest
from block_drives import LIMIT_S, SECTOR, Result, TestLoop, aligned, flush, read, takes_direct, write
from waiting import wait_for

from pyvmm.block import BlockBackend
from pyvmm.block.protocols import fallocate, file_posix
from pyvmm.block.protocols.file_posix import FilePosix
from pyvmm.errors import ConfigError

Open = Callable[..., BlockBackend]


class Calls:
    """Stands in for os.preadv or os.pwritev: writes down, says what it was told to, else does it."""

    def __init__(self, real: Callable[..., int]) -> None:
        self.real = real
        self.answers: list[int | OSError | None] = []
        self.always: dict[int, OSError] = {}  # by flags
        self.most = 1 << 40  # bytes a call
        self.made: list[tuple[int, int, int, bool]] = []  # offset, bytes, flags, on this thread
        self.gate: threading.Event | None = None
        self._lock = threading.Lock()
        self._me = threading.get_ident()

    def __call__(self, fd: int, iov: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        length = sum(len(view) for view in iov)
        with self._lock:
            self.made.append((offset, length, flags, threading.get_ident() == self._me))
            answer = self.answers.pop(0) if self.answers else None
        if self.gate is not None:
            assert self.gate.wait(LIMIT_S)
        if flags in self.always:
            raise self.always[flags]
        if isinstance(answer, OSError):
            raise answer
        if answer is not None or length > self.most:
            part = b"".join(bytes(view) for view in iov)[: self.most if answer is None else answer]
            if self.real is os.pwritev:
                return os.pwrite(fd, part, offset) if part else 0
            data = memoryview(os.pread(fd, len(part), offset))
            got, at = len(data), 0
            for view in iov:
                piece = data[at : at + len(view)]
                view[: len(piece)] = piece
                at += len(piece)
            return got
        return self.real(fd, iov, offset, flags)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(os.preadv)
    monkeypatch.setattr(file_posix, "preadv", calls)
    return calls


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(os.pwritev)
    monkeypatch.setattr(file_posix, "pwritev", calls)
    return calls


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


NOWAIT = os.RWF_NOWAIT

# -- the road that does not wait ----------------------------------------------------------------------------


def test_what_the_page_cache_has_comes_before_the_call_returns(drive: Open, image: Path, reads: Calls) -> None:
    content = image.read_bytes()  # and now it is in the cache
    buffer, done = bytearray(128 << 10), []
    drive().aio_readv(0, [memoryview(buffer)], done.append)
    assert done == [0]
    assert buffer == content[: 128 << 10]
    assert reads.made == [(0, 128 << 10, NOWAIT, True)]


def test_what_would_wait_goes_to_a_worker(drive: Open, image: Path, reads: Calls) -> None:
    reads.always[NOWAIT] = error(EAGAIN)
    backend = drive()
    for _ in range(2):  # and each time it is tried anew
        assert read(backend, 3, 1) == image.read_bytes()[3 * SECTOR : 4 * SECTOR]
    assert [call[2:] for call in reads.made] == [(NOWAIT, True), (0, False)] * 2


def test_half_in_the_cache(drive: Open, image: Path, reads: Calls) -> None:
    reads.answers = [1000, error(EAGAIN)]
    assert read(drive(), 2, 4) == image.read_bytes()[2 * SECTOR : 6 * SECTOR]
    assert reads.made == [
        (1024, 2048, NOWAIT, True),
        (2024, 1048, NOWAIT, True),
        (2024, 1048, 0, False),
    ]


def test_a_file_system_that_cannot_say_is_asked_once_a_direction(
    drive: Open, image: Path, reads: Calls, writes: Calls
) -> None:
    reads.always[NOWAIT] = writes.always[NOWAIT] = error(EOPNOTSUPP)
    backend = drive()
    for _ in range(3):
        assert write(backend, 1, b"x" * SECTOR) == 0
    for _ in range(3):
        assert read(backend, 1, 1) == b"x" * SECTOR
    assert [call[2] for call in reads.made] == [NOWAIT, 0, 0, 0]
    assert [call[2] for call in writes.made] == [NOWAIT, 0, 0, 0]


def test_what_fails_at_once_fails(drive: Open, reads: Calls, writes: Calls) -> None:
    reads.answers, writes.answers = [error(EIO)], [error(ENOSPC)]
    backend = drive(werror="report")
    done: list[int] = []
    backend.aio_readv(0, [aligned(512)], done.append)
    backend.aio_writev(8, [aligned(512)], done.append)
    assert done == [-EIO, -ENOSPC]


def test_large_transfers_leave_the_submitters_thread_alone(drive: Open, reads: Calls) -> None:
    backend = drive()
    result = Result()
    backend.aio_readv(0, [memoryview(bytearray(file_posix.INLINE_LIMIT_BYTES + SECTOR))], result)
    assert result.wait() == 0
    assert not reads.made[0][3]


# -- the rules ----------------------------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything by the workers."""
    monkeypatch.setattr(file_posix, "INLINE_LIMIT_BYTES", -1)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("most", [512, 700, 5000])
def test_short_transfers_go_on(drive: Open, image: Path, reads: Calls, writes: Calls, most: int) -> None:
    reads.most = writes.most = most
    backend = drive()
    data = bytes(range(256)) * 40
    assert write(backend, 7, data) == 0
    assert read(backend, 7, 20) == data
    assert image.read_bytes()[7 * SECTOR : 27 * SECTOR] == data
    assert len(writes.made) == -(-len(data) // most)


@pytest.mark.usefixtures("worker")
def test_a_file_that_was_cut_reads_as_zeros(drive: Open, image: Path) -> None:
    backend = drive()
    os.truncate(image, 1000)
    assert read(backend, 1, 2) == (1).to_bytes(4, "little") * 122 + bytes(1024 - 488)


@pytest.mark.usefixtures("worker")
def test_a_write_that_gets_nowhere_is_no_space(drive: Open, writes: Calls) -> None:
    writes.answers = [512, 0]
    assert write(drive(werror="report"), 0, bytes(1024)) == -ENOSPC


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("number", [EIO, ENOSPC, EDQUOT])
def test_an_error_is_that_requests_alone(drive: Open, reads: Calls, writes: Calls, number: int) -> None:
    backend = drive(werror="report")
    reads.answers, writes.answers = [error(number)], [error(number)]
    assert write(backend, 0, b"x" * 512) == -number
    assert write(backend, 0, b"x" * 512) == 0
    result = Result()
    backend.aio_readv(0, [aligned(512)], result)
    assert result.wait() == -number
    assert read(backend, 0, 1) == b"x" * 512


def test_a_failed_flush_fails_from_then_on(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = drive()
    calls: list[int] = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise error(EIO)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert write(backend, 0, b"x" * 512) == 0
    assert [flush(backend) for _ in range(3)] == [-EIO] * 3
    assert write(backend, 0, b"x" * 512) == 0
    assert flush(backend) == -EIO
    assert len(calls) == 1


def test_with_o_direct_a_later_flush_may_succeed(drive: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_direct(tmp_path), "the tests' directory is on a file system without O_DIRECT"
    backend = drive(cache="none")
    calls: list[int] = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise error(EIO)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert write(backend, 0, b"x" * 512) == 0
    assert [flush(backend), flush(backend)] == [-EIO, 0]


@pytest.mark.parametrize(("cache", "flags"), [("writethrough", os.RWF_DSYNC), ("writeback", 0), ("unsafe", 0)])
def test_write_through_is_on_stable_storage(drive: Open, writes: Calls, cache: str, flags: int) -> None:
    writes.always[NOWAIT] = error(EOPNOTSUPP)
    backend = drive(cache=cache)
    write(backend, 0, b"x" * 512)
    assert [call[2] for call in writes.made if call[2] != NOWAIT] == [flags]


def test_zeroes_are_written_through_too(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    result = Result()
    drive(cache="writethrough").aio_write_zeroes(0, 8, result)
    assert result.wait() == 0
    assert len(synced) == 1


@pytest.mark.usefixtures("worker")
def test_our_own_mistakes_stop_the_machine(drive: Open, loop: TestLoop) -> None:
    backend = drive()
    view = memoryview(bytearray(512))
    iov = [view]
    done: list[int] = []
    taken = threading.Event()
    original = FilePosix._do

    def release_first(self: FilePosix, aiocb: file_posix.Aiocb) -> None:
        view.release()
        taken.set()
        original(self, aiocb)

    FilePosix._do = release_first  # type: ignore[method-assign]
    try:
        backend.aio_readv(0, iov, done.append)
        assert taken.wait(LIMIT_S)
        wait_for(lambda: bool(loop.errors))
    finally:
        FilePosix._do = original  # type: ignore[method-assign]
    assert [type(exc) for exc in loop.errors] == [ValueError]
    loop.errors.clear()
    backend.drain()
    assert done == []


# -- cancel and merging -------------------------------------------------------------------------------------


class Busy:
    """All workers of a drive in a write each, until let go."""

    def __init__(self, backend: BlockBackend, writes: Calls) -> None:
        self.gate = writes.gate = threading.Event()
        self.results = [Result() for _ in range(16)]
        for number, result in enumerate(self.results):
            backend.aio_writev(1000 + 2 * number, [memoryview(b"b" * 512)], result)
        wait_for(lambda: len(writes.made) == 16)
        writes.made.clear()


@pytest.mark.usefixtures("worker")
def test_what_no_worker_has_begun_is_taken_back(drive: Open, image: Path, writes: Calls) -> None:
    backend = drive()
    busy = Busy(backend, writes)
    waiting, last = Result(), Result()
    request = backend.aio_writev(3, [memoryview(b"w" * 512)], waiting)
    backend.aio_writev(5, [memoryview(b"l" * 512)], last)
    request.cancel()
    assert waiting.wait() == -ECANCELED
    busy.gate.set()
    backend.drain()
    assert last.values == [0]
    content = image.read_bytes()
    assert content[3 * SECTOR : 3 * SECTOR + 4] == (3).to_bytes(4, "little")
    assert content[5 * SECTOR : 6 * SECTOR] == b"l" * 512


@pytest.mark.usefixtures("worker")
def test_waiting_writes_that_join_become_one(drive: Open, image: Path, writes: Calls) -> None:
    backend = drive()
    busy = Busy(backend, writes)
    results = [Result() for _ in range(6)]
    for number, result in enumerate(results):
        sector = 10 + number if number < 5 else 100
        backend.aio_writev(sector, [memoryview(bytes([number + 1]) * 512)], result)
    busy.gate.set()
    backend.drain()
    assert [result.values for result in results] == [[0]] * 6
    assert sorted(call[:2] for call in writes.made) == [(10 * SECTOR, 5 * SECTOR), (100 * SECTOR, SECTOR)]
    assert backend.stats.write.merged == 4
    assert backend.stats.write.operations == 22
    assert image.read_bytes()[10 * SECTOR : 15 * SECTOR] == b"".join(bytes([n + 1]) * 512 for n in range(5))


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("answer", [error(EIO), 700, 0])
def test_where_one_call_for_all_fails_each_is_done_by_itself(
    drive: Open, image: Path, writes: Calls, answer: OSError | int
) -> None:
    backend = drive(werror="report")
    busy = Busy(backend, writes)
    results = [Result() for _ in range(3)]
    for number, result in enumerate(results):
        backend.aio_writev(10 + number, [memoryview(bytes([number + 1]) * 512)], result)
    # That of all three, then that of the second one (or the first, where nothing was done).
    writes.answers = [answer, error(ENOSPC)]
    busy.gate.set()
    backend.drain()
    failed = 1 if answer == 700 else 0
    assert [result.values[0] for result in results] == [-ENOSPC if n == failed else 0 for n in range(3)]
    content = image.read_bytes()
    assert content[12 * SECTOR : 13 * SECTOR] == bytes([3]) * 512
    assert backend.stats.write.merged == 0


# -- O_DIRECT -----------------------------------------------------------------------------------------------


@pytest.fixture
def direct(drive: Open, tmp_path: Path, reads: Calls, writes: Calls) -> Callable[..., BlockBackend]:
    assert takes_direct(tmp_path), "the tests' directory is on a file system without O_DIRECT"

    def open_it(*file: Path, **options: object) -> BlockBackend:
        backend = drive(*file, cache="none", **options)
        file_driver = backend._driver._file  # type: ignore[union-attr]
        file_driver.alignment = 4096  # as on a disk of 4 KiB sectors, also where this one's are smaller
        backend._alignment = 4096
        reads.made.clear()
        return backend

    return open_it


def test_whole_blocks_go_as_they_are(direct: Open, image: Path, reads: Calls, writes: Calls) -> None:
    backend = direct()
    memory = aligned(8192)
    result = Result()
    backend.aio_readv(16, [memory], result)
    assert result.wait() == 0
    assert memory == image.read_bytes()[8192:16384]
    result = Result()
    backend.aio_writev(32, [memory], result)
    assert result.wait() == 0
    assert [call[:2] for call in reads.made] == [(8192, 8192)]
    assert [call[:2] for call in writes.made] == [(16384, 8192)]


def test_parts_of_blocks_are_read_and_written_back(direct: Open, image: Path, reads: Calls, writes: Calls) -> None:
    backend = direct()
    content = bytearray(image.read_bytes())
    assert write(backend, 9, b"x" * (8 * SECTOR)) == 0  # from the middle of one block to that of the next
    content[9 * SECTOR : 17 * SECTOR] = b"x" * (8 * SECTOR)
    assert [call[:2] for call in reads.made] == [(4096, 4096), (8192, 4096)]
    assert [call[:2] for call in writes.made] == [(4096, 8192)]
    reads.made.clear()
    writes.made.clear()
    assert write(backend, 41, b"y" * SECTOR) == 0  # inside of one block
    content[41 * SECTOR : 42 * SECTOR] = b"y" * SECTOR
    assert [call[:2] for call in reads.made] == [(20480, 4096)]
    assert [call[:2] for call in writes.made] == [(20480, 4096)]
    assert write(backend, 48, b"z" * (9 * SECTOR)) == 0  # begins with a block
    content[48 * SECTOR : 57 * SECTOR] = b"z" * (9 * SECTOR)
    assert image.read_bytes() == content
    assert read(backend, 41, 3) == content[41 * SECTOR : 44 * SECTOR]


def test_memory_that_does_not_fit_is_bounced(direct: Open, image: Path, reads: Calls, writes: Calls) -> None:
    backend = direct()
    reads.answers, writes.answers = [error(EINVAL)], [error(EINVAL)]
    odd = aligned(8192)[1:4097]
    result = Result()
    backend.aio_readv(8, [odd], result)
    assert result.wait() == 0
    assert odd == image.read_bytes()[4096:8192]
    result = Result()
    backend.aio_writev(16, [odd], result)
    assert result.wait() == 0
    assert image.read_bytes()[8192:12288] == odd
    assert len(reads.made) == len(writes.made) == 2


def test_large_ones_are_bounced_in_pieces(direct: Open, image: Path) -> None:
    backend = direct()
    content = bytearray(image.read_bytes())
    data = os.urandom(1500 * SECTOR)
    assert write(backend, 101, data) == 0
    content[101 * SECTOR : 1601 * SECTOR] = data
    assert read(backend, 99, 1900) == content[99 * SECTOR : 1999 * SECTOR]
    assert image.read_bytes() == content


def test_an_error_within_a_bounce_is_the_requests(direct: Open, reads: Calls, writes: Calls) -> None:
    backend = direct(werror="report", rerror="report")
    reads.answers = [error(EIO)]
    assert write(backend, 9, b"x" * SECTOR) == -EIO  # the block could not be read
    assert writes.made == []
    writes.answers = [error(ENOSPC)]
    assert write(backend, 9, b"x" * SECTOR) == -ENOSPC


def test_neighbours_in_one_block_do_not_lose_each_other(direct: Open, image: Path) -> None:
    backend = direct()
    results = [Result() for _ in range(64)]
    for sector, result in enumerate(results):
        backend.aio_writev(sector, [memoryview(bytes([sector + 1]) * SECTOR)], result)
    backend.drain()
    assert [result.values for result in results] == [[0]] * 64
    assert image.read_bytes()[: 64 * SECTOR] == b"".join(bytes([n + 1]) * SECTOR for n in range(64))


def test_a_file_system_without_o_direct(drive: Open, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise error(EINVAL)
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match="knows no O_DIRECT: use cache=writeback"):
        drive(cache="none")


# -- fallocate ----------------------------------------------------------------------------------------------


def test_fallocate_does_what_it_is_asked(image: Path) -> None:
    with open(image, "r+b") as file:
        fallocate.punch_hole(file.fileno(), 4096, 8192)
        content = image.read_bytes()
        assert content[4096:12288] == bytes(8192)
        assert content[:4] + content[12288:12292] == bytes(4) + (24).to_bytes(4, "little")
        fallocate.punch_hole(file.fileno(), 1 << 20, 4096)
        assert os.fstat(file.fileno()).st_size == 1 << 20  # it does not grow
        with pytest.raises(OSError, match="Errno") as caught:
            fallocate.fallocate(file.fileno(), fallocate.PUNCH_HOLE, 0, 4096)  # without KEEP_SIZE
        assert caught.value.errno in (EINVAL, EOPNOTSUPP)


@pytest.mark.parametrize(
    ("discard", "modes"),
    [
        ("unmap", [fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE, fallocate.ZERO_RANGE | fallocate.KEEP_SIZE]),
        ("ignore", [fallocate.ZERO_RANGE | fallocate.KEEP_SIZE]),
    ],
)
def test_roads_to_zeros(
    drive: Open, image: Path, monkeypatch: pytest.MonkeyPatch, discard: str, modes: list[int]
) -> None:
    tried: list[int] = []

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        tried.append(mode)
        raise error(EOPNOTSUPP)

    monkeypatch.setattr(fallocate, "fallocate", refuse)
    backend = drive(discard=discard)
    for _ in range(2):
        result = Result()
        backend.aio_write_zeroes(5, 1000, result)
        assert result.wait() == 0
    assert tried == modes
    assert image.read_bytes()[5 * SECTOR : 1005 * SECTOR] == bytes(1000 * SECTOR)


def test_an_error_of_fallocate_is_the_requests(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, mode: int, offset: int, length: int) -> None:
        raise error(EIO)

    monkeypatch.setattr(fallocate, "fallocate", fail)
    backend = drive(werror="report")
    results = [Result(), Result()]
    backend.aio_write_zeroes(0, 8, results[0])
    backend.aio_discard(8, 8, results[1])
    assert [result.wait() for result in results] == [-EIO, -EIO]
