"""MigrationStream: what two pyvmm say to each other while a machine moves from one to the other.

    source                          destination
    MAGIC, HEAD, IMAGE ...
                                    READY, or REFUSED and why
    PAGES, ZEROS ... again and again, while the guest runs
    PAGES, ZEROS ..., STATE         the guest stands
                                    LOADED, or REFUSED and why
    GO
                                    GOES                    it is the destination's from here on

Each frame is a kind, a length and so many bytes. HEAD and STATE are plain data as MessagePack (msgpack.pyx); PAGES an
address, little endian, and whole pages; ZEROS an address and a size. Whatever comes in may be a stranger's: a length is
looked at before anything is made of it, and what has not come takes no room.
"""

from __future__ import annotations

import struct
from _socket import AF_INET, AF_INET6, IPPROTO_TCP, TCP_NODELAY
from time import monotonic

from pyvmm.errors import HostError, StateError, VmmError, remedy
from pyvmm.msgpack import pack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any, Self

    from typing_extensions import Buffer

MAGIC = b"pyvmm migration\n"
FORMAT = 1
HEAD, IMAGE, PAGES, ZEROS, STATE, GO = range(1, 7)
READY, REFUSED, LOADED, GOES = range(16, 20)
NAMES = {
    HEAD: "HEAD",
    IMAGE: "IMAGE",
    PAGES: "PAGES",
    ZEROS: "ZEROS",
    STATE: "STATE",
    GO: "GO",
    READY: "READY",
    REFUSED: "REFUSED",
    LOADED: "LOADED",
    GOES: "GOES",
}
FRAME = struct.Struct("<BxxxI")  # kind, length
PLACE = struct.Struct("<Q")
RANGE = struct.Struct("<QQ")
PIECE_BYTES = 1 << 20  # of memory or of an image, in a frame
DATA_BYTES = 64 << 20  # HEAD or STATE: of a machine with 255 vCPUs it is some 4 MiB
WHY_BYTES = 4096
# The longest that each kind may be.
LONGEST = dict.fromkeys(NAMES, 0) | {
    HEAD: DATA_BYTES,
    IMAGE: PIECE_BYTES,
    PAGES: PLACE.size + PIECE_BYTES,
    ZEROS: RANGE.size,
    STATE: DATA_BYTES,
    REFUSED: WHY_BYTES,
}
RECEIVE_BYTES = 1 << 20  # what is received at a time where a length is a stranger's
LOOK_S = 0.1  # how often a wait looks whether it is cancelled
SILENCE_S = 30.0  # a peer from whom nothing comes, or who takes nothing, for so long is gone


class Cancelled(VmmError):
    """Somebody has called the migration off."""


