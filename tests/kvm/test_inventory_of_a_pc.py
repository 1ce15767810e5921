"""A kernel booted directly on a pc finds SMBIOS tables, with the processor that CPUID describes."""

from __future__ import annotations

import struct
from pathlib import Path

import pyvmm
from pyvmm.x86 import cpuid, layout


def test_smbios_names_the_processor(tmp_path: Path) -> None:
    # A multiboot kernel of no instructions: address fields, all of it header.
    magic, flags, at = 0x1BADB002, 1 << 16, 0x10_0000
    header = struct.pack("<3I5I", magic, flags, -(magic + flags) & 0xFFFF_FFFF, at, at, 0, 0, at)
    (tmp_path / "kernel").write_bytes(header)
    with pyvmm.Machine(machine="pc", memory_mib=16, cpus=2, kernel=tmp_path / "kernel") as machine:
        entry = machine.memory.read(layout.SMBIOS, 31)
        length, gpa = struct.unpack_from("<HI", entry, 0x16)
        structures = machine.memory.read(gpa, length)
        signature, features, vendor = cpuid.identity(machine.cpus[0].cpuid)
    assert entry.startswith(b"_SM_")
    assert vendor.encode() + b"\0" in structures
    assert struct.pack("<2I", signature, features) in structures
