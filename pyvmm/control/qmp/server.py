"""QmpServer: QMP for one machine, on a Unix socket.

It is the machine's own event loop that asyncio would stand beside: none of that is imported here. The qemu.qmp package
is the other end, in the tests.
"""

from __future__ import annotations

from pyvmm.control.qmp import (
    block,
    cpus,
    memory,
    migration,
    monitor,
    net,
    objects,
    pci,
    schema,
    snapshots,
    stats,
    status,
    trace,
    watch,
)
from pyvmm.control.qmp.news import News
from pyvmm.control.qmp.session import QmpSession
from pyvmm.control.qmp.status import version
from pyvmm.control.socket import SocketServer, complain
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Machine
    from pyvmm.control.socket import Peer
    from pyvmm.unix_socket import UnixListener

GROUPS = (block, cpus, memory, migration, monitor, net, objects, pci, schema, snapshots, stats, status, trace, watch)


class QmpServer:
    """``listen`` makes a socket, ``add`` takes one that is there; clients are served at once, any number of them, each
    told of all events. ``close`` ends it: the machine does so at its own end.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.greeting: dict[str, Any] = {"QMP": {"version": version(), "capabilities": []}}
        self.sockets = SocketServer(lambda peer: self._session(peer), complain, what="--qmp", on_client=self._client)
        self.kvm_stats: Any = None
        """The kernel's statistics, once somebody has asked for them (stats.py)."""
        self.migration: dict[str, Any] = {"status": "none"}
        """What came of the last one (migration.py), changed with ``migrating`` held."""
        self.migrating = Lock()
        self._lock = Lock()
        self._hearing: tuple[QmpSession, ...] = ()
        self._news = News(machine, self.tell)
        self.sockets.serve()

    @property
    def closing(self) -> bool:
        """Whether it is being closed: what takes long ends."""
        return self.sockets.closing

    def listen(self, path: str) -> None:
        """A socket that only this user may connect to. ConfigError where there can't be one."""
        self.sockets.listen(path)

    def add(self, listener: UnixListener) -> None:
        """The same for one that was made before."""
        self.sockets.add(listener)

    # -- clients ----------------------------------------------------------------------------------------------------

    def _client(self, did: str) -> None:
        self.machine.events.tell("client", protocol="qmp", did=did)

    def _session(self, peer: Peer) -> QmpSession:
        return QmpSession(self, peer)

    def joined(self, session: QmpSession, answer: bytes) -> None:
        """A session's own: it is told of events from now on. No event comes before ``answer``, and none is left out
        that happens once the client has that. With nobody to tell nobody listens.
        """
        with self._lock:
            if not self._hearing:
                self._news.listen()
            session.tell(answer)
            self._hearing = (*self._hearing, session)

    def left(self, session: QmpSession) -> None:
        """A session's own: its client has gone."""
        with self._lock:
            if session in self._hearing:
                self._hearing = tuple(each for each in self._hearing if each is not session)
                if not self._hearing:
                    self._news.forget()

    def tell(self, line: bytes) -> None:
        """An event, to every client that is told of them. From any thread."""
        with self._lock:
            for session in self._hearing:
                session.tell(line)

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Hang up, when everybody has been told of all that has happened. Again is fine."""
        if not self.sockets.closing:
            self.machine.events.flush()
        self.sockets.close()
        self._close_stats()

    def abandon(self) -> None:
        """In a child of fork: only the descriptors."""
        self.sockets.abandon()
        self._close_stats()

    def _close_stats(self) -> None:
        stats, self.kvm_stats = self.kvm_stats, None
        if stats is not None:
            stats.close()
