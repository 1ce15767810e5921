"""The tables: checksums, pointers, the fields a kernel acts on, and ACPICA's opinion of all of it."""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from acpica import disassemble, recompile

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import acpi, aml, layout

VIRTIO = aml.device(
    "VM00",
    aml.name("_HID", "LNRO0005"),
    aml.name("_UID", 0),
    aml.name("_CCA", 1),
    aml.name("_CRS", aml.resources(aml.memory32(layout.VIRTIO_MMIO, 0x200), aml.interrupt(5, edge=True))),
)
DEVICES = [acpi.rtc(), acpi.keyboard(), acpi.serial_port(), VIRTIO]


def body(tables: acpi.AcpiTables, signature: str) -> bytes:
    return tables.tables[signature][1]


@pytest.mark.parametrize("cpus", [1, 2, 64, 255, 256, 300])
@pytest.mark.parametrize("irqchip", [True, False])
def test_every_checksum_and_length(cpus: int, irqchip: bool) -> None:
    tables = acpi.build(cpus, irqchip=irqchip)
    for signature, (gpa, data) in tables.tables.items():
        if signature == "RSDP":
            assert data[:8] == b"RSD PTR "
            assert sum(data) & 0xFF == sum(data[:20]) & 0xFF == 0
            continue
        assert data[:4] == signature.encode()
        if signature == "FACS":
            assert struct.unpack_from("<I", data, 4) == (len(data),) == (64,)
            assert gpa % 64 == 0
        else:
            assert sum(data) & 0xFF == 0
            assert struct.unpack_from("<I", data, 4) == (len(data),)


def test_a_kernel_finds_everything_from_the_root(memory: GuestMemory) -> None:
    """As an operating system does: scan, then follow pointers."""
    tables = acpi.build(2)
    tables.write(memory)
    area = memory.read(0xE0000, 0x20000)
    found = [at for at in range(0, len(area), 16) if area[at : at + 8] == b"RSD PTR "]
    assert [0xE0000 + at for at in found] == [tables.rsdp]
    rsdp = memory.read(tables.rsdp, 36)
    revision, rsdt, length, xsdt = struct.unpack_from("<BIIQ", rsdp, 15)
    assert (revision, length) == (2, 36)
    listed = []
    for gpa, form in ((rsdt, "I"), (xsdt, "Q")):
        (size,) = struct.unpack("<I", memory.read(gpa + 4, 4))
        count = (size - 36) // struct.calcsize(form)
        listed.append(struct.unpack(f"<{count}{form}", memory.read(gpa + 36, size - 36)))
    assert listed[0] == listed[1]
    assert [memory.read(gpa, 4) for gpa in listed[1]] == [b"FACP", b"APIC"]
    fadt = memory.read(listed[1][0], 276)
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert (memory.read(facs, 4), memory.read(dsdt, 4)) == (b"FACS", b"DSDT")
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)


