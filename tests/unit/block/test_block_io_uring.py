"""The io_uring engine: what is its own. What both engines share is in test_block_engines.py."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from errno import EAGAIN, ECANCELED, EFAULT, EINTR, EINVAL, EIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from block_drives import (
    IO_URING_REFUSAL,
    LIMIT_S,
    SECTOR,
    ManualLoop,
    Result,
    TestLoop,
    aligned,
    flush,
    read,
    write,
)
from sandbox import run_without
from waiting import wait_for

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.coroutine import Waiter, start
from pyvmm.block.protocols import file_posix
from pyvmm.block.protocols.file_posix import READ, Aiocb
from pyvmm.block.protocols.io_uring import ENTRIES
from pyvmm.block.uring import Ring
from pyvmm.clock import VirtualClock
from pyvmm.errors import ConfigError, StateError

Open = Callable[..., BlockBackend]


def test_a_kernel_that_refuses(tmp_path: Path) -> None:
    """Nothing stays open of a drive that could not be had, and no other engine takes its place."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    code = f"""if True:
        import os
        from pyvmm.block import DriveOptions, open_drive
        from pyvmm.clock import VirtualClock
        from pyvmm.errors import ConfigError
        from block_drives import TestLoop
        loop = TestLoop()
        loop.call_soon(lambda: None)
        before = sorted(os.listdir("/proc/self/fd"))
        for cache in ("writeback", "none"):
            try:
                open_drive(DriveOptions({str(image)!r}, aio="io_uring", cache=cache), loop=loop, clock=VirtualClock())
            except ConfigError as error:
                print(error)
        assert sorted(os.listdir("/proc/self/fd")) == before
        open_drive(DriveOptions({str(image)!r}), loop=loop, clock=VirtualClock()).close()
        loop.close()
    """
    done = run_without("EPERM", ["io_uring_setup"], code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith("aio=io_uring can't be had: io_uring_setup: Operation not permitted: ")
    assert first.endswith(", or use aio=threads")


def test_a_loop_that_watches_no_descriptors(image: Path) -> None:
    with pytest.raises(ConfigError, match="needs an event loop that watches descriptors: use aio=threads"):
        open_drive(DriveOptions(image, aio="io_uring"), loop=ManualLoop(), clock=VirtualClock())


def test_a_loop_that_is_closed(image: Path, loop: TestLoop) -> None:
    loop.close()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises((StateError, ConfigError)):
        open_drive(DriveOptions(image, aio="io_uring"), loop=loop, clock=VirtualClock())
    assert sorted(os.listdir("/proc/self/fd")) == before


if not IO_URING_REFUSAL:

    @pytest.fixture
    def ring_drive(drive: Open, monkeypatch: pytest.MonkeyPatch) -> Open:
        monkeypatch.setattr(file_posix, "INLINE_LIMIT_BYTES", -1)
        return lambda *file, **options: drive(*file, **{"aio": "io_uring", **options})

    def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: object, aiocb: object) -> None:
            raise AssertionError("a worker thread was asked")

        monkeypatch.setattr(file_posix.FilePosix, "paio_submit", refuse)

    def test_reads_writes_and_flushes_need_no_worker(
        ring_drive: Open, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        no_worker(monkeypatch)
        backend = ring_drive()
        threads = len(os.listdir("/proc/self/task"))
        result = Result()
        backend.aio_writev(5, [memoryview(bytearray(b"x" * SECTOR))], result)
        assert result.wait() == 0
        assert flush(backend) == 0
        assert read(backend, 5, 1) == b"x" * SECTOR
        assert image.read_bytes()[5 * SECTOR : 6 * SECTOR] == b"x" * SECTOR
        assert len(os.listdir("/proc/self/task")) <= threads + 1  # the kernel may show one of its own

    def test_what_is_in_the_page_cache_completes_at_once(ring_drive: Open, image: Path) -> None:
        content = image.read_bytes()
        backend = ring_drive()
        buffer, done = aligned(4096), []
        backend.aio_readv(8, [buffer], done.append)
        assert done == [0]
        assert buffer == content[4096:8192]

    def test_memory_that_may_not_be_written_can_be_read_from(
        ring_drive: Open, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        no_worker(monkeypatch)
        backend = ring_drive()
        assert write(backend, 1, b"r" * SECTOR) == 0
        assert image.read_bytes()[SECTOR : 2 * SECTOR] == b"r" * SECTOR

    def test_more_than_the_ring_holds(ring_drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = ring_drive()
        buffer = bytearray(SECTOR)
        results = [Result() for _ in range(3 * ENTRIES)]
        for number, result in enumerate(results):
            backend.aio_writev(number, [memoryview(buffer)], result)
        backend.drain()
        assert [result.values for result in results] == [[0]] * len(results)

    class Between:
        """A ring whose kernel takes nothing for the next ``refusals`` submissions. ``batches``: what it was given."""

        def __init__(self, ring: Ring, error: int = EAGAIN) -> None:
            self.ring = ring
            self.error = error
            self.refusals = 0
            self.batches: list[int] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ring, name)

        def submit(self) -> int:
            if self.refusals:
                self.refusals -= 1
                return self.error
            self.batches += [self.ring.unsubmitted] if self.ring.unsubmitted else []
            return self.ring.submit()

    def between(backend: BlockBackend, error: int = EAGAIN) -> Between:
        file: Any = backend._driver._file  # type: ignore[union-attr]
        file._ring = Between(file._ring, error)
        return file._ring  # type: ignore[no-any-return]

    @pytest.mark.parametrize("refusals", [1, 2, 9])
    def test_what_the_kernel_cannot_take_now_is_done_all_the_same(ring_drive: Open, image: Path, refusals: int) -> None:
        backend = ring_drive()
        ring = between(backend)
        ring.refusals = refusals
        buffers, results = [aligned(SECTOR) for _ in range(9)], [Result() for _ in range(9)]
        for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
            backend.aio_readv(number, [buffer], result)
        assert write(backend, 9, b"w" * SECTOR) == 0
        assert flush(backend) == 0
        backend.drain()
        assert [result.values for result in results] == [[0]] * 9
        content = image.read_bytes()
        assert all(buffer == content[n * SECTOR : (n + 1) * SECTOR] for n, buffer in enumerate(buffers))
        assert content[9 * SECTOR : 10 * SECTOR] == b"w" * SECTOR
        assert ring.unsubmitted == ring.in_flight == 0

    def test_a_filter_that_comes_later(image: Path) -> None:
        """io_uring_enter is forbidden when the drive is open: its requests are done by workers."""
        code = f"""if True:
            from block_drives import SECTOR, TestLoop, flush, read, write
            import sandbox
            from pyvmm.block import DriveOptions, open_drive
            from pyvmm.block.protocols import file_posix
            file_posix.INLINE_LIMIT_BYTES = -1
            loop = TestLoop()
            drive = open_drive(DriveOptions({str(image)!r}, aio="io_uring"), loop=loop, clock=loop.clock)
            sandbox.forbid("EPERM", "io_uring_enter")
            for n in range(300):
                assert write(drive, n, bytes([n % 256]) * SECTOR) == 0
                assert read(drive, n, 1) == bytes([n % 256]) * SECTOR
            assert flush(drive) == 0
            drive.close()
            loop.close()
            assert loop.errors == []
            print("well")
        """
        done = run_without("EPERM", [], code)
        assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr

    def test_many_rounds_of_the_ring(ring_drive: Open) -> None:
        # In step and out of step with completions.
        backend = ring_drive()
        for burst in (1, 3, 50, 128, 7) * 4:
            results = [Result() for _ in range(burst)]
            buffers = [aligned(SECTOR) for _ in range(burst)]
            for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
                backend.aio_readv(number, [buffer], result)
            backend.drain()
            for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
                assert result.values == [0]
                assert buffer[:4] == number.to_bytes(4, "little")

    def on_a_completion(backend: BlockBackend, loop: TestLoop, what: Callable[[], None]) -> None:
        """Have ``what`` run where requests go on whose completion the ring has brought."""
        waiter = Waiter()

        async def wait() -> None:
            await waiter
            what()

        def as_by_the_eventfd() -> None:
            start(wait(), SimpleNamespace(waiter=None))
            backend._context.complete(waiter, 0)
            backend._driver._file._on_event()  # type: ignore[union-attr]

        loop.call_soon(as_by_the_eventfd)

    def test_what_a_completion_sets_going_is_one_batch(ring_drive: Open, loop: TestLoop) -> None:
        backend = ring_drive()
        ring = between(backend)
        results = [Result() for _ in range(20)]

        def next_ones() -> None:
            for number, result in enumerate(results):
                backend.aio_readv(number, [aligned(SECTOR)], result)

        on_a_completion(backend, loop, next_ones)
        assert [result.wait() for result in results] == [0] * 20
        assert ring.batches == [20]

    def test_who_drains_there_waits_for_no_batch_of_its_own(ring_drive: Open, loop: TestLoop) -> None:
        """Requests wait there to be submitted together; a drain must not wait for that."""
        backend = ring_drive(cache="none")
        drained, done = threading.Event(), []

        def again(ret: int) -> None:
            done.append(ret)
            if len(done) < 5:
                backend.aio_readv(8 * len(done), [aligned(8 * SECTOR)], again)

        def drain() -> None:
            backend.aio_readv(80, [aligned(8 * SECTOR)], again)
            backend.drain()
            drained.set()

        on_a_completion(backend, loop, drain)
        assert drained.wait(LIMIT_S)
        assert done == [0] * 5

    @pytest.mark.parametrize("cache", ["none", "writeback"])
    def test_the_end_of_the_thread_that_asked_is_not_the_end_of_the_request(
        ring_drive: Open, tmp_path: Path, cache: str
    ) -> None:
        """When a thread ends, the kernel cancels, interrupts or fails (EFAULT) what it has submitted to a ring."""
        image = tmp_path / "large.img"
        image.write_bytes(b"".join(number.to_bytes(4, "little") * 128 for number in range(16 << 11)))
        backend = ring_drive(image, cache=cache)
        for _ in range(10):
            fd = os.open(image, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that reads have to wait
            os.close(fd)
            buffers, results = [aligned(64 << 10) for _ in range(100)], [Result() for _ in range(100)]

            def ask(buffers: list[memoryview] = buffers, results: list[Result] = results) -> None:
                for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
                    backend.aio_readv(number * 300, [buffer], result)

            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            assert [result.wait() for result in results] == [0] * 100
            for number, buffer in enumerate(buffers):
                assert buffer[:4] == (number * 300).to_bytes(4, "little")
                assert buffer[-4:] == (number * 300 + 127).to_bytes(4, "little")

    @pytest.mark.parametrize("ret", [-EAGAIN, -EINTR, -ECANCELED, -EFAULT])
    def test_what_the_kernel_gave_up_is_done_by_a_worker(ring_drive: Open, image: Path, ret: int) -> None:
        backend = ring_drive()
        ring = between(backend)
        ring.reap = lambda: [(request, ret) for request, _ in ring.ring.reap()]  # type: ignore[attr-defined]
        buffer, result = aligned(SECTOR), Result()
        backend.aio_readv(4, [buffer], result)
        assert result.wait() == 0
        assert buffer == image.read_bytes()[4 * SECTOR : 5 * SECTOR]
        assert write(backend, 4, b"w" * SECTOR) == 0
        assert flush(backend) == 0

    @pytest.mark.parametrize("ret", [-EAGAIN, -EINTR, -ECANCELED, -EFAULT, -EINVAL, -EIO, 100])
    def test_what_was_cancelled_on_purpose_is_not_done_again(
        ring_drive: Open, monkeypatch: pytest.MonkeyPatch, ret: int
    ) -> None:
        no_worker(monkeypatch)
        backend = ring_drive(cache="none")
        file: Any = backend._driver._file  # type: ignore[union-attr]
        file.alignment = 512
        ring = between(backend)
        ring.reap = lambda: [(request, ret) for request, _ in ring.ring.reap()]  # type: ignore[attr-defined]
        aiocb = Aiocb(file, READ, 0, 4096, [aligned(4096)], False)
        aiocb.cancelled = True
        result = Result()

        async def submit() -> None:
            result(await file.co_submit(aiocb))

        start(submit(), SimpleNamespace(waiter=None))
        assert result.wait() == (ret if ret in (-EIO, 100) else -ECANCELED)

    def test_the_images_locks_end_with_the_drive(ring_drive: Open) -> None:
        """The kernel may hold the open file longer than the drive does, as somebody with a copy of it."""
        backend = ring_drive()
        copy = os.dup(backend._driver._file._fd)  # type: ignore[union-attr]
        try:
            with pytest.raises(ConfigError, match="in use by"):
                ring_drive()
            backend.close()
            ring_drive().close()
        finally:
            os.close(copy)

    def test_closing_with_requests_in_flight(ring_drive: Open, image: Path, loop: TestLoop) -> None:
        """Not the backend, which drains before: the file, by itself."""
        backend = ring_drive(cache="none")
        results = [Result() for _ in range(100)]
        buffers = [aligned(8 * SECTOR) for _ in results]
        for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
            backend.aio_readv(8 * number, [buffer], result)
        backend._driver.close()  # type: ignore[union-attr]
        assert all(result.wait() in (0, -ECANCELED) for result in results)
        for number, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
            assert result.values != [0] or buffer[:4] == (8 * number).to_bytes(4, "little")

    def test_the_child_of_a_fork_lets_go_of_its_side_only(image: Path) -> None:
        code = f"""if True:
            import os
            from block_drives import SECTOR, TestLoop, aligned, read, write, Result
            from pyvmm.block import DriveOptions, open_drive
            from pyvmm.block.protocols import file_posix
            file_posix.INLINE_LIMIT_BYTES = -1
            before = sorted(os.listdir("/proc/self/fd"))
            loop = TestLoop()
            drive = open_drive(DriveOptions({str(image)!r}, aio="io_uring"), loop=loop, clock=loop.clock)
            results = [Result() for _ in range(50)]
            for n, result in enumerate(results):
                drive.aio_readv(n, [aligned(SECTOR)], result)
            child = os.fork()
            if not child:
                drive.abandon()
                loop.abandon()
                os._exit(0 if sorted(os.listdir("/proc/self/fd")) == before else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert [result.wait() for result in results] == [0] * 50
            assert write(drive, 1, b"w" * SECTOR) == 0
            assert read(drive, 1, 1) == b"w" * SECTOR
            drive.close()
            loop.close()
            assert loop.errors == []
            print("well")
        """
        done = run_without("EPERM", [], code)
        assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr

    def test_it_lets_go_of_memory(ring_drive: Open) -> None:
        backend = ring_drive()
        buffer = bytearray(4 * SECTOR)
        for _ in range(10):
            view = memoryview(buffer)
            result = Result()
            backend.aio_readv(0, [view[:SECTOR], view[SECTOR:]], result)
            assert result.wait() == 0
            backend.drain()
            view.release()
        buffer.append(0)  # BufferError where anybody still held it

    def test_an_event_after_close_finds_nothing(ring_drive: Open, loop: TestLoop) -> None:
        backend = ring_drive()
        driver = backend._driver._file  # type: ignore[union-attr]
        result = Result()
        backend.aio_readv(0, [aligned(512)], result)
        result.wait()
        backend.close()
        driver._on_event()
        loop.call_soon(driver._on_event)
        seen: list[int] = []
        loop.call_soon(lambda: seen.append(1))
        wait_for(lambda: bool(seen))
