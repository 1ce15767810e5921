"""QmpSession: the conversation with one client (QEMU docs/interop/qmp-spec.rst).

The client is greeted, and negotiates: until ``qmp_capabilities`` nothing else is carried out, and no event comes. From
then on each request is answered, in their order: one that waits for the machine is carried out on a thread of its own,
and nothing more is read from this client until it is answered.
"""

from __future__ import annotations

import sys

from pyvmm.control.qmp.kinds import QmpError
from pyvmm.control.qmp.table import find
from pyvmm.control.qmp.wire import Broken, Splitter, decode, encode
from pyvmm.errors import VmmError, describe
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.control.qmp.table import Command
    from pyvmm.control.socket import Peer, SocketServer

    class Server(Protocol):
        """What it is one client of (server.py)."""

        greeting: dict[str, Any]
        sockets: SocketServer

        def joined(self, session: QmpSession, answer: bytes) -> None: ...
        def left(self, session: QmpSession) -> None: ...


MEMBERS = ("execute", "arguments", "id")
CAPABILITIES = "qmp_capabilities"


class QmpSession:
    def __init__(self, server: Server, peer: Peer) -> None:
        self._server = server
        self._peer = peer
        self._splitter = Splitter()
        self._waiting: deque[bytes | Broken] = deque()  # what has come and is not carried out
        self._busy = False  # a request is being carried out elsewhere
        self.negotiated = False
        """Whether it is told of events, and its commands are carried out."""
        peer.send(encode(server.greeting))

    # -- the socket's side, on the server's thread --------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        self._waiting.extend(self._splitter.feed(data))
        self._go_on()

    def roomy(self) -> None:
        """The client has read what it had been sent."""
        self._go_on()

    def gone(self) -> None:
        self._waiting.clear()
        self._server.left(self)

    def tell(self, line: bytes) -> None:
        """A line that is no answer of ours; from any thread."""
        self._peer.send(line)

    def _go_on(self) -> None:
        """Carry out what has come, as long as nothing stands in the way; then, and only then, read more."""
        peer = self._peer
        while self._waiting and not self._busy and not peer.crowded and not peer.closed:
            self._take(self._waiting.popleft())
        if peer.closed:
            return
        stands = self._busy or peer.crowded
        if stands and not peer.held:
            peer.hold()
        elif not stands and peer.held:
            peer.go_on()

    # -- a request ------------------------------------------------------------------------------------------------

    def _take(self, message: bytes | Broken) -> None:
        about: dict[str, Any] = {}
        try:
            if isinstance(message, Broken):
                raise message
            request = decode(message)
            if "id" in request:
                about["id"] = request["id"]
            command, taken = self._checked(request)
        except Broken as broken:
            self._answer(about, error=QmpError(broken.args[0]))
        except QmpError as error:
            self._answer(about, error=error)
        else:
            if command.name == CAPABILITIES:
                self._negotiate(command, taken, about)
            elif command.waits:
                self._carry_out_elsewhere(command, taken, about)
            else:
                self._peer.send(self._carry_out(command, taken, about))

    def _checked(self, request: dict[str, Any]) -> tuple[Command, dict[str, Any]]:
        """What it asks for, and its arguments. QmpError."""
        for name in request:
            if name not in MEMBERS:
                raise QmpError(f"QMP input member '{name[:80]}' is unexpected")
        if "execute" not in request:
            raise QmpError("QMP input lacks member 'execute'")
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == CAPABILITIES and self.negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if name != CAPABILITIES and not self.negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        command = find(name)
        return command, command.check(arguments)

    def _negotiate(self, command: Command, taken: dict[str, Any], about: dict[str, Any]) -> None:
        try:
            command.carry_out(self._server, taken)
        except QmpError as error:
            self._answer(about, error=error)
            return
        self.negotiated = True
        self._server.joined(self, encode({"return": {}, **about}))

    def _carry_out_elsewhere(self, command: Command, taken: dict[str, Any], about: dict[str, Any]) -> None:
        lines: list[bytes] = []

        def done() -> None:
            self._busy = False
            for line in lines:
                self._peer.send(line)
            self._go_on()

        self._busy = True
        try:
            self._server.sockets.work(lambda: lines.append(self._carry_out(command, taken, about)), done)
        except VmmError as error:  # no thread is to be had
            self._busy = False
            self._answer(about, error=QmpError(str(error)))

    def _carry_out(self, command: Command, taken: dict[str, Any], about: dict[str, Any]) -> bytes:
        """The answer. Nothing that a command raises goes further."""
        try:
            return encode({"return": command.carry_out(self._server, taken), **about})
        except QmpError as error:
            failure = error
        except (VmmError, OSError) as error:  # a TimeoutError is an OSError too
            failure = QmpError(" ".join(str(error).split()) or describe(error))
        except MemoryError:
            failure = QmpError("this host has no memory left for that")
        except Exception as error:
            # A mistake of ours. The machine is none the worse for it.
            import traceback

            traceback.print_exc(file=sys.stderr)
            failure = QmpError(f"internal error: {describe(error)}")
        return self._error(failure, about)

    def _answer(self, about: dict[str, Any], *, error: QmpError) -> None:
        self._peer.send(self._error(error, about))

    @staticmethod
    def _error(error: QmpError, about: dict[str, Any]) -> bytes:
        return encode({"error": {"class": error.class_, "desc": error.desc}, **about})
