"""One set of tests for every engine, every cache mode, and both roads to the system call.

"at once" leaves the road open that needs no engine, "engine" closes it.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from errno import EBADF, ECANCELED
from pathlib import Path

import pytest
from block_drives import (
    ENGINES,
    LIMIT_S,
    SECTOR,
    Result,
    TestLoop,
    aligned,
    flush,
    read,
    takes_direct,
    write,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from waiting import wait_for

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.protocols import file_posix
from pyvmm.guest_memory import GuestMemory

CACHES = ["none", "writeback", "writethrough", "unsafe", "directsync"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    direct = request.param in ("none", "directsync")
    return "writeback" if direct and not takes_direct(tmp_path) else str(request.param)


@pytest.fixture(params=["at once", "engine"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "engine":
        monkeypatch.setattr(file_posix, "INLINE_LIMIT_BYTES", -1)
    return str(request.param)


Open = Callable[..., BlockBackend]


@pytest.fixture
def any_drive(drive: Open, engine: str, cache: str, road: str) -> Open:
    return lambda *file, **options: drive(*file, **{"aio": engine, "cache": cache, **options})


def test_what_is_written_is_read(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    content = bytearray(image.read_bytes())
    assert read(backend, 0, 2048) == content
    generator = random.Random(1)
    for _ in range(20):
        sector = generator.randrange(2048)
        data = generator.randbytes(generator.randint(1, min(64, 2048 - sector)) * SECTOR)
        assert write(backend, sector, data) == 0
        content[sector * SECTOR : sector * SECTOR + len(data)] = data
    assert flush(backend) == 0
    assert read(backend, 0, 2048) == content
    assert image.read_bytes() == content
    assert backend.stats.write.operations == 20
    assert backend.stats.in_flight == 0


def test_guest_memory_goes_straight(any_drive: Open, image: Path) -> None:
    memory = GuestMemory(1 << 20)
    backend = any_drive()
    # Pieces as a PRD table gives them, one of them at no page's beginning.
    iov = [memory.view(0x1000, 4096), memory.view(0x5200, 512), memory.view(0x3000, 1024)]
    result = Result()
    backend.aio_readv(8, iov, result)
    assert result.wait() == 0
    content = image.read_bytes()[8 * SECTOR : 19 * SECTOR]
    assert b"".join(bytes(view) for view in iov) == content
    result = Result()
    backend.aio_writev(100, iov, result)
    assert result.wait() == 0
    assert image.read_bytes()[100 * SECTOR : 111 * SECTOR] == content
    # Nothing holds on to the memory: the guest's RAM can be given back.
    for view in iov:
        view.release()
    del view, iov
    backend.close()
    memory.close()


def test_odd_memory(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    block = aligned(8192)
    content = image.read_bytes()
    for start in (1, 3, 256, 511):
        iov = [block[start : start + 100], block[start + 200 : start + 1636]]
        result = Result()
        backend.aio_readv(5, iov, result)
        assert result.wait() == 0
        assert b"".join(bytes(view) for view in iov) == content[5 * SECTOR : 8 * SECTOR]
        result = Result()
        backend.aio_writev(50, iov, result)
        assert result.wait() == 0
        assert image.read_bytes()[50 * SECTOR : 53 * SECTOR] == content[5 * SECTOR : 8 * SECTOR]


def test_more_pieces_than_the_kernel_takes_at_once(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    block = bytearray(2500 * SECTOR // 5 // SECTOR * SECTOR)
    whole = memoryview(block)
    iov = [whole[at : at + 64] for at in range(0, len(block), 64)]
    assert len(iov) > 2 * file_posix.IOV_MAX
    result = Result()
    backend.aio_readv(100, iov, result)
    assert result.wait() == 0
    content = image.read_bytes()
    assert block == content[100 * SECTOR : 100 * SECTOR + len(block)]
    result = Result()
    backend.aio_writev(1000, iov, result)
    assert result.wait() == 0
    assert image.read_bytes()[1000 * SECTOR : 1000 * SECTOR + len(block)] == block


@pytest.mark.parametrize("size", [512, 513, 1000, 4095, 4096, 4608, 10000, 65537])
def test_images_of_any_size_grow_to_whole_sectors_and_no_further(any_drive: Open, tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    content = bytearray(random.Random(size).randbytes(size))
    path.write_bytes(content)
    backend = any_drive(path)
    sectors = -(-size // SECTOR)
    assert (backend.size_bytes, backend.sectors) == (sectors * SECTOR, sectors)
    content += bytes(sectors * SECTOR - size)
    assert read(backend, 0, sectors) == content
    assert path.stat().st_size == size
    for count in {1, min(3, sectors), sectors}:
        data = random.Random(count).randbytes(count * SECTOR)
        assert write(backend, sectors - count, data) == 0
        content[(sectors - count) * SECTOR :] = data
        assert read(backend, sectors - count, count) == data
    result = Result()
    backend.aio_write_zeroes(sectors - 1, 1, result)
    assert result.wait() == 0
    content[(sectors - 1) * SECTOR :] = bytes(SECTOR)
    assert flush(backend) == 0
    assert path.read_bytes() == content


@pytest.mark.parametrize("offset", [512, 4096, 100, 1000])
def test_a_window(any_drive: Open, image: Path, offset: int) -> None:
    """Its end is the user's word: nothing is written behind it, and so the part of a sector is not offered."""
    backend = any_drive(offset=offset, size=10 * SECTOR + 7)
    content = image.read_bytes()
    assert (backend.size_bytes, backend.sectors) == (10 * SECTOR, 10)
    assert read(backend, 0, 10) == content[offset : offset + 10 * SECTOR]
    # Neighbours in one block of O_DIRECT, all in flight together.
    results = [Result() for _ in range(10)]
    for sector, result in enumerate(results):
        backend.aio_writev(sector, [memoryview(bytes([sector + 1]) * SECTOR)], result)
    assert [result.wait() for result in results] == [0] * 10
    written = b"".join(bytes([sector + 1]) * SECTOR for sector in range(10))
    assert read(backend, 0, 10) == written
    assert image.read_bytes() == content[:offset] + written + content[offset + len(written) :]


