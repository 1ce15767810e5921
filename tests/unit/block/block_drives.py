"""What the tests of the block layer share: loops, callbacks one can wait for, drivers that wait for the test."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.coroutine import AioContext, Waiter
from pyvmm.block.driver import FormatDriver, ProtocolDriver
from pyvmm.event_loop import EventLoop

LIMIT_S = 20.0
SECTOR = 512


class TestLoop(EventLoop):
    __test__ = False

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        super().__init__(self.errors.append)


class ManualLoop:
    """Runs what it was given when told to, on the caller's thread."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def run(self) -> None:
        while self.calls:
            self.calls.popleft()()


class Result:
    """A callback that remembers what it was told, and on which thread."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.thread = 0
        self._event = threading.Event()

    def __call__(self, ret: int) -> None:
        self.values.append(ret)
        self.thread = threading.get_ident()
        self._event.set()

    @property
    def done(self) -> bool:
        return bool(self.values)

    def wait(self) -> int:
        assert self._event.wait(LIMIT_S)
        assert len(self.values) == 1
        return self.values[0]


def aligned(length: int) -> memoryview:
    """Zeroed memory that begins at a page."""
    return memoryview(mmap.mmap(-1, max(1, length)))[:length]


def read(backend: BlockBackend, sector: int, count: int) -> bytes:
    buffer = bytearray(count * SECTOR)
    result = Result()
    backend.aio_readv(sector, [memoryview(buffer)], result)
    assert result.wait() == 0
    return bytes(buffer)


def write(backend: BlockBackend, sector: int, data: bytes) -> int:
    result = Result()
    backend.aio_writev(sector, [memoryview(data)], result)
    return result.wait()


def flush(backend: BlockBackend) -> int:
    result = Result()
    backend.aio_flush(result)
    return result.wait()


def io_uring_refusal() -> str:
    """Why this host refuses io_uring; "" where it does not. Asked in a child: a filter of system calls may kill."""
    ask = "from pyvmm.block.protocols.io_uring import refusal; print(refusal() or '')"
    child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if child.returncode < 0:
        return f"whoever asks for it dies of {signal.Signals(-child.returncode).name}"
    return child.stdout.strip() if child.returncode == 0 else child.stderr.strip().rpartition("\n")[2]


def takes_direct(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


# What of these tests can't be done on this host, and why: conftest.py says it at the end.
LEFT_OUT: list[str] = []
IO_URING_REFUSAL = io_uring_refusal()
ENGINES = ["threads"] if IO_URING_REFUSAL else ["threads", "io_uring"]
if IO_URING_REFUSAL:
    LEFT_OUT.append(f"the io_uring engine: {IO_URING_REFUSAL}")


class Step(Waiter):
    """Something a ManualDriver was asked for, until the test says how it went."""

    def __init__(self, name: str, offset: int, length: int) -> None:
        super().__init__()
        self.name = name
        self.offset = offset
        self.length = length

    def __repr__(self) -> str:
        return f"{self.name} {self.offset // SECTOR}+{self.length // SECTOR}"


class ManualDriver(FormatDriver):
    """A disk on which nothing happens until ``finish``. ``steps`` are under way; ``log`` is everything that began."""

    def __init__(self, context: AioContext, size_bytes: int = 1 << 20) -> None:
        self.context = context
        self.size_bytes = size_bytes
        self.steps: list[Step] = []
        self.log: list[str] = []
        self.closed = False

    def _begin(self, name: str, offset: int = 0, length: int = 0) -> Step:
        step = Step(name, offset, length)
        self.steps.append(step)
        self.log.append(repr(step))
        return step

    async def co_readv(self, offset: int, iov: Sequence[memoryview], length: int) -> int:
        return await self._begin("read", offset, length)

    async def co_writev(self, offset: int, iov: Sequence[memoryview], length: int, fua: bool) -> int:
        return await self._begin("write-fua" if fua else "write", offset, length)

    async def co_flush(self) -> int:
        return await self._begin("flush")

    async def co_discard(self, offset: int, length: int) -> int:
        return await self._begin("discard", offset, length)

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        return await self._begin("unmap" if may_unmap else "zero", offset, length)

    def finish(self, result: int = 0, index: int = 0) -> None:
        self.context.complete(self.steps.pop(index), result)

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        pass


class ManualDrive:
    """A backend over a ManualDriver, on a loop that runs when told to."""

    def __init__(self, *, alignment: int = 1, **options: object) -> None:
        self.loop = ManualLoop()
        context = AioContext(self.loop)
        self.driver = ManualDriver(context)
        self.driver.alignment = alignment
        self.errors: list[tuple[str, int, str]] = []
        self.backend = BlockBackend(
            DriveOptions("none", **options),
            self.driver,
            context,
            on_error=lambda backend, operation, errno, action: self.errors.append((operation, errno, action)),
        )

    def read(self, sector: int, count: int = 1) -> Result:
        result = Result()
        result.request = self.backend.aio_readv(sector, [memoryview(bytearray(count * SECTOR))], result)  # type: ignore[attr-defined]
        return result

    def write(self, sector: int, count: int = 1, byte: int = 1) -> Result:
        result = Result()
        result.request = self.backend.aio_writev(sector, [memoryview(bytes([byte]) * (count * SECTOR))], result)  # type: ignore[attr-defined]
        return result

    def flush(self) -> Result:
        result = Result()
        result.request = self.backend.aio_flush(result)  # type: ignore[attr-defined]
        return result

    def finish(self, result: int = 0, index: int = 0) -> None:
        """The driver is done with what is under way (the first of it), and the loop runs."""
        self.driver.finish(result, index)
        self.loop.run()


class MemoryProtocol(ProtocolDriver):
    """A file that is a bytearray. ``most``: bytes a transfer; ``results``: what the next calls give instead."""

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        self.data = bytearray(data)
        self.size_bytes = len(data)
        self.most = most
        self.results: list[int] = []
        self.calls: list[tuple[object, ...]] = []
        self.closed = False

    async def co_preadv(self, offset: int, iov: Sequence[memoryview], length: int) -> int:
        assert length == sum(len(view) for view in iov)
        self.calls.append(("read", offset, length))
        if self.results:
            return self.results.pop(0)
        data = bytes(self.data[offset : offset + min(length, self.most)])
        at = 0
        for view in iov:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return len(data)

    async def co_pwritev(self, offset: int, iov: Sequence[memoryview], length: int, fua: bool) -> int:
        assert length == sum(len(view) for view in iov)
        self.calls.append(("write", offset, length, fua))
        if self.results:
            return self.results.pop(0)
        data = b"".join(bytes(view) for view in iov)[: self.most]
        assert offset + len(data) <= len(self.data), "it would grow"
        self.data[offset : offset + len(data)] = data
        return len(data)

    async def co_flush(self) -> int:
        self.calls.append(("flush",))
        return self.results.pop(0) if self.results else 0

    async def co_pdiscard(self, offset: int, length: int) -> int:
        self.calls.append(("discard", offset, length))
        return self.results.pop(0) if self.results else 0

    async def co_pwrite_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        self.calls.append(("zeroes", offset, length, may_unmap, fua))
        if self.results:
            return self.results.pop(0)
        self.data[offset : offset + length] = bytes(length)
        return 0

    def close(self) -> None:
        self.closed = True


class NoOwner:
    """For coroutines that nobody cancels."""

    waiter: Waiter | None = None


def run(coroutine: object) -> int:
    """The result of a coroutine that need not wait."""
    from pyvmm.block.coroutine import start

    found: list[int] = []

    async def outer() -> None:
        found.append(await coroutine)  # type: ignore[misc]

    start(outer(), NoOwner())
    assert len(found) == 1, "it waits"
    return found[0]