class MigrationStream:
    """One end of a connected socket, which belongs to it from here on. ``cancelled`` is asked in each wait.

    HostError where the connection breaks or the peer is silent, StateError for what the peer may not say.
    """

    def __init__(self, connection: socket.socket, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._socket = connection
        self._cancelled = cancelled
        self.sent_bytes = 0
        connection.settimeout(LOOK_S)
        if connection.family in (AF_INET, AF_INET6):
            # While the guest stands each side waits for a few bytes of the other: they are not to be gathered.
            connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)

    # -- sending

    def greet(self) -> None:
        self._send(MAGIC + FORMAT.to_bytes(4, "little"))

    def send(self, kind: int, data: Buffer = b"") -> None:
        view = memoryview(data).cast("B")
        self._send(FRAME.pack(kind, view.nbytes))
        self._send(view)

    def send_data(self, kind: int, data: dict[str, Any]) -> None:
        self.send(kind, pack(data))

    def send_pages(self, gpa: int, pages: memoryview) -> None:
        """At most PIECE_BYTES."""
        self._send(FRAME.pack(PAGES, PLACE.size + pages.nbytes) + PLACE.pack(gpa))
        self._send(pages)

    def send_zeros(self, gpa: int, size: int) -> None:
        """So many bytes of zeros there, in whole pages."""
        self.send(ZEROS, RANGE.pack(gpa, size))

    def send_why(self, error: BaseException) -> None:
        """That it is refused."""
        self.send(REFUSED, str(error).encode()[:WHY_BYTES])

    def _send(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        done = 0
        since = monotonic()
        while done < view.nbytes:
            self._look()
            try:
                done += self._socket.send(view[done:])
                since = monotonic()
            except TimeoutError:
                self._patience(since)
            except OSError as error:
                raise broken(error) from None
        self.sent_bytes += done

    # -- receiving

    def meet(self) -> None:
        """The peer's greeting."""
        said = bytes(self._receive(len(MAGIC) + 4))
        if not said.startswith(MAGIC):
            raise StateError("the peer sends no machine: it is no `pyvmm` that migrates one")
        if said[len(MAGIC) :] != FORMAT.to_bytes(4, "little"):
            theirs = int.from_bytes(said[len(MAGIC) :], "little")
            raise StateError(f"the peer speaks version {theirs}, this pyvmm {FORMAT}: use the same on both hosts")

    def frame(self, *expected: int) -> tuple[int, int]:
        """Kind and length of the next frame; one that is none of ``expected`` is a StateError."""
        kind, length = FRAME.unpack(self._receive(FRAME.size))
        if kind not in expected:
            what = NAMES.get(kind, f"kind {kind}")
            raise StateError(f"the peer said {what}, where {' or '.join(NAMES[n] for n in expected)} was due")
        if length > LONGEST[kind]:
            raise StateError(f"the peer's {NAMES[kind]} has {length} bytes, {LONGEST[kind]} are the most")
        return kind, length

    def answer(self, expected: int) -> None:
        """Wait for it. StateError with the peer's reason where it refuses."""
        kind, length = self.frame(expected, REFUSED)
        if kind == REFUSED:
            raise StateError(f"the other side refuses: {sentence(self._receive(length))}")

    def data(self, length: int) -> dict[str, Any]:
        value = unpack(bytes(self._receive(length)))
        if not isinstance(value, dict):
            raise StateError("the peer's data is no dict")
        return value

    def bytes(self, length: int) -> bytearray:
        return self._receive(length)

    def place(self) -> int:
        """The address of PAGES."""
        (gpa,) = PLACE.unpack(self._receive(PLACE.size))
        return int(gpa)

    def range(self, length: int) -> tuple[int, int]:
        """Address and size of ZEROS."""
        if length != RANGE.size:
            raise StateError(f"the peer's ZEROS has {length} bytes, not {RANGE.size}")
        gpa, size = RANGE.unpack(self._receive(length))
        return int(gpa), int(size)

    def receive_into(self, view: memoryview) -> None:
        done = 0
        since = monotonic()
        while done < view.nbytes:
            self._look()
            try:
                got = self._socket.recv_into(view[done:])
            except TimeoutError:
                self._patience(since)
                continue
            except OSError as error:
                raise broken(error) from None
            if not got:
                raise HostError("the connection has ended in the middle: the other side is gone")
            done += got
            since = monotonic()

    def _receive(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            piece = bytearray(min(RECEIVE_BYTES, size - len(data)))
            self.receive_into(memoryview(piece))
            data += piece
        return data

    # -- both

    def _look(self) -> None:
        if self._cancelled():
            raise Cancelled("the migration was called off")

    @staticmethod
    def _patience(since: float) -> None:
        if monotonic() - since > SILENCE_S:
            raise HostError(f"the other side was silent for {SILENCE_S:.0f} s: look whether it is alive")

    def told_why(self) -> Told:
        """``with`` it: what is raised inside is told to the other side too, where that still listens."""
        return Told(self)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Told:
    def __init__(self, stream: MigrationStream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if error is not None:
            try:
                self._stream.send_why(error if str(error) else StateError(f"{type(error).__name__} there"))
            except VmmError:
                pass


def sentence(said: bytes | bytearray) -> str:
    """A peer's words, as they may stand in a message: on one line, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in said.decode(errors="replace"))


def broken(error: OSError) -> HostError:
    return HostError(f"the connection broke: {remedy(error, 'look at the other side')}")
