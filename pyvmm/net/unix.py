"""A stream socket with frames: another machine at its other end, or a program of the user's.

Each frame has its length in front, four bytes, big endian: what QEMU's ``-netdev stream`` and passt speak, too. One
that listens takes one peer at a time, and the next when that has gone; the guest's link is up while there is one.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError, remedy
from pyvmm.net.backend import NetBackend, StreamBackend
from pyvmm.net.port import TapPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from pyvmm.net.backend import IoWatcher
    from pyvmm.net.options import NetOptions

LONGEST_PATH_BYTES = 107  # sockaddr_un's, without its zero


def open_unix(options: NetOptions) -> NetBackend:
    """ConfigError for a path where nobody listens, or where something is already."""
    path = options.path
    assert path is not None
    if len(os.fsencode(path)) > LONGEST_PATH_BYTES:
        raise ConfigError(f"net unix={path}: a path of a socket has at most {LONGEST_PATH_BYTES} bytes: shorten it")
    return Listener(path) if options.server else StreamBackend(connected(path))


def connected(path: str) -> int:
    import socket

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.connect(path)
            end.setblocking(False)
            return end.detach()
    except OSError as error:
        why = remedy(error, "nobody listens there: start the other end first, or give server=on to be that")
        raise ConfigError(f"net unix={path}: {why}") from None


class Listener(StreamBackend):
    """A socket at ``path``, which is taken away again in the end."""

    def __init__(self, path: str) -> None:
        import socket

        super().__init__()
        self._path = path
        self._io: IoWatcher | None = None
        self._on_link: Callable[[], None] = lambda: None
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            remove_stale(path)
            end.bind(path)
            end.listen(1)
        except OSError as error:
            end.close()
            why = remedy(error, "something is there already, or nothing can be made there: give another path")
            raise ConfigError(f"net unix={path}: {why}") from None
        end.setblocking(False)
        self._inode = os.lstat(path).st_ino
        self._socket: socket.socket = end

    def attach(self, io: IoWatcher, on_link: Callable[[], None]) -> None:
        self._io, self._on_link = io, on_link
        if not self.connected:
            io.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._io is not None
        try:
            peer, _ = self._socket.accept()
        except OSError:  # it has gone again
            return
        self._io.remove_reader(self._socket.fileno())
        peer.setblocking(False)
        self.ports[0].connect(peer.detach())
        self._on_link()

    def lost(self) -> None:
        super().lost()
        if self._io is not None and self._socket.fileno() >= 0:
            self._io.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        super().close()
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        try:
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except OSError:
            pass

    def abandon(self) -> None:
        super().abandon()
        self._socket.close()


def remove_stale(path: str) -> None:
    """Take a socket away on which nobody listens any more."""
    import socket
    import stat

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass


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
