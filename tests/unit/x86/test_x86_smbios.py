"""SMBIOS structures: lengths and strings as the specification has them for 2.8, and what they say of the machine."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import layout, smbios

MIB = 1 << 20
GIB = 1 << 30
UUID = smbios.parse_uuid("00112233-4455-6677-8899-aabbccddeeff")

# Length of the formatted part in version 2.8 (DSP0134 2.8, chapter 7).
LENGTHS = {1: 0x1B, 3: 0x16, 4: 0x2A, 16: 0x17, 17: 0x28, 19: 0x1F, 32: 0x0B, 127: 0x04}


class Structure:
    def __init__(self, data: bytes, strings: list[str]) -> None:
        self.data = data
        self.strings = strings
        self.kind, self.length, self.handle = struct.unpack_from("<BBH", data)

    def text(self, at: int) -> str | None:
        """The string that the byte there names."""
        number = self.data[at]
        return self.strings[number - 1] if number else None

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little")


def parse(table: bytes) -> list[Structure]:
    found = []
    while table:
        length = table[1]
        end = table.index(b"\0\0", length)
        strings = table[length:end].decode().split("\0") if end > length else []
        assert all(strings)
        found.append(Structure(table[:length], strings))
        table = table[end + 2 :]
    return found


def kinds(tables: smbios.SmbiosTables, kind: int) -> list[Structure]:
    return [structure for structure in parse(tables.structures) if structure.kind == kind]


@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 1 << 20), min_size=1, max_size=3),
    st.sampled_from(["", "0", "a serial number"]),
)
def test_structures_are_well_formed(cpus: int, sizes_mib: list[int], serial: str) -> None:
    ranges, base = [], 0
    for size in sizes_mib:
        ranges.append((base, size * MIB))
        base += (size + 1) * MIB
    tables = smbios.build(cpus, ranges, serial=serial)
    structures = parse(tables.structures)
    assert [(s.kind, s.length) for s in structures] == [(s.kind, LENGTHS[s.kind]) for s in structures]
    assert {s.kind for s in structures} == set(LENGTHS)
    assert structures[-1].kind == 127
    assert len({s.handle for s in structures}) == len(structures) == tables.count
    array = next(s for s in structures if s.kind == 16)
    devices = [s for s in structures if s.kind == 17]
    assert array.number(0x0D, 2) == len(devices)
    assert all(s.number(4, 2) == array.handle for s in devices)
    assert sum(mib_of(s) for s in devices) == sum(sizes_mib)
    found = [span_of(s) for s in structures if s.kind == 19]
    assert found == [(base, base + size - 1) for base, size in ranges]


def mib_of(device: Structure) -> int:
    size = device.number(0x0C, 2)
    return device.number(0x1C, 4) if size == 0x7FFF else size


def span_of(mapped: Structure) -> tuple[int, int]:
    first, last = mapped.number(4, 4), mapped.number(8, 4)
    if first == 0xFFFF_FFFF:
        return mapped.number(0x0F, 8), mapped.number(0x17, 8)
    return first * 1024, last * 1024 + 1023


def test_the_entry_point_has_both_sums() -> None:
    tables = smbios.build(2, [(0, 64 * MIB)])
    data = tables.entry_point(0xF1000)
    assert len(data) == data[5] == 0x1F
    assert data[:4] == b"_SM_"
    assert data[16:21] == b"_DMI_"
    assert sum(data) & 0xFF == sum(data[16:]) & 0xFF == 0
    assert (data[6], data[7], data[30]) == (2, 8, 0x28)
    largest, table_bytes, gpa, count = struct.unpack_from("<H12xHIH", data, 8)
    assert largest == max(
        s.length + sum(len(t) + 1 for t in s.strings) + (1 if s.strings else 2) for s in parse(tables.structures)
    )
    assert (table_bytes, gpa, count) == (len(tables.structures), 0xF1000, len(parse(tables.structures)))


def test_the_files_are_what_firmware_asks_for() -> None:
    tables = smbios.build(1, [(0, 64 * MIB)])
    assert tables.files() == {
        "etc/smbios/smbios-anchor": tables.entry_point(0),
        "etc/smbios/smbios-tables": tables.structures,
    }


def test_the_system_has_its_uuid_with_the_first_fields_swapped() -> None:
    (system,) = kinds(smbios.build(1, [(0, MIB)], uuid=UUID, serial="S1", product="A name"), 1)
    assert system.data[8:24].hex() == "33221100" + "5544" + "7766" + "8899" + "aabbccddeeff"
    assert (system.text(4), system.text(5), system.text(7)) == ("pyvmm", "A name", "S1")
    (nameless,) = kinds(smbios.build(1, [(0, MIB)]), 1)
    assert nameless.data[8:24] == bytes(16)
    assert nameless.text(7) is None


@pytest.mark.parametrize(
    "text", ["", "0011", "00112233-4455-6677-8899-aabbccddeefg", "0011-22334455-6677-8899-aabbccddeeff"]
)
def test_a_uuid_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"UUID .* 8-4-4-4-12"):
        smbios.parse_uuid(text)


def test_a_uuid_may_come_without_hyphens() -> None:
    assert smbios.parse_uuid("00112233445566778899AABBCCDDEEFF") == UUID


def test_a_uuid_has_16_bytes() -> None:
    with pytest.raises(ConfigError, match="UUID of 3 bytes"):
        smbios.build(1, [(0, MIB)], uuid=b"abc")


@pytest.mark.parametrize(("cpus", "cores"), [(1, 1), (4, 4), (255, 255), (300, 255)])
def test_one_package_has_all_cores(cpus: int, cores: int) -> None:
    tables = smbios.build(cpus, [(0, MIB)], cpu_id=(0x000306C3, 0x178BFBFF, "GenuineIntel"))
    (processor,) = kinds(tables, 4)
    assert list(processor.data[0x23:0x26]) == [cores] * 3
    assert processor.number(8, 8) == 0x178BFBFF_000306C3
    assert processor.text(7) == "GenuineIntel"
    assert bool(processor.number(0x26, 2) & 1 << 3) is (cpus > 1)
    assert processor.data[0x18] == 0x41


def test_memory_is_listed_in_devices_of_16_gib() -> None:
    tables = smbios.build(1, [(0, 3 * GIB), (4 * GIB, 37 * GIB)])
    assert [mib_of(s) for s in kinds(tables, 17)] == [16384, 16384, 8192]
    assert [s.text(0x10) for s in kinds(tables, 17)] == ["DIMM 0", "DIMM 1", "DIMM 2"]
    (array,) = kinds(tables, 16)
    assert array.number(7, 4) == 40 * MIB  # in KiB


def test_large_numbers_go_to_the_extended_fields() -> None:
    tables = smbios.build(1, [(0, 3 * GIB), (4 * GIB, 5 << 39)])
    (array,) = kinds(tables, 16)
    assert (array.number(7, 4), array.number(0x0F, 8)) == (0x8000_0000, 3 * GIB + (5 << 39))
    ranges = [(0, 3 * GIB), (8 << 40, GIB)]
    assert [span_of(s) for s in kinds(smbios.build(1, ranges), 19)] == [
        (0, 3 * GIB - 1),
        (8 << 40, (8 << 40) + GIB - 1),
    ]


def test_too_much_memory_to_list() -> None:
    with pytest.raises(ConfigError, match="use less than 4 TiB"):
        smbios.build(1, [(0, 4 << 40)])


def test_in_memory_the_entry_point_leads_to_the_structures() -> None:
    """Of 255 processors and as much memory as can be listed: that is the longest there is."""
    tables = smbios.build(255, [(0, 3 * GIB), (4 * GIB, (4 << 40) - 20 * GIB)], cpu_id=(1, 2, "GenuineIntel"))
    memory = GuestMemory(2 * MIB)
    try:
        tables.write(memory)
        entry = memory.read(layout.SMBIOS, 31)
        assert (entry[:4], sum(entry) & 0xFF, sum(entry[16:]) & 0xFF) == (b"_SM_", 0, 0)
        length, gpa, count = struct.unpack_from("<HIH", entry, 0x16)
        assert gpa % 16 == 0
        assert gpa + length <= layout.SMBIOS_END
        assert memory.read(gpa, length) == tables.structures
        assert len(parse(memory.read(gpa, length))) == count
    finally:
        memory.close()
