"""What an NBD server answers: a stream of replies taken apart, for requests that are under way.

NetworkBlockDevice doc/proto.md, "Simple reply message" and "Structured reply message". What the server says is checked
against what it was asked: nothing is written outside of a request's memory, nothing grows with what it sends, and what
no server may say is a NbdError, which ends the connection.
"""

from __future__ import annotations

from _bisect import bisect_left
from _struct import Struct
from errno import EINVAL, EIO, ENOMEM, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, ESHUTDOWN

from pyvmm.block.coroutine import Waiter
from pyvmm.block.iov import IovSlice, fill_zeros
from pyvmm.block.protocols.nbd_handshake import NbdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from pyvmm.block.driver import Iov

SIMPLE = Struct(">IIQ")  # magic, error, cookie
CHUNK = Struct(">IHHQI")  # magic, flags, type, cookie, length
MAGIC_AT_HEAD = Struct(">I")
PLACE = Struct(">Q")
READ_CHUNK = Struct(">IHHQIQ")  # a chunk, and the place behind it
HOLE = Struct(">QI")
ERROR = Struct(">IH")

SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE = 0, 1, 2
ERROR_TYPES = 1 << 15
ERROR_OFFSET = ERROR_TYPES | 2

READ, WRITE, DISC, FLUSH, TRIM, _CACHE, WRITE_ZEROES = range(7)

BUFFER_BYTES = 256 << 10
MOST_ERROR_BYTES = 6 + 4096 + 8  # a string's limit, and an offset
MOST_PIECES = 16 << 10  # of one read's answer that do not touch each other
DIRECT_BYTES = 16 << 10  # from so many on a payload goes past our buffer
IOV_MAX = 1024

# The protocol's numbers, which are Linux's; others are taken as EINVAL (proto.md, "Error values").
ERRORS = {1: EPERM, 5: EIO, 12: ENOMEM, 22: EINVAL, 28: ENOSPC, 75: EOVERFLOW, 95: ENOTSUP, 108: ESHUTDOWN}


class NbdRequest(Waiter):
    """One request, from its beginning to the answer. ``sent``: the server may have it."""

    __slots__ = (
        *("cancel_held", "cookie", "error_number", "flags", "got", "iov", "kind", "length", "lost_at"),
        *("offset", "put_upto", "sent", "since", "spans"),
    )

    def __init__(self, kind: int, flags: int, offset: int, length: int, iov: Iov) -> None:
        super().__init__()
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.length = length
        self.iov = iov
        self.cookie = 0
        self.sent = False
        self.put_upto = 0  # how much has to go out until all of a write's data has
        self.since = 0.0  # when it was sent, or began to wait for a connection (monotonic, as lost_at)
        self.lost_at = 0.0  # when the first connection was lost that it was on
        self.cancel_held: Callable[[NbdRequest], None] | None = None
        self.error_number = 0
        self.got = 0
        self.spans: list[tuple[int, int]] | None = None  # (begin, end) of what has come, where it came in pieces

    def begin_again(self) -> None:
        """Nothing of an answer is here."""
        self.error_number = 0
        self.got = 0
        self.spans = None

    def cancel(self) -> None:
        if self.cancel_held is not None:
            self.cancel_held(self)

    def covers(self, begin: int, length: int) -> None:
        """A piece of a read has come, and none has come there before: NbdError else."""
        end = begin + length
        if not length or begin < 0 or end > self.length:
            raise NbdError("it answers a read with what was not asked for")
        spans = self.spans
        if spans is None:
            if length == self.length:
                self.got = length
                self.spans = []
                return
            spans = self.spans = []
        if self.got + length > self.length or len(spans) > MOST_PIECES:
            raise NbdError("it answers a read with more than was asked for")
        at = bisect_left(spans, (begin, end))
        if (at and spans[at - 1][1] > begin) or (at < len(spans) and spans[at][0] < end):
            raise NbdError("it answers a part of a read twice")
        if at < len(spans) and spans[at][0] == end:
            end = spans.pop(at)[1]
        if at and spans[at - 1][1] == begin:
            at -= 1
            begin = spans.pop(at)[0]
        spans.insert(at, (begin, end))
        self.got += length

    def outcome(self) -> int:
        """The result, when the server says that this was all. NbdError where a read has holes that are none."""
        if self.error_number:
            return -self.error_number
        if self.kind == READ:
            if self.got != self.length:
                raise NbdError("it answers a read with less than was asked for")
            return self.length
        return self.length if self.kind == WRITE else 0


