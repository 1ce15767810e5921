"""From a drive's options to its format driver: which image, how it is opened, how much of it is the disk."""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.driver import FormatDriver, ProtocolDriver
    from pyvmm.block.image import Image
    from pyvmm.block.options import DriveOptions
    from pyvmm.block.stats import BlockStats

SECTOR_BYTES = 512
CD_SECTOR_BYTES = 2048


def open_image(options: DriveOptions, context: AioContext, stats: BlockStats) -> FormatDriver:
    """The drive's disk, opened. ConfigError where that can't be."""
    file = open_protocol(options, context, stats)
    try:
        return open_format(options, file, context, stats)
    except BaseException:
        file.close()
        raise


def open_format(
    options: DriveOptions, file: ProtocolDriver, context: AioContext, stats: BlockStats
) -> FormatDriver:
    """The disk in ``file``; with ``snapshot``, and what the guest writes to it beside it."""
    from pyvmm.block.raw import RawDriver

    if not options.format_given:
        refuse_other_formats(options, file)
    raw = RawDriver(file, options.offset, window_size(options, file))
    if not keeps_writes(options):
        return raw
    from pyvmm.block.image import TemporaryImage
    from pyvmm.block.snapshot import SnapshotDriver, cluster_size, temporary_directory

    cluster_size(raw.size_bytes)  # before there is anything to close again
    image = TemporaryImage(temporary_directory())
    try:
        top = make_file(options, image, context, stats)
    except BaseException:
        image.close()
        raise
    return SnapshotDriver(raw, RawDriver(top, 0, raw.size_bytes))


def refuse_other_formats(options: DriveOptions, file: ProtocolDriver) -> None:
    from pyvmm.block import probe

    tail_at = max(0, file.size_bytes - probe.TAIL_BYTES)
    head, tail = file.peek(0, probe.HEAD_BYTES), file.peek(tail_at, probe.TAIL_BYTES)
    sentence = probe.refusal(image_path(options), head, tail)
    if sentence is not None:
        raise ConfigError(sentence)


def open_protocol(options: DriveOptions, context: AioContext, stats: BlockStats) -> ProtocolDriver:
    """What the option ``file`` names: a path, "file:PATH", or "blkdebug:RULES:" and one of these."""
    from pyvmm.block.image import Image

    rules, path = split_file(options)
    image = Image(
        path,
        writable=options.guest_may_write and not keeps_writes(options),
        direct=options.cache in ("none", "directsync"),
        locking=options.locking,
    )
    try:
        file = make_file(options, image, context, stats)
    except BaseException:
        image.close()
        raise
    try:
        for rules_path in reversed(rules):
            from pyvmm.block.blkdebug import BlkDebug, read_rules

            file = BlkDebug(file, read_rules(rules_path), context)
    except BaseException:
        file.close()
        raise
    return file


def make_file(options: DriveOptions, image: Image, context: AioContext, stats: BlockStats) -> ProtocolDriver:
    """An opened image with its engine; it belongs to that then."""
    if options.aio == "io_uring":
        from pyvmm.block.io_uring import FileUring

        return FileUring(image, context, stats)
    from pyvmm.block.file_posix import FilePosix

    return FilePosix(image, context, stats)


def split_file(options: DriveOptions) -> tuple[list[str], str]:
    """The rules files of blkdebug, outermost first, and the path of the image."""
    assert options.file is not None
    path = os.fspath(options.file)
    rules = []
    while path.startswith("blkdebug:"):
        rules_path, colon, path = path.removeprefix("blkdebug:").partition(":")
        if not colon or not path:
            raise ConfigError(f"the image {options.file} names none: write blkdebug:RULES:IMAGE")
        rules.append(rules_path)
    return rules, path.removeprefix("file:")


def image_path(options: DriveOptions) -> str:
    return split_file(options)[1]


def window_size(options: DriveOptions, file: ProtocolDriver) -> int:
    """How many bytes of the image are the disk. Where the guest may write: whole sectors, of which the last may end
    behind the file's end if a write may complete it.
    """
    least = CD_SECTOR_BYTES if options.media == "cdrom" else SECTOR_BYTES
    file_bytes = file.size_bytes
    there = file_bytes - options.offset
    if options.size is not None and options.size > there:
        raise ConfigError(
            f"the image {options.file} has {file_bytes} bytes, and offset={options.offset}, size={options.size} ask for"
            f" {options.offset + options.size}: give a window that is inside"
        )
    size_bytes = there if options.size is None else options.size
    if file_bytes == 0:
        give = "make it as large as the disk, with truncate -s SIZE"
        if options.media == "cdrom":
            give = "give a whole CD image, or a drive without a disc: --drive media=cdrom"
        raise ConfigError(f"the image {options.file} is empty: {give}")
    if size_bytes < least:
        raise ConfigError(
            f"the image {options.file} is too small: {max(0, size_bytes)} bytes are not one sector of {least} bytes"
        )
    part = size_bytes % SECTOR_BYTES
    if not part:
        return size_bytes
    whole = size_bytes - part
    completed = whole + SECTOR_BYTES
    if not options.guest_may_write:
        return size_bytes  # what is missing of a sector reads as zeros, and nobody writes it
    if options.size is None and (keeps_writes(options) or file.may_grow_to(options.offset + completed)):
        return completed
    return whole


def keeps_writes(options: DriveOptions) -> bool:
    """Whether the guest's writes go to a file of their own, where there is room for a whole last sector."""
    return options.snapshot and options.guest_may_write
