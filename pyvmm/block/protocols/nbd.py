"""A disk that an NBD server has: qemu-nbd, nbdkit, or another at the end of a Unix or TCP socket.

NetworkBlockDevice doc/proto.md, "Transmission phase". A request goes out on the thread that makes it, where the socket
takes it at once; between ``plug`` and ``unplug`` several do in one call. One thread a drive receives, sends what is
left, connects anew, and goes on with the coroutines whose answers it brings, as a worker of file_posix does. While it
is at that, requests gather, and go out in one call.

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
from errno import ECANCELED, EIO, ENOTSUP
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
from pyvmm.block.protocols.nbd_replies import (
    DISC,
    FLUSH,
    IOV_MAX,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    NbdRequest,
    Replies,
)
from pyvmm.errors import ConfigError
from pyvmm.light import Lock, Thread, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Coroutine
    from typing import Any

    from pyvmm.block.coroutine import AioContext, Waiter
    from pyvmm.block.driver import Iov
    from pyvmm.block.protocols.nbd_address import NbdAddress
    from pyvmm.block.protocols.nbd_handshake import Export

REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
REQUEST_MAGIC = 0x25609513
FLAG_FUA, FLAG_NO_HOLE = 1, 2

OPEN_LIMIT_S = 10.0  # from the first packet to the transmission phase
AGAIN_LIMIT_S = 5.0  # the same, of a try to connect anew
END_LIMIT_S = 10.0  # how long a request waits at most, when the drive is being closed
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # between two tries to connect
MOST_ZEROES_BYTES = 128 << 20  # in one request: a server that writes them has to be done within the time limit
PEEK_LIMIT_S = 10.0
MOST_PLUGGED = 8  # requests that wait for others before they are sent: the server may have to do with these


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
        self._requests: dict[int, NbdRequest] = {}  # without an answer, the oldest first
        self._out: deque[memoryview | bytes] = deque()  # what the socket did not take
        self._put = self._gone = 0  # bytes that came into it, and that left it
        self._awake = True  # the thread will look at ``_out`` before it sleeps
        self._plugs = 0  # who has more to ask for, and says so when it has not
        self._plugged = 0  # requests that wait for that
        self._cookie = 0
        self._connected = True
        self._holding_until = 0.0  # without a connection: when those that wait for one fail
        self._closed = False
        self._try_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._replies = self._new_replies()
        self._poll_events = 0
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

    def _new_replies(self) -> Replies:
        return Replies(self._socket, self._export.structured, self._requests.get, self._answered)

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
        request.since = now = monotonic()
        request.cancel_held = self._cancel
        with self._lock:
            if not self._closed and (self._connected or now < self._holding_until):
                self._cookie += 1
                request.cookie = self._cookie
                self._requests[self._cookie] = request
                if self._connected:
                    request.sent = True
                    self._send_locked(request)
                return request
        request.result = -EIO
        request.set()
        return request

    def _send_locked(self, request: NbdRequest) -> None:
        """Where nobody is about to send more, at once; else it goes out with that."""
        kind, data = request.kind, request.iov
        self._out.append(
            REQUEST.pack(REQUEST_MAGIC, request.flags, kind, request.cookie, request.offset, request.length)
        )
        self._put += REQUEST.size
        if kind == WRITE:
            self._out.extend(data)
            self._put += request.length
            request.put_upto = self._put
        if self._plugs:
            self._plugged += 1
            if self._plugged < MOST_PLUGGED:
                return
        if not self._awake:
            self._send_now_locked()

    def _send_now_locked(self) -> None:
        self._plugged = 0
        try:
            self._flush_locked()
        except NbdError:
            pass  # the thread finds the same, and what to do about it
        if self._out:
            self._ends.wake()  # it is to wait until there is room

    def plug(self) -> None:
        """A message a request costs a system call here and a wake-up there; what is asked for by then goes out in one.
        """
        with self._lock:
            self._plugs += 1

    def unplug(self) -> None:
        with self._lock:
            self._plugs -= 1
            if not self._plugs and self._out and not self._awake and self._connected:
                self._send_now_locked()

    def _flush_locked(self) -> None:
        """Send what is left, as much as goes. NbdError."""
        out = self._out
        while out:
            batch = [*out] if len(out) <= IOV_MAX else [out[n] for n in range(IOV_MAX)]
            try:
                sent = self._socket.sendmsg(batch)
            except BlockingIOError:
                return
            except OSError as error:
                raise NbdError(error.strerror) from None
            self._gone += sent
            if len(batch) == len(out) and sent == sum(map(len, batch)):
                out.clear()
                return
            while out and sent >= len(out[0]):
                sent -= len(out.popleft())
            if sent:
                with memoryview(out.popleft()) as first:
                    out.appendleft(first[sent:])

    def _cancel(self, request: NbdRequest) -> None:
        """One that the server can't have yet ends now; others when it answers."""
        with self._lock:
            if request.sent or self._requests.pop(request.cookie, None) is None:
                return
        self._context.complete(request, -ECANCELED)

    # -- the thread --------------------------------------------------------------------------------------------

    def turn(self, woken: bool) -> float | None:
        """Do what there is to do: how long to sleep then, in milliseconds; None: the drive is closed. ``woken``: by
        ``wake_fd``, not only by the socket.
        """
        with self._lock:
            if self._closed:
                return None
            self._awake = True
        if woken:
            os.eventfd_read(self._ends.wake_fd)
        if not self._connected and monotonic() >= self._try_at:
            self._reconnect()
        if self._connected:
            try:
                while self._replies.receive():
                    pass
                return self._sleep()
            except NbdError as error:
                self._lose(error)
        return self._sleep()

    def _sleep(self) -> float:
        """About to sleep: until when. NbdError where the connection is over."""
        now = monotonic()
        with self._lock:
            if self._connected:
                self._flush_locked()
                self._watch_locked()
            self._awake = False
            end = self._next_end_locked()
        if end is None:
            return -1.0
        if now >= end:
            self._run_out(now)
            return 0.0
        return (end - now) * 1000 + 1

    def _next_end_locked(self) -> float | None:
        """When there is something to do though nothing comes."""
        if not self._connected:
            return min(self._try_at, self._holding_until) if self._requests else self._try_at
        if not self._timeout_s:
            return None
        # One that is sent while the thread sleeps does not wake it: it looks now and then.
        look = monotonic() + self._timeout_s / 4
        return min(look, next(iter(self._requests.values())).since + self._timeout_s) if self._requests else look

    def _watch_locked(self) -> None:
        events = select.POLLIN | (select.POLLOUT if self._out else 0)
        if events != self._poll_events:
            self._poll_events = events
            self._ends.poll.register(self._socket.fileno(), events)

    def _run_out(self, now: float) -> None:
        """A time has come: of a server that does not answer, or of those that wait for it to come back."""
        with self._lock:
            connected = self._connected
            waiting = bool(self._requests)
            late = waiting and now >= next(iter(self._requests.values())).since + self._timeout_s
        if connected and late and self._timeout_s:
            self._lose(NbdError("it does not answer"))
        elif waiting and not connected and now >= self._holding_until:
            self._fail_all()

    def _answered(self, request: NbdRequest, result: int) -> None:
        with self._lock:
            if self._requests.pop(request.cookie, None) is None:
                return
            if request.kind == WRITE and request.put_upto > self._gone:
                # It has answered before it had all of it, as it may with an error. It gets the rest, but not from
                # memory that is the guest's again.
                self._out = deque(bytes(view) for view in self._out)
        request.iov = ()
        self._context.complete_here(request, result)

    def _lose(self, error: NbdError) -> None:
        """The connection is over."""
        with self._lock:
            if not self._connected:
                return
            self._connected = False
            now = monotonic()
            self._holding_until = now + self._reconnect_delay_s
            self._try_at, self._pause_s = now, FIRST_PAUSE_S
            self._out.clear()
            self._put = self._gone = 0
            if self._poll_events:
                self._ends.poll.unregister(self._socket.fileno())
                self._poll_events = 0
            failed = []
            for request in self._requests.values():
                request.sent = False
                request.lost_at = request.lost_at or now
                if now >= request.lost_at + self._reconnect_delay_s:
                    failed.append(request)  # at once, or it has been asked again and again meanwhile
            for request in failed:
                del self._requests[request.cookie]
        self._replies.close()
        self._socket.close()
        self._fail(failed)

    def _fail_all(self) -> None:
        with self._lock:
            self._holding_until = 0.0
            failed = list(self._requests.values())
            self._requests.clear()
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
            self._replies = self._new_replies()
            self._connected = True
            now = monotonic()
            for request in self._requests.values():
                request.begin_again()
                request.since = now
                request.sent = True
                self._send_locked(request)

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
        self._replies.close()
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
