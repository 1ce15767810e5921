"""Every error pyvmm raises. Host mistakes carry the remedy in their one sentence; guest mistakes never get here."""

from __future__ import annotations

import posix
from errno import EDQUOT, EFBIG, EMFILE, ENFILE, ENOMEM, ENOSPC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def describe(error: BaseException) -> str:
    """An exception in one line, its type first. Never raises, whatever the exception's own methods do."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except BaseException:
        return f"{name} (it can't say why: its __str__ raises)"
    return f"{name}: {text}" if text else name


class AccessNote(str):
    """A note of an exception: which handler raised it, and for which access of the guest."""


def add_access_note(error: BaseException, text: str) -> None:
    """Say where ``error`` comes from; it takes the place of an earlier word, so that one exception object that is
    raised again and again does not grow.
    """
    notes: list[str] | None = getattr(error, "__notes__", None)
    if notes is not None:
        notes[:] = [note for note in notes if not isinstance(note, AccessNote)]
    error.add_note(AccessNote(text))


# What calls handlers and callbacks: their frames come first in every traceback and say nothing.
_CALLERS = (
    *("pyvmm.event_loop", "pyvmm.cpu", "pyvmm.cpu_exec", "pyvmm.machine", "pyvmm.run_control", "pyvmm.address_space"),
    *("pyvmm.chassis", "pyvmm.consoles", "pyvmm.events", "pyvmm.restart", "pyvmm.region", "pyvmm.late"),
)


def whose(error: BaseException) -> str:
    """The handler that raised ``error``, and for which access where that is known. Never raises."""
    try:
        for note in getattr(error, "__notes__", ()):
            if isinstance(note, AccessNote):
                return note
        at = error.__traceback__
        while at is not None and at.tb_frame.f_globals.get("__name__") in _CALLERS:
            at = at.tb_next
        return "a device" if at is None else at.tb_frame.f_code.co_qualname
    except BaseException:
        return "a device"


def traceback_text(error: BaseException) -> str:
    """The traceback as text. Never raises, whatever the exception's own methods do."""
    try:
        import traceback
    except (OSError, ImportError, MemoryError):  # no descriptor is left, say
        return describe(error)
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    except BaseException:
        return "".join(traceback.format_tb(error.__traceback__)).rstrip() + "\n" + describe(error)


class Brief(type):
    """The type of classes whose dir(), and so whose help(), is what pyvmm says of them: not what every exception or
    every int can do as well.
    """

    def __dir__(cls) -> list[str]:
        names = {"__doc__", "__init__", "__module__"} if "__init__" in cls.__dict__ else {"__doc__", "__module__"}
        for owner in cls.__mro__:
            if isinstance(owner, Brief):
                names |= {name for name in (*owner.__dict__, *owner.__annotations__) if not name.startswith("_")}
        return sorted(names)


class VmmError(Exception, metaclass=Brief):
    """The base of all of them."""


class ConfigError(VmmError):
    """The embedder or the user asked for something that can't be: a bad value, a missing file, no room for an image."""


class KindError(ConfigError, TypeError):
    """A ConfigError for an argument of the wrong kind: a TypeError too, as Python has it."""


class StateError(VmmError):
    """The call needs the machine in another state, for example registers of a running vCPU, or a closed machine."""


class BusError(VmmError):
    """A guest-physical range is not wholly inside one piece of guest RAM."""


class HostError(VmmError):
    """The host has no more of something (descriptors, memory, threads); the sentence says which limit to raise."""


class ThreadError(HostError, RuntimeError):
    """The host has no room for one more thread."""


class KvmError(VmmError, OSError):
    """An ioctl on a KVM descriptor failed: ``ioctl`` by its kernel name, ``errno`` and ``strerror`` as in OSError."""

    def __init__(self, ioctl: str, errno: int, remedy: str = "") -> None:
        OSError.__init__(self, errno, posix.strerror(errno))
        self.ioctl = ioctl
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.ioctl}: {self.strerror}"
        return f"{text}: {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[type[KvmError], tuple[str, int, str]]:
        return (type(self), (self.ioctl, self.errno or 0, self.remedy))


class GuestError(VmmError):
    """The guest can't go on: KVM reported an internal error, a failed entry or an exit nobody handles.

    ``dump`` is the post-mortem text (registers, code bytes, reason by name); ``status`` what ``pyvmm run`` exits with.
    """

    status = 4

    def __init__(self, reason: str, dump: str = "") -> None:
        super().__init__(reason)
        self.dump = dump


class DeviceError(GuestError):
    """A device's handler raised. ``__cause__`` is what it raised, ``dump`` has the traceback beside the registers."""

    status = 8


# What to do where the host has no more of something, whatever it was wanted for.
HOST_LIMITS = {
    EMFILE: "raise `ulimit -n`: this process may open no more files",
    ENFILE: "raise /proc/sys/fs/file-max: the host has no more open files",
    ENOMEM: "raise `ulimit -v`, or ask for less memory",
    ENOSPC: "free some space there, or write elsewhere",
    EDQUOT: "free some space there, or write elsewhere",
    EFBIG: "raise `ulimit -f`, or write elsewhere",
}


def remedy(error: OSError, otherwise: str) -> str:
    """"why: what to do" of a failed system call; ``otherwise`` where no limit of the host's is the reason."""
    return f"{error.strerror or error}: {HOST_LIMITS.get(error.errno or 0, otherwise)}"


def remedy_for_path(path: str, error: OSError, otherwise: str) -> str:
    """The same where ``path`` was to be opened for reading."""
    return not_local(path) or remedy(error, otherwise)


# What QEMU's block layer knows by such a prefix, beside URLs.
PROTOCOLS = ("nbd", "json", "fat", "rbd", "ssh", "iscsi", "gluster", "nvme", "vxhs")


def exists(path: str, look: Callable[[str], object] = posix.stat) -> bool:
    """os.path.exists; with ``posix.lstat`` os.path.lexists, for which a link that leads nowhere is there too."""
    try:
        look(path)
    except (OSError, ValueError):
        return False
    return True


def not_local(path: str) -> str:
    """What to do about a ``path`` that is a URL, or a word of QEMU's for something that is no file; else ""."""
    scheme, colon, rest = path.partition(":")
    if not colon or exists(path, posix.lstat):
        return ""
    if scheme == "file" and rest.startswith("//"):
        return f"that is a URL: give the path, {rest[2:]}"
    if scheme in ("http", "https", "ftp", "ftps"):
        import shlex

        return f"that is a URL: fetch it first, with `curl -LO {shlex.quote(path)}`, and give the path of the file"
    if rest.startswith("//") or scheme in PROTOCOLS:
        return f"that is no path of a file: what QEMU reads by {scheme}: is not there yet, give a local image"
    return ""
