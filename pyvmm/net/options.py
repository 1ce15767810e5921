"""What a user may say about a network card: the rows of NetOptions, and the way to write them, ``--net``."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import (
    SWITCH,
    Kind,
    Options,
    decimal,
    disable_legacy,
    disable_modern,
    is_path,
    option,
    path_text,
    split_commas,
    text,
    whole,
    word,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

KINDS = ("tap", "passt", "unix", "fd")
WITH_VALUE = ("tap", "unix", "fd")  # these are written kind=VALUE
INTERFACE_CHARACTERS = 15  # IFNAMSIZ without its zero
MOST_QUEUES = 16  # pairs; each is two rings and, of a tap, a descriptor
# virtio 1.2, 5.1.4.1: at least 68, which is IPv4's (RFC 791); at most what its 16 bits and a frame hold.
LEAST_MTU, MOST_MTU = 68, 65535
# IPv6 needs so much (RFC 8200, 5).
LAST_PORT = 0xFFFF


# -- kinds of values ---------------------------------------------------------------------------------------------------


def take_interface(name: str, value: Any) -> str | None:
    """The name of a network interface."""
    if value is None:
        return None
    good = isinstance(value, str) and 0 < len(value.encode()) <= INTERFACE_CHARACTERS and value not in (".", "..")
    if not good or any(character in "/:" or character.isspace() or character == "\0" for character in value):
        raise ConfigError(
            f"{name}={value!r}: give the name of a network interface, at most {INTERFACE_CHARACTERS} characters"
        )
    return str(value)


def take_mac(name: str, value: Any) -> str | None:
    """Six bytes with colons, in small letters."""
    if value is None:
        return None
    parts = value.replace("-", ":").split(":") if isinstance(value, str) else []
    try:
        octets = bytes(int(part, 16) for part in parts if 1 <= len(part) <= 2 and part.isalnum())
    except ValueError:
        octets = b""
    if len(octets) != 6 or len(parts) != 6:
        raise ConfigError(f"{name}={value!r}: give six bytes in hexadecimal, 02:00:00:00:00:01")
    if octets[0] & 1:
        raise ConfigError(f"{name}={value!r} is a group's address: give one whose first byte is even")
    if not any(octets):
        raise ConfigError(f"{name}={value!r} is nobody's address: give another, or leave it out")
    return octets.hex(":")


def take_path(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not is_path(value):
        raise ConfigError(f"{name}={value!r}: give a path")
    path = path_text(value)
    if not path or "\0" in path:
        raise ConfigError(f"{name}={value!r}: give the path of a socket")
    return path


def take_forwards(name: str, value: Any) -> tuple[str, ...]:
    """Each "[tcp:|udp:][ADDRESS/]PORT[:PORT]": the host's port, and the guest's where it is another one."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}={value!r}: give a list of 'HOST:GUEST', port numbers")
    for one in value:
        if not isinstance(one, str) or not is_forward(one):
            raise ConfigError(f"{name}={one!r}: give HOST:GUEST, two port numbers, as in forward=8080:80 or udp:53:53")
    return tuple(value)


def is_forward(text: str) -> bool:
    _, rest = protocol_of(text)
    address, slash, ports = rest.rpartition("/")
    if slash and (address[:1] in ("", "-") or not all(letter.isalnum() or letter in ".:%_-" for letter in address)):
        return False
    numbers = ports.split(":")
    return len(numbers) <= 2 and all(
        number.isascii() and number.isdigit() and 0 < int(number) <= LAST_PORT for number in numbers
    )


def protocol_of(forward: str) -> tuple[str, str]:
    """("tcp" or "udp", the rest)."""
    for protocol in ("tcp", "udp"):
        if forward.startswith(f"{protocol}:"):
            return protocol, forward[len(protocol) + 1 :]
    return "tcp", forward


def take_address(name: str, value: Any) -> str | None:
    """An address of the host's with the length of its network's prefix."""
    if value is None:
        return None
    if isinstance(value, str) and "/" in value:
        import ipaddress

        try:
            ipaddress.ip_interface(value)
        except ValueError:
            pass
        else:
            return value
    raise ConfigError(f"{name}={value!r}: give an address and its prefix, as 192.168.7.1/24")


INTERFACE = Kind(take_interface, metavar="NAME")
MAC = Kind(take_mac, metavar="MAC")
PATH = Kind(take_path, metavar="PATH")
FORWARDS = Kind(take_forwards, file="array", metavar="HOST:GUEST", from_text=lambda text: (text,), plain=list)
ADDRESS = Kind(take_address, metavar="ADDRESS/PREFIX")
QUEUES = whole(least=1, most=MOST_QUEUES, from_text=decimal)
MTU = whole(least=LEAST_MTU, most=MOST_MTU, none=True, from_text=decimal)
DESCRIPTOR = whole(none=True, give="an open descriptor", from_text=decimal)


