"""The engine aio="io_uring": reads, writes and flushes of a file by a ring of the kernel's instead of worker threads.

It is file_posix with another ``co_submit``. A submission whose completion is in the ring when the system call returns
(data in the page cache, a file system in memory) does not suspend its coroutine. The others ring an eventfd, which
the event loop watches: from the kernel straight to the thread that goes on with the request. What the ring does not
do (discards, zeroes, more than it holds, O_DIRECT that does not fit) goes to the thread pool.

It stands on the PyPI package ``liburing`` (2026.3.30, alpha), but for one thing: its Iovec takes a buffer of every
memoryview and never gives it back, so guest memory could not be closed again. So each submission is prepared with an
Iovec of bytes that live as long as the engine, and then its entry in the submission queue, which the kernel lets us
map (io_uring_setup(2), IORING_OFF_SQES), is given the address and the length of our own array of struct iovec.
"""

from __future__ import annotations

import mmap
import os
import struct
from errno import EAGAIN, EBUSY, EINTR, EINVAL, EIO

from pyvmm.block.file_posix import FLUSH, IOV_MAX, READ, Aiocb, FilePosix
from pyvmm.errors import ConfigError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block.coroutine import AioContext, ReaderLoop
    from pyvmm.block.image import Image
    from pyvmm.block.stats import BlockStats

ENTRIES = 128
OFFSET_OF_SQES = 0x10000000  # linux/io_uring.h: IORING_OFF_SQES
SQE_BYTES = 64  # struct io_uring_sqe
SQE_ADDRESS = 16  # its fields addr and len
SQE_USER_DATA = 32
CANCELS = 1 << 63  # in user_data: the completion of a cancellation itself


class InRing:
    """A request in the ring: its memory stays where it is until the kernel is done with it."""

    __slots__ = ("aiocb", "holds")

    def __init__(self, aiocb: Aiocb, holds: list[Any]) -> None:
        self.aiocb = aiocb
        self.holds = holds


class Ring:
    """The ring, behind one lock. ``number`` stands for a request in it."""

    def __init__(self) -> None:
        try:
            import liburing  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as exc:
            raise ConfigError(
                "aio=io_uring needs the package liburing: pip install 'pyvmm-kvm[io_uring]', or use aio=threads"
            ) from exc
        import ctypes

        self._api: Any = liburing
        self._address_of = ctypes.addressof
        self._c_char = ctypes.c_char
        self.lock = Lock()
        self.closed = False
        self._ring = liburing.Ring()
        try:
            liburing.io_uring_queue_init(ENTRIES, self._ring)
        except OSError as exc:
            raise ConfigError(
                f"the host's kernel refuses io_uring ({exc.strerror}): allow it (sysctl kernel.io_uring_disabled=0),"
                " or use aio=threads"
            ) from exc
        self._cqe = liburing.Cqe()
        self._entries_taken = 0
        self.unsubmitted = 0
        self._some_bytes = bytearray(1)
        self._some_iovec = liburing.Iovec([self._some_bytes])
        self._sqes = mmap.mmap(self._ring.ring_fd, ENTRIES * SQE_BYTES, offset=OFFSET_OF_SQES)
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        liburing.io_uring_register_eventfd(self._ring, self.event_fd)

    def memory(self, iov: Any) -> tuple[list[Any], Any]:
        """Objects that keep the memory of ``iov`` in its place, and an array of struct iovec that says where it is.

        TypeError where a view is read-only: ctypes can't tell its address.
        """
        c_char, address_of = self._c_char, self._address_of
        holds: list[Any] = [c_char.from_buffer(view) for view in iov]
        fields: list[int] = []
        for hold, view in zip(holds, iov, strict=True):
            fields += (address_of(hold), len(view))
        array = bytearray(struct.pack(f"{len(fields)}Q", *fields))
        holds.append(array)
        return holds, c_char.from_buffer(array)

    def entry_locked(self) -> tuple[Any, int] | None:
        """A free entry of the submission queue and where it is in ``_sqes``."""
        sqe = self._api.io_uring_get_sqe(self._ring)
        if sqe is None:
            return None
        at = self._entries_taken % ENTRIES * SQE_BYTES
        self._entries_taken += 1
        self.unsubmitted += 1
        return sqe, at

    def prepare_locked(self, entry: tuple[Any, int], fd: int, aiocb: Aiocb, number: int, array: Any) -> None:
        sqe, at = entry
        api = self._api
        if aiocb.kind == FLUSH:
            api.io_uring_prep_fsync(sqe, fd, api.IORING_FSYNC_DATASYNC)
        else:
            prepare = api.io_uring_prep_readv if aiocb.kind == READ else api.io_uring_prep_writev
            prepare(sqe, fd, self._some_iovec, aiocb.offset, aiocb.flags)
            struct.pack_into("QI", self._sqes, at + SQE_ADDRESS, self._address_of(array), len(aiocb.iov))
        sqe.user_data = number
        assert struct.unpack_from("Q", self._sqes, at + SQE_USER_DATA)[0] == number

    def cancel_locked(self, number: int) -> None:
        """Ask for -ECANCELED as the result of ``number``, if it has not begun."""
        entry = self.entry_locked()
        if entry is not None:
            sqe, _ = entry
            self._api.io_uring_prep_cancel64(sqe, number, 0)
            sqe.user_data = number | CANCELS
            self.submit_locked()

    def submit_locked(self) -> None:
        """Tell the kernel of the entries that were prepared. What it can't take now it takes with the next ones."""
        try:
            self.unsubmitted -= self._api.io_uring_submit(self._ring)
        except OSError as exc:
            if exc.errno not in (EAGAIN, EBUSY, EINTR):
                raise

    def collect_locked(self) -> list[tuple[int, int]]:
        """The completions there are: (number, result)."""
        if self.unsubmitted:
            self.submit_locked()
        found = []
        api, ring, cqes = self._api, self._ring, self._cqe
        for _ in range(api.io_uring_cq_ready(ring)):
            api.io_uring_peek_cqe(ring, cqes)
            cqe = cqes[0]
            try:
                result = cqe.res  # the package raises what is an error
            except OSError as exc:
                result = -(exc.errno or EIO)
            number = cqe.user_data
            api.io_uring_cqe_seen(ring, cqe)
            if not number & CANCELS:
                found.append((number, result))
        return found

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self._sqes.close()
            self._api.io_uring_queue_exit(self._ring)
            os.close(self.event_fd)


