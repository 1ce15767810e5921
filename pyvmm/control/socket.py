"""SocketServer: the socket half of what talks to a machine from outside: QMP, gdb.

It has an event loop of its own beside the machine's, and so a thread: what a client asks for may have to wait for the
machine (for vCPUs to park, say), and neither the guest's timers nor its console wait with it. What takes long is not
for that thread either: other clients are on it (``work``).

A protocol is a class with ``receive(data)`` and ``gone()``, called on that thread; one is made for each client, with
its ``Peer``, the way back.

What clients can make grow is bounded. One that sends and does not read is not read from any more (``crowded``), one
that is told of things and does not read is cut off. More clients than MOST_CLIENTS wait until others have left,
or where nobody stays long (``crowd_out``) the one that has been there the longest makes room.
"""

from __future__ import annotations

import sys
from _socket import AF_INET, AF_INET6, SHUT_RDWR, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

from pyvmm.errors import ConfigError, StateError, remedy, traceback_text
from pyvmm.event_loop import EventLoop
from pyvmm.light import Lock, Thread, deque
from pyvmm.unix_socket import UnixListener, accept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Session(Protocol):
        """What a client and the machine say to each other. Called on the server's thread."""

        def receive(self, data: bytes) -> object:
            """So many bytes have come, cut anywhere."""

        def gone(self) -> object:
            """The client has left, or was cut off; nothing is called after this."""

    class Listener(Protocol):
        @property
        def fd(self) -> int: ...
        def accept(self) -> int: ...
        def close(self) -> None: ...
        def abandon(self) -> None: ...


MOST_CLIENTS = 64
BACKLOG = 512  # a Unix socket refuses who comes beyond it, and does not wait
ACCEPTS_A_TURN = 16
READ_BYTES = 1 << 16
CROWDED_BYTES = 1 << 16  # so much waits for a client: nothing more of it is read until it has read that
UNREAD_MOST_BYTES = 1 << 20  # so much waits for it, and there is more: it is cut off
TRY_AGAIN_NS = 1_000_000_000  # where the host has no descriptor for a client
LOOPBACK = "127.0.0.1"


class TcpListener:
    """Listens at a port of this host's loopback: anybody on this host may connect, and nobody else. Or at another
    address of its, where that is asked for.
    """

    def __init__(self, port: int, backlog: int, *, what: str, address: str = LOOPBACK) -> None:
        self._socket = socket(AF_INET6 if ":" in address else AF_INET, SOCK_STREAM)
        try:
            self._socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            self._socket.bind((address, port))
            self._socket.listen(backlog)
            self._socket.setblocking(False)
            self.port: int = self._socket.getsockname()[1]
        except (OSError, OverflowError) as error:
            self._socket.close()
            why = error if isinstance(error, OverflowError) else remedy(error, "give another port, or 0 for any")
            raise ConfigError(f"{what}={port}: {why}") from None
        except (TypeError, ValueError):  # a NUL in it, or what no name of a host can have
            self._socket.close()
            raise ConfigError(f"{what}: {address!r} is no address of a host, give one, or {LOOPBACK}") from None

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    @property
    def place(self) -> int:
        return self.port

    def accept(self) -> int:
        return accept(self._socket)

    def close(self) -> None:
        self._socket.close()

    def abandon(self) -> None:
        self._socket.close()


