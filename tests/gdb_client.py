"""A client of gdb's remote protocol, for tests: a packet, its reply, and what the machine stops with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LIMIT_S = 240.0 if "PYVMM_LAB" in os.environ else 60.0


def framed(data: bytes) -> bytes:
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


class GdbClient:
    """Connected to a Unix socket; acknowledges what it gets, until ``no_ack``."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(str(path))
        self._pending = b""
        self._acks = True

    def __enter__(self) -> GdbClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def no_ack(self) -> None:
        assert self.ask("QStartNoAckMode") == "OK"
        self._acks = False

    def send(self, packet: str | bytes) -> None:
        """A packet, for which the reply comes later or not at all."""
        self.socket.sendall(framed(packet.encode() if isinstance(packet, str) else packet))
        if self._acks:
            assert self.byte() == b"+"

    def ask(self, packet: str | bytes) -> str:
        self.send(packet)
        return self.reply()

    def interrupt(self) -> None:
        self.socket.sendall(b"\x03")

    def byte(self) -> bytes:
        self._fill(1)
        first, self._pending = self._pending[:1], self._pending[1:]
        return first

    def _fill(self, size: int) -> None:
        while len(self._pending) < size:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the server has hung up")
            self._pending += data

    def reply(self) -> str:
        """The next packet."""
        while b"#" not in self._pending or len(self._pending.partition(b"#")[2]) < 2:
            self._fill(len(self._pending) + 1)
        data, _, rest = self._pending.partition(b"#")
        digits, self._pending = rest[:2], rest[2:]
        assert data[:1] == b"$", data
        assert int(digits, 16) == sum(data[1:]) & 0xFF
        if self._acks:
            self.socket.sendall(b"+")
        return data[1:].decode("latin-1")

    def gone(self) -> bool:
        """Wait for the server to hang up."""
        try:
            return not self.socket.recv(1)
        except ConnectionError:
            return True

    # -- what tests ask again and again ------------------------------------------------------------------------

    def register(self, number: int) -> int:
        return int.from_bytes(bytes.fromhex(self.ask(f"p{number:x}")), "little")

    def memory(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(f"m{address:x},{size:x}"))

    def monitor(self, line: str) -> str:
        """What ``monitor`` shows."""
        self.send(b"qRcmd," + line.encode().hex().encode())
        text = ""
        while (reply := self.reply()) != "OK":
            assert reply[0] == "O", reply
            text += bytes.fromhex(reply[1:]).decode()
        return text


RAX, RBX, RCX, RIP = 0, 1, 2, 16
