"""What SeaBIOS makes of the board's tables, by its own log and by what an operating system finds in memory after it."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from console import SerialLine

import pyvmm
from pyvmm.x86 import acpi_pc, smbios

LIMIT_S = 60.0
MIB = 1 << 20
UNHAPPY = r"(?i)error|fail(?!ed: could not read the boot disk)|warn|overrun|invalid|bad |no space|unable|out of|timeout"


class Booted:
    """A pc whose firmware has found nothing to boot from: its log, and its memory."""

    def __init__(self, firmware: Path, memory_mib: int, cpus: int) -> None:
        line, log = SerialLine(), bytearray()
        with pyvmm.Machine(
            machine="pc", memory_mib=memory_mib, cpus=cpus, firmware=firmware, serial=line.chardev, debugcon=log.extend
        ) as m:
            m.resume()
            line.expect("No bootable device.", LIMIT_S)
            m.pause()
            self.low = m.memory.read(0, MIB)
            # Tables lie in what the firmware's memory map holds back at the top of RAM below 4 GiB.
            _, low_bytes = m.memory.regions[0]
            self.top = low_bytes
            self.high = m.memory.read(low_bytes - MIB, MIB)
        self.log = log.decode("latin-1")

    def read(self, gpa: int, size: int) -> bytes:
        if gpa + size <= MIB:
            return self.low[gpa : gpa + size]
        at = gpa - (self.top - MIB)
        assert 0 <= at <= MIB - size
        return self.high[at : at + size]

    def find(self, signature: bytes) -> int:
        """The one place in 0xf0000-0xfffff, on a paragraph, where a structure with a good first sum begins."""
        size = {b"RSD PTR ": 20, b"_SM_": 16, b"_MP_": 16}[signature]
        found = [
            at
            for at in range(0xF0000, MIB, 16)
            if self.low.startswith(signature, at) and sum(self.low[at : at + size]) & 0xFF == 0
        ]
        assert len(found) == 1
        return found[0]

    def table(self, gpa: int) -> bytes:
        data = self.read(gpa, int.from_bytes(self.read(gpa + 4, 4), "little"))
        assert data[:4] == b"FACS" or sum(data) & 0xFF == 0
        return data


@pytest.fixture(scope="module")
def boot(firmware: Path) -> Callable[[int, int], Booted]:
    """boot(memory_mib, cpus); each kind is booted once."""
    kept: dict[tuple[int, int], Booted] = {}

    def booted(memory_mib: int, cpus: int) -> Booted:
        if (memory_mib, cpus) not in kept:
            kept[memory_mib, cpus] = Booted(firmware, memory_mib, cpus)
        return kept[memory_mib, cpus]

    return booted


MACHINES = [(64, 1), (3600, 2)]  # (MiB, processors); the second has RAM on both sides of the hole


@pytest.mark.parametrize("machine", MACHINES)
def test_the_firmware_complains_of_nothing(boot: Callable[..., Booted], machine: tuple[int, int]) -> None:
    log = boot(*machine).log
    unhappy = [line for line in log.splitlines() if re.search(UNHAPPY, line)]
    assert unhappy == []
    assert "Running on QEMU (i440fx)" in log
    assert "QEMU fw_cfg DMA interface supported" in log
    assert "Moving pm_base to 0x600" in log
    assert "sercon: using ioport 0x3f8" in log
    # What it looks up in the DSDT: without them it would leave the keyboard and the serial port alone.
    assert re.search(r"ACPI: parse DSDT at 0x\w+ \(len \d+\)", log)
    assert f"Found {machine[1]} cpu(s) max supported {machine[1]} cpu(s)" in log
    assert "PS2 keyboard initialized" in log
    assert "Found 1 serial ports" in log


@pytest.mark.parametrize("machine", MACHINES)
def test_the_dsdts_window_is_the_firmwares(boot: Callable[..., Booted], machine: tuple[int, int]) -> None:
    booted = boot(*machine)
    (window,) = re.findall(r"PCI: 32: (\w+) - (\w+)", booted.log)
    first, last = acpi_pc.pci_memory_window(booted.top)
    assert (int(window[0], 16), int(window[1], 16)) == (first, last + 1)


@pytest.mark.parametrize("machine", MACHINES)
def test_an_operating_system_finds_the_acpi_tables(boot: Callable[..., Booted], machine: tuple[int, int]) -> None:
    booted = boot(*machine)
    rsdp = booted.read(booted.find(b"RSD PTR "), 36)
    assert sum(rsdp) & 0xFF == 0
    rsdt, _, xsdt = struct.unpack_from("<IIQ", rsdp, 16)
    assert len(booted.table(rsdt)) == 36 + 2 * 4
    roots = struct.unpack("<2Q", booted.table(xsdt)[36:])
    fadt, madt = (booted.table(gpa) for gpa in roots)
    assert (fadt[:4], madt[:4]) == (b"FACP", b"APIC")
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert booted.read(facs, 4) == b"FACS"
    assert booted.table(dsdt)[:4] == b"DSDT"
    kinds, at = [], 44
    while at < len(madt):
        kinds.append(madt[at])
        at += madt[at + 1]
    assert kinds.count(0) == machine[1]


@pytest.mark.parametrize("machine", MACHINES)
def test_an_operating_system_finds_the_smbios_structures(boot: Callable[..., Booted], machine: tuple[int, int]) -> None:
    booted = boot(*machine)
    entry = booted.read(booted.find(b"_SM_"), 31)
    assert sum(entry[16:]) & 0xFF == 0
    size, gpa, count = struct.unpack_from("<HIH", entry, 22)
    data = booted.read(gpa, size)
    kinds = []
    while data:
        kinds.append(data[0])
        data = data[data.index(b"\0\0", data[1]) + 2 :]
    assert kinds[0] == 0  # the firmware's own
    ranges = [19] if machine[0] < 3072 else [19, 19]
    assert kinds[1:] == [1, 3, 4, 16, 17, *ranges, 32, 127]
    assert count == len(kinds)
    assert smbios.PRODUCT.encode() in booted.read(gpa, size)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_firmware_makes_the_mp_and_interrupt_routing_tables(
    boot: Callable[..., Booted], machine: tuple[int, int]
) -> None:
    booted = boot(*machine)
    (table,) = struct.unpack_from("<I", booted.read(booted.find(b"_MP_"), 16), 4)
    length, count = struct.unpack_from("<4xH28xH", booted.read(table, 44), 0)
    data = booted.read(table, length)
    assert data[:4] == b"PCMP"
    assert sum(data) & 0xFF == 0
    entries, at = [], 44
    for _ in range(count):
        size = 20 if data[at] == 0 else 8
        entries.append(data[at : at + size])
        at += size
    # One entry a package: its cores are listed in the MADT only.
    assert len([e for e in entries if e[0] == 0]) == 1
    # ISA interrupt 0 is wired to the IOAPIC's pin 2.
    pins = {(e[4], e[5]): e[7] for e in entries if e[0] == 3 and e[1] == 0}
    isa = next(e[1] for e in entries if e[0] == 1 and e[2:5] == b"ISA")
    assert pins[isa, 0] == 2
    assert b"$PIR" in booted.low[0xF0000:]
