"""The pc board's tables, read and run by ACPICA: windows, interrupt routing, link devices, the chipset's ports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from acpica import disassemble, evaluate, recompile

from pyvmm.x86 import acpi, acpi_pc, aml, layout

MIB = 1 << 20
GIB = 1 << 30


def pc(cpus: int = 1, low: int = 64 * MIB, **options: object) -> acpi.AcpiTables:
    return acpi_pc.build(cpus, ram_below_4g_bytes=low, **options)  # type: ignore[arg-type]


def body(tables: acpi.AcpiTables, signature: str) -> bytes:
    return tables.tables[signature][1]


@pytest.mark.parametrize("cpus", [1, 2, 255, 300])
@pytest.mark.parametrize("irqchip", [True, False])
def test_sums_fit_and_order(cpus: int, irqchip: bool) -> None:
    tables = pc(cpus, irqchip=irqchip)
    assert ("APIC" in tables.tables) is irqchip
    for signature, (gpa, data) in tables.tables.items():
        assert gpa + len(data) <= layout.ACPI_TABLES_END
        assert signature == "FACS" or sum(data) & 0xFF == 0


@pytest.mark.parametrize("options", [{}, {"gpe0": False}, {"cpus": 300}, {"low": 3 * GIB}])
def test_the_dsdt_recompiles_to_itself(tmp_path: Path, options: dict[str, object]) -> None:
    original = body(pc(**options), "DSDT")  # type: ignore[arg-type]
    assert recompile(tmp_path, original)[36:] == original[36:]


def test_the_fadt_names_the_chipsets_ports(tmp_path: Path) -> None:
    def shown(label: str, **options: object) -> list[str]:
        text = disassemble(tmp_path, "facp", body(pc(**options), "FACP"))  # type: ignore[arg-type]
        return re.findall(rf"(?:  |\] ){re.escape(label)} : (.*)", text)

    assert shown("GPE0 Block Address") == ["0000AFE0"]
    assert shown("GPE0 Block Length") == ["04"]
    assert "000000000000AFE0" in shown("Address")
    assert shown("SMI Command Port") == ["00000000"]
    assert shown("ACPI Enable Value") == shown("ACPI Disable Value") == ["00"]
    assert shown("GPE0 Block Address", gpe0=False) == ["00000000"]
    assert shown("GPE0 Block Length", gpe0=False) == ["00"]
    assert shown("SMI Command Port", smi_command=True) == ["000000B2"]
    assert shown("ACPI Enable Value", smi_command=True) == ["F1"]
    assert shown("ACPI Disable Value", smi_command=True) == ["F0"]
    assert shown("PM1A Control Block Address") == ["00000604"]
    assert shown("SCI Interrupt") == ["0009"]


def test_pci_interrupts_are_level_triggered_in_the_madt(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "apic", body(pc(), "APIC"))
    assert re.findall(r" Source : (\w+)", text) == ["00", "05", "09", "0A", "0B"]
    assert re.findall(r"Trigger Mode : (\d)", text)[1:5] == ["3"] * 4
    assert re.findall(r"Polarity : (\d)", text)[1:5] == ["1"] * 4


@pytest.mark.parametrize(
    ("low", "start"), [(MIB, 0x80000000), (2 * GIB, 0x80000000), (2 * GIB + MIB, 0xC0000000), (3 * GIB, 0xC0000000)]
)
def test_pci_memory_begins_where_firmware_begins(tmp_path: Path, low: int, start: int) -> None:
    assert acpi_pc.pci_memory_window(low) == (start, 0xFEBFFFFF)
    text = disassemble(tmp_path, "dsdt", body(pc(low=low), "DSDT"))
    windows = re.findall(r"0x(\w+), +// Range Minimum\s+0x(\w+), +// Range Maximum", text)
    assert windows[:6] == [
        ("0000", "0000"),
        ("0CF8", "0CF8"),
        ("0000", "0CF7"),
        ("0D00", "FFFF"),
        ("000A0000", "000BFFFF"),
        (f"{start:08X}", "FEBFFFFF"),
    ]


def test_every_pin_of_every_slot_is_routed(tmp_path: Path) -> None:
    text = disassemble(tmp_path, "dsdt", body(pc(), "DSDT"))
    entry = r"Package \(0x04\)\s+\{\s+(\w+),\s+(\w+),\s+LNK(\w),\s+Zero\s+\}"
    number = {"Zero": 0, "One": 1}
    found = {
        (int(address, 16) >> 16, number[pin] if pin in number else int(pin, 16)): link
        for address, pin, link in re.findall(entry, text)
        if int(address, 16) & 0xFFFF == 0xFFFF
    }
    assert len(found) == 32 * 4
    # As the board is wired: the first slot behind the chipset has its INTA on PIRQB.
    assert [found[2, pin] for pin in range(4)] == ["B", "C", "D", "A"]
    assert [found[3, pin] for pin in range(4)] == ["C", "D", "A", "B"]
    # The power management function shares slot 1; its INTA is the SCI.
    assert [found[1, pin] for pin in range(4)] == ["S", "B", "C", "D"]
    assert all(
        found[slot, pin] == "ABCD"[acpi_pc.pirq(slot, pin)]
        for slot in range(32)
        for pin in range(4)
        if (slot, pin) != (1, 0)
    )


@pytest.mark.parametrize("line", range(4))
def test_a_link_device_is_its_routing_register(tmp_path: Path, line: int) -> None:
    name = f"\\_SB.LNK{'ABCD'[line]}"
    register = f"execute \\_SB.PCI0.ISA.PRQ{'ABCD'[line]}"
    wanted = "89 06 00 09 01 0A 00 00 00 79 00"
    data = body(pc(), "DSDT")
    results = evaluate(
        tmp_path,
        data,
        f"execute {name}._PRS",
        f"execute {name}._DIS",
        register,
        f"execute {name}._STA",
        f"execute {name}._CRS",
        f"execute {name}._SRS ({wanted})",
        register,
        f"execute {name}._STA",
        f"execute {name}._CRS",
    )
    choices, nothing, disabled, status, current, _, chosen, status_then, current_then = results
    assert isinstance(choices, bytes)
    assert [int.from_bytes(choices[at : at + 4], "little") for at in (5, 9, 13)] == [5, 10, 11]
    assert choices[3] == aml.CONSUMER | aml.SHARED  # level, active high
    assert (nothing, disabled, status) == (None, 0x80, 0x09)
    assert isinstance(current, bytes)
    assert current[5:9] == bytes(4)
    assert (chosen, status_then) == (10, 0x0B)
    assert current_then == bytes.fromhex(wanted)


def test_the_links_have_registers_of_their_own(tmp_path: Path) -> None:
    chosen = {"A": 10, "B": 11, "C": 5, "D": 10}
    set_all = [f"execute \\_SB.LNK{k}._SRS (89 06 00 09 01 {irq:02X} 00 00 00 79 00)" for k, irq in chosen.items()]
    results = evaluate(tmp_path, body(pc(), "DSDT"), *set_all, *(f"execute \\_SB.PCI0.ISA.PRQ{k}" for k in chosen))
    assert results[4:] == list(chosen.values())


def test_the_scis_link_stays_as_it_is(tmp_path: Path) -> None:
    results = evaluate(
        tmp_path,
        body(pc(), "DSDT"),
        "execute \\_SB.LNKS._DIS",
        "execute \\_SB.LNKS._SRS (89 06 00 09 01 0A 00 00 00 79 00)",
        "execute \\_SB.LNKS._STA",
        "execute \\_SB.LNKS._CRS",
    )
    assert results[:3] == [None, None, 0x0B]
    assert isinstance(results[3], bytes)
    assert results[3][5:9] == (9).to_bytes(4, "little")


def test_devices_are_on_the_isa_bus(tmp_path: Path) -> None:
    extra = aml.device("TEST", aml.name("_HID", "PVMM0001"))
    legacy = [acpi.rtc(), acpi.keyboard(), acpi.serial_port(), acpi_pc.firmware_configuration()]
    text = disassemble(tmp_path, "dsdt", body(pc(2, devices=[*legacy, extra]), "DSDT"))
    assert re.findall(r"Device \((\w+)\)", text) == [
        *("C000", "C001", "PCI0", "ISA", "RTC0", "KBD0", "COM1", "FWCF", "TEST", "GPE0"),
        *("LNKA", "LNKB", "LNKC", "LNKD", "LNKS"),
    ]
    # Firmware looks for these by their _HID in the code, which therefore stands right behind the device's name.
    data = body(pc(devices=legacy), "DSDT")
    for name, hid in (("KBD0", "PNP0303"), ("COM1", "PNP0501"), ("RTC0", "PNP0B00")):
        assert name.encode() + b"\x08_HID" + aml.eisa_id(hid) in data


def test_sleep_is_the_fixed_hardwares() -> None:
    assert body(pc(), "DSDT").endswith(acpi.sleep_states(True))
    assert body(pc(s3=False), "DSDT").endswith(acpi.sleep_states(False))
