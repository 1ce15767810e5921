"""Start states against the SDM's tables, descriptors and page tables against decoders made for that."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import cpu_state, layout

REGS = {*cpu_state.GENERAL, "rip", "rflags"}
SREGS = {
    *[
        "cs",
        "ds",
        "es",
        "fs",
        "gs",
        "ss",
        "tr",
        "ldt",
        "gdt",
        "idt",
        "cr0",
        "cr2",
        "cr3",
        "cr4",
        "cr8",
        "efer",
    ]
}
SEGMENT = {
    *[
        "base",
        "limit",
        "selector",
        "type",
        "present",
        "dpl",
        "db",
        "s",
        "l",
        "g",
        "avl",
        "unusable",
        "padding",
    ]
}


def decode(raw: int) -> dict[str, int]:
    """A GDT descriptor by figure 3-8 of SDM vol. 3."""
    limit = raw & 0xFFFF | (raw >> 32) & 0xF0000
    g = raw >> 55 & 1
    return {
        "limit": limit << 12 | 0xFFF if g else limit,
        "base": (raw >> 16) & 0xFFFFFF | (raw >> 32) & 0xFF000000,
        "type": raw >> 40 & 0xF,
        "s": raw >> 44 & 1,
        "dpl": raw >> 45 & 3,
        "present": raw >> 47 & 1,
        "avl": raw >> 52 & 1,
        "l": raw >> 53 & 1,
        "db": raw >> 54 & 1,
        "g": g,
    }


def check_complete(regs: dict[str, Any], sregs: dict[str, Any]) -> None:
    assert set(regs) == REGS
    assert set(sregs) == SREGS
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        assert set(sregs[name]) == SEGMENT
    assert regs["rflags"] == 2


def test_there_are_sixteen_general_registers() -> None:
    assert len(set(cpu_state.GENERAL)) == 16


def test_reset_is_table_10_1() -> None:
    regs: dict[str, Any] = {"rax": 5, "rip": 0}
    sregs: dict[str, Any] = {}
    cpu_state.reset(regs, sregs, signature=0x806F8)
    check_complete(regs, sregs)
    assert (regs["rip"], regs["rdx"], regs["rax"]) == (0xFFF0, 0x806F8, 0)
    assert sregs["cr0"] == 0x6000_0010
    assert (sregs["cs"]["selector"], sregs["cs"]["base"], sregs["cs"]["limit"]) == (
        0xF000,
        0xFFFF_0000,
        0xFFFF,
    )
    assert sregs["cs"]["base"] + regs["rip"] == layout.RESET_VECTOR
    for name in ("ds", "es", "fs", "gs", "ss"):
        segment = sregs[name]
        assert (segment["selector"], segment["base"], segment["limit"], segment["type"]) == (0, 0, 0xFFFF, 3)
    assert sregs["gdt"] == sregs["idt"] == {"base": 0, "limit": 0xFFFF, "padding": [0, 0, 0]}
    assert (sregs["cr2"], sregs["cr3"], sregs["cr4"], sregs["efer"]) == (0, 0, 0, 0)


def test_what_is_kvms_is_left_alone() -> None:
    sregs: dict[str, Any] = {"apic_base": 0xFEE0_0900, "interrupt_bitmap": [0, 0, 0, 0]}
    cpu_state.reset({}, sregs)
    cpu_state.long_mode({}, sregs, 0x100000)
    assert sregs["apic_base"] == 0xFEE0_0900
    assert sregs["interrupt_bitmap"] == [0, 0, 0, 0]


def test_real_mode() -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    cpu_state.real_mode(regs, sregs, 0x1234, 0x5678, data=0x2000, ss=0x3000, sp=0xFFFE)
    check_complete(regs, sregs)
    assert (regs["rip"], regs["rsp"]) == (0x5678, 0xFFFE)
    assert (sregs["cs"]["selector"], sregs["cs"]["base"]) == (0x1234, 0x12340)
    assert (sregs["es"]["selector"], sregs["es"]["base"]) == (0x2000, 0x20000)
    assert (sregs["ss"]["selector"], sregs["ss"]["base"]) == (0x3000, 0x30000)
    assert sregs["cr0"] == 0x10


@pytest.mark.parametrize("long_mode", [False, True])
def test_registers_agree_with_the_gdt(long_mode: bool) -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    enter = cpu_state.long_mode if long_mode else cpu_state.protected_mode
    enter(regs, sregs, 0x123456)
    check_complete(regs, sregs)
    table = struct.unpack("<6Q", cpu_state.gdt(long_mode))
    assert sregs["gdt"]["limit"] == len(cpu_state.gdt(long_mode)) - 1
    assert table[:2] == (0, 0)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment = sregs[name]
        for field, value in decode(table[segment["selector"] // 8]).items():
            assert segment[field] == value, (name, field)
    assert (sregs["cs"]["selector"], sregs["ds"]["selector"]) == (0x10, 0x18)
    assert sregs["cs"]["limit"] == sregs["ds"]["limit"] == 0xFFFF_FFFF


def test_pvh_abi_protected_mode() -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    cpu_state.protected_mode(regs, sregs, 0x100_0000, esp=0x9000)
    assert sregs["cr0"] & ~0x10 == 1  # ET can't be cleared
    assert (sregs["cr4"], sregs["efer"]) == (0, 0)
    assert (sregs["cs"]["db"], sregs["cs"]["l"], sregs["cs"]["type"]) == (1, 0, 0xB)
    assert (sregs["tr"]["type"], sregs["tr"]["limit"], sregs["tr"]["base"]) == (0xB, 0x67, 0)
    assert regs["rsp"] == 0x9000


def test_long_mode_and_its_page_tables(memory: GuestMemory) -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    cpu_state.write_long_mode_tables(memory)
    cpu_state.long_mode(regs, sregs, 0x100200)
    assert sregs["efer"] == 0x500
    assert sregs["cr0"] & 0x8000_0001 == 0x8000_0001
    assert sregs["cr4"] == 1 << 5
    assert (sregs["cs"]["l"], sregs["cs"]["db"]) == (1, 0)
    assert memory.read(sregs["gdt"]["base"], 48) == cpu_state.gdt(True)
    for address in (0, 0x9FC00, 0x1FFFFF, 0x200000, 0x7654_3210, 0xFEE0_0000, 0xFFFF_FFFF):
        assert walk(memory, sregs["cr3"], address) == address
    assert walk(memory, sregs["cr3"], 1 << 32) is None
    assert walk(memory, sregs["cr3"], 1 << 39) is None


def walk(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """4-level paging (SDM vol. 3, 4.5), 2 MiB pages at the third level."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + (address >> shift & 0x1FF) * 8, 8))
        if not entry & 1:
            return None
        assert entry & 2
        if shift == 21:
            assert entry & 0x80
            return int(entry & ~0x1FFFFF) | address & 0x1FFFFF
        table = entry & ~0xFFF
    raise AssertionError
