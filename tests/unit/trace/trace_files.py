"""Traces that tests write: records by hand, in chunks as a drain writes them."""

from __future__ import annotations

import json
from typing import Any

from pyvmm.trace.format import CHUNK, CHUNK_MAGIC, NAMES, RECORD, RECORDS, THREAD, chunk_bytes, header_bytes

KHZ = 1_000_000  # so a tick is a nanosecond
START = 1000

Row = tuple[int, ...]  # kind, since, ticks, source, a, b; what is missing is 0
PLAIN = {
    "cpus": 1, "queues": {"0": "blk0.0"}, "drives": {"0": "virtio0", "1": "ide0"}, "gsis": {"14": "ide0"},
    "regions": [["IO", 0x80, 1, "port80"], ["IO", 0x1F0, 8, "ide0"], ["MMIO", 0xFE000000, 0x1000, "blk0.pci"]],
}  # fmt: skip


def record(kind: int, since: int, ticks: int = 0, source: int = 0, a: int = 0, b: int = 0) -> bytes:
    return RECORD.pack(START + since, ticks << 24 | source << 8 | kind, a & (1 << 64) - 1, b & (1 << 64) - 1)


def named(number: int, name: str) -> bytes:
    low, high = (int.from_bytes(name.encode().ljust(16, b"\0")[at : at + 8], "little") for at in (0, 8))
    return RECORD.pack(START, number << 24 | THREAD, low, high)


def chunk(ring: int, data: bytes, *, at: int, dropped: int = 0) -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, RECORDS, ring, len(data), dropped, START + at, at) + data


def trace(*chunks: bytes, names: Any = PLAIN, khz: int = KHZ) -> bytes:
    written = chunk_bytes(NAMES, json.dumps(names).encode(), START, 0)
    return header_bytes(khz, START, 0, 0) + written + b"".join(chunks)


def of_threads(threads: dict[str, list[Row]], *, until: int = 1 << 20) -> bytes:
    """One drain: {name: records} of each thread."""
    made = []
    for ring, (name, rows) in enumerate(threads.items()):
        data = named(100 + ring, name) + b"".join(record(*row) for row in rows)
        made.append(chunk(ring, data, at=until))
    return trace(*made)
