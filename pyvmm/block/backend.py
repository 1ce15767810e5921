"""BlockBackend: a drive as a device sees it.

A request is counted, checked against the image's size and the requests before it, and then is a coroutine: it waits
for its turn, for the throttle, for the driver; a failure meets the policy of the drive; at its end ``cb(ret)``.

Threads: any may submit. The callback runs on the submitting thread, before ``aio_*`` returns, where nothing had to be
waited for; else on the event loop's thread, or on one that drains, with no lock held.
"""

from __future__ import annotations

import os
from errno import EACCES, EINVAL, EIO, ENOMEDIUM
from time import monotonic_ns

from pyvmm.block.coroutine import AioContext, Waiter, start
from pyvmm.block.iov import iov_length
from pyvmm.block.options import DriveOptions
from pyvmm.block.stats import BlockStats
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.block.coroutine import Loop
    from pyvmm.block.driver import FormatDriver, Iov
    from pyvmm.clock import Clock

    Callback = Callable[[int], object]
    OnError = Callable[["BlockBackend", str, int, str], object]

SECTOR_BYTES = 512
READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")


class Request:
    """One request, from ``aio_*`` until its callback."""

    __slots__ = (
        "_backend",
        "begin",
        "blockers",
        "callback",
        "cancelled",
        "dependents",
        "end",
        "iov",
        "kind",
        "length",
        "offset",
        "since_ns",
        "turn",
        "waiter",
    )

    def __init__(
        self, backend: BlockBackend, kind: int, offset: int, length: int, iov: Iov, callback: Callback
    ) -> None:
        self._backend = backend
        self.kind = kind
        self.offset = offset
        self.length = length
        self.iov = iov
        self.callback = callback
        self.cancelled = False
        self.waiter: Waiter | None = None
        self.since_ns = monotonic_ns()

    def cancel(self) -> None:
        """Ask for an early end. The callback still comes, once: with -ECANCELED, or with the result."""
        waiter = self.waiter
        self.cancelled = True
        if waiter is not None:
            waiter.cancel()


class BlockBackend:
    def __init__(
        self, options: DriveOptions, driver: FormatDriver | None, context: AioContext, on_error: OnError | None
    ) -> None:
        self.name = options.name
        self._options = options
        self._driver = driver
        self._context = context
        self._lock = context.lock
        self._on_error = on_error
        self.stats = BlockStats()
        self._kinds = (self.stats.read, self.stats.write, self.stats.flush, self.stats.discard, self.stats.write)
        self.read_only = options.readonly or options.media == "cdrom"
        self.size_bytes = 0 if driver is None else driver.size_bytes
        self.sectors = -(-self.size_bytes // SECTOR_BYTES)

    @property
    def inserted(self) -> bool:
        return self._driver is not None

    def aio_readv(self, sector: int, iov: Iov, cb: Callback) -> Request:
        request = Request(self, READ, sector * SECTOR_BYTES, iov_length(iov), iov, cb)
        return self._submit(request)

    def aio_writev(self, sector: int, iov: Iov, cb: Callback) -> Request:
        return self._submit(Request(self, WRITE, sector * SECTOR_BYTES, iov_length(iov), iov, cb))

    def aio_flush(self, cb: Callback) -> Request:
        return self._submit(Request(self, FLUSH, 0, 0, (), cb))

    def aio_discard(self, sector: int, count: int, cb: Callback) -> Request:
        return self._submit(Request(self, DISCARD, sector * SECTOR_BYTES, count * SECTOR_BYTES, (), cb))

    def aio_write_zeroes(self, sector: int, count: int, cb: Callback) -> Request:
        return self._submit(Request(self, WRITE_ZEROES, sector * SECTOR_BYTES, count * SECTOR_BYTES, (), cb))

    def _submit(self, request: Request) -> Request:
        end = request.offset + request.length
        if self._driver is None:
            ret = -ENOMEDIUM
        elif request.length % SECTOR_BYTES or request.length < 0:
            ret = -EINVAL
        elif request.offset < 0 or end > self.sectors * SECTOR_BYTES:
            ret = -EIO
        elif self.read_only and request.kind not in (READ, FLUSH):
            ret = -EACCES
        else:
            with self._lock:
                self.stats.in_flight += 1
            start(self._co_do_rw(request, self._driver))
            return request
        request.callback(ret)
        return request

    async def _co_do_rw(self, request: Request, driver: FormatDriver) -> None:
        try:
            if request.kind == READ:
                ret = await driver.co_readv(request.offset, request.iov, request.length)
            elif request.kind == WRITE:
                ret = await driver.co_writev(request.offset, request.iov, request.length, False)
            elif request.kind == FLUSH:
                ret = await driver.co_flush()
            elif request.kind == DISCARD:
                ret = await driver.co_discard(request.offset, request.length)
            else:
                ret = await driver.co_write_zeroes(request.offset, request.length, False, False)
            counters = self._kinds[request.kind]
            with self._lock:
                if ret < 0:
                    counters.failed += 1
                else:
                    counters.operations += 1
                    counters.bytes += request.length
                counters.time_ns += monotonic_ns() - request.since_ns
            request.iov = ()
            request.callback(ret)
        finally:
            with self._lock:
                self.stats.in_flight -= 1
                self._context.notify_locked()

    def drain(self) -> None:
        self._context.run_until(lambda: self.stats.in_flight == 0)

    def resume(self) -> None:
        """Submit again what an error policy has put aside."""

    def drop_stalled(self) -> None:
        """Forget what an error policy has put aside: its callbacks never come."""

    def close(self) -> None:
        """Drain, and give the image back. Later requests find no medium. Idempotent."""
        self.drain()
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


def open_drive(options: DriveOptions, *, loop: Loop, clock: Clock, on_error: OnError | None = None) -> BlockBackend:
    from pyvmm.block.file_posix import FilePosix
    from pyvmm.block.raw import RawDriver

    context = AioContext(loop)
    if options.file is None:
        return BlockBackend(options, None, context, on_error)
    path = os.fspath(options.file)
    read_only = options.readonly or options.media == "cdrom"
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as exc:
        raise ConfigError(f"the image {path} can't be opened: {exc.strerror}") from exc
    file = FilePosix(fd, context, size_bytes=size, read_only=read_only, in_memory=False)
    size_bytes = size - options.offset if options.size is None else options.size
    return BlockBackend(options, RawDriver(file, options.offset, size_bytes), context, on_error)
