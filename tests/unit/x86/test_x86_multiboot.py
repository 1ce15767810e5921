"""Multiboot: both ways to say where an image goes, the information structure, and where that may stand."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import x86_images
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, cpu_state, e820, layout, multiboot

MIB = 1 << 20


def text(memory: GuestMemory, gpa: int) -> bytes:
    return memory.read(gpa, 4096).split(b"\0")[0]


def info(memory: GuestMemory, gpa: int) -> dict[str, int]:
    words = struct.unpack("<22I", memory.read(gpa, 88))
    names = {
        "flags": 0,
        "mem_lower": 1,
        "mem_upper": 2,
        "cmdline": 4,
        "mods_count": 5,
        "mods_addr": 6,
        "mmap_length": 11,
        "mmap_addr": 12,
        "boot_loader_name": 16,
    }
    return {name: words[n] for name, n in names.items()}


def test_the_hand_over(memory: GuestMemory) -> None:
    image = x86_images.multiboot_elf(0x10_0000, bss=0x1234, code=b"code")
    state = boot.load(
        memory,
        image,
        name="tests/msr.flat",
        append="ept cores=2",
        initrd=[(b"ENV=1\n", "environment"), (bytes(5000), "")],
    )
    assert (state.protocol, state.mode, state.rip) == ("multiboot", "protected32", 0x10_000C)
    assert state.regs == {"rax": 0x2BADB002, "rbx": 0x7000}
    assert memory.read(0x10_000C, 4) == b"code"
    fields = info(memory, 0x7000)
    assert fields["flags"] == 0b10_0100_1101
    assert (fields["mem_lower"], fields["mem_upper"]) == (639, 63 * 1024)
    assert text(memory, fields["cmdline"]) == b"tests/msr.flat ept cores=2"
    assert text(memory, fields["boot_loader_name"]) == b"pyvmm"
    mods = [struct.unpack("<4I", memory.read(fields["mods_addr"] + 16 * n, 16)) for n in range(2)]
    assert fields["mods_count"] == 2
    # Page-aligned, right behind the kernel with its bss, in their order.
    assert mods[0][:2] == (0x102000, 0x102006)
    assert mods[1][:2] == (0x103000, 0x103000 + 5000)
    assert [text(memory, mod[2]) for mod in mods] == [b"module environment", b"module"]
    assert memory.read(0x102000, 6) == b"ENV=1\n"
    mmap = memory.read(fields["mmap_addr"], fields["mmap_length"])
    assert mmap == e820.pack_multiboot(e820.memory_map(memory.regions))


def test_the_entry_state(memory: GuestMemory) -> None:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    boot.load(memory, x86_images.multiboot_elf()).apply(regs, sregs)
    assert (regs["rax"], regs["rbx"]) == (0x2BADB002, 0x7000)
    assert sregs["cr0"] == 0x11
    assert (sregs["cs"]["base"], sregs["cs"]["limit"], sregs["cs"]["db"]) == (0, 0xFFFF_FFFF, 1)
    assert memory.read(sregs["gdt"]["base"], 48) == cpu_state.gdt(False)
    assert 0x7000 < sregs["gdt"]["base"] < 0x8000


def test_the_kernels_name_alone_is_a_command_line(memory: GuestMemory) -> None:
    boot.load(memory, x86_images.multiboot_elf(), name="kernel.elf")
    assert text(memory, info(memory, 0x7000)["cmdline"]) == b"kernel.elf"
    assert info(memory, 0x7000)["mods_count"] == 0


def test_bss_is_cleared_unless_memory_is_clean(memory: GuestMemory) -> None:
    memory.write(0x10_0000, b"\xaa" * 0x1000)
    boot.load(memory, x86_images.multiboot_elf(bss=100, code=b"code"))
    assert memory.read(0x10_0010, 101) == bytes(100) + b"\xaa"


@pytest.mark.parametrize("spot", [0x7000, 0x4000, 0x1000])
def test_the_information_avoids_the_kernel(memory: GuestMemory, spot: int) -> None:
    """Also the kind that covers the usual page: kvm-unit-tests' realmode.flat is linked at 0x4000."""
    code = b"\x90" * 0x5000
    state = boot.load(memory, x86_images.multiboot_elf(spot, code=code), initrd=b"module")
    gpa = state.regs["rbx"]
    end = state.gdt_gpa + 48 + 64
    assert end <= spot or gpa >= spot + len(code) + 12
    assert not (gpa < 0xE000 and end > 0x8000)
    assert memory.read(spot + 12, len(code)) == code
    ((start, _),) = [struct.unpack("<2I", memory.read(info(memory, gpa)["mods_addr"], 8))]
    assert start == 0x10_0000


def test_long_command_lines_move_the_information(memory: GuestMemory) -> None:
    state = boot.load(memory, x86_images.multiboot_elf(), append="x" * 8000)
    assert state.regs["rbx"] != 0x7000
    assert len(text(memory, info(memory, state.regs["rbx"])["cmdline"])) == 4096
    with pytest.raises(ConfigError, match="command line has 20007 bytes"):
        boot.load(memory, x86_images.multiboot_elf(), append="x" * 20000)


