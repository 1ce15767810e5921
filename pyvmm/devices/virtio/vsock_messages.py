"""MessageConnection: messages between a socket of the host and a port of the guest. OASIS virtio 1.2, 5.10.6.6.

The host's socket is one of SOCK_SEQPACKET. A message of the guest's comes in packets, of which the last one says so;
all of it is kept until then and is one message to the host. It can't be longer than BUFFER_BYTES, for which the guest
has credit: one that never ends is cut off like any data without credit. Messages that the host does not take
are kept likewise, MOST_KEPT at most, for an empty one needs no credit.

A message of the host's is read whole, and cut to the guest's credit and buffers. One that the guest could never have
room for, or longer than BUFFER_BYTES, ends the connection.
"""

from __future__ import annotations

import select
from _socket import MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC, SO_SNDBUF, SOL_SOCKET

from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES, NOTHING, Connection
from pyvmm.devices.virtio.vsock_packet import END_OF_MESSAGE, NO_SEND, SEQPACKET
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

MOST_KEPT = 1 << 14  # messages
MOST_EMPTY = 64  # of the host's in a row, at the end
LOADED, ENDED, TOO_LONG = 1, 0, -2  # of ``load``, beside NOTHING


class MessageConnection(Connection):
    kind = SEQPACKET

    __slots__ = ("_left", "_message", "_messages")

    def __init__(self, end: socket, host_port: int, guest_port: int, *, accepted: bool) -> None:
        super().__init__(end, host_port, guest_port, accepted=accepted)
        end.setsockopt(SOL_SOCKET, SO_SNDBUF, 2 * BUFFER_BYTES)  # the longest message, as far as the host allows
        self._message = bytearray()  # of the guest's, as far as it has come
        self._messages: deque[bytes] = deque()  # those that are whole, and still to be sent
        self._left: memoryview | None = None  # of the host's, what the guest has still to get

    # -- from the guest to the host --------------------------------------------------------------------------------

    def take(self, pieces: list[memoryview], size: int, flags: int) -> bool:
        self.received += size
        if self.received - self.forwarded > BUFFER_BYTES or self.guest_shut & NO_SEND:
            return False
        for piece in pieces:
            self._message += piece
        if flags & END_OF_MESSAGE:
            if len(self._messages) == MOST_KEPT:
                return False
            self._messages.append(bytes(self._message))
            self._message.clear()
        return True

    def give(self) -> None:
        self.drain()

    def drain(self) -> bool:
        while self._messages:
            if not self._send_message(self._messages[0]):
                return False
            self.forwarded += len(self._messages.popleft())
        return True

    def _send_message(self, message: bytes) -> bool:
        """Whether it is no longer ours to keep."""
        if self.deaf:
            return True
        try:
            self._socket.sendmsg([message], (), MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:  # nobody is there; or it is longer than the socket takes
            self.deaf = True
        return True

    @property
    def keeps(self) -> bool:
        return bool(self._messages)

    @property
    def wants_telling(self) -> bool:
        """Of every bit of room: a message needs all of it at once."""
        return self.forwarded != self.told

    # -- from the host to the guest --------------------------------------------------------------------------------

    def load(self) -> int:
        """Have a message for ``unload``, if none is there: LOADED, NOTHING yet, ENDED, or TOO_LONG."""
        if self._left is not None:
            return LOADED
        try:
            size = self._next_size()
            if size > min(BUFFER_BYTES, self.guest_room):
                return TOO_LONG
            if not size and self._shut_by_host:
                return ENDED
            self._left = memoryview(self._socket.recv(size or 1))  # of no bytes Python asks nobody
        except BlockingIOError:
            return NOTHING
        except OSError:
            self.deaf = True
            return ENDED
        return LOADED

    def _next_size(self) -> int:
        """How long it is. 0 is an empty one; or the end, where the host has shut its side: empty ones before that are
        not told from it, and passed over.
        """
        probe = bytearray(1)
        for _ in range(MOST_EMPTY):
            size = self._socket.recv_into(probe, 1, MSG_PEEK | MSG_TRUNC)
            if size or not self._shut_by_host:
                return size
            self._socket.recv(1)
        return 0

    @property
    def _shut_by_host(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def left(self) -> int:
        """How many bytes of the message the guest has still to get."""
        return 0 if self._left is None else len(self._left)

    def unload(self, pieces: list[memoryview], size: int) -> int:
        """The next ``size`` bytes of it, into those pieces: the flags of the packet."""
        message = self._left
        assert message is not None
        at = 0
        for piece in pieces:
            end = min(at + len(piece), size)
            piece[: end - at] = message[at:end]
            at = end
        self.sent += size
        self._left = message[size:] if size < len(message) else None
        return 0 if self._left is not None else END_OF_MESSAGE
