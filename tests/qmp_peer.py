"""A QMP client that can be wrong: it says what it is told to, byte by byte. The right one is the package qemu.qmp."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

LIMIT_S = 120.0


class QmpPeer:
    """``ask`` says a command and gives its answer; events that come meanwhile are in ``events``."""

    def __init__(self, path: Path | str, *, negotiate: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.settimeout(LIMIT_S)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.greeting = self.read()
        if negotiate:
            assert self.ask("qmp_capabilities") == {"return": {}}

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> dict[str, Any]:
        """The next line. EOFError where there is none."""
        line = self._lines.readline()
        if not line:
            raise EOFError
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def reply(self) -> dict[str, Any]:
        """The next answer."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def ask(self, name: str, arguments: Any = None) -> dict[str, Any]:
        request = {"execute": name} if arguments is None else {"execute": name, "arguments": arguments}
        self.send(json.dumps(request).encode() + b"\n")
        return self.reply()

    def get(self, name: str, /, **arguments: Any) -> Any:
        """What a command returns that succeeds. Underscores in names of arguments are dashes."""
        answer = self.ask(name, {key.replace("_", "-"): value for key, value in arguments.items()})
        assert "return" in answer, answer
        return answer["return"]

    def error(self, name: str, /, **arguments: Any) -> str:
        """The description of the error that a command ends with."""
        answer = self.ask(name, {key.replace("_", "-"): value for key, value in arguments.items()})
        assert answer.keys() == {"error"}, answer
        return str(answer["error"]["desc"])

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name, with those before it forgotten."""
        while True:
            message = self.events.pop(0) if self.events else self.read()
            if message.get("event") == name:
                return message

    def hang_up(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> QmpPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.hang_up()
