"""A connection to an NBD server, up to the transmission phase: fixed newstyle, structured replies where it has them.

NetworkBlockDevice doc/proto.md, "Fixed newstyle negotiation" and "Option types". What comes from the server is a
stranger's: every length has a limit, and the whole takes no longer than it may.
"""

from __future__ import annotations

import os
import select

# Not ``socket``: importing that takes as long as half of a start.
from _socket import (
    AF_UNIX,
    IPPROTO_TCP,
    SO_ERROR,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
    getaddrinfo,
    socket,
)
from _struct import pack, unpack, unpack_from
from errno import EINPROGRESS
from time import monotonic

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block.protocols.nbd_address import NbdAddress

MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OLD_MAGIC = bytes.fromhex("00420281861253")
REPLY_MAGIC = 0x3E889045565A9

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_GO, OPT_STRUCTURED_REPLY = 1, 7, 8
REP_ACK, REP_INFO = 1, 3
REP_ERROR = 1 << 31
ERR_UNSUP, ERR_TLS_REQD, ERR_UNKNOWN = REP_ERROR | 1, REP_ERROR | 5, REP_ERROR | 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

# Transmission flags.
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_WRITE_ZEROES = 1 << 5, 1 << 6

MOST_REPLY_BYTES = 16 << 10  # of an option: a message is at most 4096 bytes long
MOST_REPLIES = 64  # to one option
LARGEST_BLOCK = 64 << 10  # proto.md, "Block size constraints"
DEFAULT_MOST_BYTES = 32 << 20  # a payload, where the server does not say


class NbdError(Exception):
    """There is no connection, and why, in words."""


class NbdRefusedError(NbdError):
    """The server is there, and will not serve this: to try again is no use."""


class Export:
    """What the server says of an export: ``size_bytes``, transmission ``flags``, whether replies are ``structured``,
    and how its requests are to be (``block_bytes``: 1 where it does not say; ``most_bytes`` of a payload).
    """

    __slots__ = ("block_bytes", "flags", "most_bytes", "size_bytes", "structured")

    def __init__(self, size_bytes: int, flags: int) -> None:
        if size_bytes >= 1 << 63:
            raise NbdRefusedError(f"it says that the export has {size_bytes} bytes, which no disk has")
        self.size_bytes = size_bytes
        self.flags = flags if flags & HAS_FLAGS else 0
        self.structured = False
        self.block_bytes = 1
        self.most_bytes = DEFAULT_MOST_BYTES

    def set_blocks(self, least: int, most: int) -> None:
        """By NBD_INFO_BLOCK_SIZE. What is behind the last whole block nobody can ask for."""
        if not least or least & (least - 1) or least > LARGEST_BLOCK or most < least:
            raise NbdRefusedError(f"its block sizes are none: {least} at least, {most} at most")
        self.block_bytes = least
        self.most_bytes = min(most - most % least, DEFAULT_MOST_BYTES)
        self.size_bytes -= self.size_bytes % least


