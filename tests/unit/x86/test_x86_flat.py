"""Flat binaries: where the bytes go, the entry state of each mode, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, cpu_state, layout

CODE = bytes(range(256)) * 4


def enter(
    memory: GuestMemory, address: int, mode: str, code: bytes = CODE
) -> tuple[dict[str, Any], dict[str, Any]]:
    state = boot.load(memory, code, flat_address=address, flat_mode=mode)
    assert state.protocol == "flat"
    assert state.image == (address, address + len(code))
    assert memory.read(address, len(code)) == code
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    state.apply(regs, sregs)
    return regs, sregs


@pytest.mark.parametrize(
    ("address", "cs", "ip", "sp"),
    [
        (0x7C00, 0, 0x7C00, 0x7C00),
        (0x1000, 0, 0x1000, 0x7C00),
        (0x7B00, 0, 0x7B00, 0x7B00),  # the image covers the usual stack
        (0x8000, 0, 0x8000, 0x7C00),
        (0x12345, 0x1234, 5, 0x7C00),
    ],
)
def test_real_mode(memory: GuestMemory, address: int, cs: int, ip: int, sp: int) -> None:
    regs, sregs = enter(memory, address, "real16")
    assert (sregs["cs"]["selector"], sregs["cs"]["base"], regs["rip"]) == (cs, cs << 4, ip)
    assert (sregs["ds"]["base"], sregs["ss"]["base"], regs["rsp"]) == (cs << 4, 0, sp)
    assert sregs["cr0"] & 1 == 0


def test_protected_mode(memory: GuestMemory) -> None:
    regs, sregs = enter(memory, 0x10_0000, "protected32")
    assert (regs["rip"], regs["rsp"]) == (0x10_0000, layout.BOOT_STACK_TOP)
    assert (sregs["cr0"], sregs["cs"]["db"]) == (0x11, 1)
    assert memory.read(layout.BOOT_GDT, 48) == cpu_state.gdt(False)


def test_long_mode(memory: GuestMemory) -> None:
    regs, sregs = enter(memory, 0x8000, "long64")
    assert (regs["rip"], regs["rsp"]) == (0x8000, layout.BOOT_STACK_TOP)
    assert (sregs["efer"], sregs["cr3"]) == (0x500, layout.PAGE_TABLES)
    assert memory.read(layout.BOOT_GDT, 48) == cpu_state.gdt(True)
    tables = cpu_state.identity_page_tables(layout.PAGE_TABLES)
    assert memory.read(layout.PAGE_TABLES, len(tables)) == tables


def test_real_mode_needs_no_more_memory_than_its_image() -> None:
    guest = GuestMemory(0x9000)
    enter(guest, 0x8000, "real16")
    guest.close()


@pytest.mark.parametrize(
    ("address", "mode", "code", "complaint"),
    [
        (0x7C00, "real32", CODE, "choose one of real16, protected32, long64"),
        (0x7C00, "real16", b"", "is empty"),
        (0x10_0000, "real16", CODE, "below 1 MiB"),
        (0x400_0000, "long64", CODE, "at least 65 MiB"),
        (0x9_6000, "long64", CODE, "covers the boot page tables"),
        (0x9_7FF0, "long64", CODE, "covers the boot GDT"),
        (0x9_7FF0, "protected32", CODE, "covers the boot GDT"),
        (-4096, "protected32", CODE, "at least 0 MiB|no RAM|can't"),
        (1 << 64, "long64", CODE, "no RAM"),
    ],
)
def test_refusals(memory: GuestMemory, address: int, mode: str, code: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        boot.load(memory, code, flat_address=address, flat_mode=mode)


def test_page_tables_need_memory() -> None:
    guest = GuestMemory(0x80000)
    with pytest.raises(ConfigError, match="long64 mode needs guest memory up to 0x9d000"):
        boot.load(guest, CODE, flat_address=0x8000, flat_mode="long64")
    guest.close()


def test_it_takes_nothing_else(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="no initrd and no command line"):
        boot.load(memory, CODE, flat_address=0x8000, append="quiet")
    with pytest.raises(ConfigError, match="no initrd and no command line"):
        boot.load(memory, CODE, flat_address=0x8000, initrd=b"x")
