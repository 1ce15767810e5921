"""HttpSession: one request of HTTP/1.1 and its answer, then the connection ends (RFC 9112).

What is served is read by a monitoring system every few seconds: connections that are kept would only be another thing
to bound. A client has LIMIT_S for all of it, to ask and to read; who is slower, or says more than a request of
REQUEST_MOST_BYTES, is cut off.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock
    from pyvmm.control.socket import Peer

REQUEST_MOST_BYTES = 8192
LIMIT_NS = 5_000_000_000
END = b"\r\n\r\n"
BLANK_LINE = b"\r\n"
METHODS = ("GET", "HEAD")


class Response:
    def __init__(self, status: str, content_type: str = "text/plain; charset=utf-8", body: bytes = b"") -> None:
        self.status = status
        self.content_type = content_type
        self.body = body or (status.encode() + b"\n")


class HttpSession:
    """``get(path, headers)`` gives the Response of a GET; names of headers are in small letters. ``clock`` is the
    server's own.
    """

    def __init__(self, peer: Peer, clock: Clock, get: Callable[[str, dict[str, str]], Response]) -> None:
        self._peer = peer
        self._get = get
        self._request = b""
        self._answered = False
        self._limit = clock.timer(peer.cut_off)
        self._limit.arm(clock.now_ns() + LIMIT_NS)

    def receive(self, data: bytes) -> None:
        if self._answered:
            return  # a body, or the next request: the answer has said that there will be none
        self._request += data
        self._request = self._request.removeprefix(BLANK_LINE)  # some clients say one after a body (2.2)
        head, end, _ = self._request.partition(END)
        if len(head) > REQUEST_MOST_BYTES:
            self._answer(Response("431 Request Header Fields Too Large"))
        elif end:
            self._take(head.decode("latin-1"))

    def gone(self) -> None:
        self._limit.disarm()

    def _take(self, head: str) -> None:
        line, *fields = head.split("\r\n")
        words = line.split(" ")
        headers = {}
        for field in fields:
            name, colon, value = field.partition(":")
            if not colon or name != name.strip() or not name:  # no folded lines, no blanks (5.1, 5.2)
                self._answer(Response("400 Bad Request"))
                return
            headers[name.lower()] = value.strip()
        path = path_of(words[1]) if len(words) == 3 else None
        if path is None or not words[2].startswith("HTTP/1."):
            self._answer(Response("400 Bad Request"))
        elif words[0] not in METHODS:
            self._answer(Response("405 Method Not Allowed"))
        else:
            self._answer(self._get(path, headers), with_body=words[0] == "GET")

    def _answer(self, response: Response, *, with_body: bool = True) -> None:
        self._answered = True
        self._request = b""
        allowed = f"Allow: {', '.join(METHODS)}\r\n" if response.status.startswith("405") else ""  # RFC 9110, 15.5.6
        head = (
            f"HTTP/1.1 {response.status}\r\nContent-Type: {response.content_type}\r\n"
            f"Content-Length: {len(response.body)}\r\n{allowed}Connection: close\r\n\r\n"
        )
        self._peer.send(head.encode("latin-1") + (response.body if with_body else b""))
        self._peer.close()


def path_of(target: str) -> str | None:
    """Of a request's target, without its query: the origin's form or the absolute one, which a proxy is told and a
    server takes as well (3.2); None: it is none.
    """
    if not target.startswith("/"):
        scheme, separator, rest = target.partition("://")
        if scheme.lower() != "http" or not separator or not rest:
            return None
        target = "/" + rest.partition("/")[2]
    return target.partition("?")[0]