class Peer:
    """The way back to one client. ``send`` and ``close`` may be called from any thread, and never wait."""

    def __init__(self, server: SocketServer, end: socket) -> None:
        self._server = server
        self._loop = server.loop
        self._socket = end
        self._lock = Lock()  # of what follows
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._last = False  # closed when all of that is out
        self.closed = False
        """Nothing comes from it or goes there any more."""
        self.too_slow = False
        """It was cut off because it did not read."""
        self.held = False
        """Nothing is read from it for now."""

    @property
    def fd(self) -> int:
        """-1 once it is closed."""
        return self._socket.fileno()

    @property
    def crowded(self) -> bool:
        """Whether the client has so much to read that it should be asked for nothing more."""
        return self._unsent_bytes > CROWDED_BYTES

    def send(self, data: bytes) -> None:
        """All of it, in order, as the client reads it. One that is far behind is cut off."""
        with self._lock:
            if self.closed or self._last:
                return
            if self._unsent_bytes > UNREAD_MOST_BYTES:
                self.too_slow = True
                self._cut_off_locked()
                return
            waits = bool(self._unsent)
            self._unsent.append(data)
            self._unsent_bytes += len(data)
            if not waits and not self._write_locked():
                self._watch(self._writable)

    def close(self) -> None:
        """Hang up, when what was sent is out."""
        with self._lock:
            self._last = True
            if not self._unsent:
                self._cut_off_locked()

    def cut_off(self) -> None:
        """Hang up now."""
        with self._lock:
            self._cut_off_locked()

    def hold(self) -> None:
        """Read nothing more from it until ``go_on``. On the server's thread."""
        self.held = True
        self._loop.remove_reader(self.fd)

    def go_on(self) -> None:
        """On the server's thread, from where ``receive`` may be called again."""
        self.held = False
        if not self.closed:
            try:
                self._loop.add_reader(self.fd, self._readable)
            except StateError:  # the server is being closed
                self.cut_off()

    # -- below: the socket -------------------------------------------------------------------------------------

    def _watch(self, writable: Callable[[], object]) -> None:
        try:
            self._loop.add_writer(self.fd, writable)
        except Exception:  # the server is being closed
            self._cut_off_locked()

    def _write_locked(self) -> bool:
        """As much as the socket takes. Whether that was all."""
        try:
            while self._unsent:
                data = self._unsent[0]
                sent = self._socket.send(data)
                self._unsent_bytes -= sent
                if sent < len(data):
                    self._unsent[0] = data[sent:]
                    return False
                self._unsent.popleft()
        except BlockingIOError:
            return False
        except OSError:  # it has gone
            self._cut_off_locked()
        return True

    def _writable(self) -> None:
        with self._lock:
            if self.closed or not self._write_locked():
                return
            if not self.closed:
                self._loop.remove_writer(self.fd)
                if self._last:
                    self._cut_off_locked()
        self._server.roomy(self)

    def _cut_off_locked(self) -> None:
        """Whoever reads or writes finds the end; the descriptor is given back on the server's thread."""
        if self.closed:
            return
        self.closed = True
        self._unsent.clear()
        self._unsent_bytes = 0
        try:
            self._socket.shutdown(SHUT_RDWR)
        except OSError:
            pass
        self._server.over(self)

    def _readable(self) -> None:
        if self.closed:
            return
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._server.came(self, data)
        else:
            self.cut_off()

    def dispose(self) -> None:
        """Give the descriptor back; nobody watches it any more."""
        fd = self.fd
        if fd >= 0:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            self._socket.close()

    def abandon(self) -> None:
        """In a child of fork: only the descriptor."""
        self.closed = True
        self._socket.close()


