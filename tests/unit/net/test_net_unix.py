"""Unix sockets as a network: two ends, in any order of coming and going."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from io_watcher import Watcher

from pyvmm.errors import ConfigError
from pyvmm.net.backend import NetBackend
from pyvmm.net.open import open_net
from pyvmm.net.options import NetOptions


def net(words: str) -> NetBackend:
    return open_net(NetOptions.parse(words))


def carries(a: NetBackend, b: NetBackend) -> bool:
    for back, other in ((a, b), (b, a)):
        assert back.ports[0].send([b"hello"])
        assert back.ports[0].flush()
        view = bytearray(10)
        if other.ports[0].receive([view]) != 5 or view[:5] != b"hello":
            return False
        assert other.ports[0].receive([view]) == 0
    return True


def test_one_listens_and_takes_one_peer_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    watcher = Watcher()
    ups: list[bool] = []
    server = net(f"unix={path},server=on")
    server.attach(watcher, lambda: ups.append(server.connected))
    assert not server.connected
    for n in range(3):
        client = net(f"unix={path}")
        waiting = net(f"unix={path}")  # it has to wait until the first has gone
        watcher.settle()
        assert ups == [True] * (2 * n + 1)
        assert carries(server, client)
        client.close()
        for peer in (waiting, None):
            assert server.ports[0].receive([bytearray(10)]) == 0
            assert not server.connected
            server.lost()
            watcher.settle()
            if peer is not None:
                assert carries(server, peer)
                peer.close()
    server.close()
    assert not path.exists()
    server.close()


def test_a_socket_that_nobody_uses_any_more_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = net(f"unix={path},server=on")
    with pytest.raises(ConfigError, match="give another path"):
        net(f"unix={path},server=on")
    # What another has put in its place is that one's.
    path.unlink()
    path.write_text("mine")
    server.close()
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="give another path"):
        net(f"unix={path},server=on")


def test_what_is_said_where_there_is_no_other_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start the other end first"):
        net(f"unix={tmp_path}/none")
    with pytest.raises(ConfigError, match="give another path"):
        net(f"unix={tmp_path}/no/such/folder,server=on")
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        net(f"unix=/{'x' * 107}")


def test_an_open_socket_stays_the_callers_own() -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        a, b = socket.socketpair(socket.AF_UNIX, kind)
        with a, b:
            backs = [net(f"fd={end.fileno()}") for end in (a, b)]
            assert carries(*backs)
            for back in backs:
                back.close()
            assert a.fileno() >= 0
            os.fstat(b.fileno())
    with socket.socket() as alone, pytest.raises(ConfigError, match="give a socket that is connected"):
        net(f"fd={alone.fileno()}")


def test_a_listener_that_takes_no_more_is_told_at_once(tmp_path: Path) -> None:
    """Connecting would wait until it takes one, which may be never."""
    path = str(tmp_path / "lan")
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        try:
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(path)
        except BlockingIOError:
            pass
        with pytest.raises(ConfigError, match="takes no more"):
            open_net(NetOptions.parse(f"unix={path}"))
    for end in waiting:
        end.close()
