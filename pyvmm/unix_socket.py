"""UnixListener: a Unix stream socket at a path, made so that nobody's is taken away, and gone again in the end."""

from __future__ import annotations

import os

# Not ``socket``: importing that takes as long as half of a start.
from _socket import AF_UNIX, SOCK_STREAM, socket

from pyvmm.errors import ConfigError, remedy

LONGEST_PATH_BYTES = 107  # sockaddr_un's, without its zero


class UnixListener:
    """Listens at ``path``, where up to ``backlog`` peers may wait. ``mode`` are the permissions of the socket; without
    them the process's umask decides. ``what`` names it in what is said; ``kind`` is the socket's type.

    A socket that is there already is replaced where nobody listens on it. ConfigError in one sentence.
    """

    def __init__(self, path: str, backlog: int, *, what: str, mode: int | None = None, kind: int = SOCK_STREAM) -> None:
        check_path(path, what)
        self.path = path
        self._socket = socket(AF_UNIX, kind)
        try:
            if mode is not None:
                # Before there is a file: bind gives it the socket's own mode, and nobody finds it open in between.
                os.fchmod(self._socket.fileno(), mode)
            remove_stale(path, kind)
            self._socket.bind(path)
            self._socket.listen(backlog)
            self._socket.setblocking(False)
            self._file = identity(path)
        except ValueError:
            self._socket.close()
            raise ConfigError(f"{what}={path!r}: no file has such a name: give another path") from None
        except OSError as error:
            self._socket.close()
            why = remedy(error, "something is there already, or nothing can be made there: give another path")
            raise ConfigError(f"{what}={path}: {why}") from None

    @property
    def fd(self) -> int:
        """-1 once it is closed."""
        return self._socket.fileno()

    @property
    def place(self) -> str:
        return self.path

    def accept(self) -> int:
        """The descriptor of the next peer, which does not block. OSError where none is there any more."""
        return accept(self._socket)

    def close(self) -> None:
        """Listen no more, and take the file away, where it is still ours. Again is fine."""
        if self.fd < 0:
            return
        self._socket.close()
        try:
            if identity(self.path) == self._file:
                os.unlink(self.path)
        except OSError:
            pass

    def abandon(self) -> None:
        """In a child of fork: only the descriptor."""
        self._socket.close()


def accept(listener: socket) -> int:
    """The descriptor of the next peer, which does not block. OSError where none is there any more."""
    fd: int = listener._accept()[0]  # type: ignore[attr-defined]  # what socket.socket's accept calls
    os.set_blocking(fd, False)
    return fd


def check_path(path: str, what: str) -> None:
    """ConfigError where it is longer than a socket's path can be."""
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError:  # a lone surrogate
        raise ConfigError(f"{what}={path!r}: no file has such a name: give another path") from None
    if length > LONGEST_PATH_BYTES:
        raise ConfigError(f"{what}={path}: a path of a socket has at most {LONGEST_PATH_BYTES} bytes: shorten it")


def identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove_stale(path: str, kind: int = SOCK_STREAM) -> None:
    """Take a socket away on which nobody listens any more."""
    import stat

    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        probe = socket(AF_UNIX, kind)
        try:
            probe.setblocking(False)  # one whose backlog is full is alive
            probe.connect(path)
        finally:
            probe.close()
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass
