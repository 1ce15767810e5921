"""The socket half of what talks to a machine: who may connect, clients that do not read, long work, the end."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.control import socket as control_socket
from pyvmm.control.socket import CROWDED_BYTES, UNREAD_MOST_BYTES, Peer, SocketServer
from pyvmm.errors import ConfigError

LIMIT_S = 20.0


class Echo:
    """Sends back what comes. "work" is done on a worker, "raise" raises, "last" is answered by the end."""

    def __init__(self, peer: Peer, made: Made) -> None:
        self.peer = peer
        self.made = made
        self.left = threading.Event()
        made.sessions.append(self)
        peer.send(b"hello\n")

    def receive(self, data: bytes) -> None:
        if b"raise" in data:
            raise ValueError("a session's mistake")
        if b"work" in data:
            self.peer.hold()
            self.made.server.work(self._job, self._done)
            return
        self.peer.send(data)
        if b"last" in data:
            self.peer.close()
        if self.peer.crowded:
            self.made.crowded.set()
            self.peer.hold()

    def roomy(self) -> None:
        if self.peer.held:
            self.peer.go_on()

    def _job(self) -> None:
        assert self.made.may_end.wait(LIMIT_S)

    def _done(self) -> None:
        self.peer.send(b"done\n")
        self.peer.go_on()

    def gone(self) -> None:
        self.left.set()


class Made:
    """A server of echoes."""

    def __init__(self, most_clients: int = control_socket.MOST_CLIENTS) -> None:
        self.sessions: list[Echo] = []
        self.errors: list[BaseException] = []
        self.may_end = threading.Event()
        self.crowded = threading.Event()
        self.clients: list[str] = []
        self.server = SocketServer(
            lambda peer: Echo(peer, self), self.errors.append, what="--test", most_clients=most_clients,
            on_client=self.clients.append,
        )  # fmt: skip


@pytest.fixture
def made() -> Iterator[Made]:
    it = Made()
    yield it
    it.may_end.set()
    it.server.close()


@pytest.fixture
def path(made: Made, tmp_path: Path) -> Path:
    at = tmp_path / "control.sock"
    made.server.listen(str(at))
    made.server.serve()
    return at


def connected(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.connect(str(path))  # with a timeout it would not wait for room
    end.settimeout(LIMIT_S)
    return end


def greeted(path: Path) -> socket.socket:
    end = connected(path)
    assert read(end, 6) == b"hello\n"
    return end


def read(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def ended(end: socket.socket) -> bool:
    """Whether all that comes is the end, perhaps behind more."""
    try:
        while end.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


def test_only_its_user_may_connect(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_sent_comes_back(path: Path) -> None:
    with greeted(path) as one, greeted(path) as other:
        for end, text in ((one, b"one"), (other, b"other"), (one, b"again")):
            end.send(text)
            assert read(end, len(text)) == text


def test_clients_that_came_before_are_served(made: Made, tmp_path: Path) -> None:
    at = tmp_path / "early.sock"
    made.server.listen(str(at))
    with connected(at) as end:
        end.send(b"early")
        made.server.serve()
        assert read(end, 11) == b"hello\nearly"


def test_several_sockets(made: Made, path: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.sock"
    made.server.listen(str(second))
    with greeted(path), greeted(second):
        pass
    made.server.close()
    assert not path.exists()
    assert not second.exists()


def test_a_port_of_the_loopback(made: Made) -> None:
    port = made.server.listen_port(0)
    made.server.serve()
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as end:
        assert read(end, 6) == b"hello\n"


@pytest.mark.parametrize("port", [-1, 1 << 16])
def test_a_port_that_there_is_none_of(made: Made, port: int) -> None:
    with pytest.raises(ConfigError, match=f"--test={port}"):
        made.server.listen_port(port)


def test_a_socket_that_is_served_is_refused(path: Path) -> None:
    other = Made()
    with pytest.raises(ConfigError, match="give another path"):
        other.server.listen(str(path))
    other.server.close()
    with greeted(path):
        pass


def test_a_socket_that_nobody_serves_is_replaced(made: Made, tmp_path: Path) -> None:
    at = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(at))
    made.server.listen(str(at))
    made.server.serve()
    with greeted(at):
        pass


def test_a_client_that_leaves(made: Made, path: Path) -> None:
    greeted(path).close()
    assert made.sessions[0].left.wait(LIMIT_S)
    with greeted(path):
        pass


def test_a_session_that_raises_is_cut_off(made: Made, path: Path) -> None:
    with greeted(path) as bad, greeted(path) as good:
        bad.send(b"raise")
        assert ended(bad)
        good.send(b"x")
        assert read(good, 1) == b"x"
    assert [str(error) for error in made.errors] == ["a session's mistake"]


def test_all_that_was_sent_is_read_before_the_end(path: Path) -> None:
    with greeted(path) as end:
        end.send(b"last words")
        assert read(end, 100) == b"last words"


def test_a_client_that_sends_and_does_not_read_is_held(made: Made, path: Path) -> None:
    """Nothing is lost: when it reads it gets all that it has sent."""
    piece = bytes(range(256)) * 64
    count = 64
    with greeted(path) as end:
        sender = threading.Thread(target=lambda: [end.sendall(piece) for _ in range(count)])
        sender.start()
        assert made.crowded.wait(LIMIT_S)
        assert read(end, count * len(piece)) == piece * count
        sender.join(LIMIT_S)
    assert not made.errors


def test_a_client_that_is_told_and_does_not_read_is_cut_off(made: Made, path: Path) -> None:
    news = b"." * 4096
    with greeted(path) as deaf, greeted(path) as other:
        session = made.sessions[0]
        sent = 0
        while not session.peer.closed:
            session.peer.send(news)
            sent += len(news)
            assert sent < 8 * UNREAD_MOST_BYTES
        assert sent > UNREAD_MOST_BYTES
        assert session.left.wait(LIMIT_S)
        assert made.clients == ["came", "came", "was cut off: it does not read"]
        assert ended(deaf)
        other.send(b"x")
        assert read(other, 1) == b"x"


def test_a_crowd_is_told_by_what_waits(made: Made, path: Path) -> None:
    with greeted(path):
        peer = made.sessions[0].peer
        assert not peer.crowded
        while not peer.crowded:
            peer.send(b"." * CROWDED_BYTES)
        assert not peer.closed


def test_work_holds_up_its_own_client_only(made: Made, path: Path) -> None:
    with greeted(path) as busy, greeted(path) as other:
        busy.send(b"work")
        other.send(b"x")
        assert read(other, 1) == b"x"
        busy.send(b"later")
        made.may_end.set()
        assert read(busy, 10) == b"done\nlater"


def test_more_than_there_is_room_for_wait(tmp_path: Path) -> None:
    few = Made(most_clients=2)
    at = tmp_path / "few.sock"
    few.server.listen(str(at))
    few.server.serve()
    with greeted(at) as one, greeted(at) as two, connected(at) as three:
        one.send(b"x")
        assert read(one, 1) == b"x"
        assert len(few.sessions) == 2
        two.close()
        assert read(three, 6) == b"hello\n"
    few.server.close()


def test_no_descriptor_is_left_for_a_client(made: Made, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "TRY_AGAIN_NS", 1_000_000)
    refused = threading.Event()
    listener = made.server._listeners[0]
    accept = listener.accept

    def no_room() -> int:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept()

    monkeypatch.setattr(listener, "accept", no_room)
    with greeted(path):
        assert refused.is_set()
    assert not made.errors


def test_ten_thousand_clients_one_after_the_other(made: Made, path: Path) -> None:
    greeted(path).close()
    assert made.sessions[0].left.wait(LIMIT_S)
    for n in range(10_000):
        connected(path).close()
        if n % 500 == 0:
            greeted(path).close()
    with greeted(path):
        pass
    assert all(session.left.wait(LIMIT_S) for session in made.sessions)
    assert not made.errors


def test_the_end(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    it = Made()
    at = tmp_path / "end.sock"
    it.server.listen(str(at))
    it.server.serve()
    with greeted(at) as idle, greeted(at) as busy:
        busy.send(b"work")
        idle.send(b"x")
        assert read(idle, 1) == b"x"
        closing = threading.Thread(target=it.server.close)
        closing.start()
        it.may_end.set()
        closing.join(LIMIT_S)
        assert not closing.is_alive()
        assert ended(idle)
        assert ended(busy)
    assert all(session.left.is_set() for session in it.sessions)
    assert not at.exists()
    it.server.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_who_comes_or_leaves_as_it_is_closed_is_no_error(tmp_path: Path) -> None:
    """close() has ended the loop, and its thread is in the middle of a callback."""
    errors: list[BaseException] = []
    left = threading.Event()

    class Silent:
        def __init__(self, peer: Peer) -> None:
            if len(server._sessions) == 1:
                server.loop.close()
                server.over(peer)
                left.set()

        def receive(self, data: bytes) -> None: ...

        def gone(self) -> None: ...

    server = SocketServer(Silent, errors.append, what="--test", most_clients=2)
    server.listen(str(tmp_path / "socket"))
    server.serve()
    ends = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for end in ends:
        end.settimeout(LIMIT_S)
        end.connect(str(tmp_path / "socket"))
    assert left.wait(LIMIT_S)
    server.close()
    server._accept_again()
    assert [end.recv(1) for end in ends] == [b"", b""]
    assert errors == []
    for end in ends:
        end.close()


def test_a_child_of_fork_closes_its_descriptors_only(made: Made, path: Path) -> None:
    with greeted(path) as end:
        child = os.fork()
        if not child:
            made.server.abandon()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        end.send(b"x")
        assert read(end, 1) == b"x"
    assert path.exists()
