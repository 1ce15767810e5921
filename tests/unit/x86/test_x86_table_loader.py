"""The loader's script, carried out by a small firmware: every table must be found and sum to zero where it landed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.x86 import acpi, acpi_pc, table_loader

MIB = 1 << 20


class Firmware:
    """Carries out a table loader script on files: HIGH ones go to ``high``, the others to ``fseg``."""

    def __init__(self, files: dict[str, bytes], high: int, fseg: int) -> None:
        self.free = {table_loader.ZONE_HIGH: high, table_loader.ZONE_FSEG: fseg}
        self.loaded: dict[str, tuple[int, bytearray]] = {}
        script = files[table_loader.SCRIPT_FILE]
        assert len(script) % 128 == 0
        for at in range(0, len(script), 128):
            self.run(script[at : at + 128], files)

    def run(self, command: bytes, files: dict[str, bytes]) -> None:
        (kind,) = struct.unpack_from("<I", command)
        name, body = text(command[4:60]), command[60:]
        if kind == 1:
            alignment, zone = struct.unpack_from("<IB", body)
            assert alignment & (alignment - 1) == 0 < alignment
            assert not any(body[5:])
            base = -(-self.free[zone] // alignment) * alignment
            self.free[zone] = base + len(files[name])
            assert name not in self.loaded
            self.loaded[name] = (base, bytearray(files[name]))
        elif kind == 2:
            at, size = struct.unpack_from("<IB", body[56:])
            data = self.loaded[name][1]
            target, content = self.loaded[text(body[:56])]
            value = int.from_bytes(data[at : at + size], "little")
            assert value < len(content)
            data[at : at + size] = (value + target).to_bytes(size, "little")
        else:
            assert kind == 3
            at, start, length = struct.unpack_from("<III", body)
            data = self.loaded[name][1]
            assert start <= at < start + length <= len(data)
            data[at] = data[at] - sum(data[start : start + length]) & 0xFF

    def read(self, gpa: int, size: int) -> bytes:
        for base, data in self.loaded.values():
            if base <= gpa and gpa + size <= base + len(data):
                return bytes(data[gpa - base : gpa - base + size])
        raise AssertionError(f"nothing was loaded at {gpa:#x}-{gpa + size:#x}")

    def table(self, gpa: int) -> bytes:
        return self.read(gpa, int.from_bytes(self.read(gpa + 4, 4), "little"))


def text(name: bytes) -> str:
    assert name.endswith(b"\0")
    return name.rstrip(b"\0").decode()


def files(cpus: int = 2, irqchip: bool = True) -> dict[str, bytes]:
    tables = acpi_pc.build(cpus, ram_below_4g_bytes=64 * MIB, irqchip=irqchip, rsdp=0, base=0, end=MIB)
    return table_loader.acpi_files(tables)


@pytest.mark.parametrize("irqchip", [True, False])
@given(cpus=st.sampled_from([1, 2, 255, 300]), page=st.integers(16, 0xFFF0), fseg=st.integers(0xF0000, 0xFF000))
def test_an_operating_system_finds_good_tables(irqchip: bool, cpus: int, page: int, fseg: int) -> None:
    firmware = Firmware(files(cpus, irqchip), page << 16 | 8, fseg)
    root_at, root = firmware.loaded["etc/acpi/rsdp"]
    assert root[:8] == b"RSD PTR "
    assert root_at % 16 == 0
    assert 0xF0000 <= root_at < 0x100000
    assert sum(root[:20]) & 0xFF == sum(root) & 0xFF == 0
    rsdt, _length, xsdt = struct.unpack_from("<IIQ", root, 16)
    listed = []
    for gpa, form in ((rsdt, "I"), (xsdt, "Q")):
        data = firmware.table(gpa)
        assert sum(data) & 0xFF == 0
        listed.append(struct.unpack(f"<{(len(data) - 36) // struct.calcsize(form)}{form}", data[36:]))
    assert listed[0] == listed[1]
    tables = [firmware.table(gpa) for gpa in listed[0]]
    assert [data[:4] for data in tables] == [b"FACP", b"APIC"][: 1 + irqchip]
    facs, dsdt = struct.unpack_from("<II", tables[0], 36)
    assert struct.unpack_from("<QQ", tables[0], 132) == (0, dsdt)
    assert firmware.table(dsdt)[:4] == b"DSDT"
    assert (firmware.read(facs, 4), facs % 64) == (b"FACS", 0)
    assert all(sum(data) & 0xFF == 0 for data in [*tables, firmware.table(dsdt)])


def test_what_does_not_move_is_the_same_as_without_firmware() -> None:
    placed = acpi_pc.build(2, ram_below_4g_bytes=64 * MIB)
    firmware = Firmware(files(2), placed.tables["FACS"][0], placed.rsdp | 0x10000)
    for name in ("FACS", "DSDT", "FACP", "APIC", "RSDT", "XSDT"):
        gpa, data = placed.tables[name]
        assert firmware.read(gpa, len(data)) == data


def test_commands_take_128_bytes_and_names_55_characters() -> None:
    script = table_loader.Script()
    script.allocate("etc/a", 64, table_loader.ZONE_HIGH)
    script.add_pointer("etc/a", 0x1234, 8, "etc/b")
    script.add_checksum("etc/a", 1, 2, 3)
    data = bytes(script)
    assert len(data) == 3 * 128
    assert data[:68] == b"\1\0\0\0etc/a".ljust(60, b"\0") + b"\x40\0\0\0\1\0\0\0"
    assert data[128:192] == b"\2\0\0\0etc/a".ljust(60, b"\0") + b"etc/"
    assert data[244:256] == b"\x34\x12\0\0\x08" + bytes(7)
    assert data[256:384] == b"\3\0\0\0etc/a".ljust(60, b"\0") + struct.pack("<III", 1, 2, 3) + bytes(56)


def test_files_hold_offsets_and_no_sums() -> None:
    made = files()
    rsdp = made["etc/acpi/rsdp"]
    assert (rsdp[8], rsdp[32], len(rsdp)) == (0, 0, acpi.RSDP_BYTES)
    rsdt = struct.unpack_from("<I", rsdp, 16)[0]
    assert made["etc/acpi/tables"][rsdt : rsdt + 4] == b"RSDT"
    assert made["etc/acpi/tables"][rsdt + 9] == 0
