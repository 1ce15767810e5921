"""MemoryWatch: whether the process's memory grows for as long as a guest goes on.

What a guest can make grow has a bound, which is reached soon: after the first look neither the number of Python's
objects nor the anonymous memory of the process may go further than what comes and goes.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fuzz.harness import KIB, MIB, Escaped

if TYPE_CHECKING:
    from pyvmm.address_space import AddressSpace

BLOCKS_LIMIT = 5_000  # of Python's allocator; a sound board stays within some hundreds
ANONYMOUS_LIMIT_BYTES = 24 * MIB  # buffers that come and go, and what malloc keeps of them


class Grown(Escaped):
    """A guest can fill the host's memory."""


def allocated_blocks() -> int:
    """How many blocks Python's allocator has given out for what is still in use."""
    gc.collect()
    return sys.getallocatedblocks()


def flood(space: AddressSpace, address: int, size: int, value: int, count: int) -> None:
    """Write one value ``count`` times and read nothing. Grown where that leaves about as many objects behind."""
    before = sys.getallocatedblocks()
    for _ in range(count):
        space.write(address, size, value)
    # Without a collection first: that takes longer than the writes.
    if sys.getallocatedblocks() - before > count // 2:
        grown = allocated_blocks() - before
        if grown > count // 2:
            what = f"{count} writes of {value:#x}, {size} bytes at {space.name} {address:#x}"
            raise Grown(f"{what}, and {grown} objects more: something keeps what is written")


def anonymous_bytes() -> int:
    """The process's own memory: proc(5), RssAnon of /proc/pid/status."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * KIB
    raise RuntimeError("/proc has no RssAnon: the watch needs Linux 4.5")


class MemoryWatch:
    """``look(accesses)`` now and then: the first one says what is usual, later ones raise Grown where there is more."""

    def __init__(self) -> None:
        self._first: tuple[int, int, int] | None = None
        self.blocks = self.anonymous = 0
        """The most that there was above the first look, in blocks and in bytes."""

    def look(self, accesses: int) -> None:
        now = accesses, allocated_blocks(), anonymous_bytes()
        if self._first is None:
            self._first = now
            return
        since, blocks, anonymous = (a - b for a, b in zip(now, self._first, strict=True))
        self.blocks, self.anonymous = max(self.blocks, blocks), max(self.anonymous, anonymous)
        if blocks > BLOCKS_LIMIT or anonymous > ANONYMOUS_LIMIT_BYTES:
            raise Grown(
                f"in {since} accesses the process has grown by {blocks} objects of Python's, and by {anonymous} bytes"
                " of memory: something keeps what the guest sends"
            )
