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
    "trans": ("auto", "none", "lba", "large", "rechs"),
}
# As far as ATA's registers for a cylinder (16 bits), a head (4) and a sector (8, from 1 on) reach.
GEOMETRY = {"cyls": 0xFFFF, "heads": 16, "secs": 255}
SERIAL_CHARACTERS = 20  # ATA IDENTIFY words 10-19
MODEL_CHARACTERS = 40  # words 27-46
REVISION_CHARACTERS = 8  # words 23-26
CD_REVISION_CHARACTERS = 4  # INQUIRY's field (SPC-2, 7.3.2)
LAST_INDEX = 3
THROTTLES = tuple(f"throttle_{unit}{what}" for unit in ("bps", "iops") for what in ("", "_read", "_write"))
SUFFIXES = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

# QEMU's -drive: key -> our name. Those with a value of their own to translate are in DriveOptions.parse.
KEYS = {
    **{name: name for name in ("file", "id", "format", "media", "cache", "aio", "rerror", "werror", "serial", "model")},
    **{name: name for name in (*GEOMETRY, "trans", "snapshot", "ver")},
    "bios-chs-trans": "trans",
    "if": "interface",
    "index": "index",
    "bus": "bus",
    "unit": "unit",
    "discard": "discard",
    "detect-zeroes": "detect_zeroes",
    "read-only": "read_only",
    "readonly": "read_only",
    "locking": "locking",
    "file.locking": "locking",
    "force-share": "force_share",
    "offset": "offset",
    "size": "size",
}
for unit in ("bps", "iops"):
    for theirs, old, ours in (("total", "", ""), ("read", "_rd", "_read"), ("write", "_wr", "_write")):
        for maximum in ("", "max"):
            our_name = f"throttle_{unit}{ours}{maximum and '_max'}"
            KEYS[f"throttling.{unit}-{theirs}{maximum and '-max'}"] = our_name
            KEYS[f"{unit}{maximum and '_max'}{old}"] = our_name
