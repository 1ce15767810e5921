"""Ranges of guest memory as a driver names them: joined, and cut to whole pages of RAM."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.virtio.page_ranges import PAGE_BYTES, joined, pages, within

END = 64 * PAGE_BYTES
RAM = [(0, 10 * PAGE_BYTES), (20 * PAGE_BYTES, 30 * PAGE_BYTES)]
RANGES = st.lists(st.tuples(st.integers(0, END), st.integers(1, END)), max_size=20)


def bytes_of(ranges: list[tuple[int, int]]) -> set[int]:
    """Which they cover, in units that no boundary of a test cuts."""
    return {byte for start, size in ranges for byte in range(start, start + size)}


def test_neighbours_are_joined() -> None:
    assert pages({5, 3, 4, 9}) == [(3 * PAGE_BYTES, 3 * PAGE_BYTES), (9 * PAGE_BYTES, PAGE_BYTES)]
    assert pages([]) == []
    assert pages(range(256)) == [(0, 256 * PAGE_BYTES)]
    assert pages({0xFFFF_FFFF}) == [(0xFFFF_FFFF * PAGE_BYTES, PAGE_BYTES)]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20))
def test_joined_ranges_cover_the_same_and_do_not_touch(ranges: list[tuple[int, int]]) -> None:
    found = joined(ranges)
    assert bytes_of(found) == bytes_of(ranges)
    assert all(start + size < after for (start, size), (after, _) in pairwise(found))


@given(RANGES)
def test_whole_pages_of_ram_and_no_other(ranges: list[tuple[int, int]]) -> None:
    found = list(within(joined(ranges), RAM))
    covered = joined(ranges)
    whole = {
        page
        for page in range(END // PAGE_BYTES)
        if any(start <= page * PAGE_BYTES and (page + 1) * PAGE_BYTES <= start + size for start, size in covered)
        and any(base <= page * PAGE_BYTES < base + length for base, length in RAM)
    }
    got = [page for start, size in found for page in range(start // PAGE_BYTES, (start + size) // PAGE_BYTES)]
    assert all(start % PAGE_BYTES == size % PAGE_BYTES == 0 for start, size in found)
    assert sorted(got) == sorted(whole)
