"""A disk that an NBD server has: qemu-nbd, nbdkit, or another at the end of a Unix or TCP socket.

NetworkBlockDevice doc/proto.md, "Transmission phase". A request goes out on the thread that makes it, where the socket
takes it at once; between ``plug`` and ``unplug`` several do in one call. One thread a drive receives, sends what is
left, connects anew, and goes on with the coroutines whose answers it brings, as a worker of file_posix does. While it
is at that, requests gather, and go out in one call. The bytes of all that are compiled code's (nbd_requests.pyx,
nbd_line.pyx), which is also the drive's lane; what is decided is here.

Where the server is lost (it hangs up, says what no server may, does not answer within ``timeout``) there are two
policies. ``reconnect_delay=0``: what is under way fails with EIO, and so does all that follows until it is there again.
Else requests wait so many seconds for it, and are asked again; QEMU's option of that name. It is tried again at ever
longer intervals for as long as the drive is open. One that is back must serve a disk of the same size.
"""

from __future__ import annotations

import os
import select
from _struct import Struct
from _weakref import ref
from errno import ECANCELED, EIO, ENOMEM, ENOTSUP
from time import monotonic

from pyvmm.block.coroutine import start
from pyvmm.block.driver import ProtocolDriver
from pyvmm.block.iov import ZEROS, IovSlice
from pyvmm.block.protocols.nbd_handshake import (
    READ_ONLY,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    NbdError,
    NbdRefusedError,
    connect,
    resolve,
)
from pyvmm.block.protocols.nbd_line import NbdLine
from pyvmm.block.protocols.nbd_request import NbdRequest
from pyvmm.errors import ConfigError
from pyvmm.light import Lock, Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Coroutine
    from typing import Any

    from pyvmm.block.coroutine import AioContext, Waiter
    from pyvmm.block.driver import Iov
    from pyvmm.block.lane import Lane
    from pyvmm.block.protocols.nbd_address import NbdAddress
    from pyvmm.block.protocols.nbd_handshake import Export

READ, WRITE, DISC, FLUSH, TRIM, _CACHE, WRITE_ZEROES = range(7)
REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC = 0x25609513
FLAG_FUA, FLAG_NO_HOLE = 1, 2

OPEN_LIMIT_S = 10.0  # from the first packet to the transmission phase
AGAIN_LIMIT_S = 5.0  # the same, of a try to connect anew
END_LIMIT_S = 10.0  # how long a request waits at most, when the drive is being closed
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # between two tries to connect
MOST_ZEROES_BYTES = 128 << 20  # in one request: a server that writes them has to be done within the time limit
PEEK_LIMIT_S = 10.0


class NobodyAsks:
    """The owner of a coroutine that nobody cancels."""

    waiter: Waiter | None = None


class Ends:
    """What the thread sleeps on. ``wake_fd``: there is something to do; ``end_fd``: the drive is closed."""

    __slots__ = ("end_fd", "poll", "wake_fd")

    def __init__(self) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.poll = select.poll()
        self.poll.register(self.wake_fd, select.POLLIN)

    def wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    def close(self) -> None:
        for fd in (self.wake_fd, self.end_fd):
            if fd >= 0:
                os.close(fd)
        self.wake_fd = self.end_fd = -1


