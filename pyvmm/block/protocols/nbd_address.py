"""Where an NBD export is: what stands behind ``nbd:`` in a drive's file, and ``nbd+unix:``.

QEMU's two ways of writing it: NetworkBlockDevice doc/uri.md, and the older ``nbd:HOST:PORT:exportname=E`` and
``nbd:unix:PATH:exportname=E``.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

PORT = 10809  # IANA's for nbd
LONGEST_NAME_BYTES = 4096  # proto.md, "Values": strings


class NbdAddress:
    """``path`` of a Unix socket, or else ``host`` and ``port``; ``export`` is the name of what is served there, "" the
    default one.
    """

    __slots__ = ("export", "host", "path", "port")

    def __init__(self, *, path: str = "", host: str = "", port: int = PORT, export: str = "") -> None:
        if len(export.encode()) > LONGEST_NAME_BYTES:
            raise ConfigError(f"the name of an NBD export has at most {LONGEST_NAME_BYTES} bytes: shorten it")
        self.path = path
        self.host = host
        self.port = port
        self.export = export

    def __str__(self) -> str:
        where = self.path or f"{self.host}:{self.port}"
        return f"{where}, export {self.export!r}" if self.export else where


def parse_nbd(text: str) -> NbdAddress:
    """Of what is behind ``nbd:``: ``//host[:port][/export]``, ``unix:PATH[:exportname=E]`` or
    ``host:port[:exportname=E]``. ConfigError.
    """
    if text.startswith("//"):
        place, _, export = text[2:].partition("?")[0].partition("/")
        host, port = host_and_port(place, text)
        return NbdAddress(host=host, port=port, export=unquoted(export))
    place, _, export = text.partition(":exportname=")
    if place.startswith("unix:"):
        path = place[len("unix:") :]
        if not path:
            raise ConfigError(f"nbd:{text}: there is no path of a socket in it: write nbd:unix:PATH")
        return NbdAddress(path=path, export=export)
    host, port = host_and_port(place, text)
    return NbdAddress(host=host, port=port, export=export)


def parse_nbd_unix(text: str) -> NbdAddress:
    """Of what is behind ``nbd+unix:``: ``///[export]?socket=PATH``. ConfigError."""
    name, _, query = text.partition("?")
    sockets = [unquoted(word[len("socket=") :]) for word in query.split("&") if word.startswith("socket=")]
    if not name.startswith("///") or len(sockets) != 1 or not sockets[0]:
        raise ConfigError(f"nbd+unix:{text} names no socket: write nbd+unix:///EXPORT?socket=PATH")
    return NbdAddress(path=sockets[0], export=unquoted(name[3:]))


def host_and_port(place: str, text: str) -> tuple[str, int]:
    host, port = place, ""
    if place.startswith("["):  # an IPv6 address (RFC 3986, 3.2.2)
        host, _, rest = place[1:].partition("]")
        port = rest[1:] if rest[:1] == ":" else rest
    elif ":" in place:
        host, _, port = place.rpartition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ConfigError(
            f"nbd:{text} names no server: write nbd://HOST:PORT/EXPORT, nbd:unix:PATH or"
            " nbd+unix:///EXPORT?socket=PATH"
        )
    return host, int(port) if port else PORT


def unquoted(text: str) -> str:
    """Without percent-encoding (RFC 3986, 2.1)."""
    begin, *rest = text.split("%")
    data = begin.encode()
    for part in rest:
        try:
            data += bytes.fromhex(part[:2]) if len(part) >= 2 else b"%"
        except ValueError:
            raise ConfigError(f"%{part[:2]} in the address {text!r} is no byte: write % as %25") from None
        data += part[2:].encode() if len(part) >= 2 else part.encode()
    return data.decode("utf-8", "surrogateescape")
