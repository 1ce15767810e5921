"""GdbServer: where gdb connects to a machine. One client at a time; the next one waits until it has left."""

from __future__ import annotations

import os

from pyvmm.control.gdb.session import Session
from pyvmm.control.gdb.target import Target
from pyvmm.control.socket import Peer, SocketServer
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.chassis import Chassis
    from pyvmm.cpu import Cpu
    from pyvmm.events import Event, Events
    from pyvmm.memory_map import MemoryMap
    from pyvmm.platform import Platform

WHAT = "gdb"


class GdbServer:
    """Serves ``target`` on a Unix socket or a port of the loopback. ``where`` says which it became.

    ``wait``: the machine does not begin before a debugger has said so. ConfigError where nobody can connect there.
    """

    def __init__(
        self,
        where: str | int,
        target: Target,
        events: Events,
        on_error: Callable[[BaseException], None],
        *,
        wait: bool = False,
    ) -> None:
        self._target = target
        self.registers = target.registers
        self._events = events
        self._session: Session | None = None
        self._server = SocketServer(self._begin, on_error, what=WHAT, most_clients=1, on_client=self._client)
        try:
            self.where = self._listen(where)
            if wait:
                target.want()
            # What a stop means is looked at on the server's thread: two ways to it, one order.
            events.listen(self._on_event, "stop", "shutdown", "resume")
            self._server.serve()
        except BaseException:
            self._server.close()
            raise

    def _listen(self, where: str | int) -> str | int:
        if isinstance(where, int):
            return self._server.listen_port(where)
        self._server.listen(where)
        return where

    def _begin(self, peer: Peer) -> Session:
        self._session = Session(peer, self._target, self._ended)
        return self._session

    def _client(self, did: str) -> None:
        self._events.tell("client", protocol="gdb", did=did)

    def _ended(self) -> None:
        self._session = None

    def _on_event(self, event: Event) -> None:
        self._server.later(self._look)

    def _look(self) -> None:
        if self._session is not None:
            self._session.look()
        else:
            self._target.went_on()

    def close(self) -> None:
        """Cut the client off; one that waits for the machine is told if that has ended. Again is fine."""
        self._events.forget(self._on_event)
        if (session := self._session) is not None:
            session.finish()
        self._server.close()
        self._target.release(self)

    def abandon(self) -> None:
        """In a child of fork: only the descriptors."""
        self._server.abandon()


def serve(
    where: str | os.PathLike[str] | int,
    chassis: Chassis,
    platform: Platform,
    memory_map: MemoryMap,
    resume: Callable[[Sequence[Cpu] | None], None],
    *,
    wait: bool,
) -> GdbServer:
    """What Machine.serve_gdb does; ``resume`` is how that machine goes on (target.py)."""
    if chassis.debugger is not None:
        raise ConfigError("this machine is served to gdb already: one debugger has it at a time")
    target = Target(chassis, platform, memory_map, resume)
    server = GdbServer(place(where), target, chassis.events, chassis.outcomes.callback_raised, wait=wait)
    chassis.debugger = server
    return chassis.closers.add(server)


def place(where: object) -> str | int:
    """ConfigError for what is neither a path nor a port."""
    if isinstance(where, (str, os.PathLike)):
        path = os.fsdecode(where)
        if path and "\0" not in path:
            return path
    elif isinstance(where, int) and not isinstance(where, bool) and 0 <= where < 1 << 16:
        return where
    raise ConfigError(f"{WHAT}={where!r}: give the path of a socket, or a port below 65536")
