"""PioBuffer: the memory behind an IDE channel's data port."""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from pyvmm.block.driver import SECTOR_BYTES

CHUNK_SECTORS = 256  # a multiple of every DRQ block
BUFFER_BYTES = CHUNK_SECTORS * SECTOR_BYTES


class PioBuffer:
    """The memory behind the data port: whole pages, so that O_DIRECT takes it as it is."""

    __slots__ = ("_iovs", "memory")

    def __init__(self) -> None:
        self.memory = memoryview(mmap(-1, BUFFER_BYTES, MAP_PRIVATE | MAP_ANONYMOUS))
        self._iovs: dict[int, list[memoryview]] = {}

    def iov(self, sectors: int) -> list[memoryview]:
        """Its first ``sectors`` sectors, for a request."""
        iov = self._iovs.get(sectors)
        if iov is None:
            iov = self._iovs[sectors] = [self.memory[: sectors * SECTOR_BYTES]]
        return iov
