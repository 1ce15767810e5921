"""Frames between the agent in the lab and a client outside: one connection a command, nothing shared between commands.

A frame is a kind (one byte), the length of its payload (u32, little endian) and the payload. A client's first frame
is START; the agent's last is EXIT. A second connection that begins with SIGNAL or RESIZE reaches a running command past
whatever standard input still waits on the first.
"""

from __future__ import annotations

import os
import socket
import struct

HEADER = struct.Struct("<BI")
# One read of a pipe; also what a frame may hold at most, but for START.
CHUNK_BYTES = 1 << 16
START_BYTES = 1 << 20
# What a descriptor that takes nothing may keep waiting before its sources are held back.
PENDING_BYTES = 1 << 20

# From the client
START = 1  # JSON: token, argv, env, cwd, terminal ([rows, columns] or null), binds
STDIN = 2  # bytes; an empty payload is the end of the input
CLOSE = 3  # the client's standard output (b"1") or error (b"2") is gone
SIGNAL = 4  # JSON: token, command, number, group (whether the whole process group gets it)
RESIZE = 5  # JSON: token, command, terminal
# From the agent
STARTED = 16  # JSON: command, the number by which SIGNAL and RESIZE name it
STDOUT = 17
STDERR = 18
EXIT = 19  # the exit status in decimal: the command's, or 128 + n if signal n ended it


class ProtocolError(Exception):
    """The other end sends what is no frame."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Takes bytes as they come and gives whole frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that `data` completes. Raises ProtocolError for one that is too long."""
        self._data += data
        found = []
        while len(self._data) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._data)
            if length > START_BYTES:
                raise ProtocolError(f"a frame of {length} bytes")
            end = HEADER.size + length
            if len(self._data) < end:
                break
            found.append((kind, bytes(self._data[HEADER.size : end])))
            del self._data[:end]
        return found


def read_frame(connection: socket.socket) -> tuple[int, bytes]:
    """The next frame, waited for, and not a byte more. Raises EOFError if the connection ends before its end."""
    kind, length = HEADER.unpack(_read_exactly(connection, HEADER.size))
    if length > START_BYTES:
        raise ProtocolError(f"a frame of {length} bytes")
    return kind, _read_exactly(connection, length)


def _read_exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


class Outlet:
    """A descriptor that is written without waiting; what it does not take yet is kept and in order.

    `step_bytes` bounds one write: a pipe or terminal in blocking mode that poll(2) calls writable takes PIPE_BUF.
    """

    def __init__(self, fd: int, step_bytes: int) -> None:
        self.fd = fd
        self.broken = False
        self.ending = False
        self._step_bytes = step_bytes
        self._pending = bytearray()

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    @property
    def full(self) -> bool:
        return len(self._pending) >= PENDING_BYTES

    def put(self, data: bytes) -> None:
        if not self.broken:
            self._pending += data

    def flush(self) -> None:
        """Once, when poll(2) says so. After an error `broken` is set and nothing is kept any more."""
        try:
            del self._pending[: os.write(self.fd, self._pending[: self._step_bytes])]
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
            self._pending.clear()