class Line:
    """A socket that is being connected. Everything ends at ``end`` (monotonic), or when ``wake_fd`` is readable."""

    def __init__(self, family: int, address: Any, end: float, wake_fd: int) -> None:
        self._end = end
        self._wake_fd = wake_fd
        self.socket = socket(family, SOCK_STREAM)
        try:
            self.socket.setblocking(False)
            self._connect(family, address)
        except BaseException:
            self.socket.close()
            raise

    def _connect(self, family: int, address: Any) -> None:
        """NbdError."""
        try:
            self.socket.connect(address)
        except BlockingIOError as error:
            if error.errno != EINPROGRESS:
                # A Unix socket whose backlog is full (unix(7)): there is nothing to wait by.
                raise NbdError("it takes no more connections") from None
            self._wait(select.POLLOUT)
            number = self.socket.getsockopt(SOL_SOCKET, SO_ERROR)
            if number:
                raise NbdError(os.strerror(number)) from None
        except OSError as error:
            raise NbdError(error.strerror) from None
        if family != AF_UNIX:
            self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self.socket.fileno(), events)
        poll.register(self._wake_fd, select.POLLIN)
        left_s = self._end - monotonic()
        ready = poll.poll(left_s * 1000) if left_s > 0 else []
        if not ready:
            raise NbdError("it does not answer")
        if any(fd == self._wake_fd for fd, _ in ready):
            raise NbdError("the drive is closed")

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise NbdError(error.strerror) from None

    def receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = self.socket.recv(count - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise NbdError(error.strerror) from None
            if not part:
                raise NbdError("it ends the connection")
            data += part
        return bytes(data)


def resolve(address: NbdAddress) -> list[tuple[int, Any]]:
    """(family, address) of each way to the server. ConfigError where there is none."""
    if address.path:
        from pyvmm.unix_socket import check_path

        check_path(address.path, "nbd:unix:")
        return [(AF_UNIX, address.path)]
    try:
        found = getaddrinfo(address.host, address.port, 0, SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", "") or error
        raise ConfigError(f"the NBD server {address}: {why}: give the name or address of a host") from None
    return [(entry[0], entry[4]) for entry in found]


def connect(ways: list[tuple[int, Any]], name: str, limit_s: float, wake_fd: int) -> tuple[socket, Export]:
    """A connection in the transmission phase, not blocking, and what is served on it. NbdError."""
    end = monotonic() + limit_s
    problem = NbdError("it has no address")
    for family, address in ways:
        try:
            line = Line(family, address, end, wake_fd)
        except NbdError as error:
            problem = error
            continue
        try:
            export = negotiate(line, name)
        except BaseException:
            line.socket.close()
            raise
        return line.socket, export
    raise problem


def negotiate(line: Line, name: str) -> Export:
    """To the transmission phase. NbdError."""
    begin = line.receive(16)
    if begin[:8] != MAGIC:
        raise NbdRefusedError("it is no NBD server")
    if begin[8:] != OPTION_MAGIC:
        old = begin[9:] == OLD_MAGIC
        raise NbdRefusedError(
            "it speaks the old protocol only, which has no names: use qemu-nbd or nbdkit" if old else
            "it is no NBD server that this one knows"
        )  # fmt: skip
    (flags,) = unpack(">H", line.receive(2))
    if not flags & FIXED_NEWSTYLE:
        raise NbdRefusedError("it has no fixed newstyle negotiation: use qemu-nbd or nbdkit")
    line.send(pack(">I", FIXED_NEWSTYLE | (flags & NO_ZEROES)))
    structured = agreed(line, OPT_STRUCTURED_REPLY, b"")
    export = go(line, name)
    if export is None:
        export = by_name(line, name, not flags & NO_ZEROES)
    export.structured = structured
    return export


def ask(line: Line, option: int, data: bytes) -> None:
    line.send(OPTION_MAGIC + pack(">II", option, len(data)) + data)


def answer(line: Line, option: int) -> tuple[int, bytes]:
    """(type, data) of one reply to ``option``."""
    magic, which, kind, length = unpack(">QIII", line.receive(20))
    if magic != REPLY_MAGIC or which != option or length > MOST_REPLY_BYTES:
        raise NbdRefusedError("what it answers is no NBD")
    return kind, line.receive(length)


def agreed(line: Line, option: int, data: bytes) -> bool:
    """Whether the server takes an option without an answer of its own."""
    ask(line, option, data)
    return answer(line, option)[0] == REP_ACK


def go(line: Line, name: str) -> Export | None:
    """NBD_OPT_GO. None: the server knows no such option."""
    wanted = name.encode("utf-8", "surrogateescape")
    ask(line, OPT_GO, pack(">I", len(wanted)) + wanted + pack(">HH", 1, INFO_BLOCK_SIZE))
    export: Export | None = None
    blocks: tuple[int, int] | None = None
    for _ in range(MOST_REPLIES):
        kind, data = answer(line, OPT_GO)
        if kind == REP_ACK:
            if export is None:
                raise NbdRefusedError("it does not say how large the export is")
            if blocks is not None:
                export.set_blocks(*blocks)
            return export
        if kind == ERR_UNSUP:
            return None
        if kind & REP_ERROR:
            raise NbdRefusedError(why_not(kind, name, data))
        info = unpack_from(">H", data)[0] if kind == REP_INFO and len(data) >= 2 else -1
        if info == INFO_EXPORT and len(data) == 12:
            export = Export(*unpack_from(">QH", data, 2))
        elif info == INFO_BLOCK_SIZE and len(data) == 14:
            least, _preferred, most = unpack_from(">III", data, 2)
            blocks = least, most
    raise NbdRefusedError("it does not come to an end with what it says of the export")


def by_name(line: Line, name: str, zeroes: bool) -> Export:
    """NBD_OPT_EXPORT_NAME, which is without an error: the server hangs up."""
    ask(line, OPT_EXPORT_NAME, name.encode("utf-8", "surrogateescape"))
    try:
        size_bytes, flags = unpack(">QH", line.receive(10))
    except NbdError as error:
        raise NbdRefusedError(f"it has no export {name!r}, or {error}") from None
    if zeroes:
        line.receive(124)
    return Export(size_bytes, flags)


def why_not(kind: int, name: str, data: bytes) -> str:
    if kind == ERR_UNKNOWN:
        why = f"it has no export {name!r}: give the name of one (nbdinfo --list)"
    elif kind == ERR_TLS_REQD:
        why = "it wants TLS, which is not here: use a Unix socket, or stunnel"
    else:
        why = f"it refuses the export {name!r} (error {kind & ~REP_ERROR})"
    text = "".join(c for c in data.decode("utf-8", "replace") if c.isprintable())[:200]
    return f"{why} ({text})" if text else why
