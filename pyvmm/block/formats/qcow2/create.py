"""A new qcow2 image: header, refcounts and an empty L1 table, in so many clusters at the file's beginning."""

from __future__ import annotations

import os

from pyvmm.block.formats.qcow2.entries import COPIED, ENTRY_BYTES, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MOST_L1_BYTES
from pyvmm.block.formats.qcow2.header import (
    COMPRESSION,
    EXTERNAL,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL,
    V3_BYTES,
    Header,
    feature_names,
)
from pyvmm.block.formats.qcow2.refcounts import Block
from pyvmm.errors import ConfigError

PREALLOCATIONS = ("off", "metadata", "falloc", "full")


class NewImage:
    """What a new image is to be. ``preallocation``: off, or whether its tables (metadata), its space (falloc) and its
    zeros (full) are there from the start. ConfigError for what can't be.
    """

    def __init__(
        self,
        size: int,
        *,
        cluster_bytes: int = 65536,
        version: int = 3,
        refcount_bits: int = 16,
        backing: str | None = None,
        backing_format: str | None = None,
        data_file: str | None = None,
        data_file_raw: bool = False,
        zstd: bool = False,
        lazy_refcounts: bool = False,
        preallocation: str = "off",
    ) -> None:
        bits = cluster_bytes.bit_length() - 1
        if cluster_bytes != 1 << bits or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise ConfigError(f"cluster_size={cluster_bytes}: give a power of two from 512 to 2M")
        order = refcount_bits.bit_length() - 1
        if refcount_bits != 1 << max(order, 0) or order > 6:
            raise ConfigError(f"refcount_bits={refcount_bits}: give 1, 2, 4, 8, 16, 32 or 64")
        if version not in (2, 3):
            raise ConfigError("compat: give 0.10 (version 2) or 1.1 (version 3)")
        if version == 2 and (order != 4 or zstd or lazy_refcounts or data_file):
            raise ConfigError("version 2 (compat=0.10) has refcounts of 16 bits, zlib and no data file: leave it out")
        if preallocation not in PREALLOCATIONS:
            raise ConfigError(f"preallocation={preallocation}: use {', '.join(PREALLOCATIONS)}")
        if backing and (preallocation not in ("off", "metadata") or data_file_raw):
            raise ConfigError("space for all of a disk that stands on a backing file hides that one: leave one out")
        if data_file_raw and not data_file:
            raise ConfigError("data_file_raw=on without data_file: give the name of one")
        header = self.header = Header()
        header.version, header.cluster_bits, header.size, header.refcount_order = version, bits, size, order
        if size < 0 or size % 512 or header.needed_l1_entries * ENTRY_BYTES > MOST_L1_BYTES:
            raise ConfigError(f"a disk of {size} bytes can't be in clusters of {cluster_bytes}: give whole sectors"
                              " of 512 bytes, less, or a larger cluster_size")  # fmt: skip
        header.backing, header.backing_format, header.data_file = backing, backing_format, data_file
        header.zstd = zstd
        header.incompatible = (EXTERNAL if data_file else 0) | (COMPRESSION if zstd else 0)
        header.compatible = LAZY_REFCOUNTS if lazy_refcounts else 0
        header.autoclear = RAW_EXTERNAL if data_file_raw else 0
        if version == 3:
            header.header_bytes = V3_BYTES + 8
            header.rest = bytes([zstd]) + bytes(7)
            if cluster_bytes >= 4096:
                header.others.append(feature_names())
        self.preallocation = "metadata" if data_file_raw and preallocation == "off" else preallocation

    def write(self, fd: int) -> None:
        """Into an empty file. OSError as pwrite(2) and its like."""
        header, cluster = self.header, self.header.cluster_bytes
        l1_entries = max(1, header.needed_l1_entries)
        l1_clusters = -(-l1_entries * ENTRY_BYTES // cluster)
        allocates = self.preallocation != "off"
        tables = header.needed_l1_entries if allocates else 0
        data = -(-header.size // cluster) if allocates and not header.external else 0
        per_block = cluster * 8 >> header.refcount_order
        blocks = table_clusters = 1
        while True:
            total = 1 + table_clusters + blocks + l1_clusters + tables + data
            needed = -(-total // per_block), -(-blocks * ENTRY_BYTES // cluster)
            if needed[0] <= blocks and needed[1] <= table_clusters:
                break
            blocks, table_clusters = max(blocks, needed[0]), max(table_clusters, needed[1])
        at = header.refcount_table_offset = cluster
        header.refcount_table_clusters = table_clusters
        first_block = 1 + table_clusters
        header.l1_offset = (first_block + blocks) * cluster
        header.l1_entries = l1_entries
        self._write_refcounts(fd, at, first_block, blocks, total, per_block)
        first_table = first_block + blocks + l1_clusters
        self._write_tables(fd, first_table, tables)
        if data and self.preallocation == "full":
            zeros = bytes(min(1 << 20, cluster))
            for offset in range((first_table + tables) * cluster, total * cluster, len(zeros)):
                os.pwrite(fd, zeros, offset)
        elif data and self.preallocation == "falloc":
            os.posix_fallocate(fd, (first_table + tables) * cluster, data * cluster)
        os.ftruncate(fd, total * cluster)
        os.pwrite(fd, header.pack(), 0)

    def _write_refcounts(self, fd: int, at: int, first: int, blocks: int, total: int, per_block: int) -> None:
        cluster = self.header.cluster_bytes
        places = b"".join(((first + n) * cluster).to_bytes(8, "big") for n in range(blocks))
        os.pwrite(fd, places, at)
        for n in range(blocks):
            os.pwrite(fd, ones(min(per_block, total - n * per_block), cluster, self.header.refcount_order),
                      (first + n) * cluster)  # fmt: skip

    def _write_tables(self, fd: int, first: int, tables: int) -> None:
        """The L1 table, and L2 tables for all of the disk where it is preallocated."""
        header, cluster = self.header, self.header.cluster_bytes
        l1 = b"".join(((first + n) * cluster | COPIED).to_bytes(8, "big") for n in range(tables))
        os.pwrite(fd, l1 or bytes(8), header.l1_offset)
        data = 0 if header.external else (first + tables) * cluster
        clusters = -(-header.size // cluster)
        per_table = cluster // ENTRY_BYTES
        for n in range(tables):
            here = range(n * per_table, min(clusters, (n + 1) * per_table))
            entries = b"".join((data + each * cluster | COPIED).to_bytes(8, "big") for each in here)
            os.pwrite(fd, entries, (first + n) * cluster)


def ones(count: int, cluster_bytes: int, order: int) -> bytes:
    """A refcount block in which the first ``count`` clusters are in use, once each."""
    if order >= 3:
        return (b"\1".rjust(1 << order - 3, b"\0") * count).ljust(cluster_bytes, b"\0")
    block = Block(bytearray(cluster_bytes), order)
    for place in range(count):
        block.set(place, 1)
    return bytes(block.data)
