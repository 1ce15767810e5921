"""From a drive's options to its backend: the tables of protocols and of formats, and who opens what in turn.

The option ``file`` names the image: a path, "PROTOCOL:PATH", or "FILTER:ARGUMENT:" in front of either, as often as
wanted. A new protocol, filter or format is a row in one of the tables below and a module that its opener imports.
"""

from __future__ import annotations

import os

from pyvmm.block.backend import BlockBackend
from pyvmm.block.coroutine import AioContext
from pyvmm.block.stats import BlockStats
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.block.backend import OnError
    from pyvmm.block.coroutine import Loop
    from pyvmm.block.driver import FormatDriver, ProtocolDriver
    from pyvmm.block.options import DriveOptions
    from pyvmm.block.protocols.image import Image
    from pyvmm.block.protocols.nbd_address import NbdAddress
    from pyvmm.clock import Clock


MOST_LAYERS = 64  # images that one stands on, one on top of the other


class Opening:
    """A drive that is being opened: its options, and what all its drivers share. ``layers`` are the images that stand
    on this one, as (path, what it is on the host), the guest's first.
    """

    __slots__ = ("context", "later", "layers", "options", "stats")

    def __init__(
        self,
        options: DriveOptions,
        context: AioContext,
        stats: BlockStats,
        *,
        later: bool = False,
        layers: tuple[tuple[str, object], ...] = (),
    ) -> None:
        self.later = later  # somebody else may have the image until it is claimed
        self.layers = layers
        self.options = options
        self.context = context
        self.stats = stats


def open_drive(
    options: DriveOptions, *, loop: Loop, clock: Clock, on_error: OnError | None = None, later: bool = False
) -> BlockBackend:
    """Open the drive's image. ConfigError where that can't be: missing, a directory, locked, too small, unreadable, no
    raw image.

    ``later``: another process may have the image until BlockBackend.claim. ``clock`` is what the limits of rate go by.
    io_uring needs ``add_reader`` and ``remove_reader`` of the loop too.
    """
    context = AioContext(loop)
    if options.file is None:
        return BlockBackend(options, None, context, on_error=on_error)
    opening = Opening(options, context, BlockStats(), later=later)
    disk = open_disk(opening)
    try:
        throttle = None
        if options.throttled:
            from pyvmm.block.throttle import Throttle

            throttle = Throttle(options, clock, context)
        return BlockBackend(options, disk, context, stats=opening.stats, throttle=throttle, on_error=on_error)
    except BaseException:
        disk.close()
        raise


def open_disk(opening: Opening) -> FormatDriver:
    """The guest's disk: format over protocol, and what keeps its writes apart."""
    options = opening.options
    file = open_protocol(opening)
    try:
        disk = FORMATS[options.format or probed_format(options, file)](file, opening)
        return open_snapshot(disk, opening) if options.keeps_writes else disk
    except BaseException:
        file.close()
        raise


# -- protocols: where bytes come from ----------------------------------------------------------------------------


def open_protocol(opening: Opening) -> ProtocolDriver:
    """What the option ``file`` names, with the filters in front of it."""
    filters, protocol, path = split_file(opening.options)
    file = PROTOCOLS[protocol](path, opening)
    try:
        for name, argument in reversed(filters):
            file = FILTERS[name](argument, file, opening)
    except BaseException:
        file.close()
        raise
    return file


def split_file(options: DriveOptions) -> tuple[list[tuple[str, str]], str, str]:
    """([(filter, its argument)], outermost first; protocol; path) of the option ``file``. ConfigError where a filter
    has nothing behind it.
    """
    assert options.file is not None
    rest = os.fspath(options.file)
    filters = []
    while (name := rest.partition(":")[0]) in FILTERS and name != rest:
        argument, colon, rest = rest[len(name) + 1 :].partition(":")
        if not colon or not rest:
            raise ConfigError(f"the image {options.file} names none: write {name}:{FILTER_WORDS[name]}:IMAGE")
        filters.append((name, argument))
    protocol, colon, path = rest.partition(":")
    if colon and protocol in PROTOCOLS:
        return filters, protocol, path
    return filters, "file", rest


def image_path(options: DriveOptions) -> str:
    """The path of the image itself."""
    return split_file(options)[2]


def open_file(path: str, opening: Opening) -> ProtocolDriver:
    """A file or block device of the host."""
    from pyvmm.block.protocols.image import Image

    options = opening.options
    image = Image(
        path,
        read_only=options.read_only or options.keeps_writes,
        direct=options.cache in ("none", "directsync"),
        locking=options.locking,
        later=opening.later,
    )
    return start_engine(image, opening)


def start_engine(image: Image, opening: Opening) -> ProtocolDriver:
    """The image with its engine, to which it belongs from here on. It is closed where that fails."""
    try:
        if opening.options.aio == "io_uring":
            from pyvmm.block.protocols.io_uring import FileUring

            return FileUring(image, opening.context, opening.stats)
        from pyvmm.block.protocols.file_posix import FilePosix

        return FilePosix(image, opening.context, opening.stats)
    except BaseException:
        image.close()
        raise


def open_blkdebug(rules: str, file: ProtocolDriver, opening: Opening) -> ProtocolDriver:
    from pyvmm.block.protocols.blkdebug import BlkDebug, read_rules

    return BlkDebug(file, read_rules(rules), opening.context)


def open_nbd(path: str, opening: Opening) -> ProtocolDriver:
    from pyvmm.block.protocols.nbd_address import parse_nbd

    return open_export(parse_nbd(path), opening)


def open_nbd_unix(path: str, opening: Opening) -> ProtocolDriver:
    from pyvmm.block.protocols.nbd_address import parse_nbd_unix

    return open_export(parse_nbd_unix(path), opening)


