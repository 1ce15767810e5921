"""What ``pyvmm image`` does with images, without a machine: tell of them, make, copy, check and resize them.

Images are opened as a drive's are, with their locks, and copied in pieces of a megabyte; what reads as zeros stays a
hole. ``progress(done, of)`` hears of how far it is, in bytes or tables.
"""

from __future__ import annotations

import os
from errno import EEXIST

from pyvmm.block import open as opener
from pyvmm.block.coroutine import AioContext
from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.block.formats.qcow2 import check as checker
from pyvmm.block.formats.qcow2.create import NewImage
from pyvmm.block.formats.qcow2.driver import Qcow2Driver
from pyvmm.block.formats.qcow2.resize import co_shrink
from pyvmm.block.formats.qcow2.snapshots import read_snapshots
from pyvmm.block.iov import all_zeros
from pyvmm.block.options import DriveOptions
from pyvmm.block.protocols.image import Image
from pyvmm.block.stats import BlockStats
from pyvmm.errors import ConfigError, remedy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.block.driver import FormatDriver, ProtocolDriver
    from pyvmm.block.formats.qcow2.check import Findings

    Progress = Callable[[int, int], object]

PIECE_BYTES = 1 << 20
FORMATS = ("raw", "qcow2")


class NoLoop:
    """Requests are waited for by whoever makes them (AioContext.run): there is no event loop."""

    def __init__(self) -> None:
        self.context = AioContext(self)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """What is due, ``run`` does."""


class Opened:
    """An image that is open for nobody but us: ``disk`` is what a guest would find in it."""

    def __init__(self, options: DriveOptions) -> None:
        """ConfigError as open_drive."""
        self.options = options
        self.context = NoLoop().context
        self.opening = opener.Opening(options, self.context, BlockStats())
        self.disk: FormatDriver = opener.open_disk(self.opening)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disk.close()

    def read(self, offset: int, view: memoryview) -> None:
        self.done("read", self.context.run(self.disk.co_readv(offset, [view], len(view))))

    def write(self, offset: int, view: memoryview) -> None:
        self.done("written", self.context.run(self.disk.co_writev(offset, [view], len(view), False)))

    def zero(self, offset: int, length: int) -> None:
        self.done("written", self.context.run(self.disk.co_write_zeroes(offset, length, True, False)))

    def flush(self) -> None:
        self.done("written", self.context.run(self.disk.co_flush()))

    def done(self, what: str, ret: int) -> None:
        """ConfigError where ``ret`` is a negative errno."""
        if ret < 0:
            why = remedy(OSError(-ret, os.strerror(-ret)), "check it, `pyvmm image check`")
            raise ConfigError(f"the image {self.options.file} can't be {what}: {why}")


# -- info ----------------------------------------------------------------------------------------------------


def info(path: str, format: str | None, *, locking: bool = True) -> dict[str, Any]:
    """As qemu-img info --output=json has it. Neither a backing file nor a data file is opened: names are told."""
    options = DriveOptions(path, format=format, read_only=True, locking=locking)
    context = NoLoop().context
    opening = opener.Opening(options, context, BlockStats())
    file = opener.open_protocol(opening)
    try:
        kind = options.format or opener.probed_format(options, file)
        name = opener.image_path(options)
        found: dict[str, Any] = {"filename": name, "format": kind, "virtual-size": file.size_bytes}
        if kind == "qcow2":
            found |= qcow2_info(name, file, context)
        try:
            found["actual-size"] = os.stat(name).st_blocks * SECTOR_BYTES
        except OSError:
            pass  # no file of this host
        return found
    finally:
        file.close()


def qcow2_info(path: str, file: ProtocolDriver, context: AioContext) -> dict[str, Any]:
    header = Qcow2Driver(path, file, context, read_only=True).header
    found = header.about()
    found["snapshots"] = [
        {"id": one.id, "name": one.name, "vm-state-size": one.vm_state_bytes, "date-sec": one.date_s,
         "vm-clock-nsec": one.vm_clock_ns}
        for one in read_snapshots(path, header, file.size_bytes, file.peek)
    ]  # fmt: skip
    return found


# -- create --------------------------------------------------------------------------------------------------


def create(
    path: str,
    format: str,
    size: int | None,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    **features: Any,
) -> int:
    """A new image, in the place of what is at ``path``; its size. ``features``: NewImage's, of qcow2. Without a size
    it is the backing file's. ConfigError where that can't be.
    """
    if format not in FORMATS:
        raise ConfigError(f"an image in the format {format!r} can't be made: use {' or '.join(FORMATS)}")
    if format == "raw" and (backing is not None or any(features.values())):
        raise ConfigError("a raw image has no backing file and no options: leave them out, or make a qcow2 one")
    if backing is None:
        return created(path, format, size, **features)
    options = DriveOptions(opener.beside(path, backing), format=backing_format, read_only=True)
    if what_is_at(path) is not None and what_is_at(opener.image_path(options)) == what_is_at(path):
        raise ConfigError(f"{path} is the backing file that it is to stand on: give another path")
    with Opened(options) as below:  # with all below it, so that none of them is what is overwritten
        kind = "qcow2" if isinstance(below.disk, Qcow2Driver) else "raw"
        size = below.disk.size_bytes + -below.disk.size_bytes % SECTOR_BYTES if size is None else size
        return created(path, format, size, backing=backing, backing_format=kind, **features)


