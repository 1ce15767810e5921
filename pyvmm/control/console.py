"""ConsoleServer: a machine's consoles for whoever attaches himself, any number at once, beside the host's own ends.

A client says one line, and is answered with one, "ok" and the console's name or "error" and a sentence:

    attach [CONSOLE]              from then on it has what the guest says there, and what it says is typed
    break CONSOLE                 a break condition on the line
    resize CONSOLE COLUMNS LINES  the size of the screen at that end

Nothing a client does holds up the guest: one that reads too slowly is cut off, and one that types faster than the guest
reads is not read from. With nobody attached a console is as it was made.
"""

from __future__ import annotations

from pyvmm.chardev import NullChardev
from pyvmm.control.socket import SocketServer, complain
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock
    from pyvmm.control.socket import Peer
    from pyvmm.unix_socket import UnixListener

LINE_MOST_BYTES = 256
TYPED_MOST_BYTES = 4096  # so much waits for the guest: nothing more is read of that client
LOOK_AGAIN_NS = 20_000_000
USE = "say attach, break or resize"


class ConsoleServer:
    """Serves at once those who come to ``listener``. ``close`` ends it."""

    def __init__(self, consoles: Mapping[str, Chardev], listener: UnixListener) -> None:
        self._consoles = consoles
        self._server = SocketServer(lambda peer: ConsoleSession(self, peer), complain, what="console")
        self._server.add(listener)
        self._server.serve()

    @property
    def clock(self) -> Clock:
        """That of the server's own loop, which no pause of the guest stops."""
        return self._server.loop.clock

    def named(self, name: str) -> tuple[str, Chardev]:
        """One of that name; without one the serial port, or where nobody is at its end the first other console that
        somebody has. ConfigError.
        """
        if name:
            if name not in self._consoles:
                raise ConfigError(f"there is no console {name!r}, there are: {', '.join(self._consoles)}")
            return name, self._consoles[name]
        seen = {key: end for key, end in self._consoles.items() if not isinstance(end, NullChardev)}
        found = {key: end for key, end in (seen or self._consoles).items() if key != "debugcon"} or self._consoles
        if not found:
            raise ConfigError("the machine has no console")
        first = "serial" if "serial" in found else next(iter(found))
        return first, found[first]

    def close(self) -> None:
        self._server.close()

    def abandon(self) -> None:
        """In a child of fork: only the descriptors."""
        self._server.abandon()


class ConsoleSession:
    def __init__(self, server: ConsoleServer, peer: Peer) -> None:
        self._server = server
        self._peer = peer
        self._line = b""
        self._console: Chardev | None = None  # that it is attached to
        self._again = server.clock.timer(self._look_again)

    def receive(self, data: bytes) -> None:
        if self._console is not None:
            self._type(data)
            return
        line, end, rest = (self._line + data).partition(b"\n")
        self._line = line
        if len(line) > LINE_MOST_BYTES or (end and not line.strip()):
            self._refuse(USE)
        elif end:
            try:
                self._do(*line.decode("ascii", "replace").split())
            except ConfigError as error:
                self._refuse(str(error))
            else:
                if rest and self._console is not None:
                    self._type(rest)

    def gone(self) -> None:
        self._again.disarm()
        if self._console is not None:
            self._console.forget(self._peer.send)

    def _do(self, verb: str, console: str = "", *more: str) -> None:
        name, end = self._server.named(console)
        if verb == "attach" and not more:
            self._peer.send(f"ok {name}\n".encode())
            self._console = end
            end.listen(self._peer.send)
            return
        if verb == "break" and not more:
            end.send_break()
        elif verb == "resize" and len(more) == 2 and all(each.isdecimal() for each in more):
            end.resize(int(more[0]), int(more[1]))
        else:
            raise ConfigError(USE)
        self._peer.send(f"ok {name}\n".encode())
        self._peer.close()

    def _refuse(self, why: str) -> None:
        self._peer.send(f"error {why}\n".encode())
        self._peer.close()

    def _type(self, data: bytes) -> None:
        assert self._console is not None
        self._console.feed(data)
        if self._console.fed_bytes > TYPED_MOST_BYTES and not self._peer.closed:
            if not self._peer.held:
                self._peer.hold()
            self._again.arm(self._server.clock.now_ns() + LOOK_AGAIN_NS)

    def _look_again(self) -> None:
        """The guest may have read meanwhile."""
        if self._peer.closed or self._console is None:
            return
        if self._console.fed_bytes > TYPED_MOST_BYTES:
            self._type(b"")
        elif self._peer.held:
            self._peer.go_on()