def open_export(address: NbdAddress, opening: Opening) -> ProtocolDriver:
    """What an NBD server has."""
    options = opening.options
    if options.aio == "io_uring":
        raise ConfigError(f"the drive {options.file} is no file, and aio=io_uring is for those: leave it out")
    from pyvmm.block.protocols.nbd import Nbd

    return Nbd(
        address,
        opening.context,
        read_only=options.read_only or options.keeps_writes,
        reconnect_delay_s=options.reconnect_delay,
        timeout_s=options.timeout,
    )


PROTOCOLS: dict[str, Callable[[str, Opening], ProtocolDriver]] = {
    "file": open_file,
    "nbd": open_nbd,
    "nbd+unix": open_nbd_unix,
}
# In front of a protocol or of another filter.
FILTERS: dict[str, Callable[[str, ProtocolDriver, Opening], ProtocolDriver]] = {"blkdebug": open_blkdebug}
FILTER_WORDS = {"blkdebug": "RULES"}  # what the argument of each is, for messages


# -- formats: where a guest's byte is among them ------------------------------------------------------------------


def probed_format(options: DriveOptions, file: ProtocolDriver) -> str:
    """A name in FORMATS, by how the file begins and ends. ConfigError for a format that there is no driver for."""
    from pyvmm.block import probe

    tail_at = max(0, file.size_bytes - probe.TAIL_BYTES)
    head, tail = file.peek(0, probe.HEAD_BYTES), file.peek(tail_at, probe.TAIL_BYTES)
    known = probe.disk_format(head, tail)
    if known is not None and known[1] in FORMATS:
        return known[1]
    sentence = probe.refusal(image_path(options), head, tail)
    if sentence is not None:
        raise ConfigError(sentence)
    return "raw"


def open_raw(file: ProtocolDriver, opening: Opening) -> FormatDriver:
    from pyvmm.block.formats.raw import RawDriver, window_size

    options = opening.options
    return RawDriver(file, options.offset, window_size(options, file), probed=options.format is None)


def open_qcow2(file: ProtocolDriver, opening: Opening) -> FormatDriver:
    """With all the images that this one names."""
    from pyvmm.block.formats.qcow2.driver import Qcow2Driver

    options, path = opening.options, image_path(opening.options)
    if options.offset or options.size is not None:
        raise ConfigError(f"the image {path} is qcow2: offset= and size= are for raw images, leave them out")
    driver = Qcow2Driver(
        path,
        file,
        opening.context,
        read_only=file.read_only,
        later=opening.later,
        snapshot=options.internal_snapshot,
        barriers=options.cache != "unsafe",
    )
    header = driver.header
    data = None
    if header.data_file is not None and header.external:
        named = options.changed(file=beside(path, header.data_file), format="raw", internal_snapshot=None)
        data = open_protocol(Opening(named, opening.context, opening.stats, later=opening.later))
    try:
        backing = open_backing(header.backing, header.backing_format, opening) if header.backing is not None else None
        driver.attach(backing, data)
    except BaseException:
        if data is not None:
            data.close()
        raise
    return driver


def open_backing(name: str, format: str | None, opening: Opening) -> FormatDriver:
    """The image that another one stands on: only read. ConfigError where one stands on itself, or there are too many.
    """
    path = image_path(opening.options)
    layers = (*opening.layers, (path, what_it_is(path)))
    if len(layers) > MOST_LAYERS:
        raise ConfigError(
            f"the image {layers[0][0]} stands on more than {MOST_LAYERS} others: join some, qemu-img commit"
        )
    file = beside(path, name)
    format = {"host_device": "raw", "file": "raw"}.get(format or "", format) or None
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"the image {path} has a backing file in the format {format!r}, which pyvmm does not read: convert it,"
            " qemu-img rebase"
        )
    options = opening.options.changed(
        file=file, format=format, read_only=True, snapshot=False, internal_snapshot=None, offset=0, size=None
    )
    below = image_path(options)
    if what_it_is(below) in [there for _, there in layers]:
        raise ConfigError(f"the image {path} stands on {below}, which stands on it: mend that, qemu-img rebase -u")
    try:
        return open_disk(Opening(options, opening.context, opening.stats, later=opening.later, layers=layers))
    except ConfigError as error:
        if opening.layers:
            raise
        raise ConfigError(f"{error} (a backing file of {path})") from None


def beside(path: str, name: str) -> str:
    """What the option ``file`` says for an image that another one at ``path`` names: relative to where that one is
    (qcow2.txt names no rule; QEMU's path_combine). A name comes out of a file: no filter is asked for by it.
    """
    protocol, colon, rest = name.partition(":")
    if name.startswith("json:"):
        raise ConfigError(f"the image {path} names another one by json:, which pyvmm does not read: qemu-img rebase -u")
    if colon and protocol in PROTOCOLS and protocol != "file":
        return name
    if colon and protocol == "file":
        name = rest
    return "file:" + os.path.join(os.path.dirname(path), name)


def what_it_is(path: str) -> object:
    """The same for every name of a file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino


FORMATS: dict[str, Callable[[ProtocolDriver, Opening], FormatDriver]] = {"raw": open_raw, "qcow2": open_qcow2}


def open_snapshot(disk: FormatDriver, opening: Opening) -> FormatDriver:
    """``disk`` as it is, and beside it a temporary file for what the guest writes."""
    from pyvmm.block.formats.raw import RawDriver
    from pyvmm.block.formats.snapshot import SnapshotDriver, cluster_size, temporary_directory
    from pyvmm.block.protocols.image import TemporaryImage

    cluster_size(disk.size_bytes)  # before there is anything to close again
    top = start_engine(TemporaryImage(temporary_directory()), opening)
    return SnapshotDriver(disk, RawDriver(top, 0, disk.size_bytes))
