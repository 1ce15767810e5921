"""Buffers for O_DIRECT: page-aligned memory for requests whose own does not fit, or which are not whole blocks."""

from __future__ import annotations

import mmap

from pyvmm.block.iov import IovSlice
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BOUNCE_BYTES = 256 << 10
KEPT = 4


class Bounce:
    """One aligned buffer, as a memoryview ``view``."""

    __slots__ = ("_memory", "view")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, BOUNCE_BYTES)
        self.view = memoryview(self._memory)

    def close(self) -> None:
        self.view.release()
        self._memory.close()


class BouncePool:
    """A few buffers that were used, kept for whoever needs one next."""

    def __init__(self) -> None:
        self._free: deque[Bounce] = deque()

    def take(self) -> Bounce:
        try:
            return self._free.pop()
        except IndexError:
            return Bounce()

    def give(self, bounce: Bounce) -> None:
        if len(self._free) < KEPT:
            self._free.append(bounce)
        else:
            bounce.close()

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


def copy_in(buffer: memoryview, at: int, iov: Sequence[memoryview], start: int, end: int) -> None:
    """iov[start:end] to ``buffer`` from ``at`` on."""
    with IovSlice(iov, start, end) as parts:
        for part in parts:
            buffer[at : at + len(part)] = part
            at += len(part)


def copy_out(buffer: memoryview, at: int, iov: Sequence[memoryview], start: int, end: int) -> None:
    """``buffer`` from ``at`` on to iov[start:end]."""
    with IovSlice(iov, start, end) as parts:
        for part in parts:
            part[:] = buffer[at : at + len(part)]
            at += len(part)
