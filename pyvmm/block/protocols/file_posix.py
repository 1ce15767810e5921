"""The protocol "file": a file or block device of the host, by preadv, pwritev, fdatasync and fallocate.

Two roads lead to the system call. Where it will not wait for a device it is made at once, on the submitter's thread:
reads of what the page cache has (RWF_NOWAIT), writes where the file system takes them so, everything on file systems
that live in memory. All else is an Aiocb for the engine: ``paio_submit`` to a worker of the thread pool, or io_uring
(io_uring.py).

One rule each:

- EINTR: never seen. Python makes such a call again by itself (PEP 475).
- short transfers: the caller gets the number of bytes; raw.py goes on with the rest.
- ENOSPC, EIO and every other errno of a transfer: that request fails with it, and only that one. The backend's policy
  says what follows.
- a failed flush: fails from then on, with the same errno. The kernel may have dropped the pages it could not write and
  say "done" the next time. With O_DIRECT there are none of the guest's data in the page cache, so there a later
  flush may succeed.
- cancel: what no worker has begun is taken back; what has begun runs to its end.

With O_DIRECT the kernel wants offset, length and memory aligned. What it refuses (EINVAL), or is known not to be whole
blocks, goes by a bounce buffer: reads as they are, writes with the rest of their first and last block read before. The
backend sees to it that no two such writes share a block (``alignment``). A last block that the file holds only in
part is written by a second descriptor, without O_DIRECT: the file must not grow beyond its last sector.
"""

from __future__ import annotations

import os
from errno import ECANCELED, EINVAL, EIO, ENODEV, ENOSPC, ENOSYS, ENOTSUP, EOPNOTSUPP

from pyvmm.block.coroutine import Waiter
from pyvmm.block.driver import ProtocolDriver
from pyvmm.block.protocols import fallocate
from pyvmm.block.protocols.bounce import BOUNCE_BYTES, BouncePool, copy_in, copy_out
from pyvmm.block.stats import TRACE_CALL
from pyvmm.block.thread_pool import ThreadPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.driver import Iov
    from pyvmm.block.lane import Lane
    from pyvmm.block.protocols.image import Image
    from pyvmm.block.stats import BlockStats

IOV_MAX = 1024
INLINE_LIMIT_BYTES = 256 << 10  # more than this is copied by a worker even where it need not wait
MERGE_LIMIT_BYTES = 1 << 20

READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES = range(5)

# What fallocate says where file system or device can't do it. EINVAL: a block device, and not whole blocks.
CANT = (EOPNOTSUPP, ENOTSUP, ENOSYS, ENODEV, EINVAL)

preadv = os.preadv
pwritev = os.pwritev


class Aiocb(Waiter):
    """One system call's worth of a request, on its way through an engine."""

    __slots__ = ("cancelled", "flags", "iov", "kind", "length", "may_unmap", "offset", "owner_file")

    def __init__(self, file: FilePosix, kind: int, offset: int, length: int, iov: Iov, fua: bool) -> None:
        super().__init__()
        self.owner_file = file
        self.kind = kind
        self.offset = offset
        self.length = length
        self.iov = iov
        self.flags = os.RWF_DSYNC if fua else 0
        self.may_unmap = False
        self.cancelled = False  # somebody no longer wants it

    def cancel(self) -> None:
        self.owner_file.cancel(self)


