"""What a user may say about a drive: the rows of DriveOptions, and QEMU's way of writing them."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import (
    SWITCH,
    Kind,
    Options,
    disable_legacy,
    disable_modern,
    is_int,
    is_path,
    on_or_off,
    option,
    path_text,
    take_flag,
    text,
    whole,
    word,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any, Self

SUFFIXES = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
MOST_BLOCK_BYTES = 32768
GEOMETRY = ("cyls", "heads", "secs")
THROTTLES = tuple(f"throttle_{unit}{what}" for unit in ("bps", "iops") for what in ("", "_read", "_write"))


# -- kinds of values, as a -drive words them -----------------------------------------------------------------------


def take_path(name: str, value: Any) -> str | None:
    """The image. None: a CD drive with no disc in it."""
    if value is None:
        return None
    if not is_path(value):
        raise ConfigError(f"{name}={value!r}: give a path")
    path = path_text(value)
    if not path:
        raise ConfigError(f"{name}={value!r}: give the path of an image")
    return path


def take_block(name: str, value: Any) -> int | None:
    """A block's size."""
    if value is None:
        return None
    if not is_int(value) or value & (value - 1) or not 512 <= value <= MOST_BLOCK_BYTES:
        raise ConfigError(f"{name}={value!r}: give a power of two from 512 to {MOST_BLOCK_BYTES}")
    return int(value)


def count(text: str) -> int:
    """A number, perhaps with a suffix."""
    factor = SUFFIXES.get(text[-1:].lower(), 0)
    try:
        return int(text[:-1], 10) * factor if factor else int(text, 10)
    except ValueError:
        raise ValueError("give a number, perhaps with k, M, G or T") from None


def discard(text: str) -> str:
    return {"on": "unmap", "off": "ignore"}.get(text, text)


IMAGE = Kind(take_path, metavar="PATH", from_text=lambda text: text or None)
LOCKING = Kind(take_flag, file="boolean", metavar="on|off", from_text=lambda text: text == "auto" or on_or_off(text))
DISCARD = word("unmap", "ignore", from_text=discard)
BYTES = whole(give="bytes from the image's beginning", from_text=count, file="integer string")
SIZE = whole(least=1, none=True, give="bytes, or None for all there are", from_text=count, file="integer string")
PLACE = whole(none=True, give="a whole number from 0, or None", from_text=count)
SECONDS = whole(most=1 << 31, give="seconds", from_text=count, file="integer string")
RATE = whole(give="a whole number a second, 0 for no limit", from_text=count, file="integer string")
GEOMETRY_NUMBER = whole(least=1, none=True, from_text=count)
SAID = text(none=True, printable=True)
BLOCK = Kind(take_block, metavar="BYTES", file="integer", from_text=count)
QUEUES = whole(least=1, most=64, none=True, from_text=count)


def rate(what: str, words: str, maximum: bool = False) -> Any:
    """The row of a limit of rate. ``words``: QEMU's, the newer first."""
    return option(RATE, 0, f"the rate of {what} that bursts may reach" if maximum else f"{what}, 0 for no limit",
                  words=words)  # fmt: skip


