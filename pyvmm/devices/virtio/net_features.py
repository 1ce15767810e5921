"""A virtio network card's features (OASIS virtio 1.2, 5.1.3), and what of them goes with what."""

from __future__ import annotations

from pyvmm.net.backend import CHECKSUM, TSO4, TSO6, TSO_ECN, USO4, USO6

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_CTRL_GUEST_OFFLOADS = 1 << 2
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_CTRL_VLAN = 1 << 19
F_CTRL_RX_EXTRA = 1 << 20
F_GUEST_ANNOUNCE = 1 << 21
F_MQ = 1 << 22
F_CTRL_MAC_ADDR = 1 << 23
F_GUEST_USO4 = 1 << 54
F_GUEST_USO6 = 1 << 55
F_HOST_USO = 1 << 56
F_VERSION_1 = 1 << 32

# (the feature, what of the host's it needs); a frame for the guest, one of the guest's.
GUEST_OFFLOADS = {
    F_GUEST_CSUM: CHECKSUM,
    F_GUEST_TSO4: TSO4,
    F_GUEST_TSO6: TSO6,
    F_GUEST_ECN: TSO_ECN,
    F_GUEST_USO4: USO4,
    F_GUEST_USO6: USO6,
}
HOST_OFFLOADS = {
    F_CSUM: CHECKSUM,
    F_HOST_TSO4: TSO4,
    F_HOST_TSO6: TSO6,
    F_HOST_ECN: TSO_ECN,
    F_HOST_USO: USO4 | USO6,
}
SEGMENTS_FOR_GUEST = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6
CONTROLLED = F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR | F_CTRL_GUEST_OFFLOADS
# A driver that takes one of these has to take one of those (5.1.3.1).
NEEDS = (
    (SEGMENTS_FOR_GUEST, F_GUEST_CSUM),
    (F_GUEST_ECN, F_GUEST_TSO4 | F_GUEST_TSO6),
    (F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_USO, F_CSUM),
    (F_HOST_ECN, F_HOST_TSO4 | F_HOST_TSO6),
    (F_CTRL_RX | F_CTRL_VLAN | F_GUEST_ANNOUNCE | F_MQ | F_CTRL_MAC_ADDR | F_CTRL_RX_EXTRA, F_CTRL_VQ),
    (F_CTRL_GUEST_OFFLOADS, F_CTRL_VQ),
)


def offered(offloads: int, *, pairs: int, mtu: bool) -> int:
    """What a card offers whose host's side can leave ``offloads`` undone. The rest is refused by negotiation: UFO
    (Linux has given it up), RSS and hash reports, coalesced segments, the driver's header lengths, standby, speed.
    """
    features = F_MAC | F_STATUS | F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA
    features |= F_CTRL_MAC_ADDR | F_GUEST_ANNOUNCE
    if mtu:
        features |= F_MTU
    if pairs > 1:
        features |= F_MQ
    if offloads & CHECKSUM:
        features |= F_CTRL_GUEST_OFFLOADS
        for table in (GUEST_OFFLOADS, HOST_OFFLOADS):
            for feature, needed in table.items():
                if offloads & needed == needed:
                    features |= feature
    return features


def goes_together(features: int) -> bool:
    """Whether nothing is taken without what it needs."""
    return all(features & needed for some, needed in NEEDS if features & some)


def guest_offloads(features: int) -> int:
    """What the guest takes upon itself for frames that come to it, as a NetBackend has it."""
    return sum(offload for feature, offload in GUEST_OFFLOADS.items() if features & feature)
