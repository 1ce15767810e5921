"""Connection: one stream between a socket of the host and a port of the guest. OASIS virtio 1.2, 5.10.6.3 and 5.10.6.5.

It moves bytes between guest memory and the host's socket and keeps count of what each side has room for. What the host
does not take at once is kept, BUFFER_BYTES at most: the guest is told that this is all the room there is. What is for
the guest stays in the socket until the guest has room. It knows no ring and no thread; its owner watches ``fd``.
"""

from __future__ import annotations

import os
import select
from _socket import MSG_NOSIGNAL, MSG_PEEK, SHUT_RD, SHUT_WR

from pyvmm.devices.virtio.vsock_packet import BOTH_WAYS, NO_RECEIVE, NO_SEND, STREAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Sequence

    from typing_extensions import Buffer

BUFFER_BYTES = 256 << 10  # as Linux's own sockets have
# The guest is told of room at the latest when so much has become free.
TELL_BYTES = BUFFER_BYTES // 2
MOST_PIECES = 1024  # IOV_MAX
NOTHING = -1  # of ``read``: it would have to wait


class Connection:
    """``host_port`` and ``guest_port`` are its name. ``accepted``: whether both ends have agreed to it.

    ``to_say`` and ``listed`` are the owner's: what the guest is to be told, a bit each op, and whether it stands in
    line for that; ``watched`` and ``written``: whether ``fd`` is watched for input and for room; ``reach``: how many of
    the guest's buffers the next read fills at most.
    """

    kind = STREAM

    __slots__ = (
        *("_kept", "_pieces", "_size", "_socket", "accepted", "asked", "deaf", "forwarded", "guest_forwarded"),
        *("guest_port", "guest_room", "guest_shut", "host_port", "host_shut", "listed", "reach", "received", "sent"),
        *("starved", "to_say", "told", "watched", "written"),
    )

    def __init__(self, end: socket, host_port: int, guest_port: int, *, accepted: bool) -> None:
        self._socket = end
        self.host_port = host_port
        self.guest_port = guest_port
        self.accepted = accepted
        self.to_say = 0
        self.listed = self.watched = self.written = False
        self.reach = 1
        # From the guest, in bytes: what has come, what of it the host has, how much of that the guest knows of.
        self.received = self.forwarded = self.told = 0
        self._kept = bytearray()
        self._pieces: list[memoryview] = []  # what this turn has brought, in guest memory
        self._size = 0
        self.deaf = False  # the host takes nothing any more
        # To the guest: what was sent, how much room it has, and how much of what was sent is no longer there.
        self.sent = self.guest_room = self.guest_forwarded = 0
        self.starved = False  # there was no room at the last look
        self.asked = False  # the guest was asked for room, since it had some
        # BOTH_WAYS' bits: what each side has said that it will not do any more.
        self.guest_shut = self.host_shut = 0

    @property
    def fd(self) -> int:
        """Of the host's socket; -1 once it is closed."""
        return self._socket.fileno()

    # -- from the guest to the host --------------------------------------------------------------------------------

    def take(self, pieces: list[memoryview], size: int, flags: int) -> bool:
        """Data of the guest's, for the next ``give``. False where it has no leave to send that."""
        self.received += size
        if self.received - self.forwarded > BUFFER_BYTES or self.guest_shut & NO_SEND:
            return False
        self._pieces += pieces
        self._size += size
        return True

    def give(self) -> None:
        """What this turn has brought goes to the host, straight from guest memory; what it does not take is kept."""
        pieces, size = self._pieces, self._size
        if not size:
            return
        self._pieces, self._size = [], 0
        done = 0 if self._kept else self._send(pieces[:MOST_PIECES], size)
        self.forwarded += done
        if done == size:
            return
        for piece in pieces:
            if done >= len(piece):
                done -= len(piece)
            else:
                self._kept += piece[done:]
                done = 0

    def drain(self) -> bool:
        """The host gets what it takes of what is kept. Whether nothing is left."""
        while self._kept:
            done = self._send([self._kept], len(self._kept))
            if not done:
                return False
            self.forwarded += done
            del self._kept[:done]
        return True

    @property
    def keeps(self) -> bool:
        """Whether something waits for the host to take it."""
        return bool(self._kept)

    def _send(self, pieces: Sequence[Buffer], size: int) -> int:
        """How many bytes of ``pieces`` are no longer ours to keep."""
        if self.deaf:
            return size
        try:
            return self._socket.sendmsg(pieces, (), MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.deaf = True
            return size

    def say(self, line: bytes) -> None:
        """Words of our own to the host, before any data: a socket that is new has room for them."""
        self.deaf = self._send([line], len(line)) < len(line) or self.deaf

    @property
    def wants_telling(self) -> bool:
        """Whether the guest should hear how much room there is."""
        return self.forwarded - self.told >= TELL_BYTES

    # -- from the host to the guest --------------------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for. All of it are numbers of the guest's, modulo 2^32."""
        return max(0, self.guest_room - (self.sent - self.guest_forwarded & 0xFFFF_FFFF))

    def read(self, pieces: list[memoryview]) -> int:
        """Straight into guest memory: how many bytes; 0 at the end, NOTHING where none are there yet."""
        try:
            return os.readv(self.fd, pieces)
        except BlockingIOError:
            return NOTHING
        except OSError:
            self.deaf = True  # it went away with something unread
            return 0

    def look(self) -> int:
        """As ``read`` of one byte, which stays there."""
        try:
            return len(self._socket.recv(1, MSG_PEEK))
        except BlockingIOError:
            return NOTHING
        except OSError:
            self.deaf = True
            return 0

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether the host has closed its end, for both ways; nothing may be left to read."""
        if self.deaf:
            return True
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))  # POLLHUP and POLLERR are always asked for

    def shut(self, flags: int) -> None:
        """The guest does not receive, or not send any more: the host sees that of its socket."""
        new = flags & BOTH_WAYS & ~self.guest_shut
        self.guest_shut |= new
        self._shutdown(SHUT_RD if new & NO_RECEIVE else -1)
        if new & NO_SEND and not self.keeps:
            self._shutdown(SHUT_WR)

    def drained(self) -> None:
        """What was kept has gone: where it was the last, the host gets to know."""
        if self.guest_shut & NO_SEND:
            self._shutdown(SHUT_WR)

    def _shutdown(self, how: int) -> None:
        try:
            if how >= 0:
                self._socket.shutdown(how)
        except OSError:
            self.deaf = True  # nobody is there

    def close(self) -> None:
        """What is kept and what still comes from the guest goes nowhere. Again is fine."""
        self.deaf = True
        self.drain()
        self._socket.close()
