"""Ranges of guest memory that a driver has named: joined, and cut to whole pages of RAM. All of it is hostile."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    # Address and length in bytes.
    Range = tuple[int, int]

PAGE_BYTES = 4096  # whatever the guest's own pages are (virtio 1.2, 5.5.6)


def pages(numbers: Iterable[int]) -> list[Range]:
    """Of pages by their numbers, neighbours joined."""
    return joined((number * PAGE_BYTES, PAGE_BYTES) for number in numbers)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Lowest first; those that touch or overlap are one."""
    found: list[Range] = []
    for start, size in sorted(ranges):
        if found and start <= sum(found[-1]):
            first, length = found[-1]
            found[-1] = first, max(length, start + size - first)
        else:
            found.append((start, size))
    return found


def within(ranges: Iterable[Range], ram: Sequence[Range]) -> Iterator[Range]:
    """The whole pages of them that lie in ``ram``, which has its regions lowest first."""
    for start, size in ranges:
        for base, length in ram:
            first = -(-max(start, base) // PAGE_BYTES) * PAGE_BYTES
            last = min(start + size, base + length) // PAGE_BYTES * PAGE_BYTES
            if first < last:
                yield first, last - first
