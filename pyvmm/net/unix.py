"""A stream socket with frames: another machine at its other end, or a program of the user's.

Each frame has its length in front, four bytes, big endian: what QEMU's ``-netdev stream`` and passt speak, too. One
that listens takes one peer at a time, and the next when that has gone; the guest's link is up while there is one.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, remedy
from pyvmm.net.backend import NetBackend, StreamBackend
from pyvmm.net.port import TapPort
from pyvmm.unix_socket import UnixListener, check_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.net.backend import IoWatcher
    from pyvmm.net.options import NetOptions


def open_unix(options: NetOptions) -> NetBackend:
    """ConfigError for a path where nobody listens, or where something is already."""
    path = options.path
    assert path is not None
    check_path(path, "net unix")
    return Listener(path) if options.server else StreamBackend(connected(path))


def connected(path: str) -> int:
    import socket

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.setblocking(False)
            end.connect(path)
            return end.detach()
    except BlockingIOError:
        raise ConfigError(
            f"net unix={path}: who listens there takes no more, and others wait already: end one of them, or give"
            " another path"
        ) from None
    except OSError as error:
        why = remedy(error, "nobody listens there: start the other end first, or give server=on to be that")
        raise ConfigError(f"net unix={path}: {why}") from None


class Listener(StreamBackend):
    """A socket at ``path``, which is taken away again in the end."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._io: IoWatcher | None = None
        self._on_link: Callable[[], None] = lambda: None
        self._listener = UnixListener(path, 1, what="net unix")

    def attach(self, io: IoWatcher, on_link: Callable[[], None]) -> None:
        self._io, self._on_link = io, on_link
        if not self.connected:
            io.add_reader(self._listener.fd, self._accept)

    def _accept(self) -> None:
        assert self._io is not None
        try:
            peer = self._listener.accept()
        except OSError:  # it has gone again
            return
        self._io.remove_reader(self._listener.fd)
        self.ports[0].connect(peer)
        self._on_link()

    def lost(self) -> None:
        super().lost()
        if self._io is not None and self._listener.fd >= 0:
            self._io.add_reader(self._listener.fd, self._accept)

    def close(self) -> None:
        super().close()
        self._listener.close()

    def abandon(self) -> None:
        super().abandon()
        self._listener.abandon()


# -- by descriptor -----------------------------------------------------------------------------------------------------


def socket_of(fd: int, given: int) -> NetBackend:
    """The connected socket that is open as ``fd``, which becomes the backend's: frames with their lengths where it is a
    stream, else a frame a message. ``given`` is its number in what is said.
    """
    import socket

    with socket.socket(fileno=os.dup(fd)) as end:
        kind = end.type
        try:
            end.getpeername()
        except OSError as error:
            raise ConfigError(f"net fd={given}: {error.strerror}: give a socket that is connected") from None
    os.set_blocking(fd, False)
    return StreamBackend(fd) if kind == socket.SOCK_STREAM else NetBackend([TapPort(fd)])