FLAGS = ("read_only", "locking", "force_share", "snapshot")
NUMBERS = ("index", "bus", "unit", "offset", "size", *GEOMETRY, *THROTTLES, *(f"{name}_max" for name in THROTTLES))
ON_OFF = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class DriveOptions:
    """One drive.

    file           path of the image or block device; None: a CD drive with no disc in it. "blkdebug:RULES:IMAGE" has
                   the image fail as the file RULES says (pyvmm/block/protocols/blkdebug.py).
    id             its name; without one its place gives it: ide0-hd0.
    format         "raw": the image's bytes are the disk, whatever they are. None: the same, but an image that is known
                   to be something else (qcow2, VMDK, VHD, gzip... pyvmm/block/probe.py) is refused.
    media          "disk", or "cdrom": read only.
    interface      "ide".
    index          0 primary master, 1 primary slave, 2 secondary master, 3 secondary slave; None: the next free one.
    cache          "writeback": the host's page cache, flushed when the guest says so. "none": O_DIRECT, else the same.
                   "writethrough", "directsync": the same two, every write on stable storage before it is complete.
                   "unsafe": flushes are not done.
    aio            "threads", or "io_uring" (Linux 5.6 or later): an error where the host's kernel refuses it, never the
                   other engine instead.
    discard        "unmap": what the guest discards becomes a hole; "ignore".
    detect_zeroes  "on": writes of nothing but zeros are told to the file system as such; "unmap": and become holes,
                   where discard="unmap".
    read_only      the guest may not write. Always so of a CD.
    rerror, werror what follows when the host can't read, or write: "report" it to the guest; "ignore"; "stop" the
                   machine, and try again when it goes on; "enospc" (werror): stop for lack of room, else report.
    locking        False: open the image although another program has it open.
    snapshot       the image stays as it is: what the guest writes goes to a temporary file without a name, in TMPDIR or
                   /var/tmp, and is gone in the end.
    offset, size   the window of the image that is the disk, in bytes; size None: to its end. A drive is whole sectors
                   of 512 bytes, a CD blocks of 2048. Of an image that ends inside a sector the drive has that one too:
                   what is missing reads as zeros, and a write makes the file longer. Where the guest may write but the
                   file not become longer (a block device, a window with a size, a seal or a limit against that), the
                   part is left out; so is a part of a CD's block.
    cyls, heads, secs  the geometry of a disk, all three: up to 65535, 16 and 255. None: as the disk's partition table
                   has it, else by its size.
    trans          how a BIOS makes its geometry of it: "none", "lba", "large", "rechs", or "auto": by the geometry, and
                   where that is not given by the partition table.
    throttle_bps, throttle_iops, and both with _read or _write: bytes, operations a second; 0: no limit. With _max
                   after that: the rate that bursts may reach.
    serial, model, ver  what the drive calls itself: up to 20 characters, 40, and of its firmware's version 8, on a CD
                   drive 4.
    """

    file: str | os.PathLike[str] | None = None
    id: str | None = None
    format: str | None = None
    media: str = "disk"
    interface: str = "ide"
    index: int | None = None
    cache: str = "writeback"
    aio: str = "threads"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    read_only: bool = False
    rerror: str = "report"
    werror: str = "enospc"
    locking: bool = True
    snapshot: bool = False
    offset: int = 0
    size: int | None = None
    cyls: int | None = None
    heads: int | None = None
    secs: int | None = None
    trans: str = "auto"
    throttle_bps: int = 0
    throttle_bps_read: int = 0
    throttle_bps_write: int = 0
    throttle_iops: int = 0
    throttle_iops_read: int = 0
    throttle_iops_write: int = 0
    throttle_bps_max: int = 0
    throttle_bps_read_max: int = 0
    throttle_bps_write_max: int = 0
    throttle_iops_max: int = 0
    throttle_iops_read_max: int = 0
    throttle_iops_write_max: int = 0
    serial: str | None = None
    model: str | None = None
    ver: str | None = None

    def __init__(self, file: str | os.PathLike[str] | None = None, **values: Any) -> None:
        self.file = file
        for name, value in values.items():
            if name not in type(self).__annotations__:
                raise ConfigError(f"a drive has no option {name!r}{nearest(name, type(self).__annotations__)}")
            setattr(self, name, value)
        self.check()

    @property
    def name(self) -> str:
        """Its id, or what its place on the IDE channels calls it, as in QEMU: index 2 is ide1-hd0 or ide1-cd0."""
        if self.id is not None:
            return self.id
        kind = "cd" if self.media == "cdrom" else "hd"
        return kind if self.index is None else f"ide{self.index // 2}-{kind}{self.index % 2}"

    @property
    def throttled(self) -> bool:
        """Whether there is a limit of rate at all."""
        return any(getattr(self, name) for name in THROTTLES)

    @property
    def keeps_writes(self) -> bool:
        """Whether the guest's writes go to a temporary file."""
        return self.snapshot and not self.read_only

    @property
    def geometry(self) -> tuple[int, int, int] | None:
        """(cylinders, heads, sectors a track) where they are given."""
        if self.cyls is None or self.heads is None or self.secs is None:
            return None
        return self.cyls, self.heads, self.secs

    def check(self) -> None:
        """ConfigError for what can be told to be wrong without opening anything."""
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "format" and value is None):
                raise ConfigError(f"drive option {name}={value!r}: use {' or '.join(allowed)}")
        if self.file is None and self.media != "cdrom":
            raise ConfigError("a disk without an image: give file=PATH (only a CD drive may be empty)")
        if self.file is not None and not (isinstance(self.file, str) or hasattr(self.file, "__fspath__")):
            raise ConfigError(f"drive option file={self.file!r}: give a path")
        if self.file is not None and self.file == "":
            raise ConfigError("drive option file='': give the path of an image")
        if self.index is not None and not (is_count(self.index) and self.index <= LAST_INDEX):
            raise ConfigError(
                f"drive option index={self.index!r}: use 0 or 1 (primary master, slave), 2 or 3 (secondary ones)"
            )
        for name in ("read_only", "locking", "snapshot"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"drive option {name}={getattr(self, name)!r}: use True or False")
        if self.media == "cdrom":
            self.read_only = True
        if not is_count(self.offset):
            raise ConfigError(f"drive option offset={self.offset!r}: give bytes from the image's beginning")
        if self.size is not None and not (is_count(self.size) and self.size):
            raise ConfigError(f"drive option size={self.size!r}: give bytes, or None for all there are")
        self._check_geometry()
        self._check_throttles()
        revision = CD_REVISION_CHARACTERS if self.media == "cdrom" else REVISION_CHARACTERS
        for name, limit in (("serial", SERIAL_CHARACTERS), ("model", MODEL_CHARACTERS), ("ver", revision)):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text.isascii() and text.isprintable()):
                raise ConfigError(f"drive option {name}={text!r}: use printable ASCII characters")
            if text is not None and len(text) > limit:
                raise ConfigError(f"drive option {name}={text!r}: use at most {limit} characters")

    def _check_geometry(self) -> None:
        given = [name for name in GEOMETRY if getattr(self, name) is not None]
        for name in given:
            value, most = getattr(self, name), GEOMETRY[name]
            if not is_count(value) or not 0 < value <= most:
                raise ConfigError(f"drive option {name}={value!r}: give a whole number from 1 to {most}")
        if given and len(given) < len(GEOMETRY):
            missing = [name for name in GEOMETRY if name not in given]
            raise ConfigError(
                f"drive option {' and '.join(given)} without {' and '.join(missing)}: a geometry is cyls, heads and"
                " secs, give all three"
            )
        for name in (*given, *(["trans"] if self.trans != "auto" else ())):
            if self.media == "cdrom":
                raise ConfigError(f"drive option {name} on a CD drive: a CD has no geometry, leave it out")

    def _check_throttles(self) -> None:
        for name in THROTTLES:
            rate, burst = getattr(self, name), getattr(self, f"{name}_max")
            for shown, value in ((name, rate), (f"{name}_max", burst)):
                if not is_count(value):
                    raise ConfigError(f"drive option {shown}={value!r}: give a whole number a second, 0 for no limit")
            if burst and not rate:
                raise ConfigError(f"drive option {name}_max={burst} without {name}: give the lasting rate too")
            if burst and burst < rate:
                raise ConfigError(f"drive option {name}_max={burst} is below {name}={rate}: give more, or leave it out")
        for unit in ("bps", "iops"):
            total = f"throttle_{unit}"
            for part in (f"{total}_read", f"{total}_write"):
                if getattr(self, total) and getattr(self, part):
                    raise ConfigError(f"drive options {total} and {part}: give the total, or reads and writes apart")

    @classmethod
    def parse(cls, text: str) -> DriveOptions:
        """From QEMU's -drive: "file=x.img,if=ide,index=1,cache=none,throttling.bps-total=1M,read-only=on".

        A comma in a value is written twice. ConfigError for what is wrong.
        """
        values: dict[str, Any] = {}
        for item in split_commas(text):
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"drive option {item!r} has no value: write {item}=VALUE")
            if key not in KEYS:
                raise ConfigError(f"a drive has no option {key!r}{nearest(key, KEYS)}")
            values[KEYS[key]] = translate(key, KEYS[key], value)
        if values.pop("force_share", False):
            values["locking"] = False
        bus, unit_number = values.pop("bus", None), values.pop("unit", None)
        if bus is not None or unit_number is not None:
            if "index" in values:
                raise ConfigError("drive option index beside bus or unit: give the one or the others")
            values["index"] = (bus or 0) * 2 + (unit_number or 0)
            if (unit_number or 0) > 1:
                raise ConfigError(f"drive option unit={unit_number}: use 0 (master) or 1 (slave)")
        return cls(**values)


def translate(key: str, name: str, value: str) -> object:
    """The Python value of ``key=value``."""
    if name in FLAGS:
        if value == "auto" and name == "locking":
            return True
        if value not in ON_OFF:
            raise ConfigError(f"drive option {key}={value}: use on or off")
        return ON_OFF[value]
    if name in NUMBERS:
        factor = SUFFIXES.get(value[-1:].lower(), 0)
        try:
            return int(value[:-1], 10) * factor if factor else int(value, 10)
        except ValueError:
            raise ConfigError(f"drive option {key}={value}: give a number, perhaps with k, M, G or T") from None
    if key == "discard" and value in ("on", "off"):
        return "unmap" if value == "on" else "ignore"
    if key == "file" and not value:
        return None
    return value


def split_commas(text: str) -> list[str]:
    """At single commas; two stand for one."""
    items = [""]
    position = 0
    while position < len(text):
        if text[position] != ",":
            items[-1] += text[position]
        elif text[position : position + 2] == ",,":
            items[-1] += ","
            position += 1
        else:
            items.append("")
        position += 1
    return [item for item in items if item]


def nearest(name: str, known: dict[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    return f": did you mean {near[0]}?" if near else ": see DriveOptions for those there are"


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