class NetOptions(Options):
    """One network card. An object does not change: ``changed`` makes another one.

    What it is joined to comes first: ``NetOptions("tap", tap="tap0")``, ``NetOptions("passt")``,
    ``NetOptions("unix", path="/run/a.sock")``, ``NetOptions("fd", fd=7)``.
    """

    noun = "net option "
    thing = "a network card"
    frozen = True

    kind: str = option(
        word(*KINDS), "passt", "tap=NAME, a tap interface of the host; passt, a network that needs no root: the guest"
        " reaches what the host reaches, and the host's own loopback by the gateway's address; unix=PATH, a stream"
        " socket with another machine at its other end, or a program; fd=N, one that is open already, of either"
        " kind")  # fmt: skip
    id: str | None = option(text(none=True, printable=True), None, "its name; without one net0, net1, ...", words="id")
    tap: str | None = option(INTERFACE, None, "the tap interface", words="tap")
    bridge: str | None = option(
        INTERFACE, None, "make the tap interface for as long as the machine lives, up and part of this bridge (needs"
        " root and the extra `net`)", words="bridge br")  # fmt: skip
    address: str | None = option(
        ADDRESS, None, "make the tap interface likewise, up and with this address of the host's,"
        " 192.168.7.1/24", words="address")  # fmt: skip
    path: str | None = option(PATH, None, "where the Unix socket is", words="unix path")
    server: bool = option(
        SWITCH, False, "of unix: listen there, for one peer at a time; else a listener is there already",
        words="server")  # fmt: skip
    fd: int | None = option(DESCRIPTOR, None, "a tap's descriptor, or a connected stream socket's", words="fd")
    forward: Sequence[str] = option(
        FORWARDS, (), "of passt: a port of the host's that leads into the guest, 8080:80, 127.0.0.1/8080:80 or"
        " udp:5353:53; may be repeated", words="forward", many=True)  # fmt: skip
    mac: str | None = option(
        MAC, None, "the guest's address; without one it is made of this host's name, the machine's uuid and what the"
        " card is joined to: locally administered, and the same every time", words="mac macaddr")  # fmt: skip
    mtu: int | None = option(
        MTU, None, f"the largest packet, {LEAST_MTU} to {MOST_MTU}, told to the guest (and to passt's)",
        words="mtu host_mtu")  # fmt: skip
    queues: int = option(
        QUEUES, 1, f"queue pairs of a tap, 1 to {MOST_QUEUES}: one a vCPU spreads the work", words="queues")
    offloads: bool = option(
        SWITCH, True, "of tap: checksums and segments are left to the host's kernel where it can", words="offloads")
    disable_legacy: str | None = disable_legacy()
    disable_modern: str | None = disable_modern()

    def __init__(self, kind: str = "passt", **values: Any) -> None:
        super().__init__(kind=kind, **values)

    @property
    def name(self) -> str:
        """Its id; every card of a Spec has one."""
        return self.id or self.kind

    def check_together(self, values: dict[str, Any]) -> None:
        kind = values["kind"]
        for name, kinds, what in (
            ("tap", ("tap",), "tap=NAME"),
            ("path", ("unix",), "unix=PATH"),
            ("fd", ("fd",), "fd=N"),
        ):
            if values[name] is None and kind in kinds:
                raise ConfigError(f"a network card of kind {kind} without {name}: write {what}")
            if values[name] is not None and kind not in kinds:
                raise ConfigError(f"net option {name} beside {kind}: a card is joined to one thing, give one of them")
        for name, kinds in (
            ("bridge", ("tap",)),
            ("address", ("tap",)),
            ("server", ("unix",)),
            ("forward", ("passt",)),
        ):
            if values[name] and kind not in kinds:
                raise ConfigError(f"net option {name} is for {kinds[0]}, not for {kind}: leave it out")
        if values["queues"] > 1 and kind != "tap":
            raise ConfigError(f"net option queues={values['queues']}: only a tap has more than one, leave it out")
        if values["bridge"] and values["address"]:
            raise ConfigError("net options bridge and address: the address is the bridge's, give bridge only")

    @classmethod
    def parse(cls, text: str) -> NetOptions:
        """From "tap=tap0,mac=02:00:00:00:00:01,queues=2", "passt,forward=8080:80,forward=2222:22" or "unix=PATH".

        A comma in a value is written twice. ConfigError for what is wrong.
        """
        first, *rest = split_commas(text) or [text]
        kind, equals, _ = first.partition("=")
        if kind not in KINDS or bool(equals) != (kind in WITH_VALUE):
            raise ConfigError(f"net {first!r}: begin with tap=NAME, passt, unix=PATH, fd=N or none")
        return cls(kind, **cls.from_words([first, *rest] if equals else rest))


# -- what a Spec says of them ------------------------------------------------------------------------------------------


def complete(nets: Sequence[NetOptions], uuid: str | None) -> tuple[NetOptions, ...]:
    """Each with a name and a MAC address of its own. ConfigError for two with one name, address, interface or socket.
    """
    done = []
    for n, net in enumerate(nets):
        name = net.id if net.id is not None else f"net{n}"
        mac = net.mac if net.mac is not None else made_mac(net, n, uuid)
        done.append(net.changed(id=name, mac=mac))
    for what in ("id", "mac", "tap", "path", "fd"):
        seen = set()
        for net in done:
            value = getattr(net, what)
            if value is not None and value in seen:
                raise ConfigError(f"two network cards with {what}={value}: give each its own")
            seen.add(value)
    return tuple(done)


def twin_macs(nets: Sequence[NetOptions], given: Sequence[NetOptions]) -> tuple[NetOptions, ...]:
    """The cards of a machine that goes on from another one's state: each has a new address, locally administered and by
    chance, but for those that were ``given`` with one.
    """
    import os

    kept = [net.mac is not None for net in given] or [False] * len(nets)
    return tuple(
        net if keep else net.changed(mac=(b"\x02" + os.urandom(5)).hex(":"))
        for net, keep in zip(nets, kept, strict=True)
    )


def made_mac(net: NetOptions, index: int, uuid: str | None) -> str:
    """02 and forty bits of what tells this card from others: two machines on one bridge have two interfaces, and the
    ends of a socket are two roles; the same configuration has the same address each time, as a saved guest expects.
    """
    import os
    from zlib import crc32

    told = repr((os.uname().nodename, uuid, index, net.kind, net.tap, net.path, net.server)).encode()
    return (b"\x02" + crc32(told).to_bytes(4, "big") + (crc32(told[::-1]) & 0xFF).to_bytes(1, "big")).hex(":")
