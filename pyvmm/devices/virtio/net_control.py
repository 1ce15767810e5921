"""The control queue of a virtio network card: its commands (OASIS virtio 1.2, 5.1.6.5).

A command is a class, a command, data of its own, and one byte for the answer. All of it is hostile: what is too short,
too long, unknown, or of a feature that was not taken, is answered with an error, and changes nothing.
"""

from __future__ import annotations

from pyvmm.devices.virtio.net_features import (
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VLAN,
    F_GUEST_ANNOUNCE,
    F_MQ,
)
from pyvmm.devices.virtio.net_filter import MAC_BYTES, MODES, MOST_MACS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.devices.virtio.net_filter import RxFilter

    class Card(Protocol):
        """What commands change."""

        features: int
        filter: RxFilter

        def set_mac(self, mac: bytes) -> None: ...
        def set_pairs(self, pairs: int) -> bool: ...
        def set_guest_offloads(self, features: int) -> bool: ...
        def announced(self) -> None: ...


OK, ERR = 0, 1
RX, MAC, VLAN, ANNOUNCE, MQ, GUEST_OFFLOADS = range(6)
FILTERS = (RX, MAC, VLAN)  # classes that change what the card lets through
NEEDED = {
    RX: F_CTRL_RX,
    MAC: F_CTRL_RX,  # the tables; the address has a feature of its own
    VLAN: F_CTRL_VLAN,
    ANNOUNCE: F_GUEST_ANNOUNCE,
    MQ: F_MQ,
    GUEST_OFFLOADS: F_CTRL_GUEST_OFFLOADS,
}
HEADER_BYTES = 2
# The longest that means anything: two tables of addresses; with more of them than the card keeps it looks at no more
# than their numbers. QEMU's limit is the same idea.
MOST_BYTES = 1 << 16
MOST_EXTRA_MODE = 2  # commands of RX above want F_CTRL_RX_EXTRA


def answer(card: Card, command: bytes) -> int:
    """Carry ``command`` out, header and data. OK or ERR."""
    if len(command) < HEADER_BYTES:
        return ERR
    kind, what, data = command[0], command[1], command[2:]
    needed = F_CTRL_MAC_ADDR if (kind, what) == (MAC, 1) else NEEDED.get(kind, 0)
    if not card.features & needed:
        return ERR
    if kind == RX:
        return set_mode(card, what, data)
    if kind == MAC:
        return set_address(card, what, data)
    if kind == VLAN:
        done = what <= 1 and len(data) == 2 and card.filter.set_vlan(int.from_bytes(data, "little"), what == 0)
    elif kind == ANNOUNCE:
        done = what == 0
        if done:
            card.announced()
    elif kind == MQ:
        done = what == 0 and len(data) == 2 and card.set_pairs(int.from_bytes(data, "little"))
    else:
        done = what == 0 and len(data) == 8 and card.set_guest_offloads(int.from_bytes(data, "little"))
    return OK if done else ERR


def set_mode(card: Card, what: int, data: bytes) -> int:
    if what >= len(MODES) or len(data) != 1:
        return ERR
    if what >= MOST_EXTRA_MODE and not card.features & F_CTRL_RX_EXTRA:
        return ERR
    setattr(card.filter, MODES[what], data[0] != 0)
    return OK


def set_address(card: Card, what: int, data: bytes) -> int:
    if what == 1:
        if len(data) != MAC_BYTES:
            return ERR
        card.set_mac(data)
        return OK
    if what != 0:
        return ERR
    try:
        unicast, rest = table(data)
        multicast, rest = table(rest)
    except ValueError:
        return ERR
    if rest:
        return ERR
    card.filter.set_tables(unicast, multicast)
    return OK


def table(data: bytes) -> tuple[list[bytes] | None, bytes]:
    """(addresses, or None where they are more than the card keeps; what follows). ValueError where it is cut short."""
    count = int.from_bytes(data[:4], "little")
    end = 4 + count * MAC_BYTES
    if len(data) < max(4, end):
        raise ValueError("a table of addresses that is cut short")
    if count > MOST_MACS:
        return None, data[end:]
    return [data[at : at + MAC_BYTES] for at in range(4, end, MAC_BYTES)], data[end:]
