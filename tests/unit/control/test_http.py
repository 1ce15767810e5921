"""One request and its answer, cut anywhere; and who never ends one, says too much, or reads nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from pyvmm.control import http
from pyvmm.control.http import REQUEST_MOST_BYTES, HttpSession, Response
from pyvmm.control.socket import LOOPBACK, Peer, SocketServer

LIMIT_S = 60.0
BIG = 64 << 20  # more than the kernel takes for somebody
Connect = Callable[[], socket.socket]


class Told(HttpSession):
    """One whose end is told."""

    ended: threading.Semaphore

    def gone(self) -> None:
        super().gone()
        self.ended.release()


@pytest.fixture
def ended() -> threading.Semaphore:
    """Released once for each connection that has ended."""
    return threading.Semaphore(0)


@pytest.fixture
def connect(ended: threading.Semaphore) -> Iterator[Connect]:
    errors: list[BaseException] = []

    def get(path: str, headers: dict[str, str]) -> Response:
        if path == "/big":
            return Response("200 OK", body=b"z" * BIG)
        return Response("200 OK", body=f"{path} {headers.get('accept', '')}".encode())

    def session(peer: Peer) -> HttpSession:
        made = Told(peer, server.loop.clock, get)
        made.ended = ended
        return made

    server = SocketServer(session, errors.append, what="t", most_clients=4)
    port = server.listen_port(0)
    server.serve()
    made: list[socket.socket] = []

    def one() -> socket.socket:
        made.append(socket.create_connection((LOOPBACK, port), LIMIT_S))
        return made[-1]

    yield one
    for each in made:
        each.close()
    server.close()
    assert errors == []


def answer(end: socket.socket) -> bytes:
    """All up to the end of the connection."""
    data = b""
    try:
        while piece := end.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


GET = b"GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\nAccept:  text/plain \r\n\r\n"


def test_a_request_cut_anywhere(connect: Connect) -> None:
    for cut in (1, 20, len(GET) - 1):
        end = connect()
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.sendall(GET[:cut])
        end.sendall(GET[cut:])
        head, _, body = answer(end).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"Content-Length: 19" in head
        assert body == b"/metrics text/plain"


def test_a_head_has_no_body(connect: Connect) -> None:
    end = connect()
    end.sendall(GET.replace(b"GET", b"HEAD"))
    assert answer(end).endswith(b"Content-Length: 19\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/metrics", b"/metrics "),
        (b"http://h:9100/metrics?a=b", b"/metrics "),
        (b"HTTP://h", b"/ "),
        (b"//h/metrics", b"//h/metrics "),
    ],
)
def test_forms_of_a_target(connect: Connect, target: bytes, path: bytes) -> None:
    end = connect()
    end.sendall(b"\r\nGET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n")
    assert answer(end).partition(b"\r\n\r\n")[2] == path


def test_who_asks_otherwise_is_told_how(connect: Connect) -> None:
    end = connect()
    end.sendall(GET.replace(b"GET", b"DELETE"))
    assert b"\r\nAllow: GET, HEAD\r\n" in answer(end)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /\r\n\r\n", b"400"),
        (b"GET / SPDY/1\r\n\r\n", b"400"),
        (b"GET ftp://x/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET metrics HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http:// HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nA: b\r\n folded: c\r\n\r\n", b"400"),
        (b"\x00\xff\xfe\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"x" * (REQUEST_MOST_BYTES + 1), b"431"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * REQUEST_MOST_BYTES + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request(connect: Connect, request_: bytes, status: bytes) -> None:
    end = connect()
    end.sendall(request_)
    assert answer(end).split(b" ")[1] == status


def test_who_never_ends_a_request_is_cut_off_and_others_come_in(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LIMIT_NS", 300_000_000)
    slow = [connect() for _ in range(12)]  # the server takes four at once
    for end in slow:
        end.sendall(b"GET / HTTP/1.1\r\nX: ")
    right = connect()
    right.sendall(GET)
    assert b"200 OK" in answer(right)
    for end in slow:
        assert answer(end) == b""


def test_who_does_not_read_is_cut_off(connect: Connect, ended: threading.Semaphore) -> None:
    end = connect()
    end.sendall(GET.replace(b"/metrics", b"/big"))
    for _ in range(4):
        other = connect()
        other.sendall(GET)
        assert b"200 OK" in answer(other)
    for _ in range(5):
        assert ended.acquire(timeout=LIMIT_S)
    assert len(answer(end)) < BIG
