"""PRD tables ("Programming Interface for Bus Master IDE Controller", 1.0, section 1): an entry, and any table."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.devices.ide.prd_table import pieces_of
from pyvmm.errors import BusError
from pyvmm.guest_memory import GuestMemory

LAST = 1 << 31
RAM_BYTES = 1 << 20
TABLE = 0x8_0000  # at the beginning of one of its blocks
BLOCK = 0x10000
ENTRIES = st.lists(st.tuples(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF)), max_size=40)


def table(entries: list[tuple[int, int]], at: int = TABLE) -> GuestMemory:
    memory = GuestMemory(RAM_BYTES)
    memory.write(at, b"".join(struct.pack("<II", *entry) for entry in entries))
    return memory


@pytest.mark.parametrize(
    ("entries", "size", "expected"),
    [
        ([(0x1000, 512 | LAST)], 512, ([(0x1000, 512)], 0, False)),
        ([(0x1000, 512 | LAST)], 256, ([(0x1000, 256)], 0, True)),  # longer than what is wanted
        ([(0x1000, 512)], 512, ([(0x1000, 512)], 0, True)),  # and so is one that goes on
        ([(0x1000, 512 | LAST)], 1024, ([(0x1000, 512)], 512, False)),
        ([(0x1001, 513 | LAST)], 512, ([(0x1000, 512)], 0, False)),  # bit 0 of both is ignored
        ([(0x1000, 0 | LAST)], BLOCK, ([(0x1000, BLOCK)], 0, False)),
        ([(0x1000, 1 | LAST)], BLOCK, ([(0x1000, BLOCK)], 0, False)),
        ([(0x1000, 4096), (0x2000, 4096 | LAST)], 8192, ([(0x1000, 8192)], 0, False)),  # neighbours are one
        ([(0x2000, 4096), (0x1000, 4096 | LAST)], 8192, ([(0x2000, 4096), (0x1000, 4096)], 0, False)),
        ([(0, 4096), (0x1000, 4096 | LAST)], 8192, ([(0, 8192)], 0, False)),
        ([(0xFFFF_F000, 8192 | LAST)], 8192, ([(0xFFFF_F000, 8192)], 0, False)),
    ],
)
def test_what_an_entry_says(
    entries: list[tuple[int, int]], size: int, expected: tuple[list[tuple[int, int]], int, bool]
) -> None:
    assert pieces_of(table(entries), TABLE, size) == expected


def test_a_table_ends_at_its_boundary() -> None:
    entries = [(0x1000 * (2 * n + 1), 2) for n in range(3)]
    at = TABLE + BLOCK - 16
    assert pieces_of(table(entries, at), at, 100) == ([(0x1000, 2), (0x3000, 2)], 96, False)
    assert pieces_of(table(entries, at), at + 12, 100) == ([], 100, False)  # no entry fits before it


def test_a_table_that_is_not_in_ram() -> None:
    memory = GuestMemory(RAM_BYTES)
    with pytest.raises(BusError, match=r"0x100000 is not inside RAM"):
        pieces_of(memory, RAM_BYTES, 512)
    at = RAM_BYTES - 12
    memory.write(at, struct.pack("<II", 0x1000, 512))
    assert pieces_of(memory, at, 512) == ([(0x1000, 512)], 0, True)  # what is not needed is not looked at


@given(ENTRIES, st.integers(1, 0x20_0000))
def test_any_table(entries: list[tuple[int, int]], size: int) -> None:
    expected: list[tuple[int, int]] = []
    left, more = size, False
    for address, count in [*entries, *[(0, 0)] * ((BLOCK >> 3) - len(entries))]:  # RAM is zeros behind it
        length = count & 0xFFFE or 0x10000
        taken = min(left, length)
        if expected and sum(expected[-1]) == address & ~1:
            expected[-1] = expected[-1][0], expected[-1][1] + taken
        else:
            expected.append((address & ~1, taken))
        left -= taken
        more = not left and (length > taken or not count & LAST)
        if not left or count & LAST:
            break
    assert pieces_of(table(entries), TABLE, size) == (expected, left, more)