class Replies:
    """Of one connection: ``receive`` takes what has come. ``take(cookie)`` is the request that has it, or None;
    ``ended(request, result)`` is told of each that is done, and forgets its cookie.
    """

    def __init__(
        self,
        line: socket,
        structured: bool,
        take: Callable[[int], NbdRequest | None],
        ended: Callable[[NbdRequest, int], None],
    ) -> None:
        self._socket = line
        self._structured = structured
        self._take = take
        self._ended = ended
        self._data = bytearray(BUFFER_BYTES + READ_CHUNK.size)  # whoever looks at a header sees so many bytes
        self._view = memoryview(self._data)
        self._begin = self._end = 0  # what of the buffer has come, and was not looked at
        # A payload under way: whose, where in its memory it goes, and how much is still to come.
        self._request: NbdRequest | None = None
        self._at = self._left = 0
        self._last = False  # its request is done with it

    def receive(self) -> bool:
        """Take what is there; whether more may be. NbdError where the connection is over."""
        size = 0
        try:
            if self._left >= DIRECT_BYTES and self._begin == self._end:
                count = self._receive_direct()
            else:
                if self._begin:
                    self._compact()
                size = BUFFER_BYTES - self._end
                with self._view[self._end : BUFFER_BYTES] as room:
                    count = self._socket.recv_into(room)
                self._end += count
        except BlockingIOError:
            return False
        except OSError as error:
            raise NbdError(error.strerror) from None
        if not count:
            raise NbdError("it has ended the connection")
        self._parse()
        return count >= size or self._left > 0

    def _compact(self) -> None:
        left = self._end - self._begin
        self._data[:left] = self._data[self._begin : self._end]
        self._begin, self._end = 0, left

    def _receive_direct(self) -> int:
        """A payload straight into its request's memory."""
        request = self._request
        assert request is not None
        with IovSlice(request.iov, self._at, self._at + self._left) as parts:
            count: int = self._socket.recvmsg_into(parts[:IOV_MAX])[0]
        self._at += count
        self._left -= count
        if not self._left:
            self._payload_done()
        return count

    # -- what stands in the buffer -----------------------------------------------------------------------------

    def _parse(self) -> None:
        while True:
            if self._left:
                if not self._copy():
                    return
                continue
            self._plain()
            there = self._end - self._begin
            if there < 16:
                return
            (magic,) = MAGIC_AT_HEAD.unpack_from(self._data, self._begin)
            if magic == SIMPLE_MAGIC:
                self._simple()
            elif magic == CHUNK_MAGIC and self._structured:
                if not self._chunk(there):
                    return
            else:
                raise NbdError("what it answers is no reply")

    def _plain(self) -> None:
        """The replies that servers send most of the time, as long as they follow each other: all of a request done in
        one, and that whole in the buffer. What is anything else is left where it is; there each has calls of its own,
        which cost more than all that a reply costs here.
        """
        data, view, take = self._data, self._view, self._take
        begin, end = self._begin, self._end
        while end - begin >= SIMPLE.size:
            magic, flags, kind, cookie, length, place = READ_CHUNK.unpack_from(data, begin)
            behind = begin + CHUNK.size + length
            if magic == SIMPLE_MAGIC:
                _, number, cookie = SIMPLE.unpack_from(data, begin)
                behind = begin + SIMPLE.size
                request = take(cookie)
                if number or request is None or request.kind == READ:
                    return
            elif magic != CHUNK_MAGIC or kind != OFFSET_DATA or flags != DONE or behind > end:
                return
            else:
                request = take(cookie)
                if request is None or request.kind != READ or request.spans is not None or request.error_number:
                    return
                if place != request.offset or length - PLACE.size != request.length or not self._structured:
                    return
                if len(request.iov) != 1:
                    return
                request.iov[0][:] = view[begin + READ_CHUNK.size : behind]
            if request.error_number:
                return
            self._begin = begin = behind
            self._ended(request, request.length if request.kind <= WRITE else 0)

    def _copy(self) -> bool:
        """As much of a payload as is here; whether it is whole."""
        request = self._request
        assert request is not None
        count = min(self._left, self._end - self._begin)
        if not count:
            return False
        begin, at = self._begin, self._at
        with self._view[begin : begin + count] as here:
            if len(request.iov) == 1:
                request.iov[0][at : at + count] = here
            else:
                done = 0
                with IovSlice(request.iov, at, at + count) as parts:
                    for part in parts:
                        part[:] = here[done : done + len(part)]
                        done += len(part)
        self._begin += count
        self._at += count
        self._left -= count
        if self._left:
            return False
        self._payload_done()
        return True

    def _payload_done(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        if self._last:
            self._ended(request, request.outcome())

    def _asked(self, cookie: int) -> NbdRequest:
        request = self._take(cookie)
        if request is None:
            raise NbdError("it answers what was not asked")
        return request

    def _simple(self) -> None:
        _, number, cookie = SIMPLE.unpack_from(self._data, self._begin)
        self._begin += 16
        request = self._asked(cookie)
        if number:
            self._ended(request, -ERRORS.get(number, EINVAL))
        elif request.kind != READ:
            self._ended(request, request.outcome())
        elif self._structured:
            raise NbdError("it answers a read in the old way, against what was agreed")
        else:
            request.covers(0, request.length)
            self._expect(request, 0, request.length, True)

    def _expect(self, request: NbdRequest, at: int, length: int, last: bool) -> None:
        """Its payload follows."""
        self._request, self._at, self._left, self._last = request, at, length, last

    def _chunk(self, there: int) -> bool:
        """One chunk, without its data. False: it is not whole yet."""
        if there < 20:
            return False
        _, flags, kind, cookie, length = CHUNK.unpack_from(self._data, self._begin)
        request = self._asked(cookie)
        fixed = 8 if kind == OFFSET_DATA else length
        if kind == OFFSET_DATA:
            if request.kind != READ or length <= 8:
                raise NbdError("it sends data that nobody asked for")
        elif fixed > (MOST_ERROR_BYTES if kind & ERROR_TYPES else HOLE.size):
            raise NbdError("it sends more than such a reply can have")
        if there < 20 + fixed:
            return False
        body = self._begin + 20
        self._begin = body + fixed
        last = bool(flags & DONE)
        if kind == OFFSET_DATA:
            at = PLACE.unpack_from(self._data, body)[0] - request.offset
            request.covers(at, length - 8)
            self._expect(request, at, length - 8, last)
            return True
        if kind & ERROR_TYPES:
            self._error(request, kind, body, length)
        elif kind == OFFSET_HOLE and length == HOLE.size and request.kind == READ:
            place, hole = HOLE.unpack_from(self._data, body)
            request.covers(place - request.offset, hole)
            fill_zeros(request.iov, place - request.offset, place - request.offset + hole)
        elif kind != NONE or length or not last:
            raise NbdError("it sends a kind of reply that was not agreed")
        if last:
            self._ended(request, request.outcome())
        return True

    def _error(self, request: NbdRequest, kind: int, body: int, length: int) -> None:
        """The request has failed, whatever else comes for it."""
        if length < ERROR.size:
            raise NbdError("it tells of an error without a number")
        number, text = ERROR.unpack_from(self._data, body)
        if ERROR.size + text + (8 if kind == ERROR_OFFSET else 0) > length or not number:
            raise NbdError("it tells of an error in no words")
        request.error_number = request.error_number or ERRORS.get(number, EINVAL)

    def close(self) -> None:
        self._request = None
        self._view.release()
