"""PVH: segments where they belong, and a start info that decodes by Xen's layout."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import x86_images

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, cpu_state, e820, layout, pvh

MIB = 1 << 20


def start_info(memory: GuestMemory) -> dict[str, int]:
    names = [
        "magic",
        "version",
        "flags",
        "nr_modules",
        "modlist",
        "cmdline",
        "rsdp",
        "memmap",
        "entries",
        "reserved",
    ]
    return dict(zip(names, struct.unpack("<4I4Q2I", memory.read(layout.PVH_START_INFO, 56)), strict=True))


def modules(memory: GuestMemory) -> list[tuple[int, int, int, int]]:
    info = start_info(memory)
    return [
        struct.unpack("<4Q", memory.read(info["modlist"] + 32 * n, 32)) for n in range(info["nr_modules"])
    ]


def text(memory: GuestMemory, gpa: int) -> bytes:
    return memory.read(gpa, 4096).split(b"\0")[0]


def test_the_hand_over(memory: GuestMemory) -> None:
    memory.write(0x100_0000, b"\xaa" * 0x3000)
    state = boot.load(
        memory,
        x86_images.pvh_kernel(0x100_0000, b"kernel code", bss=0x2000, entry=0x100_0004),
        initrd=b"archive" * 1000,
        append="console=ttyS0",
        acpi_rsdp=0xE0000,
    )
    assert (state.protocol, state.mode, state.rip) == ("pvh", "protected32", 0x100_0004)
    assert state.regs == {"rbx": layout.PVH_START_INFO}
    # The segment, its zeroed rest, and nothing behind it.
    assert memory.read(0x100_0000, 11 + 0x2000 + 1) == b"kernel code" + bytes(0x2000) + b"\xaa"
    info = start_info(memory)
    assert (info["magic"], info["version"], info["flags"], info["rsdp"]) == (0x336EC578, 1, 0, 0xE0000)
    assert text(memory, info["cmdline"]) == b"console=ttyS0"
    ((gpa, size, cmdline, reserved),) = modules(memory)
    assert memory.read(gpa, size) == b"archive" * 1000
    assert gpa == (64 * MIB - 7000) & ~4095
    assert (cmdline, reserved) == (0, 0)
    table = [struct.unpack("<QQII", memory.read(info["memmap"] + 24 * n, 24)) for n in range(info["entries"])]
    assert [entry[:3] for entry in table] == e820.memory_map(memory.regions)


def test_the_entry_state(memory: GuestMemory) -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    boot.load(memory, x86_images.pvh_kernel()).apply(regs, sregs)
    assert (regs["rip"], regs["rbx"], regs["rax"]) == (0x100_0000, layout.PVH_START_INFO, 0)
    assert (sregs["cr0"], sregs["cr4"], sregs["efer"]) == (0x11, 0, 0)
    assert memory.read(sregs["gdt"]["base"], 48) == cpu_state.gdt(False)


def test_clean_memory_is_not_cleared(memory: GuestMemory) -> None:
    memory.write(0x100_0000, b"\xaa" * 0x1000)
    boot.load(memory, x86_images.pvh_kernel(0x100_0000, b"code", bss=0x100), clean=True)
    assert memory.read(0x100_0000, 8) == b"code\xaa\xaa\xaa\xaa"


def test_several_modules_with_command_lines(memory: GuestMemory) -> None:
    boot.load(
        memory, x86_images.pvh_kernel(), initrd=[(b"first", "one"), (bytes(5000), "two 2"), (b"third", "")]
    )
    first, second, third = modules(memory)
    assert (text(memory, first[2]), text(memory, second[2]), third[2]) == (b"one", b"two 2", 0)
    assert memory.read(first[0], first[1]) == b"first"
    assert third[0] + third[1] <= second[0] < second[0] + second[1] <= first[0]


def test_the_initrd_stays_below_the_hole(large_memory: GuestMemory) -> None:
    boot.load(large_memory, x86_images.pvh_kernel(), initrd=b"x")
    assert modules(large_memory)[0][0] == layout.RAM_HOLE - 4096


def load_at(paddr: int, **more: int) -> bytes:
    return x86_images.pvh_kernel(paddr, b"code", **more)


def high_after_low(*paddrs: int) -> bytes:
    segments = [(x86_images.PT_LOAD, paddr, b"code", 4) for paddr in paddrs]
    return x86_images.elf(segments, note=x86_images.pvh_note(paddrs[0]))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (x86_images.elf([(1, 0x100_0000, b"code", 4)]), "no PVH entry note: build .*CONFIG_PVH=y"),
        (x86_images.elf([], note=x86_images.pvh_note(0x100_0000)), "no segment to load"),
        (load_at(0x3FF_F000, bss=4097), "at least 65 MiB"),
        (high_after_low(0x450_0000, 0x480_0000), "at least 73 MiB"),  # what all of it takes, at once
        (load_at(0x100_0000, bss=1 << 40), "no RAM"),
        (load_at(0xFFFF_FFFF_FFFF_F000, bss=1 << 20), "no RAM"),
        (load_at(0x97000), "covers the boot information"),
        (load_at(0x9F000), "covers the BIOS area"),
        (load_at(0x100_0000, entry=0x900_0000), "entry 0x9000000 outside"),
        (load_at(0x100_0000)[:-8], "truncated"),
    ],
)
def test_refusals(memory: GuestMemory, image: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        boot.load(memory, image)


def test_strings_and_modules_have_limits(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="this kernel takes 16383"):
        boot.load(memory, x86_images.pvh_kernel(), append="x" * 16384)
    with pytest.raises(ConfigError, match="module's command line"):
        boot.load(memory, x86_images.pvh_kernel(), append="x" * 16000, initrd=[(b"m", "y" * 400)])
    with pytest.raises(ConfigError, match="33 modules are too many"):
        boot.load(memory, x86_images.pvh_kernel(), initrd=[(b"m", "")] * (pvh.MAX_MODULES + 1))
    with pytest.raises(ConfigError, match="initrd of 67108864 bytes"):
        boot.load(memory, x86_images.pvh_kernel(), initrd=bytes(64 * MIB))
