"""RxFilter: which frames a virtio network card lets through to its guest (OASIS virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

What is wanted is kept here; RxLane looks at the frames.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAC_BYTES = 6
MOST_MACS = 64  # of one table: with more the card lets all of that kind through, as QEMU's does
VLANS = 4096
ALL_VLANS = b"\xff" * (VLANS // 8)

# Commands of class RX, in their order: which field each sets (5.1.6.5.1).
MODES = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")


class RxFilter:
    """A card that was reset lets everything through (``promisc``), for drivers that never say what they want."""

    STATE = {
        **dict.fromkeys(MODES, "flag"),
        "unicast": ("list", ("bytes", MAC_BYTES), 0, MOST_MACS),
        "multicast": ("list", ("bytes", MAC_BYTES), 0, MOST_MACS),
        "unicast_overflow": "flag",
        "multicast_overflow": "flag",
        "vlans": ("bytes", VLANS // 8),
    }

    def __init__(self) -> None:
        self.vlans = bytearray(ALL_VLANS)
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.reset(by_vlan=False)

    def reset(self, *, by_vlan: bool) -> None:
        """``by_vlan``: the driver says which VLANs it wants, none at first."""
        self.promisc = True
        self.allmulti = self.alluni = self.nomulti = self.nouni = self.nobcast = False
        self.unicast.clear()
        self.multicast.clear()
        self.unicast_overflow = self.multicast_overflow = False
        self.vlans[:] = bytes(VLANS // 8) if by_vlan else ALL_VLANS

    @property
    def modes(self) -> int:
        """All flags, a bit each, as RxLane.set_filter has them."""
        flags = [*(getattr(self, mode) for mode in MODES), self.unicast_overflow, self.multicast_overflow]
        return sum(flag << n for n, flag in enumerate(flags))

    def set_tables(self, unicast: list[bytes] | None, multicast: list[bytes] | None) -> None:
        """None: more than the card keeps."""
        self.unicast[:], self.unicast_overflow = unicast or [], unicast is None
        self.multicast[:], self.multicast_overflow = multicast or [], multicast is None

    def set_vlan(self, vlan: int, wanted: bool) -> bool:
        """Whether there is such a VLAN."""
        if vlan >= VLANS:
            return False
        if wanted:
            self.vlans[vlan >> 3] |= 1 << (vlan & 7)
        else:
            self.vlans[vlan >> 3] &= ~(1 << (vlan & 7))
        return True

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)
