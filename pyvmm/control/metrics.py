"""MetricsServer: a machine's counters for Prometheus, at /metrics; ``metrics_text.py`` says which they are.

Nothing is counted for it, and nothing read before somebody asks. Answers less than KEPT_NS old are given again, so that
who asks all the time costs the machine no more than who asks four times a second.
"""

from __future__ import annotations

from pyvmm.control.http import HttpSession, Response
from pyvmm.control.socket import LOOPBACK, SocketServer, TcpListener, complain
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.control.metrics_text import Watched
    from pyvmm.control.socket import Peer
    from pyvmm.unix_socket import UnixListener

BACKLOG = 512
KEPT_NS = 250_000_000
HIGHEST_PORT = 65535
USE = "give PORT, ADDRESS:PORT or unix:PATH"
INDEX = b"pyvmm: what the machine has counted is at /metrics\n"


def listener_at(where: str | int) -> TcpListener | UnixListener:
    """PORT of the loopback, ADDRESS:PORT with an address of this host ([::1]:PORT too), or unix:PATH, which only this
    user may connect to. ConfigError.
    """
    if isinstance(where, str) and where.startswith("unix:") and len(where) > len("unix:"):
        from pyvmm.unix_socket import UnixListener

        return UnixListener(where.removeprefix("unix:"), BACKLOG, what="metrics", mode=0o600)
    address, _, port = str(where).rpartition(":")
    if isinstance(where, bool) or not (port.isascii() and port.isdecimal()) or int(port) > HIGHEST_PORT:
        raise ConfigError(f"metrics={where}: {USE}")
    address = address.removeprefix("[").removesuffix("]")
    return TcpListener(int(port), BACKLOG, what="metrics", address=address or LOOPBACK)


def check_installed() -> None:
    """ConfigError where the library is missing that makes the text."""
    from importlib.util import find_spec

    if find_spec("prometheus_client") is None:
        raise ConfigError("metrics need prometheus-client: pip install 'pyvmm-kvm[metrics]'")


class MetricsServer:
    """Of ``machine``, at once, to those who come to ``listener``. ``close`` ends it."""

    def __init__(self, machine: Watched, listener: TcpListener | UnixListener) -> None:
        self._machine = machine
        self._texts: dict[str, tuple[int, bytes]] = {}  # by content type: when it was made, and it
        self._encoders: Callable[[str], tuple[Callable[[], bytes], str]] | None = None
        # A right client has its answer at once: whoever has been there the longest is none.
        self._sockets = SocketServer(self._session, complain, what="metrics", crowd_out=True)
        self._sockets.add(listener)
        self._sockets.serve()

    def _session(self, peer: Peer) -> HttpSession:
        return HttpSession(peer, self._sockets.loop.clock, self._get)

    def _get(self, path: str, headers: dict[str, str]) -> Response:
        if path == "/":
            return Response("200 OK", body=INDEX)
        if path != "/metrics":
            return Response("404 Not Found")
        if self._encoders is None:
            from pyvmm.control.metrics_text import encoders

            self._encoders = encoders(self._machine)
        encode, content_type = self._encoders(headers.get("accept", ""))
        made_ns, text = self._texts.get(content_type, (0, b""))
        now_ns = self._sockets.loop.clock.now_ns()
        if not text or now_ns - made_ns > KEPT_NS:
            text = encode()
            self._texts = {content_type: (now_ns, text)}
        return Response("200 OK", content_type, text)

    def close(self) -> None:
        self._sockets.close()

    def abandon(self) -> None:
        """In a child of fork: only the descriptors."""
        self._sockets.abandon()