def test_overlapping_writes_in_flight_end_as_the_last_one(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    model = bytearray(image.read_bytes())
    generator = random.Random(5)
    results = []
    for number in range(200):
        sector, count = generator.randrange(32), generator.randint(1, 16)
        data = bytes([number % 251 + 1]) * (count * SECTOR)
        results.append(Result())
        backend.aio_writev(sector, [memoryview(data)], results[-1])
        model[sector * SECTOR : sector * SECTOR + len(data)] = data
    backend.drain()
    assert [result.values for result in results] == [[0]] * 200
    assert image.read_bytes() == model


def test_zeroes_and_discards(any_drive: Open, image: Path) -> None:
    backend = any_drive(detect_zeroes="unmap")
    content = bytearray(image.read_bytes())
    for sector, count in ((0, 1), (3, 5), (64, 256), (2040, 8)):
        result = Result()
        backend.aio_write_zeroes(sector, count, result)
        assert result.wait() == 0
        content[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
    assert write(backend, 1000, bytes(64 * SECTOR)) == 0
    content[1000 * SECTOR : 1064 * SECTOR] = bytes(64 * SECTOR)
    assert read(backend, 0, 2048) == content
    before = os.stat(image).st_blocks
    result = Result()
    backend.aio_discard(1024, 1024, result)
    assert result.wait() == 0
    content[1024 * SECTOR :] = bytes(1024 * SECTOR)
    assert read(backend, 0, 2048) == content
    assert image.read_bytes() == content
    assert os.stat(image).st_blocks < before


def test_without_fallocate_zeros_are_written(any_drive: Open, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errno import EOPNOTSUPP

    calls = []

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append(mode)
        raise OSError(EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("pyvmm.block.protocols.fallocate.fallocate", refuse)
    backend = any_drive(offset=100)
    content = bytearray(image.read_bytes())
    for sector, count in ((1, 3), (700, 1200)):
        result = Result()
        backend.aio_write_zeroes(sector, count, result)
        assert result.wait() == 0
        begin = 100 + sector * SECTOR
        content[begin : begin + count * SECTOR] = bytes(count * SECTOR)
    result = Result()
    backend.aio_discard(0, 8, result)
    assert result.wait() == 0
    assert image.read_bytes() == content
    assert len(calls) == 2  # asked once for each mode


def test_many_threads_on_one_drive(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    failures: list[object] = []

    def work(number: int) -> None:
        try:
            generator = random.Random(number)
            for _ in range(15):
                sector = number * 256 + generator.randrange(200)
                data = generator.randbytes(generator.randint(1, 40) * SECTOR)
                assert write(backend, sector, data) == 0
                assert read(backend, sector, len(data) // SECTOR) == data
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert backend.stats.read.operations == backend.stats.write.operations == 90


def test_drain_on_the_loops_own_thread(any_drive: Open, loop: TestLoop) -> None:
    backend = any_drive()
    results = [Result() for _ in range(20)]
    drained = threading.Event()

    def submit_and_drain() -> None:
        for number, result in enumerate(results):
            backend.aio_writev(number, [memoryview(b"y" * SECTOR)], result)
        backend.drain()
        drained.set()

    loop.call_soon(submit_and_drain)
    assert drained.wait(LIMIT_S)
    assert [result.values for result in results] == [[0]] * 20


def test_drain_after_the_loop_is_closed(engine: str, image: Path, road: str) -> None:
    loop = TestLoop()
    backend = open_drive(DriveOptions(image, aio=engine), loop=loop, clock=loop.clock)
    loop.close()
    results = [Result() for _ in range(5)]
    for number, result in enumerate(results):
        backend.aio_writev(number, [memoryview(b"y" * SECTOR)], result)
    backend.drain()
    assert [result.values for result in results] == [[0]] * 5
    backend.close()


def test_an_error_of_the_host_is_an_errno(any_drive: Open, image: Path, tmp_path: Path) -> None:
    backend = any_drive(werror="report")
    file = backend._driver._file  # type: ignore[union-attr]
    other = os.open(tmp_path, os.O_RDONLY)  # a directory in the image's place
    os.dup2(other, file._fd)
    os.close(other)
    result = Result()
    backend.aio_readv(0, [aligned(512)], result)
    assert result.wait() < 0
    assert write(backend, 0, b"x" * 512) == -EBADF
    assert backend.stats.read.failed == backend.stats.write.failed == 1


def test_cancel_tells_exactly_once(any_drive: Open, image: Path) -> None:
    backend = any_drive()
    results = [Result() for _ in range(100)]
    requests = [
        backend.aio_writev(number % 7, [memoryview(bytes([number + 1]) * SECTOR)], result)
        for number, result in enumerate(results)
    ]
    for request in requests[1::2]:
        request.cancel()
    backend.drain()
    assert all(len(result.values) == 1 for result in results)
    assert {result.values[0] for result in results[1::2]} <= {0, -ECANCELED}
    assert {result.values[0] for result in results[::2]} == {0}


def test_close_leaves_no_thread_and_no_descriptor(engine: str, road: str, image: Path, loop: TestLoop) -> None:
    loop.call_soon(lambda: None)
    wait_for(lambda: not loop._calls)
    fds, threads = set(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task"))
    backend = open_drive(DriveOptions(image, aio=engine, cache="writeback"), loop=loop, clock=loop.clock)
    for number in range(20):
        backend.aio_writev(number, [memoryview(b"z" * SECTOR)], lambda ret: None)
    backend.close()
    backend.close()
    assert set(os.listdir("/proc/self/fd")) == fds
    wait_for(lambda: set(os.listdir("/proc/self/task")) <= threads)
    assert image.read_bytes()[: 20 * SECTOR] == b"z" * (20 * SECTOR)


def test_no_request_leaves_garbage(any_drive: Open) -> None:
    backend = any_drive()
    buffer = [aligned(512)]
    write(backend, 0, b"x" * 512)
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            result = Result()
            backend.aio_readv(1, buffer, result)
            result.wait()
            write(backend, 2, b"x" * 512)
        backend.drain()
        left = [item for item in gc.get_objects() if type(item).__name__ in ("Request", "Aiocb", "Waiter", "InRing")]
    finally:
        gc.enable()
    assert len(left) <= 1  # the last one may still be on its way out on its worker
    del left


class DiskModel(RuleBasedStateMachine):
    """Requests in flight together, against a bytearray: each sees those before it that it overlaps, none after it."""

    options: dict[str, object] = {}
    path: Path

    @initialize(size=st.integers(512, 20000), offset=st.sampled_from([0, 512, 777]), ends=st.booleans())
    def open(self, size: int, offset: int, ends: bool) -> None:
        """``ends``: the window has a size, and there is something behind it; else the file grows."""
        self.before = b"\xaa" * offset
        self.after = b"\xbb" * 100 if ends else b""
        self.path.write_bytes(self.before + bytes(size) + self.after)
        self.loop = TestLoop()
        window = {"offset": offset, "size": size if ends else None}
        options = DriveOptions(self.path, **window, **self.options)
        self.drive = open_drive(options, loop=self.loop, clock=self.loop.clock)
        self.size = size
        assert self.drive.sectors == (size // SECTOR if ends else -(-size // SECTOR))
        self.model = bytearray(self.drive.sectors * SECTOR)
        self.pending: list[Result] = []
        self.expected: list[tuple[bytearray, bytes]] = []

    def place(self, where: int, count: int) -> tuple[int, int]:
        sector = where % self.drive.sectors
        return sector, min(count, self.drive.sectors - sector)

    def put(self, sector: int, data: bytes) -> None:
        self.model[sector * SECTOR : sector * SECTOR + len(data)] = data

    def callback(self) -> Result:
        self.pending.append(Result())
        return self.pending[-1]

    @rule(where=st.integers(0, 100), count=st.integers(1, 12), byte=st.integers(0, 255), cut=st.integers(0, 600))
    def write(self, where: int, count: int, byte: int, cut: int) -> None:
        sector, count = self.place(where, count)
        data = bytes([byte]) * (count * SECTOR)
        iov = [memoryview(data[:cut]), memoryview(data[cut:])]
        self.drive.aio_writev(sector, iov, self.callback())
        self.put(sector, data)

    @rule(where=st.integers(0, 100), count=st.integers(1, 12), skew=st.integers(0, 3))
    def read(self, where: int, count: int, skew: int) -> None:
        sector, count = self.place(where, count)
        buffer = bytearray(skew + count * SECTOR)
        self.drive.aio_readv(sector, [memoryview(buffer)[skew:]], self.callback())
        expected = bytes(skew) + bytes(self.model[sector * SECTOR : (sector + count) * SECTOR])
        self.expected.append((buffer, expected))

    @rule(where=st.integers(0, 100), count=st.integers(1, 12), discard=st.booleans())
    def zero(self, where: int, count: int, discard: bool) -> None:
        sector, count = self.place(where, count)
        (self.drive.aio_discard if discard else self.drive.aio_write_zeroes)(sector, count, self.callback())
        self.put(sector, bytes(count * SECTOR))

    @rule()
    def flush(self) -> None:
        self.drive.aio_flush(self.callback())

    @rule()
    def drain(self) -> None:
        self.drive.drain()
        assert all(result.values == [0] for result in self.pending)
        for buffer, expected in self.expected:
            assert buffer == expected
        self.pending.clear()
        self.expected.clear()
        self.look_at_the_image()

    def look_at_the_image(self) -> None:
        content = self.path.read_bytes()
        behind = bytes(max(0, self.size - len(self.model))) + self.after  # what is left of a window's end
        whole = self.before + self.model + behind
        # A last sector that nobody has written need not be all there.
        assert content == whole or (content + bytes(len(whole) - len(content)) == whole and not self.after)
        assert len(content) >= len(self.before) + self.size

    @invariant()
    def the_loop_is_well(self) -> None:
        if hasattr(self, "loop"):
            assert self.loop.errors == []

    def teardown(self) -> None:
        if hasattr(self, "drive"):
            self.drain()
            self.drive.close()
            self.loop.close()


def test_against_a_model(engine: str, cache: str, road: str, tmp_path: Path) -> None:
    class Model(DiskModel):
        options = {"aio": engine, "cache": cache}
        path = tmp_path / "model.img"

    run_state_machine_as_test(Model, settings=settings(max_examples=15, stateful_step_count=25, deadline=None))


def test_the_engines_have_the_same_face(drive: Open, loop: TestLoop) -> None:
    for aio in ENGINES:
        backend = drive(aio=aio, locking=False)
        assert backend.options.aio == aio


@pytest.fixture(autouse=True)
def no_thread_hangs() -> Iterator[None]:
    yield
    assert threading.active_count() < 20
