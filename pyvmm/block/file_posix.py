"""The protocol "file": a file or block device of the host, by preadv, pwritev, fdatasync and fallocate.

Two roads lead to the system call. Where it will not wait for a device it is made at once, on the submitter's thread:
reads of what the page cache has (RWF_NOWAIT), writes where the file system takes them so, everything on file systems
that live in memory. All else is an Aiocb for the engine (``paio_submit``): a worker of the thread pool, or io_uring.

One rule each:

- EINTR: never seen. Python makes such a call again by itself (PEP 475).
- short transfers: the count goes up; raw.py goes on with the rest.
- ENOSPC, EIO and every other errno of a transfer: that request fails with it, and only that one. The backend's policy
  says what follows.
- a failed flush: fails from then on, with the same errno. The kernel may have dropped the pages it could not write and
  say "done" the next time. With O_DIRECT there are none of the guest's data in the page cache, so there a later
  flush may succeed.
- cancel: what no worker has begun is taken back; what has begun runs to its end.
"""

from __future__ import annotations

import os
from errno import EIO, EOPNOTSUPP

from pyvmm.block.coroutine import AioContext, Waiter
from pyvmm.block.driver import ProtocolDriver
from pyvmm.block.thread_pool import ThreadPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.driver import Iov

IOV_MAX = 1024
INLINE_LIMIT_BYTES = 256 << 10  # more than this is copied by a worker even where it need not wait

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)

preadv = os.preadv
pwritev = os.pwritev


class Aiocb(Waiter):
    """One system call's worth of a request, on its way through an engine."""

    __slots__ = ("engine", "fua", "iov", "kind", "length", "may_unmap", "offset")

    def __init__(
        self, engine: FilePosix, kind: int, offset: int, length: int, iov: Iov = (), fua: bool = False
    ) -> None:
        super().__init__()
        self.engine = engine
        self.kind = kind
        self.offset = offset
        self.length = length
        self.iov = iov
        self.fua = fua
        self.may_unmap = False

    def cancel(self) -> None:
        self.engine.cancel(self)


class FilePosix(ProtocolDriver):
    """``fd`` belongs to it from here on."""

    def __init__(self, fd: int, context: AioContext, *, size_bytes: int, read_only: bool, in_memory: bool) -> None:
        self._fd = fd
        self._context = context
        self.size_bytes = size_bytes
        self.read_only = read_only
        self._inline_read = self._inline_write = True
        self._inline_flags = 0 if in_memory else os.RWF_NOWAIT
        self._flush_error = 0
        self._pool = ThreadPool(self._aio_worker)

    # -- the coroutines -------------------------------------------------------------------------------------

    async def co_preadv(self, offset: int, iov: Iov, length: int) -> int:
        if self._inline_read and length <= INLINE_LIMIT_BYTES and len(iov) <= IOV_MAX:
            try:
                return preadv(self._fd, iov, offset, self._inline_flags)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != EOPNOTSUPP:
                    return -(exc.errno or EIO)
                self._inline_read = False
        return await self.paio_submit(READ, offset, length, iov)

    async def co_pwritev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        if self._inline_write and not fua and length <= INLINE_LIMIT_BYTES and len(iov) <= IOV_MAX:
            try:
                return pwritev(self._fd, iov, offset, self._inline_flags)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != EOPNOTSUPP:
                    return -(exc.errno or EIO)
                self._inline_write = False
        return await self.paio_submit(WRITE, offset, length, iov, fua)

    async def co_flush(self) -> int:
        return await self.paio_submit(FLUSH, 0, 0)

    def paio_submit(self, kind: int, offset: int, length: int, iov: Iov = (), fua: bool = False) -> Aiocb:
        """Give the thread pool one system call; await what this returns."""
        aiocb = Aiocb(self, kind, offset, length, iov, fua)
        self._pool.submit(aiocb)
        return aiocb

    def cancel(self, aiocb: Aiocb) -> None:
        from errno import ECANCELED

        if self._pool.remove(aiocb):
            self._context.complete(aiocb, -ECANCELED)

    # -- on a worker's thread -------------------------------------------------------------------------------

    def _aio_worker(self, job: object) -> None:
        assert isinstance(job, Aiocb)
        try:
            if job.kind <= WRITE:
                result = self._handle_aiocb_rw(job)
            else:
                result = self._handle_aiocb_flush()
        except OSError as exc:
            result = -(exc.errno or EIO)
        except BaseException as exc:
            self._context.fail(job, exc)
            return
        self._context.complete(job, result)

    def _handle_aiocb_rw(self, aiocb: Aiocb) -> int:
        iov = aiocb.iov if len(aiocb.iov) <= IOV_MAX else aiocb.iov[:IOV_MAX]
        if aiocb.kind == READ:
            return preadv(self._fd, iov, aiocb.offset)
        return pwritev(self._fd, iov, aiocb.offset, os.RWF_DSYNC if aiocb.fua else 0)

    def _handle_aiocb_flush(self) -> int:
        if not self._flush_error:
            try:
                os.fdatasync(self._fd)
            except OSError as exc:
                self._flush_error = exc.errno or EIO
        return -self._flush_error

    def close(self) -> None:
        self._pool.close()
        os.close(self._fd)
