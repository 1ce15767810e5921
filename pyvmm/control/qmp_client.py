"""QmpClient: the other end of QMP, for our own commands: one request after the other, or many before the first answer.

The qemu.qmp package is the client for programs; it stands on asyncio, which takes longer to import than a command here
takes altogether.
"""

from __future__ import annotations

import json
import socket
from time import monotonic

from pyvmm.control.registry import pid_of
from pyvmm.errors import VmmError, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self

ANSWER_MOST_BYTES = 64 << 20
LIMIT_S = 10.0


class QmpRefused(VmmError):
    """The machine has answered with an error: ``error`` is that, "class" and "desc"."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(f"{error.get('desc')} ({error.get('class')})")
        self.error = error


class NoAnswer(VmmError):
    """Nothing that is QMP has come from there, in time."""


class QmpClient:
    """Connected to the socket at ``path``. An answer is waited for ``limit_s`` seconds at most; NoAnswer then and where
    the machine hangs up. The attribute may be None: as long as it takes. ``pid`` is the process that listens there.
    """

    def __init__(self, path: str, limit_s: float = LIMIT_S) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._lines = self._socket.makefile("rb")
        self.limit_s: float | None = limit_s
        self._greeted = False
        try:
            self._socket.settimeout(limit_s)
            self._socket.connect(path)
            self.pid = pid_of(self._socket)
        except OSError as error:
            self.close()
            raise NoAnswer(f"{path}: {describe(error)}") from None
        self.send("qmp_capabilities")

    def send(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Ask, and ``receive`` the answer later: answers come in the order of asking."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.settimeout(self.limit_s)
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise NoAnswer(describe(error)) from None

    def receive(self) -> Any:
        """What the next command returns that has not been answered. QmpRefused."""
        self.greet()
        return self._answer()

    def greet(self) -> None:
        """Wait for the greeting, which a process that runs at all says at once, and negotiate."""
        if not self._greeted:
            if "QMP" not in self._read(self._end_s()):
                raise NoAnswer("what listens there does not speak QMP")
            self._greeted = True
            self._answer()  # of the negotiation

    def ask(self, command: str, **arguments: Any) -> Any:
        """What ``command`` returns, with nothing else under way. Underscores in names of arguments are dashes."""
        self.send(command, {name.replace("_", "-"): value for name, value in arguments.items()})
        return self.receive()

    def _answer(self) -> Any:
        end_s = self._end_s()
        while "event" in (message := self._read(end_s)):
            pass
        if "return" in message:
            return message["return"]
        raise QmpRefused(message.get("error", {}))

    def _end_s(self) -> float | None:
        return None if self.limit_s is None else monotonic() + self.limit_s

    def _read(self, end_s: float | None) -> dict[str, Any]:
        self._socket.settimeout(None if end_s is None else max(0.001, end_s - monotonic()))
        try:
            line = self._lines.readline(ANSWER_MOST_BYTES)
            message = json.loads(line) if line.endswith(b"\n") else None
        except TimeoutError:
            raise NoAnswer("no answer: its guest has not begun, or its process is stopped") from None
        except (OSError, ValueError, RecursionError) as error:
            raise NoAnswer(describe(error)) from None
        if not isinstance(message, dict):
            raise NoAnswer("it hangs up without an answer" if not line else "what it says is no message of QMP's")
        return message

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
