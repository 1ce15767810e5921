"""Every error pyvmm raises. Host mistakes carry the remedy in their one sentence; guest mistakes never get here."""

from __future__ import annotations

import os


class VmmError(Exception):
    """The base of all of them."""


class ConfigError(VmmError):
    """The embedder or the user asked for something that can't be: a bad value, a missing file, no room for an image."""


class StateError(VmmError):
    """The call needs the machine in another state, for example registers of a running vCPU, or a closed machine."""


class BusError(VmmError):
    """A guest-physical range is not wholly inside one piece of guest RAM."""


class KvmError(VmmError, OSError):
    """An ioctl on a KVM descriptor failed: ``ioctl`` by its kernel name, ``errno`` and ``strerror`` as in OSError."""

    def __init__(self, ioctl: str, errno: int, remedy: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
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