def by_address(
    load: int, load_end: int, bss_end: int, entry: int, *, before: int = 16, size: int = 256
) -> bytes:
    """An image whose header stands ``before`` bytes into the file and 32 bytes above the load address."""
    header = x86_images.multiboot_header(0x10003, (load + 32, load, load_end, bss_end, entry))
    return bytes(before) + b"L" * 32 + header + b"C" * (size - 32 - len(header))


def test_address_fields(memory: GuestMemory) -> None:
    memory.write(0x20_0000, b"\xaa" * 0x1000)
    image = by_address(0x20_0000, 0x20_0080, 0x20_0200, 0x20_0050)
    state = boot.load(memory, image)
    assert state.rip == 0x20_0050
    assert memory.read(0x20_0000, 0x80) == image[16 : 16 + 0x80]
    assert memory.read(0x20_0080, 0x181) == bytes(0x180) + b"\xaa"


def test_address_fields_without_ends_mean_the_whole_file(memory: GuestMemory) -> None:
    image = by_address(0x20_0000, 0, 0, 0x20_0050)
    assert boot.load(memory, image).image == (0x20_0000, 0x20_0100)
    assert memory.read(0x20_0000, 0x100) == image[16:]


def test_address_fields_win_over_elf(memory: GuestMemory) -> None:
    header = x86_images.multiboot_header(0x10000, (0x30_0054, 0x30_0000, 0, 0, 0x30_0000))
    image = x86_images.elf([(x86_images.PT_LOAD, 0x10_0000, header, 4096)], bits=32, entry=0x10_0000)
    assert image.index(header) == 0x54
    assert boot.load(memory, image).rip == 0x30_0000
    assert memory.read(0x30_0000, len(image)) == image


def test_a_virtual_entry_is_made_physical(memory: GuestMemory) -> None:
    contents = x86_images.multiboot_header() + bytes(16)
    image = x86_images.elf(
        [(1, 0x10_0000, contents, 0x1000)], bits=32, entry=0xC010_0010, virtual=0xC000_0000
    )
    assert boot.load(memory, image).rip == 0x10_0010


def test_the_header_is_searched_for_in_8_kib_and_aligned() -> None:
    header = x86_images.multiboot_header()
    found = multiboot.find_header(memoryview(bytes(8192 - 12) + header))
    assert found is not None
    assert (found.offset, found.flags) == (8180, 3)
    assert multiboot.find_header(memoryview(bytes(8192 - 8) + header)) is None
    assert multiboot.find_header(memoryview(bytes(6) + header)) is None
    assert multiboot.find_header(memoryview(header[:8] + b"\1" + header[9:])) is None
    # A false magic number before the true header.
    assert multiboot.find_header(memoryview(header[:4] + bytes(12) + header)).offset == 16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (x86_images.multiboot_elf(flags=0xF), "features 0x8 "),
        (x86_images.multiboot_elf(flags=0x8000), "features 0x8000"),
        (x86_images.multiboot_elf(0x400_0000 - 64), "at least 65 MiB"),
        (x86_images.multiboot_elf(0xD000_0000), "no RAM"),
        (x86_images.elf([(1, 0x10_0000, x86_images.multiboot_header(), 64)], entry=0x10_0000), "elf32-i386"),
        (
            x86_images.elf([(1, 0x10_0000, x86_images.multiboot_header(), 64)], bits=32, entry=4),
            "entry 0x4 outside",
        ),
        (x86_images.elf([(4, 0, x86_images.multiboot_header(), 12)], bits=32), "no segment"),
        (by_address(0x20_0000, 0x20_0000 - 4, 0, 0x20_0000), "contradict"),
        (by_address(0x20_0000, 0x20_0080, 0, 0x20_0000, before=0)[32:], "contradict"),
        (by_address(0x20_0000, 0x20_0900, 0, 0x20_0000), "truncated: it has 272 bytes of 2320"),
        (by_address(0x20_0000, 0, 0, 0x30_0000), "entry 0x300000 outside"),
        (by_address(0x20_0000, 0, 0xFFFF_FFFF, 0x20_0000), "no RAM"),
        (x86_images.multiboot_elf(0x1000, bss=0x9_E000), "leaves no .* bytes below 0x9fc00"),
    ],
)
def test_refusals(memory: GuestMemory, image: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        boot.load(memory, image)


def test_a_module_must_fit(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match=r"multiboot module .* at least 65 MiB"):
        boot.load(memory, x86_images.multiboot_elf(), initrd=bytes(63 * MIB))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 0xFFFF_FFFF), min_size=5, max_size=5),
    st.integers(0, 300),
    st.integers(0, 0x20000),
)
def test_no_address_fields_raise_anything_else(fields: list[int], before: int, flags: int) -> None:
    header = x86_images.multiboot_header(flags, tuple(fields))  # type: ignore[arg-type]
    guest = GuestMemory(2 * MIB)
    try:
        state = boot.load(guest, bytes(before & ~3) + header + bytes(64), initrd=b"module")
        assert state.regs["rax"] == 0x2BADB002
        assert guest.read(layout.MULTIBOOT_INFO, 1) is not None
    except ConfigError as error:
        assert "\n" not in str(error)
    finally:
        guest.close()
