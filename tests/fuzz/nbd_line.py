"""Replies without sense from an NBD server: headers, cookies, places and lengths of any kind, cut anywhere.

    python tests/fuzz/nbd_line.py [--cases N] [--seed N]     so many inputs by a generator

Nothing but an NbdError may be raised. Each request ends once, by an answer or with the connection, and with a result
that it can have; no byte around a request's memory changes, and what it is in is nobody's any more.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pyvmm.block.protocols.nbd_handshake import NbdError
from pyvmm.block.protocols.nbd_line import WRONG, NbdLine
from pyvmm.block.protocols.nbd_request import NbdRequest

READ, WRITE, FLUSH, TRIM = 0, 1, 3, 4
SIMPLE, CHUNK = 0x67446698, 0x668E33EF
SIZES = (512, 4096, 20_000, 70_000)
LENGTHS = (0, 1, 8, 12, 20, 512, 520, 4104, 0xFFFF_FFFF)
EDGES = (0, 1, 512, 4096, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
MARGIN = b"\xa5" * 64
MOST_REQUESTS = 6
MOST_REPLIES = 12


class Input:
    """Choices out of bytes; zeros where there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def of(self, values: tuple[int, ...]) -> int:
        return values[self.byte() % len(values)]


class Asked:
    """A request with its memory between margins, in one piece or two."""

    def __init__(self, given: Input, number: int) -> None:
        kind = given.of((READ, READ, READ, WRITE, FLUSH, TRIM))
        self.length = given.of(SIZES) if kind in (READ, WRITE) else 0
        cut = given.byte() * self.length // 256
        sizes = [size for size in (cut, self.length - cut) if size]
        self.memory = [bytearray(MARGIN + bytes(size) + MARGIN) for size in sizes]
        views = [memoryview(memory)[len(MARGIN) : -len(MARGIN)] for memory in self.memory]
        self.request = NbdRequest(kind, 0, number << 20, self.length, views)
        self.cookie = b""

    def check(self, result: int) -> None:
        assert result == self.length or -4096 < result < 0, result
        for view in self.request.iov:
            view.release()  # BufferError, if somebody had it still
        for memory in self.memory:
            assert memory.startswith(MARGIN) and memory.endswith(MARGIN)


class Target:
    def __init__(self) -> None:
        self.ended = 0
        self.told: set[str] = set()

    def __call__(self, data: bytes) -> None:
        given = Input(data)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            line = NbdLine(-1, 0, 0, 0)
            line.begin(ours.fileno(), bool(given.byte() & 1), 1 << 20, 1)
            asked = {}
            for number in range(1 + given.byte() % MOST_REQUESTS):
                one = Asked(given, number)
                request = one.request
                assert line.ask(request, request.kind, 0, request.offset, request.length, request.iov)
                asked[request] = one
            line.fall_asleep()
            self.take_cookies(theirs, list(asked.values()))
            for _ in range(given.byte() % MOST_REPLIES):
                if not self.reply(given, theirs, list(asked.values())) or not self.receive(line, asked):
                    break
            for request in line.end():
                asked.pop(request).check(-5)
            assert not asked
            assert line.unsent == 0 and line.oldest_s is None

    def take_cookies(self, theirs: socket.socket, asked: list[Asked]) -> None:
        stream = b""
        while True:
            try:
                stream += theirs.recv(1 << 20)
            except BlockingIOError:
                break
        at = 0
        for one in asked:
            if len(stream) < at + 28:
                return  # the socket had no room for it yet: who guesses its name?
            one.cookie = stream[at + 8 : at + 16]
            at += 28 + (one.length if one.request.kind == WRITE else 0)

    def reply(self, given: Input, theirs: socket.socket, asked: list[Asked]) -> bool:
        one = asked[given.byte() % len(asked)] if asked else None
        cookie = one.cookie if one is not None and one.cookie and given.byte() % 32 else bytes([given.byte()]) * 8
        offset, length = (one.request.offset, one.length) if one is not None else (0, 0)
        what = given.byte() % 16
        if what < 4:
            message = struct.pack(">II", SIMPLE, given.of((0, 0, 0, 5, 28, 0xFFFF_FFFF))) + cookie
            message += b"s" * length if given.byte() & 1 else b""
        elif what == 4:
            message = bytes(given.byte() for _ in range(given.byte() % 64))
        else:
            message = self.chunk(given, cookie, offset, length)
        cut = given.byte()
        if cut > 251:
            message = message[: len(message) * (cut - 251) // 5]
        try:
            theirs.sendall(message)
        except BlockingIOError:
            return False
        return True

    def chunk(self, given: Input, cookie: bytes, offset: int, length: int) -> bytes:
        kind = given.of((1, 1, 1, 2, 0, 1 << 15 | 1, 1 << 15 | 2, 77))
        begin = given.byte() * length // 256 if given.byte() & 1 else 0
        size = max(1, given.byte() * (length - begin) // 255)
        place = offset + begin if given.byte() % 8 else given.of(EDGES)
        if kind == 1:
            body = struct.pack(">Q", place) + b"c" * size
        elif kind == 2:
            body = struct.pack(">QI", place, size if given.byte() % 8 else given.of(LENGTHS))
        elif kind >> 15:
            text = b"x" * (given.byte() % 20)
            body = struct.pack(">IH", given.of((5, 28, 0)), len(text) + given.of((0, 0, 0, 1))) + text
            body += struct.pack(">Q", place) if kind & 2 else b""
        else:
            body = b"?" * given.of((0, 0, 0, 3))
        says = len(body) if given.byte() % 8 else given.of(LENGTHS)
        return struct.pack(">IHH", CHUNK, given.byte() & 1, kind) + cookie + struct.pack(">I", says) + body

    def receive(self, line: NbdLine, asked: dict[NbdRequest, Asked]) -> bool:
        """False: the connection is over."""
        more = True
        while more:
            try:
                ended, more = line.receive()
            except NbdError as error:
                assert str(error) in WRONG
                self.told.add(str(error))
                return False
            for request, result in ended:
                one = asked.pop(request)
                one.check(result)
                self.ended += 1
        return True


def run(cases: int, seed: int) -> Target:
    """So many inputs: the target, with what it has seen."""
    target = Target()
    source = random.Random(seed)
    for n in range(cases):
        data = source.randbytes(source.choice((20, 60, 200)))
        try:
            target(data)
        except BaseException as error:
            error.add_note(f"input {n} of seed {seed}: {data.hex()}")
            raise
    return target


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    target = run(args.cases, args.seed)
    print(f"{args.cases} inputs of seed {args.seed}: {target.ended} requests answered, {len(target.told)} lies told")


if __name__ == "__main__":
    main()