class SocketServer:
    """``make_session(peer)`` makes the protocol's end for each client. ``what`` names the option, in messages.

    ``listen`` and ``listen_port`` make sockets: clients can connect, and wait until ``serve``. ``close``, from any
    thread but the server's own, ends all of it. ``on_error(error)`` hears what a session raised; its client is cut off.
    ``on_client(did)`` hears of each that it came, left or was cut off.
    """

    def __init__(
        self,
        make_session: Callable[[Peer], Session],
        on_error: Callable[[BaseException], None],
        *,
        what: str,
        most_clients: int = MOST_CLIENTS,
        crowd_out: bool = False,
        on_client: Callable[[str], object] = lambda did: None,
    ) -> None:
        self._on_client = on_client
        self._make_session = make_session
        self._on_error = on_error
        self._what = what
        self._most_clients = most_clients
        self._crowd_out = crowd_out
        self._listeners: list[Listener] = []
        self._sessions: dict[Peer, Session] = {}
        self._workers: set[Thread] = set()
        self._lock = Lock()  # of the workers
        self._serves = False
        self._closed = False
        self.loop = EventLoop(on_error)
        self._again = self.loop.clock.timer(self._accept_again)

    @property
    def closing(self) -> bool:
        """Whether it is being closed: work that takes long looks now and then."""
        return self._closed

    # -- sockets -----------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """A Unix socket that only this user may connect to (mode 0600), gone again in the end. One that a dead process
        has left there is replaced. ConfigError where somebody listens on it, or something else is there.
        """
        self.add(UnixListener(path, BACKLOG, what=self._what, mode=0o600))

    def listen_port(self, port: int) -> int:
        """A TCP port of the loopback; 0: any that is free. Which it is. ConfigError where it can't be had."""
        listener = TcpListener(port, BACKLOG, what=self._what)
        self.add(listener)
        return listener.port

    def add(self, listener: Listener) -> None:
        """One that was made before, to which clients may have connected. It is closed with the server."""
        self._listeners.append(listener)
        if self._serves:
            self._watch(listener)

    def serve(self) -> None:
        """Clients are heard from now on, also those that connected before."""
        if not self._serves:
            self._serves = True
            for listener in self._listeners:
                self._watch(listener)

    def _watch(self, listener: Listener) -> None:
        self.loop.add_reader(listener.fd, lambda: self._accept(listener))

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if self._closed:
                return
            if len(self._sessions) >= self._most_clients:
                self._accept_no_more()  # until one has left
                if self._crowd_out:
                    next(iter(self._sessions)).cut_off()
                return
            try:
                fd = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:
                # No descriptor is left, or no memory: those who want to come wait.
                self._accept_no_more()
                self._again.arm(self.loop.clock.now_ns() + TRY_AGAIN_NS)
                return
            self._begin(socket(fileno=fd))

    def _accept_no_more(self) -> None:
        for listener in self._listeners:
            self.loop.remove_reader(listener.fd)

    def _accept_again(self) -> None:
        try:
            for listener in self._listeners:
                self._watch(listener)
        except StateError:
            pass  # the server is being closed

    # -- clients, on the server's thread -----------------------------------------------------------------------

    def _begin(self, end: socket) -> None:
        peer = Peer(self, end)
        self._on_client("came")
        try:
            self._sessions[peer] = self._make_session(peer)
        except Exception as error:
            peer.cut_off()
            self._on_error(error)
            return
        # It may have been cut off by what it was greeted with, or be held.
        if not peer.held:
            peer.go_on()

    def came(self, peer: Peer, data: bytes) -> None:
        """A peer's own: so many bytes have come."""
        session = self._sessions.get(peer)
        if session is not None:
            self.call(peer, lambda: session.receive(data))

    def call(self, peer: Peer, work: Callable[[], object]) -> None:
        """What the protocol does for a client. What it raises is its end."""
        try:
            work()
        except Exception as error:
            peer.cut_off()
            self._on_error(error)

    def roomy(self, peer: Peer) -> None:
        """A peer's own: all that waited for its client has been read."""
        session = self._sessions.get(peer)
        heard = getattr(session, "roomy", None)
        if heard is not None and not peer.closed:
            self.call(peer, heard)

    def over(self, peer: Peer) -> None:
        """A peer's own, from any thread and under its lock: nothing comes or goes any more."""
        self.later(lambda: self._end(peer))

    def _end(self, peer: Peer) -> None:
        session = self._sessions.pop(peer, None)
        self._on_client("was cut off: it does not read" if peer.too_slow else "left")
        peer.dispose()
        if session is not None:
            try:
                session.gone()
            finally:
                if len(self._sessions) == self._most_clients - 1:
                    self._accept_again()

    def later(self, callback: Callable[[], None]) -> None:
        """Call it on the server's thread; not at all where that has ended."""
        self.loop.call_soon(callback)

    # -- work that takes long ----------------------------------------------------------------------------------

    def work(self, job: Callable[[], object], then: Callable[[], None]) -> None:
        """``job()`` on a thread of its own, then ``then()`` on the server's. ``job`` does not raise. ThreadError where
        there is no thread to be had.
        """

        def done() -> None:
            with self._lock:
                self._workers.discard(thread)
            then()

        def body() -> None:
            try:
                job()
            finally:
                self.later(done)

        thread = Thread(body)
        with self._lock:
            thread.start()
            self._workers.add(thread)

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cut off everybody, wait for work that is under way, take the sockets away. Again is fine."""
        self._closed = True
        self.loop.close()
        # First: who is told of the end by us hanging up finds no socket any more.
        while self._listeners:
            self._listeners.pop().close()
        with self._lock:
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.join()
        sessions, self._sessions = self._sessions, {}
        for peer, session in sessions.items():
            peer.cut_off()
            peer.dispose()
            session.gone()

    def abandon(self) -> None:
        """In a child of fork: only the descriptors. Takes no lock."""
        self._closed = True
        self.loop.abandon()
        for peer in self._sessions:
            peer.abandon()
        for listener in self._listeners:
            listener.abandon()


def complain(error: BaseException) -> None:
    """A mistake of ours, of which no client can be told."""
    if sys.stderr is not None:
        try:
            print(traceback_text(error), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # nobody reads it
