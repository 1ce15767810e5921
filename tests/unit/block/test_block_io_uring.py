"""The io_uring engine: what is its own. What both engines share is in test_block_engines.py."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from errno import EAGAIN, EPERM
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from block_drives import ENGINES, SECTOR, ManualLoop, Result, TestLoop, aligned, flush, read, wait_until, write

from pyvmm.block import BlockBackend, DriveOptions, file_posix, open_drive
from pyvmm.clock import VirtualClock
from pyvmm.errors import ConfigError

Open = Callable[..., BlockBackend]


def test_without_the_package(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_liburing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "liburing":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_liburing)
    with pytest.raises(ConfigError, match=r"pip install 'pyvmm-kvm\[io_uring\]', or use aio=threads"):
        drive(aio="io_uring")


def test_a_kernel_that_refuses(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entries: int, ring: object) -> None:
        raise PermissionError(EPERM, "Operation not permitted")

    monkeypatch.setitem(
        sys.modules,
        "liburing",
        SimpleNamespace(Ring=lambda: None, io_uring_queue_init=refuse),  # type: ignore[arg-type]
    )
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"refuses io_uring \(Operation not permitted\): .* or use aio=threads"):
        drive(aio="io_uring")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_loop_that_watches_no_descriptors(image: Path) -> None:
    with pytest.raises(ConfigError, match="needs an event loop that watches descriptors: use aio=threads"):
        open_drive(DriveOptions(image, aio="io_uring"), loop=ManualLoop(), clock=VirtualClock())


if "io_uring" in ENGINES:
    from pyvmm.block import io_uring

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

    def test_memory_that_may_not_be_written_goes_to_a_worker(ring_drive: Open, image: Path) -> None:
        backend = ring_drive()
        assert write(backend, 1, b"r" * SECTOR) == 0
        assert image.read_bytes()[SECTOR : 2 * SECTOR] == b"r" * SECTOR

    def test_more_than_the_ring_holds(ring_drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = ring_drive()
        buffer = bytearray(SECTOR)
        results = [Result() for _ in range(3 * io_uring.ENTRIES)]
        for number, result in enumerate(results):
            backend.aio_writev(number, [memoryview(buffer)], result)
        backend.drain()
        assert [result.values for result in results] == [[0]] * len(results)

    def test_submissions_the_kernel_cannot_take_now_are_made_later(ring_drive: Open, image: Path) -> None:
        backend = ring_drive()
        ring = backend._driver._file._ring  # type: ignore[union-attr]
        api, refused = ring._api, []

        class Busy:
            def __getattr__(self, name: str) -> Any:
                return getattr(api, name)

            def io_uring_submit(self, handle: object) -> int:
                if len(refused) < 3:
                    refused.append(1)
                    raise BlockingIOError(EAGAIN, "Resource temporarily unavailable")
                return int(api.io_uring_submit(handle))

        ring._api = Busy()
        buffer, result = aligned(SECTOR), Result()
        backend.aio_readv(9, [buffer], result)
        assert not result.done
        assert result.wait() == 0
        assert buffer == image.read_bytes()[9 * SECTOR : 10 * SECTOR]
        assert ring.unsubmitted == 0
        assert len(refused) == 3

    def test_an_entry_is_where_it_is_thought_to_be(ring_drive: Open) -> None:
        # Round the ring a few times, in step and out of step with completions.
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
        wait_until(lambda: bool(seen))
