"""A QMP client that makes no sense: bytes, cut anywhere, into a session whose commands do nothing.

What must hold: nothing is raised, every line that goes out is JSON with an answer or an error, and a request that
follows on a line of its own is answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pyvmm.control.qmp import server  # noqa: F401  # all groups of commands
from pyvmm.control.qmp.session import QmpSession
from pyvmm.control.qmp.table import COMMANDS, Command
from pyvmm.control.qmp.wire import MESSAGE_MOST_BYTES

LAST = b'\n{"execute": "query-status", "id": "last"}\n'


class Peer:
    """The way back: what is sent is looked at."""

    crowded = closed = held = False

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, line: bytes) -> None:
        assert line.endswith(b"\r\n")
        assert line.isascii()
        message = json.loads(line)
        assert {"return", "error", "QMP"} & message.keys(), message
        self.sent.append(message)

    def hold(self) -> None:
        self.held = True

    def go_on(self) -> None:
        self.held = False


class Server:
    """Work that takes long is done at once."""

    greeting: dict[str, Any] = {"QMP": {}}

    def __init__(self) -> None:
        self.sockets = self

    def work(self, job: Callable[[], object], then: Callable[[], None]) -> None:
        job()
        then()

    def joined(self, session: QmpSession, answer: bytes) -> None:
        session.tell(answer)

    def left(self, session: QmpSession) -> None: ...


def nothing(self: Command, served: object, taken: dict[str, Any]) -> dict[str, Any]:
    """In place of what a command does."""
    return {}


def one_input(data: bytes) -> None:
    """The first byte says into how many pieces the others are cut."""
    before, Command.carry_out = Command.carry_out, nothing  # type: ignore[method-assign]
    try:
        peer = Peer()
        session: Any = QmpSession(Server(), peer)  # type: ignore[arg-type]
        session.receive(b'{"execute": "qmp_capabilities"}')
        assert peer.sent[-1] == {"return": {}}
        body = data[1:]
        step = 1 + (data[0] if data else 0)
        for at in range(0, len(body), step):
            session.receive(body[at : at + step])
        # Whatever string or object is still open is ended, for good, by more than a message may have.
        session.receive(b" " * (MESSAGE_MOST_BYTES + 1))
        session.receive(LAST)
        assert peer.sent[-1] == {"return": {}, "id": "last"}, peer.sent[-1]
        session.gone()
    finally:
        Command.carry_out = before  # type: ignore[method-assign]


NAMES = list(COMMANDS)