class FilePosix(ProtocolDriver):
    """An opened image, which belongs to it from here on. Engine: its own thread pool."""

    def __init__(self, image: Image, context: AioContext, stats: BlockStats) -> None:
        self._image = image
        self._fd = image.fd
        self._context = context
        self._stats = stats
        self.size_bytes = image.size_bytes
        self.read_only = image.read_only
        self.alignment = image.alignment
        # With O_DIRECT every transfer waits for the device.
        self._inline_read = self._inline_write = image.in_memory or not image.direct
        self._inline_flags = 0 if image.in_memory else os.RWF_NOWAIT
        self._flush_error = 0
        self._can_punch = self._can_zero = True
        self._bounces = BouncePool()
        self._pool = ThreadPool(self._aio_worker)

    def claim(self) -> None:
        self._image.lock()

    def give_up(self) -> None:
        self._image.unlock()

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
        return await self.co_submit(Aiocb(self, READ, offset, length, iov, False))

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
        return await self.co_submit(Aiocb(self, WRITE, offset, length, iov, fua))

    async def co_flush(self) -> int:
        if self._flush_error:
            return -self._flush_error
        ret = await self.co_submit(Aiocb(self, FLUSH, 0, 0, (), False))
        if ret < 0 and ret != -ECANCELED and not self._image.direct:
            self._flush_error = -ret
        return ret

    async def co_pdiscard(self, offset: int, length: int) -> int:
        if not self._can_punch:
            return -ENOTSUP
        return await self.paio_submit(Aiocb(self, DISCARD, offset, length, (), False))

    async def co_pwrite_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        aiocb = Aiocb(self, WRITE_ZEROES, offset, length, (), fua)
        aiocb.may_unmap = may_unmap
        return await self.paio_submit(aiocb)

    # -- the engine -----------------------------------------------------------------------------------------

    async def co_submit(self, aiocb: Aiocb) -> int:
        """A read, a write or a flush, by the engine. Here that is the thread pool."""
        return await self.paio_submit(aiocb)

    def paio_submit(self, aiocb: Aiocb) -> Aiocb:
        """Give the thread pool one system call; await what this returns."""
        self._pool.submit(aiocb)
        return aiocb

    def cancel(self, aiocb: Aiocb) -> None:
        """Take it back, if nobody has begun it."""
        if self._pool.remove(aiocb):
            self._context.complete(aiocb, -ECANCELED)

    def may_grow_to(self, end: int) -> bool:
        return self._image.may_grow_to(end)

    def measure(self, least_bytes: int = 0) -> None:
        self._image.lengthen(least_bytes)
        self._image.measure()
        self.size_bytes = self._image.size_bytes

    def shorten(self, most_bytes: int) -> None:
        self._image.shorten(most_bytes)
        self.measure()

    def lane(self, offset: int, size_bytes: int) -> Lane | None:
        if self._image.direct:
            return None
        from pyvmm.block.lane import Lane

        return Lane(self._fd, self._inline_flags, offset, size_bytes)

    def peek(self, offset: int, length: int) -> bytes:
        return self._image.peek(offset, length)

    def close(self) -> None:
        self._pool.close()
        self._bounces.close()
        self._image.close()

    def abandon(self) -> None:
        self._image.close()

    # -- on a worker's thread -------------------------------------------------------------------------------

    def _aio_worker(self, job: object) -> None:
        assert isinstance(job, Aiocb)
        if job.kind == WRITE and self._pool.queued:
            batch = self._take_neighbours(job)
            if len(batch) > 1:
                self._write_merged(batch)
                return
        self._do(job)

    def _do(self, aiocb: Aiocb) -> None:
        """Make the call, and go on with the request on this thread. ``aiocb`` is not touched after that."""
        tap = self._stats.tap
        since = 0 if tap is None else tap.now()
        try:
            if aiocb.kind <= WRITE:
                result = self._handle_aiocb_rw(aiocb)
            elif aiocb.kind == FLUSH:
                result = self._handle_aiocb_flush()
            elif aiocb.kind == DISCARD:
                result = self._handle_aiocb_discard(aiocb)
            else:
                result = self._handle_aiocb_write_zeroes(aiocb)
        except OSError as exc:
            result = -(exc.errno or EIO)
        except BaseException as exc:
            self._context.fail(aiocb, exc)
            return
        if tap is not None:
            tap.mark(TRACE_CALL, aiocb.asked_by, result, since)
        self._context.complete_here(aiocb, result)

    def _handle_aiocb_rw(self, aiocb: Aiocb) -> int:
        return self._transfer(aiocb.kind, aiocb.offset, aiocb.iov, aiocb.length, aiocb.flags)

    def _transfer(self, kind: int, offset: int, iov: Iov, length: int, flags: int) -> int:
        if len(iov) > IOV_MAX:
            iov = iov[:IOV_MAX]
            length = sum(len(view) for view in iov)
        if self.alignment > 1 and (offset | length) % self.alignment:
            return self._bounce(kind, offset, iov, length, flags)
        try:
            return preadv(self._fd, iov, offset) if kind == READ else pwritev(self._fd, iov, offset, flags)
        except OSError as exc:
            if exc.errno != EINVAL or self.alignment == 1:
                raise
        return self._bounce(kind, offset, iov, length, flags)  # the memory is not aligned

    def _handle_aiocb_flush(self) -> int:
        os.fdatasync(self._fd)
        return 0

    def _handle_aiocb_discard(self, aiocb: Aiocb) -> int:
        try:
            fallocate.punch_hole(self._fd, aiocb.offset, aiocb.length)
        except OSError as exc:
            if exc.errno not in CANT:
                raise
            self._can_punch &= exc.errno == EINVAL
            return -ENOTSUP
        return 0

    def _handle_aiocb_write_zeroes(self, aiocb: Aiocb) -> int:
        """By fallocate, by writing zeros where that is not to be had."""
        if not self._fallocate_zeroes(aiocb.offset, aiocb.length, aiocb.may_unmap):
            self._write_zeroes(aiocb.offset, aiocb.length)
        if aiocb.flags:
            os.fdatasync(self._fd)
        return 0

    def _fallocate_zeroes(self, offset: int, length: int, may_unmap: bool) -> bool:
        if may_unmap and self._can_punch:
            try:
                fallocate.punch_hole(self._fd, offset, length)
                return True
            except OSError as exc:
                if exc.errno not in CANT:
                    raise
                self._can_punch &= exc.errno == EINVAL
        if self._can_zero:
            try:
                fallocate.zero_range(self._fd, offset, length)
                return True
            except OSError as exc:
                if exc.errno not in CANT:
                    raise
                self._can_zero &= exc.errno == EINVAL
        return False

    def _write_zeroes(self, offset: int, length: int) -> None:
        bounce = self._bounces.take()
        zeros = bounce.view
        try:
            zeros[:] = bytes(len(zeros))
            while length:
                # The first piece goes to a block's end, so that the others are whole blocks.
                count = min(length, len(zeros) - offset % self.alignment)
                with zeros[:count] as part:
                    done = self._transfer(WRITE, offset, [part], count, 0)
                if not done:
                    raise OSError(ENOSPC, os.strerror(ENOSPC))
                offset += done
                length -= done
        finally:
            self._bounces.give(bounce)

    # -- O_DIRECT: what does not fit ------------------------------------------------------------------------

    def _bounce(self, kind: int, offset: int, iov: Iov, length: int, flags: int) -> int:
        """By way of an aligned buffer, a piece at a time: how many bytes."""
        bounce = self._bounces.take()
        done = 0
        try:
            while done < length:
                count = min(length - done, BOUNCE_BYTES - (offset + done) % self.alignment)
                move = self._bounce_read if kind == READ else self._bounce_write
                moved = move(bounce.view, offset + done, iov, done, count, flags)
                done += moved
                if moved < count:
                    break
        except OSError:
            if not done:
                raise
        finally:
            self._bounces.give(bounce)
        return done

    def _blocks(self, offset: int, count: int) -> tuple[int, int]:
        """Beginning and end of the blocks that have these bytes."""
        return offset - offset % self.alignment, offset + count + -(offset + count) % self.alignment

    def _bounce_read(self, buffer: memoryview, offset: int, iov: Iov, start: int, count: int, flags: int) -> int:
        begin, end = self._blocks(offset, count)
        with buffer[: end - begin] as blocks:
            got = preadv(self._fd, [blocks], begin)
        count = min(count, max(0, begin + got - offset))
        copy_out(buffer, offset - begin, iov, start, start + count)
        return count

    def _bounce_write(self, buffer: memoryview, offset: int, iov: Iov, start: int, count: int, flags: int) -> int:
        whole_end = self.size_bytes - self.size_bytes % self.alignment
        if offset >= whole_end:
            copy_in(buffer, 0, iov, start, start + count)
            with buffer[:count] as part:
                return pwritev(self._image.tail_fd, [part], offset, flags)
        count = min(count, whole_end - offset)  # the odd tail comes with the next piece
        begin, end = self._blocks(offset, count)
        if offset > begin:
            self._read_block(buffer, 0, begin)
        if offset + count < end and (end - self.alignment > begin or offset == begin):
            self._read_block(buffer, end - begin - self.alignment, end - self.alignment)
        copy_in(buffer, offset - begin, iov, start, start + count)
        with buffer[: end - begin] as blocks:
            put = pwritev(self._fd, [blocks], begin, flags)
        return min(count, max(0, begin + put - offset))

    def _read_block(self, buffer: memoryview, at: int, offset: int) -> None:
        with buffer[at : at + self.alignment] as block:
            got = preadv(self._fd, [block], offset)
            block[got:] = bytes(self.alignment - got)

    # -- merging --------------------------------------------------------------------------------------------

    def _take_neighbours(self, first: Aiocb) -> list[Aiocb]:
        """``first`` and the writes waiting behind it that begin where the one before ends."""
        batch = [first]
        end, pieces = first.offset + first.length, len(first.iov)

        def fits(job: object) -> bool:
            assert isinstance(job, Aiocb)
            return (
                job.kind == WRITE
                and job.flags == first.flags
                and job.offset == end
                and pieces + len(job.iov) <= IOV_MAX
                and end + job.length - first.offset <= MERGE_LIMIT_BYTES
            )

        while job := self._pool.take_if(fits):
            assert isinstance(job, Aiocb)
            batch.append(job)
            end, pieces = end + job.length, pieces + len(job.iov)
        return batch

    def _write_merged(self, batch: list[Aiocb]) -> None:
        """One call for all. Those it did not do whole are done again one by one: each has its own result."""
        first = batch[0]
        iov = [view for aiocb in batch for view in aiocb.iov]
        done = 0
        tap = self._stats.tap
        since = 0 if tap is None else tap.now()
        try:
            done = self._transfer(WRITE, first.offset, iov, sum(aiocb.length for aiocb in batch), first.flags)
        except BaseException:
            pass  # each is done again by itself, and fails with its own error
        del iov
        whole = 0
        for aiocb in batch:
            if done >= aiocb.length:
                done -= aiocb.length
                whole += 1
        with self._context.lock:
            self._stats.write.merged += max(0, whole - 1)
        for number, aiocb in enumerate(batch):
            if number < whole:
                if tap is not None:
                    tap.mark(TRACE_CALL, aiocb.asked_by, aiocb.length, since)
                self._context.complete_here(aiocb, aiocb.length)
            else:
                self._do(aiocb)
