"""Places: what a machine has of each kind is given out once: ports, MMIO windows, memory slots, PCI slots.

    ports.take(0x3F8, 8, "serial")            a fixed place
    at = windows.give(0x200, "virtio-blk")    the lowest that is free
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Places:
    """Numbers from ``first`` up to ``end`` of one ``kind`` ("port"), and who has which."""

    __slots__ = ("_ends", "_names", "_starts", "end", "first", "kind", "numbered")

    def __init__(self, kind: str, first: int, end: int, *, numbered: bool = False) -> None:
        self.kind = kind
        self.first = first
        self.end = end
        self.numbered = numbered  # messages give the numbers in decimal, as those of slots
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []

    def take(self, at: int, size: int, name: str) -> int:
        """``size`` numbers from ``at`` on are ``name``'s. ConfigError where somebody has one of them, and names both.
        """
        if not self.first <= at <= self.end - size:
            raise ConfigError(f"{name} at {self._range(at, size)} is no {self.kind}: {self._all()}")
        n = self._behind(at)
        if n < len(self._starts) and self._starts[n] < at + size:
            there = self._range(self._starts[n], self._ends[n] - self._starts[n])
            mine = f"{name} at {self.kind} {self._range(at, size)}"
            raise ConfigError(f"{mine} overlaps {self._names[n]} at {there}: give another place")
        self._starts.insert(n, at)
        self._ends.insert(n, at + size)
        self._names.insert(n, name)
        return at

    def give(self, size: int, name: str, *, align: int = 0, first: int | None = None, end: int | None = None) -> int:
        """The lowest place for ``size`` numbers that is free, at a multiple of ``align`` (of ``size``, where that is
        left out), between ``first`` and ``end``: it is ``name``'s now. ConfigError where none is left, and says whose
        they are.
        """
        step = align or size
        low = self.first if first is None else first
        top = self.end if end is None else end
        at = -(-low // step) * step
        for start, stop in zip(self._starts, self._ends, strict=True):
            if at + size <= start:
                break
            if stop > at:
                at = -(-stop // step) * step
        if at + size > top:
            owners = ", ".join(dict.fromkeys(who for where, _, who in self if low <= where < top))
            where = self._range(low, top - low)
            raise ConfigError(f"no {self.kind} of {where} is left for {name}: {owners} have them, leave one out")
        return self.take(at, size, name)

    def free(self, at: int) -> None:
        """Whoever took the place at ``at`` gives it back."""
        n = self._starts.index(at)
        del self._starts[n], self._ends[n], self._names[n]

    def owner(self, at: int) -> str | None:
        """Who has it."""
        n = self._behind(at)
        return self._names[n] if n < len(self._starts) and self._starts[n] <= at else None

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        """(first, size, name) of all that is given, the lowest first."""
        for start, stop, name in zip(self._starts, self._ends, self._names, strict=True):
            yield start, stop - start, name

    def _behind(self, at: int) -> int:
        """Index of the first that ends behind ``at``. There are some dozens at most: a loop beats an import."""
        if not self._ends or self._ends[-1] <= at:
            return len(self._ends)
        for n, stop in enumerate(self._ends):
            if stop > at:
                return n
        return len(self._ends)

    def _range(self, at: int, size: int) -> str:
        number = str if self.numbered else hex
        return number(at) if size == 1 else f"{number(at)}-{number(at + size - 1)}"

    def _all(self) -> str:
        return f"they go from {self._range(self.first, self.end - self.first)}"