class DriveOptions(Options):
    """One drive. An object does not change: ``changed`` makes another one.

    A drive is whole sectors of 512 bytes, a CD blocks of 2048. Of an image that ends inside a sector the drive has that
    one too: what is missing reads as zeros, and a write makes the file longer. Where the guest may write but the file
    not become longer (a block device, a window with a size, a seal or a limit against that), the part is left out; so
    is a part of a CD's block.
    """

    noun = "drive option "
    thing = "a drive"
    frozen = True
    other_words = {"force-share": ("locking", lambda text: not on_or_off(text))}

    file: str | None = option(
        IMAGE, None, "path of the image or block device; nbd:unix:PATH[:exportname=E], nbd://HOST[:PORT]/EXPORT or"
        " nbd+unix:///EXPORT?socket=PATH; file:PATH, or blkdebug:RULES:PATH, which fails as the file RULES says"
        " (pyvmm/block/protocols/blkdebug.py); a CD drive may have none", words="file")  # fmt: skip
    format: str | None = option(
        word("raw", "qcow2", none=True), None, "raw: the image's bytes are the disk, whatever they look like; qcow2;"
        " without it as the image begins; VMDK, VHD, gzip and their like are refused", words="format")  # fmt: skip
    interface: str | None = option(
        word("ide", "virtio", none=True), None, "the bus; without it ide on a pc, virtio on a microvm, which has no"
        " other", words="if")  # fmt: skip
    index: int | None = option(
        PLACE, None, "its place; with if=ide 0 and 1 are primary master and slave, 2 and 3 secondary master and slave,"
        " with if=virtio the order; without it the next that is free", words="index")  # fmt: skip
    bus: int | None = option(
        PLACE, None, "with if=ide and unit the same in two numbers: the channel, 0 or 1", words="bus")  # fmt: skip
    unit: int | None = option(PLACE, None, "with if=ide 0, the master, or 1, the slave", words="unit")
    media: str = option(word("disk", "cdrom"), "disk", "a disk, or a CD-ROM drive", words="media")
    id: str | None = option(text(none=True), None, "its name; without one its place, as ide0-hd0", words="id")
    cache: str = option(
        word("writeback", "none", "writethrough", "directsync", "unsafe"), "writeback", "the host's page cache with the"
        " guest's flushes; O_DIRECT, else the same; the same two with every write on stable storage before it is"
        " complete; flushes left out", words="cache")  # fmt: skip
    aio: str = option(
        word("threads", "io_uring"), "threads", "how the host is asked; io_uring wants Linux 5.6 or later, and is an"
        " error where the host refuses it", words="aio")  # fmt: skip
    discard: str = option(
        DISCARD, "unmap", "what the guest discards becomes a hole in the image, or nothing (also on,"
        " off)", words="discard")  # fmt: skip
    detect_zeroes: str = option(
        word("off", "on", "unmap"), "off", "writes of nothing but zeros are told to the file system as such; and become"
        " holes, where discard is unmap", words="detect-zeroes")  # fmt: skip
    read_only: bool = option(
        SWITCH, False, "the guest may not write; always so of a CD", words="read-only readonly")  # fmt: skip
    snapshot: bool = option(
        SWITCH, False, "what the guest writes goes to a temporary file without a name, in TMPDIR or /var/tmp, that is"
        " gone in the end", words="snapshot")  # fmt: skip
    internal_snapshot: str | None = option(
        text(none=True), None, "ID or name of a snapshot inside of a qcow2 image, to be read in the place of the disk"
        " as it is; with read-only=on or snapshot=on", words="internal-snapshot")  # fmt: skip
    rerror: str = option(
        word("report", "ignore", "stop"), "report", "what follows when the host can't read: the guest is told; or not;"
        " or the machine stops and tries again when it goes on (at SIGCONT)", words="rerror")  # fmt: skip
    werror: str = option(
        word("enospc", "report", "ignore", "stop"), "enospc", "the same of writes; enospc: stop for lack of room, else"
        " report", words="werror")  # fmt: skip
    locking: bool = option(
        LOCKING, True, "refuse an image that another program uses (also auto; force-share=on for off)",
        words="locking file.locking")  # fmt: skip
    reconnect_delay: int = option(
        SECONDS, 0, "with nbd: how many seconds requests wait for a server that is lost to come back; 0: they fail at"
        " once, until it is back", words="reconnect-delay file.reconnect-delay")  # fmt: skip
    timeout: int = option(
        SECONDS, 30, "with nbd: after how many seconds without an answer the server is taken for lost; 0:"
        " never", words="timeout")  # fmt: skip
    offset: int = option(BYTES, 0, "where in the image the disk begins, in bytes", words="offset")
    size: int | None = option(
        SIZE, None, "how many bytes of the image are the"
        " disk; without it all that follow", words="size")  # fmt: skip
    cyls: int | None = option(
        GEOMETRY_NUMBER, None, "with heads and secs the geometry that a disk shows; without them as its partition table"
        " has it, else by its size, as QEMU does", words="cyls")  # fmt: skip
    heads: int | None = option(GEOMETRY_NUMBER, None, "heads of that geometry", words="heads")
    secs: int | None = option(GEOMETRY_NUMBER, None, "sectors a track of that geometry", words="secs")
    trans: str = option(
        word("auto", "none", "lba", "large", "rechs"), "auto", "how the BIOS translates it; auto: by the geometry, and"
        " where that is not given by the partition table", words="trans bios-chs-trans")  # fmt: skip
    logical_block_size: int | None = option(
        BLOCK, None, "with if=virtio how small a request may be, in bytes; else 512", words="logical-block-size"
        " logical_block_size")  # fmt: skip
    physical_block_size: int | None = option(
        BLOCK, None, "with if=virtio in what pieces the guest should write, in bytes; else the same", words=
        "physical-block-size physical_block_size")  # fmt: skip
    num_queues: int | None = option(
        QUEUES, None, "with if=virtio how many queues, each with a thread of its own; without it on a pc one a"
        " processor, up to 8, else one", words="num-queues")  # fmt: skip
    disable_legacy: str | None = disable_legacy()
    disable_modern: str | None = disable_modern()
    throttle_bps: int = rate("bytes a second, reads and writes together", "throttling.bps-total bps")
    throttle_bps_read: int = rate("bytes read a second", "throttling.bps-read bps_rd")
    throttle_bps_write: int = rate("bytes written a second", "throttling.bps-write bps_wr")
    throttle_iops: int = rate("operations a second, reads and writes together", "throttling.iops-total iops")
    throttle_iops_read: int = rate("reads a second", "throttling.iops-read iops_rd")
    throttle_iops_write: int = rate("writes a second", "throttling.iops-write iops_wr")
    throttle_bps_max: int = rate("all bytes", "throttling.bps-total-max bps_max", True)
    throttle_bps_read_max: int = rate("bytes read", "throttling.bps-read-max bps_max_rd", True)
    throttle_bps_write_max: int = rate("bytes written", "throttling.bps-write-max bps_max_wr", True)
    throttle_iops_max: int = rate("all operations", "throttling.iops-total-max iops_max", True)
    throttle_iops_read_max: int = rate("reads", "throttling.iops-read-max iops_max_rd", True)
    throttle_iops_write_max: int = rate("writes", "throttling.iops-write-max iops_max_wr", True)
    serial: str | None = option(SAID, None, "the serial number that the drive tells; without one by its place",
                                words="serial")  # fmt: skip
    model: str | None = option(SAID, None, "the model that the drive tells", words="model")
    ver: str | None = option(SAID, None, "the revision of its firmware that the drive tells", words="ver")

    def __init__(self, file: str | os.PathLike[str] | None = None, **values: Any) -> None:
        super().__init__(file=file, **values)

    @property
    def name(self) -> str:
        """Its id; a board gives one to every drive that has none."""
        return self.id or self.media

    @property
    def throttled(self) -> bool:
        """Whether there is a limit of rate at all."""
        return any(getattr(self, name) for name in THROTTLES)

    def with_limits(self, limits: dict[str, int]) -> Self:
        """A copy with these limits of rate and no others. ConfigError for what is none."""
        for name in limits:
            if not name.startswith("throttle_") or name not in self.rows:
                raise ConfigError(self.unknown(name, [row for row in self.rows if row.startswith("throttle_")]))
        none = {name: 0 for name in self.rows if name.startswith("throttle_")}
        return self.changed(**{**none, **limits})

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

    def check_together(self, values: dict[str, Any]) -> None:
        if values["media"] == "cdrom":
            values["read_only"] = True
        elif values["file"] is None:
            raise ConfigError("a disk without an image: give file=PATH (only a CD drive may be empty)")
        if values["index"] is not None and (values["bus"], values["unit"]) != (None, None):
            raise ConfigError("drive option index beside bus or unit: give the one or the others")
        if values["internal_snapshot"] is not None and not (values["read_only"] or values["snapshot"]):
            raise ConfigError("drive option internal_snapshot is only read: give read-only=on or snapshot=on with it")
        if values["internal_snapshot"] is not None and values["format"] == "raw":
            raise ConfigError("drive option internal_snapshot with format=raw: only qcow2 has any, leave one out")
        check_blocks(values)
        check_geometry(values)
        check_throttles(values)

    @classmethod
    def parse(cls, text: str) -> DriveOptions:
        """From QEMU's -drive: "file=x.img,if=ide,index=1,cache=none,throttling.bps-total=1M,read-only=on".

        A comma in a value is written twice. ConfigError for what is wrong.
        """
        return cls(**cls.from_words(text))


