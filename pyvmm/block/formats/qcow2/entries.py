"""Entries of L1 and L2 tables (qcow2.txt, "Cluster mapping"), and the limits of what is taken (QEMU's)."""

from __future__ import annotations

COPIED = 1 << 63  # the refcount is exactly one: it may be written in place
COMPRESSED = 1 << 62
ZERO = 1  # reads as zeros, version 3
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # bits 9 to 55
ENTRY_BYTES = 8
SECTOR = 512

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MOST_L1_BYTES = 32 << 20
MOST_REFCOUNT_TABLE_BYTES = 8 << 20
MOST_SNAPSHOTS = 65536
MOST_SNAPSHOT_TABLE_BYTES = 64 << 20
MOST_NAME_BYTES = 1023
MOST_HOST_OFFSET = 1 << 56


def compressed_at(entry: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, bytes up to the end of the last sector) of a compressed cluster's data ("Compressed Clusters
    Descriptor"). The data may be shorter than that.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & (1 << shift) - 1
    sectors = entry >> shift & (1 << cluster_bits - 8) - 1
    return offset, (sectors + 1) * SECTOR - offset % SECTOR
