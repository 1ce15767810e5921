"""The other end of a qtest server: lines out, lines in."""

from __future__ import annotations

import socket
from pathlib import Path

TIMEOUT_S = 20


class Client:
    """``ask(line)`` gives the reply; IRQ lines that came before it are in ``irqs``."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.end.settimeout(TIMEOUT_S)
        self.irqs: list[str] = []
        self._pending = b""

    @classmethod
    def connected_to(cls, path: Path) -> Client:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(path))
        return cls(end)

    def send(self, data: bytes) -> None:
        self.end.sendall(data)

    def line(self) -> str:
        """The next line, whatever it is; EOFError where the server has hung up."""
        while b"\n" not in self._pending:
            data = self.end.recv(1 << 16)
            if not data:
                raise EOFError(self._pending)
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode("latin-1")

    def reply(self) -> str:
        while (line := self.line()).startswith("IRQ "):
            self.irqs.append(line)
        return line

    def ask(self, line: str) -> str:
        self.send(line.encode("latin-1") + b"\n")
        return self.reply()

    def hang_up(self) -> None:
        self.end.close()