def check_blocks(values: dict[str, Any]) -> None:
    logical, physical = values["logical_block_size"], values["physical_block_size"]
    if physical is not None and physical < (logical or 512):
        raise ConfigError(
            f"drive option physical_block_size={physical} is below logical_block_size={logical or 512}: give more, or"
            " leave it out"
        )


def check_geometry(values: dict[str, Any]) -> None:
    given = [name for name in GEOMETRY if values[name] is not None]
    if given and len(given) < len(GEOMETRY):
        missing = [name for name in GEOMETRY if name not in given]
        raise ConfigError(
            f"drive option {' and '.join(given)} without {' and '.join(missing)}: a geometry is cyls, heads and"
            " secs, give all three"
        )
    for name in (*given, *(["trans"] if values["trans"] != "auto" else ())):
        if values["media"] == "cdrom":
            raise ConfigError(f"drive option {name} on a CD drive: a CD has no geometry, leave it out")


def check_throttles(values: dict[str, Any]) -> None:
    for name in THROTTLES:
        lasting, burst = values[name], values[f"{name}_max"]
        if burst and not lasting:
            raise ConfigError(f"drive option {name}_max={burst} without {name}: give the lasting rate too")
        if burst and burst < lasting:
            raise ConfigError(f"drive option {name}_max={burst} is below {name}={lasting}: give more, or leave it out")
    for unit in ("bps", "iops"):
        total = f"throttle_{unit}"
        for part in (f"{total}_read", f"{total}_write"):
            if values[total] and values[part]:
                raise ConfigError(f"drive options {total} and {part}: give the total, or reads and writes apart")
