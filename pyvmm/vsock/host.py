"""HostEnd: the host's Unix sockets of a vsock device, by the convention of Firecracker's docs/vsock.md.

Into the guest: a client connects to PATH and says ``CONNECT 1234\\n``; when something in the guest has accepted at that
port the answer is ``OK 1073741824\\n`` with the host's port, and from there on it is the stream. Where nothing listens,
the socket is closed. Out of the guest: a connection to port 1234 of the host is one to the Unix socket PATH_1234.

With messages in place of a stream (SOCK_SEQPACKET) it is the same at PATH.seq, each line a message; and at PATH_1234
somebody has to listen with a socket of that type.
"""

from __future__ import annotations

# Not ``socket``: importing that takes as long as half of a start.
from _socket import AF_UNIX, MSG_PEEK, SOCK_SEQPACKET, SOCK_STREAM, socket

from pyvmm.unix_socket import UnixListener

MODE = 0o600  # whoever may connect speaks to the guest as the host
BACKLOG = 128
MESSAGES = ".seq"  # behind the path, of the socket with messages
LAST_PORT = 0xFFFF_FFFE  # VMADDR_PORT_ANY is no port
WORD = b"CONNECT "
LONGEST_LINE = len(WORD) + len(f"{LAST_PORT}\n")


class Caller:
    """A client that has connected, and not said yet where to."""

    __slots__ = ("_line", "socket")

    def __init__(self, end: socket) -> None:
        self.socket = end
        self._line = b""

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def port(self) -> int | None:
        """The guest's port, once the line is there; None before. ValueError for another line, and where it is gone.

        What stands behind the line stays in the socket.
        """
        try:
            data = self.socket.recv(LONGEST_LINE - len(self._line), MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        end = data.find(b"\n") + 1
        self._line += self.socket.recv(end or len(data)) if data else b""
        if not end and data and len(self._line) < LONGEST_LINE:
            return None
        digits = self._line[len(WORD) : -1]
        if not end or not self._line.startswith(WORD) or not digits.isdigit() or int(digits) > LAST_PORT:
            raise ValueError(self._line)
        return int(digits)


class HostEnd:
    """The sockets at ``path`` and behind it; without one there are none, and nobody is at this end. ``messages``: those
    that keep the boundaries of messages.

    ConfigError where there can be no socket at ``path``.
    """

    def __init__(self, path: str | None, *, messages: bool = False) -> None:
        self._path = path
        self._kind = SOCK_SEQPACKET if messages else SOCK_STREAM
        self._listener: UnixListener | None = None
        if path is not None:
            where = f"{path}{MESSAGES}" if messages else path
            self._listener = UnixListener(where, BACKLOG, what="vsock path", mode=MODE, kind=self._kind)

    @property
    def fd(self) -> int:
        """Readable while a client waits; -1 where nobody listens."""
        return self._listener.fd if self._listener is not None else -1

    def accept(self) -> Caller:
        """OSError where the client has gone, or the host has no descriptor for it."""
        assert self._listener is not None
        return Caller(socket(fileno=self._listener.accept()))

    def connect(self, port: int) -> socket | None:
        """A connection to whoever listens for the guest at ``port``; None where nobody does. Never waits."""
        if self.fd < 0:
            return None
        end = None
        try:
            end = socket(AF_UNIX, self._kind)
            end.setblocking(False)
            end.connect(f"{self._path}_{port}")
        except OSError:  # nobody there, a backlog that is full, or no descriptor left
            if end is not None:
                end.close()
            return None
        return end

    def close(self) -> None:
        """Again is fine."""
        if self._listener is not None:
            self._listener.close()

    def abandon(self) -> None:
        """In a child of fork."""
        if self._listener is not None:
            self._listener.abandon()
