"""The memory map covers RAM exactly, and each protocol's form decodes to the same entries."""

from __future__ import annotations

import struct
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.x86 import e820, layout

GIB = 1 << 30
PAGE = 4096


def test_a_small_machine() -> None:
    assert e820.memory_map([(0, 128 << 20)]) == [
        (0, 0x9FC00, e820.RAM),
        (0x9FC00, 0x60400, e820.RESERVED),
        (0x100000, (128 << 20) - 0x100000, e820.RAM),
        (0xFEFFC000, 0x4000, e820.RESERVED),
    ]


def test_a_large_machine_goes_on_at_4_gib() -> None:
    entries = e820.memory_map([(0, 0xC000_0000), (4 * GIB, 2 * GIB)])
    assert (0x100000, 0xC000_0000 - 0x100000, e820.RAM) in entries
    assert entries[-1] == (4 * GIB, 2 * GIB, e820.RAM)


def test_memory_in_the_hole_is_not_offered() -> None:
    assert e820.memory_map([(0, 1 << 20), (0xFF00_0000, 0x10000)]) == e820.memory_map([(0, 1 << 20)])


def test_memory_that_ends_below_the_bios_area() -> None:
    entries = e820.memory_map([(0, 0x80000)])
    assert [entry for entry in entries if entry[2] == e820.RAM] == [(0, 0x80000, e820.RAM)]


@given(
    st.integers(1, 0xC000_0000 // PAGE),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 1 << 16)), max_size=4),
)
def test_ram_is_what_is_not_reserved(pages: int, cuts: list[tuple[int, int]]) -> None:
    reserved, at = [], 0
    for gap, length in cuts:
        reserved.append((at + gap, length, e820.RESERVED))
        at += gap + length
    entries = e820.memory_map([(0, pages * PAGE)], reserved)
    for (base, size, _), (following, _, _) in pairwise(entries):
        assert base + size <= following
    ram = sum(size for _, size, kind in entries if kind == e820.RAM)
    lost = sum(max(0, min(base + size, pages * PAGE) - base) for base, size, _ in reserved)
    assert ram == pages * PAGE - lost
    assert [entry for entry in entries if entry[2] == e820.RESERVED] == reserved


def test_the_packed_forms() -> None:
    entries = [(0, 0x9FC00, 1), (5 << 32, 7 << 32, 2)]
    zero_page = e820.pack_zero_page(entries)
    assert [struct.unpack_from("<QQI", zero_page, n * 20) for n in (0, 1)] == entries
    assert len(zero_page) == 40
    assert [struct.unpack_from("<QQII", e820.pack_pvh(entries), n * 24) for n in (0, 1)] == [
        (*entry, 0) for entry in entries
    ]
    assert [struct.unpack_from("<IQQI", e820.pack_multiboot(entries), n * 24) for n in (0, 1)] == [
        (20, *entry) for entry in entries
    ]


def test_firmware_gets_whole_regions() -> None:
    data = e820.pack_fw_cfg([(0, 64 << 20)])
    assert struct.unpack_from("<QQI", data) == (0, 64 << 20, e820.RAM)
    assert struct.unpack_from("<QQI", data, 20) == (layout.KVM_PAGES, layout.KVM_PAGES_BYTES, e820.RESERVED)


def test_multiboot_sizes() -> None:
    entries = e820.memory_map([(0, 128 << 20)])
    assert e820.conventional_kib(entries) == 639
    assert e820.extended_kib(entries) == 127 * 1024
    assert e820.extended_kib(e820.memory_map([(0, 1 << 20)])) == 0
