"""What a user may say about a drive, checked: every wrong value is one sentence that says what to give instead."""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

CHOICES = {
    "format": ("raw",),
    "media": ("disk", "cdrom"),
    "interface": ("ide",),
    "cache": ("none", "writeback", "writethrough", "unsafe", "directsync"),
    "aio": ("threads", "io_uring"),
    "discard": ("unmap", "ignore"),
    "detect_zeroes": ("off", "on", "unmap"),
    "rerror": ("report", "ignore", "stop"),
    "werror": ("report", "ignore", "stop", "enospc"),
}


class DriveOptions:
    """The drive's options, as keyword arguments of these names."""

    file: str | os.PathLike[str] | None = None
    id: str | None = None
    format: str = "raw"
    media: str = "disk"
    interface: str = "ide"
    index: int | None = None
    cache: str = "writeback"
    aio: str = "threads"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    readonly: bool = False
    rerror: str = "report"
    werror: str = "enospc"
    locking: bool = True
    offset: int = 0
    size: int | None = None
    serial: str | None = None
    model: str | None = None

    def __init__(self, file: str | os.PathLike[str] | None = None, **values: Any) -> None:
        self.file = file
        for name, value in values.items():
            if name not in type(self).__annotations__:
                raise ConfigError(f"a drive has no option {name!r}: see DriveOptions for those there are")
            setattr(self, name, value)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"drive option {name}={getattr(self, name)!r}: use one of {', '.join(allowed)}")

    @property
    def name(self) -> str:
        """Its id, or the name its place on the IDE channels gives it, as in QEMU: ide1-cd0 is index 2."""
        if self.id is not None:
            return self.id
        kind = "cd" if self.media == "cdrom" else "hd"
        return kind if self.index is None else f"ide{self.index // 2}-{kind}{self.index % 2}"
