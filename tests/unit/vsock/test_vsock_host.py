"""The host's end of a vsock device: its sockets, and the line that a client says."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.vsock.host import LONGEST_LINE, Caller, HostEnd


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostEnd]:
    made = HostEnd(str(tmp_path / "vm.sock"))
    yield made
    made.close()


def pair() -> tuple[Caller, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return Caller(ours), theirs


def test_what_stands_behind_the_line_stays_there() -> None:
    caller, client = pair()
    with client, caller.socket:
        assert caller.port() is None
        client.sendall(b"CONNECT 1")
        assert caller.port() is None
        client.sendall(b"024\nCONNECT 5\nand more")
        assert caller.port() == 1024
        assert caller.socket.recv(100) == b"CONNECT 5\nand more"


@pytest.mark.parametrize(
    ("line", "port"), [(b"CONNECT 0\n", 0), (b"CONNECT 4294967294\n", 0xFFFF_FFFE), (b"CONNECT 007\n", 7)]
)
def test_ports(line: bytes, port: int) -> None:
    caller, client = pair()
    with client, caller.socket:
        client.sendall(line)
        assert caller.port() == port


@pytest.mark.parametrize("line", [b"x" * LONGEST_LINE, b"CONNECT 4294967295\n", b"CONNECT 1_0\n", b"CONNECT 0x10\n"])
def test_lines_that_are_none(line: bytes) -> None:
    caller, client = pair()
    with client, caller.socket:
        client.sendall(line)
        with pytest.raises(ValueError):  # with what was said
            caller.port()


@pytest.mark.parametrize("said", [b"", b"CONNECT 10"])
def test_a_client_that_goes(said: bytes) -> None:
    caller, client = pair()
    with caller.socket:
        client.sendall(said)
        client.close()
        if said:
            assert caller.port() is None
        with pytest.raises(ValueError):
            caller.port()


def test_clients_and_programs(host: HostEnd, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "vm.sock"))
        caller = host.accept()
        client.sendall(b"CONNECT 7\n")
        assert caller.port() == 7
        caller.socket.close()
    assert host.connect(5) is None
    with socket.socket(socket.AF_UNIX) as program:
        program.bind(str(tmp_path / "vm.sock_5"))
        assert host.connect(5) is None  # it does not listen
        program.listen(0)
        end = host.connect(5)
        assert end is not None
        assert host.connect(5) is None  # it takes no more, and nobody waits for it
        end.close()
    host.close()
    assert host.fd == -1
    assert not (tmp_path / "vm.sock").exists()


def test_without_a_path_nobody_is_there(tmp_path: Path) -> None:
    host = HostEnd(None)
    assert host.fd == -1
    assert host.connect(5) is None
    host.close()
    host.abandon()


def test_two_can_not_have_one(host: HostEnd, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vsock path=.*give another path"):
        HostEnd(str(tmp_path / "vm.sock"))
