"""An NBD server for tests, that tells the truth or does not (NetworkBlockDevice doc/proto.md)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from struct import pack, unpack

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES = range(7)
OPTION_REPLY = 0x3E889045565A9
ALL_FLAGS = 0b1101101  # has flags, flush, FUA, trim, write zeroes


class Asked:
    """One request, as it came."""

    def __init__(self, flags: int, kind: int, cookie: int, offset: int, length: int, data: bytes) -> None:
        self.flags = flags
        self.kind = kind
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.data = data


class Client:
    """A connection, as the server has it."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line

    def get(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.line.recv(count - len(data))
            if not part:
                raise ConnectionError
            data += part
        return data

    def put(self, data: bytes) -> None:
        self.line.sendall(data)

    def simple(self, asked: Asked, error: int = 0, data: bytes = b"") -> None:
        self.put(pack(">IIQ", 0x67446698, error, asked.cookie) + data)

    def chunk(self, asked: Asked, kind: int, data: bytes = b"", *, done: bool = True) -> None:
        self.put(pack(">IHHQI", 0x668E33EF, int(done), kind, asked.cookie, len(data)) + data)


Answer = Callable[[Client, Asked], object]


class NbdServer:
    """Serves ``data`` at a Unix socket. ``asked`` is all that came; ``answer`` is called for each and may be anything.

    ``begin``, where given, is all that a client gets to hear, in place of the negotiation.
    """

    def __init__(
        self,
        path: Path,
        size_bytes: int = 1 << 20,
        *,
        flags: int = ALL_FLAGS,
        structured: bool = True,
        go: bool = True,
        blocks: tuple[int, int, int] | None = None,
        answer: Answer | None = None,
        begin: Callable[[Client], object] | None = None,
    ) -> None:
        self.path = path
        self.data = bytearray(bytes(range(256)) * (size_bytes // 256))
        self.size_bytes = size_bytes
        self.flags = flags
        self.structured = structured
        self.go = go
        self.blocks = blocks
        self.answer = answer or self.tell_the_truth
        self.begin = begin
        self.asked: list[Asked] = []
        self.names: list[bytes] = []
        self.came = threading.Semaphore(0)  # a client
        self._clients: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._structured_now = False
        self.listen()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        listener = self._listener
        while True:
            try:
                line = listener.accept()[0]
            except OSError:
                return
            self._clients.append(line)
            self.came.release()
            self._start(lambda line=line: self._serve(Client(line)))  # type: ignore[misc]

    def hang_up(self) -> None:
        """End every connection, and listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._clients:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        try:
            self.hang_up()
        except OSError:
            pass
        for thread in self._threads:
            thread.join()
        for line in self._clients:
            line.close()

    def _serve(self, client: Client) -> None:
        try:
            if self.begin is not None:
                self.begin(client)
                client.get(1 << 20)
            elif self._negotiate(client):
                while self._one(client):
                    pass
        except OSError:
            pass
        finally:
            client.line.close()

    def _negotiate(self, client: Client) -> bool:
        client.put(b"NBDMAGICIHAVEOPT" + pack(">H", 3))
        zeroes = not unpack(">I", client.get(4))[0] & 2
        while True:
            magic, option, length = unpack(">8sII", client.get(16))
            assert magic == b"IHAVEOPT"
            data = client.get(length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                client.put(pack(">QIII", OPTION_REPLY, option, kind, len(data)) + data)

            if option == 8 and self.structured:
                self._structured_now = True
                reply(1)
            elif option == 7 and self.go:
                self.names.append(data[4:-4])
                reply(3, pack(">HQH", 0, self.size_bytes, self.flags))
                if self.blocks is not None:
                    reply(3, pack(">HIII", 3, *self.blocks))
                reply(1)
                return True
            elif option == 1:
                self.names.append(data)
                client.put(pack(">QH", self.size_bytes, self.flags) + bytes(124 if zeroes else 0))
                return True
            else:
                reply(1 << 31 | 1)

    def _one(self, client: Client) -> bool:
        magic, flags, kind, cookie, offset, length = unpack(">IHHQQI", client.get(28))
        assert magic == 0x25609513
        asked = Asked(flags, kind, cookie, offset, length, client.get(length) if kind == WRITE else b"")
        self.asked.append(asked)
        if kind == DISC:
            return False
        self.answer(client, asked)
        return True

    def tell_the_truth(self, client: Client, asked: Asked) -> None:
        begin, end = asked.offset, asked.offset + asked.length
        if asked.kind == WRITE:
            self.data[begin:end] = asked.data
        elif asked.kind == WRITE_ZEROES:
            self.data[begin:end] = bytes(asked.length)
        if asked.kind != READ:
            client.simple(asked)
        elif self.structured:
            client.chunk(asked, 1, pack(">Q", begin) + self.data[begin:end])
        else:
            client.simple(asked, 0, bytes(self.data[begin:end]))