def test_tables_do_not_overlap() -> None:
    spans = sorted((gpa, gpa + len(data)) for gpa, data in acpi.build(255).tables.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[0][0] == layout.ACPI_RSDP
    assert spans[-1][1] <= layout.ACPI_TABLES_END


def test_too_many_processors() -> None:
    with pytest.raises(ConfigError, match=r"ACPI tables of 4000 processors are .* use fewer"):
        acpi.build(4000)


def test_what_the_fadt_says(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "facp", body(acpi.build(1), "FACP"))

    def shown(label: str) -> list[str]:
        return re.findall(rf"(?:  |\] ){re.escape(label)} : (.*)", text)

    assert shown("SCI Interrupt") == ["0009"]
    assert shown("PM1A Event Block Address") == ["00000600"]
    assert shown("PM1A Control Block Address") == ["00000604"]
    assert shown("PM Timer Block Address") == ["00000608"]
    assert (shown("PM1 Event Block Length"), shown("PM1 Control Block Length")) == (["04"], ["02"])
    assert shown("PM Timer Block Length") == ["04"]
    assert shown("SMI Command Port") == ["00000000"]
    assert shown("Value to cause reset") == ["06"]
    assert shown("Address")[0] == "0000000000000CF9"
    assert shown("Address")[1:3] == ["0000000000000600", "0000000000000000"]
    for flag, value in {
        "Legacy Devices Supported (V2)": "1",
        "8042 Present on ports 60/64 (V2)": "1",
        "VGA Not Present (V4)": "1",
        "CMOS RTC Not Present (V5)": "0",
        "Reset Register Supported (V2)": "1",
        "Hardware Reduced (V5)": "0",
        "Control Method Power Button (V1)": "0",
        "32-bit PM Timer (V1)": "1",
    }.items():
        assert shown(flag) == [value], flag


def test_what_the_madt_says(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "apic", body(acpi.build(3), "APIC"))
    assert re.findall(r"Subtable Type : (\w\w)", text) == ["00", "00", "00", "01", "02", "02", "04"]
    assert re.findall(r"Local Apic ID : (\w+)", text) == ["00", "01", "02"]
    assert re.findall(r" Source : (\w+)", text) == ["00", "09"]
    assert re.findall(r"\] +Interrupt : (\w+)", text) == ["00000000", "00000002", "00000009"]
    assert "Local Apic Address : FEE00000" in text
    assert "PC-AT Compatibility : 1" in text
    override = text[text.index("Source : 09") :]
    assert re.findall(r"Polarity : (\d)", override)[0] == "1"
    assert re.findall(r"Trigger Mode : (\d)", override)[0] == "3"
    assert "Interrupt Input LINT : 01" in text


def test_processors_past_254_are_x2apics(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "apic", body(acpi.build(257), "APIC"))
    kinds = re.findall(r"Subtable Type : (\w\w)", text)
    assert [kinds.count(kind) for kind in ("00", "09", "0A")] == [255, 2, 1]
    assert re.findall(r"Processor x2Apic ID : (\w+)", text) == ["000000FF", "00000100"]


def test_without_an_irqchip_there_is_no_madt() -> None:
    tables = acpi.build(1, irqchip=False)
    assert "APIC" not in tables.tables
    assert len(body(tables, "XSDT")) == 36 + 8


@pytest.mark.parametrize("cpus", [1, 300])
def test_the_dsdt_recompiles_to_itself(tmp_path: Path, cpus: int) -> None:
    original = body(acpi.build(cpus, devices=DEVICES), "DSDT")
    again = recompile(tmp_path, original)
    # Checksum and compiler's name differ.
    assert again[36:] == original[36:]


def test_what_the_dsdt_says(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "dsdt", body(acpi.build(2, devices=DEVICES), "DSDT"))
    assert re.findall(r"Device \((\w+)\)", text) == ["C000", "C001", "RTC0", "KBD0", "COM1", "VM00"]
    assert [text.count(f'"{name}"') for name in ("PNP0501", "PNP0B00", "PNP0303", "ACPI0007")] == [1, 1, 1, 2]
    serial = text[text.index("COM1") :]
    assert re.findall(r"0x03F8", serial) == ["0x03F8", "0x03F8"]
    assert "{4}" in serial
    virtio = text[text.index("VM00") :]
    assert "0xFEB00000" in virtio
    assert "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive" in virtio


def test_where_the_generation_s_number_is_and_how_another_one_is_told(tmp_path: Path) -> None:
    """By the names of Microsoft's specification, 2.3; the same within any device."""
    for devices in ([acpi.vm_generation_id()], [aml.device("ISA", aml.name("_ADR", 1), acpi.vm_generation_id())]):
        dsdt = body(acpi.build(1, devices=devices), "DSDT")
        text = disassemble(tmp_path, "dsdt", dsdt)
        assert text.count('"VM_Gen_Counter"') == 2
        assert re.search(r"Name \(ADDR, Package \(0x02\)\s+\{\s+0xFEFFB000,\s+Zero\s+\}\)", text), text
        assert re.search(r"Scope \(\\_GPE\)\s+\{\s+Method \(_E05, 0, NotSerialized\)", text), text
        assert "Notify (\\_SB.VGEN, 0x80)" in text
        assert recompile(tmp_path, dsdt)[36:] == dsdt[36:]


def test_s5_is_what_the_power_management_block_is_given() -> None:
    """The package's first number goes to PM1a control's SLP_TYP, the same the board tells its AcpiPm."""
    s5 = aml.name("_S5", aml.package(layout.SLP_TYP_S5, 0, 0, 0))
    assert body(acpi.build(1), "DSDT").endswith(s5)
    assert 0 <= layout.SLP_TYP_S5 <= 7


def test_s3_is_offered_unless_it_is_not_wanted() -> None:
    """ACPI 6.5, 7.4.2.4 (\\_S3); the value is QEMU's (hw/i386/acpi-build.c), which kvm-unit-tests write unasked."""
    s3 = aml.name("_S3", aml.package(1, 1, 0, 0))
    assert s3 in body(acpi.build(1), "DSDT")
    assert b"_S3_" not in body(acpi.build(1, s3=False), "DSDT")
    assert layout.SLP_TYP_S3 == 1


def test_what_waking_needs_of_the_fadt_and_the_facs() -> None:
    """FADT flags (table 5.10): bit 6 clear, the RTC's wake status is in PM1. The FACS (table 5.13) is where we look."""
    tables = acpi.build(255)
    fadt = tables.tables["FACP"][1]
    assert not int.from_bytes(fadt[112:116], "little") & 1 << 6
    gpa, facs = tables.tables["FACS"]
    assert gpa == layout.FACS
    assert int.from_bytes(fadt[36:40], "little") == gpa
    assert facs[12:16] == bytes(4) and facs[24:32] == bytes(8)
    assert facs[32] == 2 and not facs[36] & 2  # no 64-bit environment