def created(path: str, format: str, size: int | None, **features: Any) -> int:
    """As ``create``; a backing file has been looked at."""
    if size is None or size < 0 or size % SECTOR_BYTES or size >> 63:
        raise ConfigError(f"a disk of {size} bytes: give whole sectors of 512 bytes")
    made = None
    if format == "qcow2":
        made = NewImage(size, **features)
        made.header.pack()
    with New(path) as fd:
        if made is None:
            os.ftruncate(fd, size)
            return size
        if made.header.data_file is not None:
            data = opener.beside(path, made.header.data_file).removeprefix("file:")
            with New(data) as other:
                os.ftruncate(other, size)
        made.write(fd)
    return size


class New:
    """A descriptor of an empty file at ``path``, locked as a writer's: ConfigError where somebody uses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except OSError as error:
            if error.errno != EEXIST:
                raise ConfigError(f"the image {path} can't be made: {remedy(error, 'give another path')}") from None
        self._image = Image(path, read_only=False)

    def __enter__(self) -> int:
        try:
            os.ftruncate(self._image.fd, 0)
        except OSError as error:
            self._image.close()
            raise ConfigError(f"the image {self.path} can't be made empty: {error.strerror}; give a file") from None
        return self._image.fd

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """On its disk, where nothing went wrong: some file systems tell only then that there is no room."""
        try:
            if error is None:
                os.fsync(self._image.fd)
            self._image.close()
        except OSError as late:
            error = late
        self._image.close()
        if isinstance(error, OSError):
            raise ConfigError(f"the image {self.path} can't be written: {remedy(error, 'make room for it')}") from None


# -- convert -------------------------------------------------------------------------------------------------


def convert(source: DriveOptions, path: str, format: str, progress: Progress | None = None, **features: Any) -> int:
    """A copy of what a guest finds in ``source``, without anything below it: how many bytes the disk has."""
    with Opened(source.changed(read_only=True)) as old:
        before, after = what_is_at(opener.image_path(source)), what_is_at(path)
        if before == after and before is not None:
            raise ConfigError(f"{path} is the image that is copied: give another path")
        size = old.disk.size_bytes + -old.disk.size_bytes % SECTOR_BYTES
        create(path, format, size, **features)
        if not size:
            return 0
        with Opened(DriveOptions(path, format=format, cache="unsafe")) as new:
            copy(old, new, size, progress)
            new.flush()
    return size


def what_is_at(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def copy(old: Opened, new: Opened, size: int, progress: Progress | None) -> None:
    """All that is not zeros, a cluster's worth of them at a time."""
    buffer = bytearray(PIECE_BYTES)
    grain = min(max(new.disk.alignment, 65536), PIECE_BYTES)
    with memoryview(buffer) as whole:
        for offset in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - offset)
            with whole[:length] as piece:
                old.read(offset, piece)
                write_what_is_there(new, offset, piece, grain)
            if progress is not None:
                progress(offset + length, size)


def write_what_is_there(new: Opened, offset: int, piece: memoryview, grain: int) -> None:
    begin = 0
    while begin < len(piece):
        end = begin
        while end < len(piece):
            with piece[end : end + grain] as part:
                if all_zeros([part]):
                    break
            end += grain
        if end > begin:
            with piece[begin:end] as part:
                new.write(offset + begin, part)
        begin = max(end, begin) + grain


# -- check, resize -------------------------------------------------------------------------------------------


def check(path: str, format: str | None, *, repair: bool = False, progress: Progress | None = None) -> Findings:
    """ConfigError for an image that can't be checked: raw has nothing to check."""
    options = DriveOptions(path, format=format, read_only=not repair)
    context = NoLoop().context
    file = opener.open_protocol(opener.Opening(options, context, BlockStats()))
    try:
        if (options.format or opener.probed_format(options, file)) != "qcow2":
            raise ConfigError(f"the image {path} is raw: there is nothing in it that could be checked")
        # Opened as if somebody else were writing it: nothing is mended before it has been looked at.
        disk = Qcow2Driver(opener.image_path(options), file, context, read_only=not repair, later=True)
        return checker.check(disk, context, repair=repair, progress=progress)
    finally:
        file.close()


def resize(path: str, format: str | None, size: int, *, shrink: bool = False) -> tuple[int, int]:
    """(bytes before, bytes now) of the disk. ``shrink``: what lies behind the new end may be lost."""
    if size <= 0 or size % SECTOR_BYTES:
        raise ConfigError(f"a disk of {size} bytes: give whole sectors of 512 bytes")
    options = DriveOptions(path, format=format)
    with Opened(options) as one:
        before = one.disk.size_bytes
        if size < before and not shrink:
            raise ConfigError(
                f"the image {path} has {before} bytes, more than {size}: what is behind would be lost; give --shrink if"
                " that is wanted"
            )
        if size < before:
            shorten(one, size)
        elif size > before:
            try:
                one.disk.grow(options, size)
            except OSError as error:
                why = remedy(error, "convert it to one with larger clusters")
                raise ConfigError(f"the image {path} can't become so large: {why}") from None
        one.flush()
    return before, size


def shorten(one: Opened, size: int) -> None:
    disk = one.disk
    if not isinstance(disk, Qcow2Driver):
        try:
            os.truncate(opener.image_path(one.options), size)
        except OSError as error:
            why = remedy(error, "see to what it is on")
            raise ConfigError(f"the image {one.options.file} can't be made smaller: {why}") from None
        return
    one.done("made smaller", one.context.run(disk.co_changed(co_shrink(disk, size))))
