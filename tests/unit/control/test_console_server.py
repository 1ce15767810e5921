"""A console for whoever attaches himself: several at once, one that does not read, one that says nonsense."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.chardev import CallableChardev, Chardev, NullChardev
from pyvmm.control.console import ConsoleServer
from pyvmm.control.socket import UNREAD_MOST_BYTES
from pyvmm.unix_socket import UnixListener

LIMIT_S = 60.0
Client = Callable[[str], socket.socket]


class Consoles(dict[str, Chardev]):
    """``host`` is what the serial port's own end has had, ``typed`` what its device has."""

    def __init__(self) -> None:
        self.host: list[bytes] = []
        self.typed = b""
        self.room = 1 << 20
        self.breaks = 0
        super().__init__(serial=CallableChardev(self.host.append), debugcon=NullChardev(), hvc0=NullChardev())
        self["serial"].set_receiver(self._type, lambda: self.room, self._break)

    def _type(self, data: bytes) -> None:
        self.typed += data

    def _break(self) -> None:
        self.breaks += 1


@pytest.fixture
def consoles() -> Consoles:
    return Consoles()


@pytest.fixture
def client(consoles: Consoles, tmp_path: Path) -> Iterator[Client]:
    path = str(tmp_path / "console")
    server = ConsoleServer(consoles, UnixListener(path, 64, what="name", mode=0o600))
    made: list[socket.socket] = []

    def say(line: str) -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].settimeout(LIMIT_S)
        made[-1].connect(path)
        made[-1].sendall(line.encode())
        return made[-1]

    yield say
    for each in made:
        each.close()
    server.close()


def line_of(end: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        data = end.recv(1)
        assert data, line
        line += data
    return line.decode()


def all_of(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += end.recv(size - len(data)) or pytest.fail("hung up")
    return data


def attached(client: Client, line: str = "attach\n") -> socket.socket:
    end = client(line)
    assert line_of(end) == "ok serial\n"
    # The answer is out before it listens: with what it types back it does.
    return end


def wait_for(condition: Callable[[], bool], nudge: Callable[[], object]) -> None:
    while not condition():
        nudge()


def listening(consoles: Consoles, count: int, client: Client) -> None:
    """Wait by way of the server's thread: what it answers later it has done before."""
    wait_for(lambda: len(consoles["serial"]._listeners) == count, lambda: line_of(client("break hvc0\n")))


def test_all_who_are_there_hear_it_and_the_host_s_end_too(client: Client, consoles: Consoles) -> None:
    one, two = attached(client), attached(client, "attach serial\n")
    listening(consoles, 2, client)
    consoles["serial"].write(b"login: ")
    assert (all_of(one, 7), all_of(two, 7), consoles.host) == (b"login: ", b"login: ", [b"login: "])
    one.close()
    listening(consoles, 1, client)
    consoles["serial"].write(b"again")
    assert all_of(two, 5) == b"again"


def test_with_nobody_there_a_console_is_as_it_was_made(client: Client, consoles: Consoles) -> None:
    assert "write" not in vars(consoles["serial"])
    end = attached(client)
    listening(consoles, 1, client)
    assert "write" in vars(consoles["serial"])
    end.close()
    listening(consoles, 0, client)
    assert "write" not in vars(consoles["serial"])


def test_what_is_typed_is_the_guest_s(client: Client, consoles: Consoles) -> None:
    one = attached(client, "attach\nroot\n")
    one.sendall(b"secret\n")
    wait_for(lambda: consoles.typed == b"root\nsecret\n", lambda: line_of(client("break hvc0\n")))


def test_one_who_types_more_than_the_guest_reads_is_not_read_from(client: Client, consoles: Consoles) -> None:
    consoles.room = 0
    one = attached(client)
    one.setblocking(False)
    sent = 0
    try:
        while sent < 64 << 20:
            sent += one.send(b"x" * 65536)
            if consoles["serial"].fed_bytes > 65536 * 3:
                pytest.fail("it is read from without a bound")
    except BlockingIOError:
        pass
    assert sent < 8 << 20
    consoles.room = 1 << 30
    consoles["serial"].accept_input()
    wait_for(lambda: len(consoles.typed) == sent, lambda: line_of(client("break hvc0\n")))


def test_one_who_does_not_read_is_cut_off_and_holds_up_nobody(client: Client, consoles: Consoles) -> None:
    slow, quick = attached(client), attached(client)
    listening(consoles, 2, client)
    piece = b"y" * 4096
    pieces = UNREAD_MOST_BYTES // len(piece) * 3
    for _ in range(pieces):
        consoles["serial"].write(piece)
        assert all_of(quick, len(piece)) == piece
    listening(consoles, 1, client)
    assert len(consoles.host) == pieces
    got = 0
    while data := slow.recv(1 << 20):
        got += len(data)
    assert got < pieces * len(piece)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("attach hvc7\n", "error there is no console 'hvc7', there are: serial, debugcon, hvc0\n"),
        ("resize serial 0 24\n", "error resize(0, 24): give columns and lines, from 1 to 65535\n"),
        ("resize serial 80\n", "error say attach, break or resize\n"),
        ("dance\n", "error say attach, break or resize\n"),
        ("\n", "error say attach, break or resize\n"),
        ("x" * 300, "error say attach, break or resize\n"),
    ],
)
def test_nonsense_is_answered_and_hung_up_on(client: Client, line: str, answer: str) -> None:
    end = client(line)
    assert line_of(end) == answer
    assert end.recv(1) == b""


def test_breaks_and_sizes(client: Client, consoles: Consoles) -> None:
    assert line_of(client("break serial\n")) == "ok serial\n"
    assert consoles.breaks == 1
    assert line_of(client("resize serial 132 50\n")) == "ok serial\n"
    assert consoles["serial"].size == (132, 50)
