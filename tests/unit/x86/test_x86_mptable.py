"""The MP tables, walked as a kernel walks them."""

from __future__ import annotations

import struct

import pytest

from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import layout, mptable

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def walk(memory: GuestMemory) -> list[bytes]:
    """Find the floating pointer, check both structures, and split the table into its entries."""
    area = memory.read(0xF0000, 0x10000)
    (at,) = [n for n in range(0, len(area), 16) if area[n : n + 4] == b"_MP_"]
    pointer = area[at : at + 16]
    table, paragraphs, revision, _, features = struct.unpack_from("<IBBBB", pointer, 4)
    assert (paragraphs, revision, features) == (1, 4, 0)
    assert sum(pointer) & 0xFF == 0
    header = memory.read(table, 44)
    signature, length, revision = struct.unpack_from("<4sHB", header)
    count, lapic = struct.unpack_from("<HI", header, 34)
    assert (signature, revision, lapic) == (b"PCMP", 4, 0xFEE0_0000)
    data = memory.read(table, length)
    assert sum(data) & 0xFF == 0
    assert 0xF0000 + at + 16 <= table
    assert table + length <= layout.MP_TABLE_END
    entries, where = [], 44
    while where < length:
        size = SIZES[data[where]]
        entries.append(data[where : where + size])
        where += size
    assert where == length
    assert len(entries) == count
    kinds = [entry[0] for entry in entries]
    assert kinds == sorted(kinds)  # the specification's order
    return entries


@pytest.mark.parametrize("cpus", [1, 2, 5, 64, 255])
def test_processors(memory: GuestMemory, cpus: int) -> None:
    mptable.write(memory, cpus, signature=0xA10F11, features=0x178BFBFF)
    processors = [entry for entry in walk(memory) if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    assert [entry[3] for entry in processors] == [3] + [1] * (cpus - 1)
    assert all(struct.unpack_from("<II", entry, 4) == (0xF11, 0x178BFBFF) for entry in processors)


def test_processors_past_an_8_bit_id_are_left_out(memory: GuestMemory) -> None:
    mptable.write(memory, 300)
    assert sum(entry[0] == 0 for entry in walk(memory)) == 255


def test_the_wiring(memory: GuestMemory) -> None:
    mptable.write(memory, 2)
    entries = walk(memory)
    assert [entry[2:] for entry in entries if entry[0] == 1] == [b"ISA   "]
    (ioapic,) = [entry for entry in entries if entry[0] == 2]
    assert struct.unpack("<BBBBI", ioapic) == (2, 0, 0x11, 1, layout.IOAPIC)
    wires = [struct.unpack("<BBHBBBB", entry) for entry in entries if entry[0] == 3]
    assert all(wire[1] == 0 and wire[3] == 0 and wire[5] == 0 for wire in wires)
    pins = {irq: pin for _, _, _, _, irq, _, pin in wires}
    assert pins == {0: 2, 1: 1, **{n: n for n in range(3, 16)}}
    flags = {irq: flag for _, _, flag, _, irq, _, _ in wires}
    assert flags[9] == 0b1101  # level, active high
    assert {flags[n] for n in flags if n != 9} == {0}
    local = [struct.unpack("<BBHBBBB", entry) for entry in entries if entry[0] == 4]
    assert [(wire[1], wire[5], wire[6]) for wire in local] == [(3, 0, 0), (1, 0xFF, 1)]
