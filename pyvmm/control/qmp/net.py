"""Network cards and consoles: their host's ends (QEMU qapi/net.json, qapi/char.json)."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import BOOL, INT, STR, Enum, Int, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.chardev import Chardev
    from pyvmm.control.qmp.subject import Served
    from pyvmm.devices.virtio.net import VirtioNet

HOW_MUCH = Enum("normal", "none", "all")
RX_FILTER = Struct({
    "name": STR, "promiscuous": BOOL, "multicast": HOW_MUCH, "unicast": HOW_MUCH, "vlan": HOW_MUCH,
    "broadcast-allowed": BOOL, "multicast-overflow": BOOL, "unicast-overflow": BOOL, "main-mac": STR,
    "vlan-table": ListOf(INT), "unicast-table": ListOf(STR), "multicast-table": ListOf(STR),
})  # fmt: skip


def card_named(served: Served, name: str) -> VirtioNet:
    """QmpError where there is none of that name."""
    if any(net.id == name for net in served.machine.config.nets):
        return served.machine.devices[name]  # type: ignore[return-value]  # it is a card's name
    raise QmpError(f"Device '{name}' not found", "DeviceNotFound")


@command("set_link", {"name": STR, "up": BOOL})
def set_link(served: Served, name: str, up: bool) -> None:
    card_named(served, name).link_up = up


MS = Int(0, 100_000)


@command("announce-self", {
    "initial": MS, "max": MS, "rounds": Int(0, 1000), "step": Int(0, 10_000), "interfaces": Optional(ListOf(STR)),
    "id": Optional(STR),
})  # fmt: skip
def announce_self(
    served: Served, initial: int, max: int, rounds: int, step: int, interfaces: list[str] | None = None, id: str = ""
) -> None:
    served.machine.announce_self(initial, max, rounds, step, interfaces=interfaces, id=id)


@command("query-rx-filter", {"name": Optional(STR)}, ListOf(RX_FILTER))
def query_rx_filter(served: Served, name: str | None = None) -> list[dict[str, Any]]:
    names = [str(net.id) for net in served.machine.config.nets] if name is None else [name]
    return [rx_filter(each, card_named(served, each)) for each in names]


def rx_filter(name: str, card: VirtioNet) -> dict[str, Any]:
    wanted = card.look_at_filter()
    vlans = [n for n in range(len(wanted.vlans) * 8) if wanted.vlans[n >> 3] >> (n & 7) & 1]
    all_vlans = len(vlans) == len(wanted.vlans) * 8
    return {
        "name": name,
        "promiscuous": wanted.promisc,
        "multicast": "none" if wanted.nomulti else "all" if wanted.allmulti else "normal",
        "unicast": "none" if wanted.nouni else "all" if wanted.alluni else "normal",
        "vlan": "all" if all_vlans else "normal" if vlans else "none",
        "broadcast-allowed": not wanted.nobcast,
        "multicast-overflow": wanted.multicast_overflow,
        "unicast-overflow": wanted.unicast_overflow,
        "main-mac": card.mac.hex(":"),
        "vlan-table": [] if all_vlans else vlans,
        "unicast-table": [mac.hex(":") for mac in wanted.unicast],
        "multicast-table": [mac.hex(":") for mac in wanted.multicast],
    }


CHARDEV = Struct({"label": STR, "filename": STR, "frontend-open": BOOL})


@command("query-chardev", returns=ListOf(CHARDEV))
def query_chardev(served: Served) -> list[dict[str, Any]]:
    return [
        {"label": name, "filename": where(chardev), "frontend-open": True}
        for name, chardev in served.machine.consoles.items()
    ]


def where(chardev: Chardev) -> str:
    """As QEMU words it: null, pty:/dev/pts/3, file, stdio."""
    from pyvmm.chardev import CallableChardev, FileChardev, NullChardev, PtyChardev

    if isinstance(chardev, NullChardev):
        return "null"
    if isinstance(chardev, PtyChardev):
        return f"pty:{chardev.path}"
    if isinstance(chardev, FileChardev):
        return f"file:{chardev.path}"
    return "function" if isinstance(chardev, CallableChardev) else "stdio"