class FileUring(FilePosix):
    """file_posix with a ring as its engine."""

    def __init__(self, image: Image, context: AioContext, stats: BlockStats) -> None:
        loop: ReaderLoop = context.loop  # type: ignore[assignment]
        if not hasattr(loop, "add_reader"):
            raise ConfigError("aio=io_uring needs an event loop that watches descriptors: use aio=threads")
        super().__init__(image, context, stats)
        self._loop = loop
        self._ring = Ring()
        self._in_ring: dict[int, InRing] = {}
        self._numbers = 0
        loop.add_reader(self._ring.event_fd, self._on_event)
        context.add_source(self._ring.event_fd, self._on_event)

    async def co_submit(self, aiocb: Aiocb) -> int:
        if not self._luring_submit(aiocb):
            return await self.paio_submit(aiocb)
        ret = await aiocb
        if ret == -EINVAL and self.alignment > 1:
            # The memory is not aligned for O_DIRECT: a worker has a buffer that is.
            again = Aiocb(self, aiocb.kind, aiocb.offset, aiocb.length, aiocb.iov, bool(aiocb.flags))
            return await self.paio_submit(again)
        return ret

    def _luring_submit(self, aiocb: Aiocb) -> bool:
        """Into the ring. False: it is none for the ring. Where the completion is there at once, the result is set."""
        holds: list[Any] = []
        array = None
        if aiocb.kind != FLUSH:
            if len(aiocb.iov) > IOV_MAX or (self.alignment > 1 and (aiocb.offset | aiocb.length) % self.alignment):
                return False
            try:
                holds, array = self._ring.memory(aiocb.iov)
            except (TypeError, ValueError):  # read-only, or empty
                return False
        with self._ring.lock:
            if len(self._in_ring) >= ENTRIES:
                return False
            entry = self._ring.entry_locked()
            if entry is None:
                return False
            self._numbers = number = (self._numbers + 1) % CANCELS
            self._in_ring[number] = InRing(aiocb, [*holds, array])
            self._ring.prepare_locked(entry, self._fd, aiocb, number, array)
            self._ring.submit_locked()
            done = self._take_locked()
            left = self._ring.unsubmitted
        for other, result in done:
            if other is aiocb:
                aiocb.result = result
                aiocb.set()  # its coroutine is the caller, and finds the result when it looks
            else:
                self._context.complete(other, result)
        if left:
            self._loop.call_soon(self._on_event)
        return True

    def _take_locked(self) -> list[tuple[Aiocb, int]]:
        """Requests whose completions are there; their memory is let go."""
        return [(self._in_ring.pop(number).aiocb, result) for number, result in self._ring.collect_locked()]

    def _on_event(self) -> None:
        """The eventfd rings, or somebody drains, or the kernel could not take a submission."""
        with self._ring.lock:
            if self._ring.closed:
                return
            try:
                os.eventfd_read(self._ring.event_fd)
            except BlockingIOError:
                pass
            done = self._take_locked()
            left = self._ring.unsubmitted
        if left:
            self._loop.call_soon(self._on_event)
        for aiocb, result in done:
            self._context.complete(aiocb, result)
        self._context.run_due()

    def cancel(self, aiocb: Aiocb) -> None:
        with self._ring.lock:
            for number, in_ring in self._in_ring.items():
                if in_ring.aiocb is aiocb:
                    self._ring.cancel_locked(number)
                    break
        super().cancel(aiocb)

    def close(self) -> None:
        self._context.remove_source(self._ring.event_fd)
        self._loop.remove_reader(self._ring.event_fd)
        self._ring.close()
        super().close()
