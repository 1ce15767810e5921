"""The running machines of a user, by their names: a folder of sockets, one of QMP's and one of the consoles' for each.

The folder is ``pyvmm`` in XDG_RUNTIME_DIR (XDG Base Directory Specification), which only its user may enter and which
goes with his last session; without that, where it is not his or nothing can be made in it, in /run/user/UID, and else
/tmp/pyvmm-UID. A machine
is there for as long as somebody listens at its socket: what a killed process has left is taken away by whoever meets
it.
The kernel tells whose socket it is (SO_PEERCRED, unix(7)), so there is no file with a pid that could be another's.
"""

from __future__ import annotations

import fcntl
import os
import stat
from _socket import AF_UNIX, SO_PEERCRED, SOCK_STREAM, SOL_SOCKET, socket
from _struct import unpack
from time import monotonic, sleep

from pyvmm.config import is_machine_name
from pyvmm.errors import ConfigError, remedy
from pyvmm.unix_socket import UnixListener, check_path, remove_stale

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

BACKLOG = 512  # a Unix socket refuses who comes beyond it, and does not wait
FOLDER = "pyvmm"
QMP, CONSOLE = ".qmp", ".console"
LOCK_LIMIT_S, LOOK_AGAIN_S = 10.0, 0.005  # whoever has the lock has it for milliseconds


class Registry:
    """``register`` puts a machine in, ``names`` and ``qmp_path`` find them. ConfigError where the folder can't be, or
    is not, this user's alone.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.path = place(environ)

    def qmp_path(self, name: str) -> str:
        return f"{self.path}/{name}{QMP}"

    def console_path(self, name: str) -> str:
        return f"{self.path}/{name}{CONSOLE}"

    def register(self, name: str) -> tuple[UnixListener, UnixListener]:
        """Sockets of that name, for QMP and for consoles, that nobody but this user may connect to. ConfigError where a
        machine has the name.
        """
        make(self.path)
        check_path(self.console_path(name), "name")
        with Locked(self.path):
            pid = listening_pid(self.qmp_path(name))
            if pid is not None:
                who = f", process {pid}" if pid else ""
                raise ConfigError(
                    f"name={name!r}: a machine of that name is running{who}: give another name, --name NAME"
                )
            qmp = UnixListener(self.qmp_path(name), BACKLOG, what="name", mode=0o600)
            try:
                return qmp, UnixListener(self.console_path(name), BACKLOG, what="name", mode=0o600)
            except BaseException:
                qmp.close()
                raise

    def names(self, known: Container[str] = ()) -> list[str]:
        """Of the machines that are running, in order. What others have left is taken away; what no machine can be
        called is none, whoever listens there. Of those in ``known`` somebody knows it, and they are not connected to.
        """
        if not there(self.path):
            return []
        with Locked(self.path):
            names = [entry.removesuffix(QMP) for entry in os.listdir(self.path) if entry.endswith(QMP)]
            return sorted(each for each in names if is_machine_name(each) and (each in known or self._running(each)))

    def _running(self, name: str) -> bool:
        if listening_pid(self.qmp_path(name)) is not None:
            return True
        for path in (self.qmp_path(name), self.console_path(name)):
            remove_stale(path)
        return False

    def find(self, name: str) -> str:
        """The path of the QMP socket of the machine called so. ConfigError where none is."""
        running = self.names()
        if name not in running:
            others = f"; there are: {', '.join(running)}" if running else "; `pyvmm run --name NAME` gives one a name"
            raise ConfigError(f"no machine called {name!r} is running{others}")
        return self.qmp_path(name)


class Locked:
    """``with``: nobody else makes or takes away sockets there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock(monotonic() + LOCK_LIMIT_S)
        except OSError as error:
            if self._fd >= 0:
                os.close(self._fd)
            raise ConfigError(f"{self._path}: {remedy(error, 'set XDG_RUNTIME_DIR to a folder of yours')}") from None

    def _lock(self, end_s: float) -> None:
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if monotonic() > end_s:
                    os.close(self._fd)
                    raise ConfigError(
                        f"{self._path} is locked by a pyvmm that was stopped meanwhile: `fuser {self._path}` finds it"
                    ) from None
                sleep(LOOK_AGAIN_S)

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def candidates(environ: Mapping[str, str]) -> Iterator[str]:
    given = environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/"):  # others are to be ignored, says the specification
        yield given
    yield f"/run/user/{os.geteuid()}"


def place(environ: Mapping[str, str]) -> str:
    """Where the folder is, or is to be."""
    for base in candidates(environ):
        try:
            status = os.stat(base)
        except (OSError, ValueError):
            continue
        folder = os.path.join(base, FOLDER)
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if ours and (os.path.lexists(folder) or os.access(base, os.W_OK | os.X_OK, effective_ids=True)):
            return folder
    return f"/tmp/{FOLDER}-{os.geteuid()}"


def make(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{path}: {remedy(error, 'set XDG_RUNTIME_DIR to a folder of yours')}") from None
    there(path)


def there(path: str) -> bool:
    """Whether it is there. ConfigError where somebody else could put things into it."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path}: {remedy(error, 'set XDG_RUNTIME_DIR to a folder of yours')}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a folder that only you may enter (mode 0700): remove it, or set XDG_RUNTIME_DIR to one"
        )
    return True


def listening_pid(path: str) -> int | None:
    """The process that listens there; 0 where it is not told; None: nobody does."""
    probe = socket(AF_UNIX, SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
        return pid_of(probe)
    except BlockingIOError:  # so many wait there that nobody else may
        return 0
    except OSError:
        return None
    finally:
        probe.close()


def pid_of(connected: socket) -> int:
    """Who listened where this one is connected to."""
    pid, _uid, _gid = unpack("=iII", connected.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))
    return int(pid)
