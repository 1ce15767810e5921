"""Page-table walks: every mode of Intel SDM vol. 3, chapter 4, with tables made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.x86.paging import translate

PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
P, PS = 1, 1 << 7


class Tables:
    """Entries by address; whoever reads elsewhere reads zeros."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: dict[int, int] = {}

    def put(self, address: int, entry: int) -> None:
        self.entries[address] = entry

    def read(self, gpa: int, size: int) -> bytes:
        assert size == self.size
        return self.entries.get(gpa, 0).to_bytes(size, "little")


def sregs(cr4: int = 0, efer: int = 0, cr3: int = 0x1000, cr0: int = PG) -> dict[str, Any]:
    return {"cr0": cr0, "cr3": cr3, "cr4": cr4, "efer": efer}


def nobody(gpa: int, size: int) -> bytes:
    raise AssertionError("no table is looked at")


def test_no_paging() -> None:
    assert translate(0x1_2345_6789, sregs(cr0=0x11), nobody) == 0x2345_6789


def test_32_bits() -> None:
    tables = Tables(4)
    tables.put(0x1000 + 4 * 0x301, 0x5000 | P)
    tables.put(0x5000 + 4 * 0x12, 0x77000 | P)
    tables.put(0x5000 + 4 * 0x13, 0x78000)
    linear = 0x301 << 22 | 0x12 << 12 | 0x345
    assert translate(linear, sregs(), tables.read) == 0x77345
    assert translate(linear + 0x1000, sregs(), tables.read) is None
    assert translate(0, sregs(), tables.read) is None
    assert translate(linear | 1 << 40, sregs(), tables.read) == 0x77345


def test_32_bits_and_large_pages() -> None:
    tables = Tables(4)
    tables.put(0x1000 + 4, 0x80_0000 | 0x5 << 13 | PS | P)
    assert translate(0x41_2345, sregs(PSE), tables.read) == 0x5_0081_2345
    # Without CR4.PSE the bit means nothing: a table, in which there is nothing.
    assert translate(0x41_2345, sregs(), tables.read) is None


def test_pae() -> None:
    tables = Tables(8)
    cr3 = 0x1020  # of 32 bytes each
    tables.put(cr3 + 8 * 3, 0x2000 | P)
    tables.put(0x2000 + 8 * 5, 0x3000 | P)
    tables.put(0x3000 + 8 * 6, 0x9_0007_7000 | P | 1 << 63)
    tables.put(0x2000 + 8 * 6, 0x1_0020_0000 | PS | P)
    state = sregs(PAE, cr3=cr3)
    assert translate(3 << 30 | 5 << 21 | 6 << 12 | 0x89, state, tables.read) == 0x9_0007_7089
    assert translate(3 << 30 | 6 << 21 | 0x1_2345, state, tables.read) == 0x1_0021_2345
    assert translate(0, state, tables.read) is None


@pytest.mark.parametrize("high", [0, 1])
def test_4_levels(high: int) -> None:
    tables = Tables(8)
    top = 0x1FE if high else 0x42
    tables.put(0x1000 + 8 * top, 0x2000 | P)
    tables.put(0x2000 + 8 * 1, 0x3000 | P)
    tables.put(0x2000 + 8 * 2, 0x40_0000_0000 | PS | P)
    tables.put(0x3000 + 8 * 1, 0x4000 | P)
    tables.put(0x3000 + 8 * 2, 0x20_0000 | PS | P | 1 << 12)  # PAT, no part of the address
    tables.put(0x4000 + 8 * 1, 0xABC000 | P | 1 << 63)
    base = (0xFFFF << 48 if high else 0) | top << 39
    state = sregs(PAE, LMA, cr3=0x1018)  # PCD and PWT are no part of it either
    assert translate(base | 1 << 30 | 1 << 21 | 1 << 12 | 7, state, tables.read) == 0xABC007
    assert translate(base | 1 << 30 | 2 << 21 | 0x1_2345, state, tables.read) == 0x21_2345
    assert translate(base | 2 << 30 | 0x1234_5678, state, tables.read) == 0x40_1234_5678
    assert translate(base | 3 << 30, state, tables.read) is None
    # Not canonical: bits 63:48 are not all as bit 47.
    assert translate(base ^ 1 << 50, state, tables.read) is None


def test_5_levels() -> None:
    tables = Tables(8)
    for level, index in enumerate((0x1FF, 7, 8, 9)):
        tables.put(0x1000 * (level + 1) + 8 * index, 0x1000 * (level + 2) | P)
    tables.put(0x5000 + 8 * 10, 0x7777000 | P)
    linear = 0x7F << 57 | 0x1FF << 48 | 7 << 39 | 8 << 30 | 9 << 21 | 10 << 12 | 0x66
    state = sregs(PAE | LA57, LMA)
    assert translate(linear, state, tables.read) == 0x7777066
    assert translate(linear ^ 1 << 60, state, tables.read) is None
    assert translate(linear, sregs(PAE, LMA), tables.read) is None  # four levels know no such address


def test_what_the_reader_raises_comes_through() -> None:
    def broken(gpa: int, size: int) -> bytes:
        raise LookupError("no RAM there")

    with pytest.raises(LookupError):
        translate(0, sregs(PAE, LMA), broken)