class Nbd(ProtocolDriver):
    """A drive's export. ConfigError where it can't be had."""

    def __init__(
        self,
        address: NbdAddress,
        context: AioContext,
        *,
        read_only: bool = False,
        reconnect_delay_s: float = 0.0,
        timeout_s: float = 0.0,
    ) -> None:
        self.address = address
        self.read_only = read_only
        self._context = context
        self._reconnect_delay_s = reconnect_delay_s
        self._timeout_s = timeout_s
        self._ways = resolve(address)
        self._ends = Ends()
        try:
            self._socket, self._export = self._connect(OPEN_LIMIT_S)
            self._check(self._export)
        except NbdError as error:
            self._ends.close()
            raise ConfigError(f"the NBD server {address}: {error}{remedy_of(error, address)}") from None
        except BaseException:
            self._ends.close()
            raise
        self.size_bytes = self._export.size_bytes
        self.alignment = self._export.block_bytes
        self._lock = Lock()
        self._line = NbdLine(-1, 0, 0, 0)
        self._line.wake_fd = self._ends.wake_fd
        self._waiting: dict[NbdRequest, None] = {}  # for a connection, the oldest first
        self._connected = True
        self._holding_until = 0.0  # without a connection: when those that wait for one fail
        self._closed = False
        self._try_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._poll_events = 0
        self._begin()
        me, ends = ref(self), self._ends
        self._thread = Thread(lambda: main(me, ends))
        self._thread.start()

    def _connect(self, limit_s: float) -> tuple[socket, Export]:
        return connect(self._ways, self.address.export, limit_s, self._ends.end_fd)

    def _check(self, export: Export) -> None:
        """ConfigError where the guest would write what may not be written."""
        if export.flags & READ_ONLY and not self.read_only:
            self._socket.close()
            raise ConfigError(
                f"the NBD server {self.address} lets nobody write: give read-only=on, or have it serve that differently"
            )

    def _begin(self) -> None:
        export = self._export
        self._line.begin(self._socket.fileno(), export.structured, export.most_bytes, self.alignment)

    def lane(self, offset: int, size_bytes: int) -> Lane | None:
        self._line.place(offset, size_bytes)
        return self._line

    # -- the coroutines ----------------------------------------------------------------------------------------

    async def co_preadv(self, offset: int, iov: Iov, length: int) -> int:
        count = min(length, self.size_bytes - offset)
        if count <= 0:
            return 0
        if (offset | count) % self.alignment:
            return await self._co_blocks(False, offset, iov, count, False)
        count = min(count, self._export.most_bytes)
        if count == length:
            return await self._ask(READ, 0, offset, count, iov)
        with IovSlice(iov, 0, count) as part:
            return await self._ask(READ, 0, offset, count, part)

    async def co_pwritev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        count = min(length, self.size_bytes - offset)
        if count <= 0:
            return 0
        if (offset | count) % self.alignment:
            return await self._co_blocks(True, offset, iov, count, fua)
        count = min(count, self._export.most_bytes)
        if count == length:
            return await self._co_write(offset, iov, count, fua)
        with IovSlice(iov, 0, count) as part:
            return await self._co_write(offset, part, count, fua)

    async def _co_write(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        by_flag = fua and self._export.flags & SEND_FUA
        ret = await self._ask(WRITE, FLAG_FUA if by_flag else 0, offset, length, iov)
        return await self._co_then_flush(ret, fua and not by_flag)

    async def _co_then_flush(self, ret: int, flush: bool) -> int:
        """``ret``, after a flush where one stands for FUA."""
        if ret >= 0 and flush:
            flushed = await self.co_flush()
            return flushed if flushed < 0 else ret
        return ret

    async def co_flush(self) -> int:
        # proto.md: where the server has no flush there is nothing that it could do.
        return await self._ask(FLUSH, 0, 0, 0, ()) if self._export.flags & SEND_FLUSH else 0

    async def co_pdiscard(self, offset: int, length: int) -> int:
        """Whole blocks of it."""
        if not self._export.flags & SEND_TRIM:
            return -ENOTSUP
        begin, end = offset + -offset % self.alignment, offset + length
        end -= end % self.alignment
        while begin < end:
            count = min(end - begin, MOST_ZEROES_BYTES)
            ret = await self._ask(TRIM, 0, begin, count, ())
            if ret < 0:
                return ret
            begin += count
        return 0

    async def co_pwrite_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        begin, end = offset + -offset % self.alignment, offset + length
        last = end - end % self.alignment
        if not self._export.flags & SEND_WRITE_ZEROES or begin >= last:
            begin = last = end
        for at, upto in ((offset, begin), (last, end)):
            while at < upto:
                with memoryview(ZEROS)[: min(len(ZEROS), upto - at)] as zeros:
                    ret = await self.co_pwritev(at, [zeros], len(zeros), fua)
                if ret <= 0:
                    return ret or -EIO
                at += ret
        by_flag = fua and self._export.flags & SEND_FUA
        flags = (0 if may_unmap else FLAG_NO_HOLE) | (FLAG_FUA if by_flag else 0)
        zeroed = begin < last
        while begin < last:
            count = min(last - begin, MOST_ZEROES_BYTES)
            ret = await self._ask(WRITE_ZEROES, flags, begin, count, ())
            if ret < 0:
                return ret
            begin += count
        return await self._co_then_flush(0, zeroed and fua and not by_flag)

    # -- what is no whole blocks: the backend keeps requests that share one apart ------------------------------

    async def _co_blocks(self, write: bool, offset: int, iov: Iov, length: int, fua: bool) -> int:
        """By a buffer of the blocks that have it, as many as go in one request; to be written they are read first."""
        begin, data, length = self._blocks(offset, length)
        with memoryview(data) as whole:
            ret = await self._ask(READ, 0, begin, len(whole), [whole])
            if ret < 0:
                return ret
            at = offset - begin
            with IovSlice(iov, 0, length) as parts:
                for part in parts:
                    with whole[at : at + len(part)] as there:
                        if write:
                            there[:] = part
                        else:
                            part[:] = there
                    at += len(part)
            if write:
                ret = await self._co_write(begin, [whole], len(whole), fua)
        return ret if ret < 0 else length

    def _blocks(self, offset: int, length: int) -> tuple[int, bytearray, int]:
        """(beginning of the first block, memory for all of them, how many bytes of the request are in them)."""
        block, most = self.alignment, max(self.alignment, self._export.most_bytes)
        begin = offset - offset % block
        end = min(offset + length + -(offset + length) % block, begin + most)
        return begin, bytearray(end - begin), min(length, end - offset)

    # -- sending -----------------------------------------------------------------------------------------------

    def _ask(self, kind: int, flags: int, offset: int, length: int, iov: Iov) -> NbdRequest:
        """One request, to be awaited: of a transfer its length, else 0; or a negative errno. That is -EIO at once where
        there is no connection, and the policy is not to wait for one.
        """
        request = NbdRequest(kind, flags, offset, length, iov)
        request.cancel_held = self._cancel
        result = -EIO
        with self._lock:
            if not self._closed:
                try:
                    if self._connected and self._line.ask(request, kind, flags, offset, length, iov):
                        return request
                    now = monotonic()
                    if not self._connected and now < self._holding_until:
                        request.lost_at = now
                        self._waiting[request] = None
                        return request
                except MemoryError:
                    result = -ENOMEM
        request.iov = ()
        request.result = result
        request.set()
        return request

    def plug(self) -> None:
        self._line.plug()

    def unplug(self) -> None:
        self._line.unplug()

    def _cancel(self, request: NbdRequest) -> None:
        """One that the server can't have yet ends now; others when it answers."""
        with self._lock:
            if request not in self._waiting:
                return
            del self._waiting[request]
        request.iov = ()
        self._context.complete(request, -ECANCELED)

    # -- the thread --------------------------------------------------------------------------------------------

    def turn(self, woken: bool) -> float | None:
        """Do what there is to do: how long to sleep then, in milliseconds; None: the drive is closed. ``woken``: by
        ``wake_fd``, not only by the socket.
        """
        if self._closed:
            return None
        self._line.wake_up()
        if woken:
            os.eventfd_read(self._ends.wake_fd)
        if not self._connected and monotonic() >= self._try_at:
            self._reconnect()
        if self._connected:
            try:
                while self._receive():
                    pass
                return self._sleep()
            except NbdError as error:
                self._lose(error)
        return self._sleep()

    def _receive(self) -> bool:
        """Take what has come: whether there may be more. NbdError where the connection is over."""
        ended, more = self._line.receive()
        for request, result in ended:
            request.iov = ()
            self._context.complete_here(request, result)
        self._give_back()
        return more

    def _give_back(self) -> None:
        """What the lane has not done is asked here once more, by its devices."""
        try:
            self._line.give_back()
        except BaseException as error:
            self._context.raise_on_loop(error)

    def _sleep(self) -> float:
        """About to sleep: until when. NbdError where the connection is over."""
        with self._lock:
            try:
                sent = self._line.fall_asleep()
            except OSError as error:
                raise NbdError(os.strerror(error.errno or EIO)) from None
            if self._connected:
                self._watch_locked(sent)
            end = self._next_end_locked()
        if end is None:
            return -1.0
        now = monotonic()
        if now >= end:
            self._run_out(now)
            return 0.0
        return (end - now) * 1000 + 1

    def _next_end_locked(self) -> float | None:
        """When there is something to do though nothing comes."""
        if not self._connected:
            return min(self._try_at, self._holding_until) if self._waiting else self._try_at
        if not self._timeout_s:
            return None
        # One that is sent while the thread sleeps does not wake it: it looks now and then.
        look = monotonic() + self._timeout_s / 4
        oldest = self._line.oldest_s
        return look if oldest is None else min(look, oldest + self._timeout_s)

    def _watch_locked(self, sent: bool) -> None:
        events = select.POLLIN | (0 if sent else select.POLLOUT)
        if events != self._poll_events:
            self._poll_events = events
            self._ends.poll.register(self._socket.fileno(), events)

    def _run_out(self, now: float) -> None:
        """A time has come: of a server that does not answer, or of those that wait for it to come back."""
        if not self._connected:
            if self._waiting and now >= self._holding_until:
                self._fail_all()
        elif self._timeout_s:
            oldest = self._line.oldest_s
            if oldest is not None and now >= oldest + self._timeout_s:
                self._lose(NbdError("it does not answer"))

    def _lose(self, error: NbdError) -> None:
        """The connection is over."""
        failed = []
        with self._lock:
            if not self._connected:
                return
            self._connected = False
            now = monotonic()
            self._holding_until = now + self._reconnect_delay_s
            self._try_at, self._pause_s = now, FIRST_PAUSE_S
            if self._poll_events:
                self._ends.poll.unregister(self._socket.fileno())
                self._poll_events = 0
            for request in self._line.end():
                request.lost_at = request.lost_at or now
                if now >= request.lost_at + self._reconnect_delay_s:
                    failed.append(request)  # at once, or it has been asked again and again meanwhile
                else:
                    self._waiting[request] = None
        self._socket.close()
        self._fail(failed)
        self._give_back()

    def _fail_all(self) -> None:
        with self._lock:
            self._holding_until = 0.0
            failed = list(self._waiting)
            self._waiting.clear()
        self._fail(failed)

    def _fail(self, failed: list[NbdRequest]) -> None:
        for request in failed:
            request.iov = ()
            self._context.complete_here(request, -EIO)

    def _reconnect(self) -> None:
        """Try once; what waits is asked again."""
        made: socket | None = None
        try:
            made, export = self._connect(AGAIN_LIMIT_S)
            if not self._same(export):
                made.close()
                made = None
        except NbdError:
            pass
        if made is None:
            self._try_at = monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return
        with self._lock:
            if self._closed:
                made.close()
                return
            self._socket, self._export = made, export
            self._connected = True
            self._begin()
            failed = []
            for request in self._waiting:
                try:
                    self._line.ask(request, request.kind, request.flags, request.offset, request.length, request.iov)
                except MemoryError:
                    failed.append(request)
            self._waiting.clear()
        self._fail(failed)

    def _same(self, export: Export) -> bool:
        """Whether it may stand in for the one that was opened."""
        before = self._export
        return (
            export.size_bytes == before.size_bytes
            and export.block_bytes == before.block_bytes
            and (self.read_only or not export.flags & READ_ONLY)
        )

    # -- the end -----------------------------------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size_bytes - offset))
        data = bytearray(length)
        done = Lock()
        done.acquire()
        result: list[int] = []

        async def look() -> None:
            try:
                with memoryview(data) as view:
                    result.append(await self.co_preadv(offset, [view], length))
            finally:
                done.release()

        looking: Coroutine[Any, None, None] = look()
        start(looking, NobodyAsks())
        if not done.acquire(timeout=PEEK_LIMIT_S) or not result or result[0] <= 0:
            return b""
        return bytes(data[: result[0]])

    def ending(self) -> None:
        with self._lock:
            self._timeout_s = min(self._timeout_s or END_LIMIT_S, END_LIMIT_S)
            self._reconnect_delay_s = min(self._reconnect_delay_s, END_LIMIT_S)
            self._holding_until = min(self._holding_until, monotonic() + END_LIMIT_S)
            if not self._closed:
                self._ends.wake()

    def close(self) -> None:
        """Say that this is the end (NBD_CMD_DISC), where the server listens. Nothing is in flight."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._ends.end_fd, 1)
            self._ends.wake()
        self._thread.join()
        if self._connected:
            try:
                self._socket.send(REQUEST.pack(REQUEST_MAGIC, 0, DISC, 0, 0, 0))
            except OSError:
                pass
        self._line.end()
        self._socket.close()
        self._ends.close()

    def abandon(self) -> None:
        """In a child: its descriptors only, and no word to the server."""
        self._closed = True
        self._socket.close()
        self._ends.close()

    def __del__(self) -> None:
        ends = getattr(self, "_ends", None)
        if ends is not None and ends.wake_fd >= 0:
            if (line := getattr(self, "_line", None)) is not None:
                line.end()  # a device may have it still
            ends.wake()  # the thread finds nobody, and ends


def main(me: ref[Nbd], ends: Ends) -> None:
    """A drive's thread. While it sleeps it holds on to its descriptors alone."""
    sleep_ms: float | None = 0.0
    while True:
        ready = ends.poll.poll(sleep_ms)
        drive = me()
        if drive is None:
            ends.close()
            return
        sleep_ms = drive.turn(any(fd == ends.wake_fd for fd, _ in ready))
        if sleep_ms is None:
            return
        if sleep_ms < 0:
            sleep_ms = None
        drive = None


def remedy_of(error: NbdError, address: NbdAddress) -> str:
    """Where the error itself says none."""
    if isinstance(error, NbdRefusedError):
        return ""
    if address.path:
        return ": start it there (qemu-nbd --socket PATH IMAGE, nbdkit --unix PATH ...), or give another path"
    return ": start it there (qemu-nbd --port PORT IMAGE, nbdkit ...), or give another address"
