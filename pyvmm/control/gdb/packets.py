"""Packets of gdb's remote serial protocol: ``$data#checksum``, and what stands between them.

gdb's documentation, "Remote Serial Protocol", Overview: a byte 0x7d escapes the next, which is sent with bit 5 the
other way round; the checksum is the sum of what is sent between ``$`` and ``#``, in two hexadecimal digits.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# How long a packet may be, its data as they are sent. gdb asks for no more memory at once than the answer has room for.
PACKET_BYTES: Final = 0x4000
ESCAPE, FLIP = 0x7D, 0x20
ESCAPED = b"#$}*"

# Besides packets, which are bytes:
ACK = "ack"
NACK = "nack"
INTERRUPT = "interrupt"
DAMAGED = "damaged"
"""A packet with a wrong checksum, or one that is too long."""


class PacketReader:
    """``feed`` takes what has come, cut anywhere; ``next`` gives what that was, one after the other.

    It holds no more than one packet and what was fed last.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._overlong = False  # the rest of a packet that is too long is on its way

    def feed(self, data: bytes) -> None:
        self._pending += data

    def next(self) -> bytes | str | None:
        """A packet's data without escapes; ACK, NACK, INTERRUPT or DAMAGED; None: nothing whole is there."""
        pending = self._pending
        while pending:
            if self._overlong:
                return self._rest_of_overlong()
            first = pending[0]
            if first == ord("$"):
                return self._packet()
            # Packets aside there is but this: everything else is noise.
            del pending[0]
            if first == ord("+"):
                return ACK
            if first == ord("-"):
                return NACK
            if first == 3:
                return INTERRUPT
            self._drop_noise()
        return None

    def _drop_noise(self) -> None:
        """All up to what may mean something, at once."""
        for n, byte in enumerate(self._pending):
            if byte in b"$+-\x03":
                del self._pending[:n]
                return
        self._pending.clear()

    def _packet(self) -> bytes | str | None:
        pending = self._pending
        end = pending.find(b"#", 1, PACKET_BYTES + 2)
        if end < 0 and len(pending) > PACKET_BYTES + 1:
            self._overlong = True
            return self._rest_of_overlong()
        if end < 0 or len(pending) < end + 3:
            return None
        # A $ is never part of one: the beginning of the packet before got lost.
        start = pending.rfind(b"$", 0, end) + 1
        data, digits = bytes(pending[start:end]), bytes(pending[end + 1 : end + 3])
        del pending[: end + 3]
        return unescape(data) if checksum(data) == digits.lower() else DAMAGED

    def _rest_of_overlong(self) -> str | None:
        end = self._pending.find(b"#")
        if end < 0 or len(self._pending) < end + 3:
            # The # and the digits behind it may come apart.
            del self._pending[: end if end >= 0 else len(self._pending)]
            return None
        del self._pending[: end + 3]
        self._overlong = False
        return DAMAGED


def checksum(data: bytes) -> bytes:
    return b"%02x" % (sum(data) & 0xFF)


def frame(data: bytes) -> bytes:
    """As it is sent."""
    return b"$" + data + b"#" + checksum(data)


def escape(data: bytes) -> bytes:
    """Binary data of a reply."""
    if not any(byte in data for byte in ESCAPED):
        return data
    return b"".join(bytes((ESCAPE, byte ^ FLIP)) if byte in ESCAPED else bytes((byte,)) for byte in data)


def unescape(data: bytes) -> bytes:
    """An escape with nothing behind it is left out."""
    if ESCAPE not in data:
        return data
    first, *others = data.split(bytes((ESCAPE,)))
    whole, n = bytearray(first), 0
    while n < len(others):
        part = others[n]
        if part:
            whole.append(part[0] ^ FLIP)
            whole += part[1:]
        elif n + 1 < len(others):
            # Two in a row: the second is what the first escapes.
            whole.append(ESCAPE ^ FLIP)
            n += 1
            whole += others[n]
        n += 1
    return bytes(whole)
