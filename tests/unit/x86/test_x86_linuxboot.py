"""What the option ROM finds in fw_cfg for a kernel, and the ROM's own headers."""

from __future__ import annotations

import struct

import pytest
import x86_images

from pyvmm import guests
from pyvmm.devices import fw_cfg
from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import bzimage, linuxboot

MIB = 1 << 20


def number(data: bytes | memoryview) -> int:
    assert len(data) == 4
    return int.from_bytes(data, "little")


def field(setup: bytes | memoryview, name: str) -> int:
    offset, form = bzimage.FIELDS[name]
    return int(struct.unpack_from("<" + form, setup, offset)[0])


@pytest.mark.parametrize("name", [name for name in dir(linuxboot) if hasattr(fw_cfg, name) and name.isupper()])
def test_the_keys_are_fw_cfgs(name: str) -> None:
    assert getattr(linuxboot, name) == getattr(fw_cfg, name)


def test_there_are_keys_to_compare() -> None:
    assert {name for name in dir(linuxboot) if hasattr(fw_cfg, name)} >= {"SETUP_DATA", "INITRD_SIZE", "KERNEL_ADDR"}


def test_a_kernel_with_all_its_parts(memory: GuestMemory) -> None:
    kernel = x86_images.bzimage()
    items = linuxboot.kernel_items(memory, kernel, initrd=b"initrd" * 1000, append="console=ttyS0")
    setup = items[fw_cfg.SETUP_DATA]
    assert number(items[fw_cfg.SETUP_SIZE]) == len(setup) == 5 * 512
    assert number(items[fw_cfg.SETUP_ADDR]) == 0x10000
    assert items[fw_cfg.CMDLINE_DATA] == b"console=ttyS0\0"
    assert number(items[fw_cfg.CMDLINE_SIZE]) == 14
    assert number(items[fw_cfg.CMDLINE_ADDR]) == field(setup, "cmd_line_ptr") == 0x20000
    assert bytes(items[fw_cfg.KERNEL_DATA]) == kernel[5 * 512 :]
    assert number(items[fw_cfg.KERNEL_SIZE]) == len(kernel) - 5 * 512
    assert number(items[fw_cfg.KERNEL_ADDR]) == 0x100000
    assert items[fw_cfg.INITRD_DATA] == b"initrd" * 1000
    assert number(items[fw_cfg.INITRD_SIZE]) == field(setup, "ramdisk_size") == 6000
    place = number(items[fw_cfg.INITRD_ADDR])
    assert place == field(setup, "ramdisk_image")
    assert place % 4096 == 0
    assert place + 6000 <= 64 * MIB - linuxboot.FIRMWARE_BYTES


def test_the_loaders_fields(memory: GuestMemory) -> None:
    kernel = x86_images.bzimage()
    setup = linuxboot.kernel_items(memory, kernel)[fw_cfg.SETUP_DATA]
    before = bzimage.BzImage(memoryview(kernel), "x")
    assert field(setup, "type_of_loader") == 0xFF
    assert field(setup, "loadflags") == before["loadflags"] | 0x80
    assert 0x10000 + field(setup, "heap_end_ptr") == 0x20000 - 0x200
    changed = {"type_of_loader", "loadflags", "heap_end_ptr", "cmd_line_ptr", "ramdisk_image", "ramdisk_size"}
    assert all(field(setup, name) == before[name] for name in bzimage.FIELDS if name not in changed)


@pytest.mark.parametrize("version", [0x200, 0x201, 0x202, 0x203, 0x205, 0x207])
def test_kernels_of_every_protocol_that_has_a_header(memory: GuestMemory, version: int) -> None:
    """boot.rst: which fields a loader fills, by the version that brought them; QEMU hw/i386/x86.c has the places."""
    kernel = x86_images.bzimage(version=version, code32_start=0)
    items = linuxboot.kernel_items(memory, kernel, initrd=b"x" * 100, append="a=b")
    setup = bytes(items[fw_cfg.SETUP_DATA])
    before = kernel[: len(setup)]
    real_mode, cmdline = number(items[fw_cfg.SETUP_ADDR]), number(items[fw_cfg.CMDLINE_ADDR])
    assert items[fw_cfg.CMDLINE_DATA] == b"a=b\0"
    assert number(items[fw_cfg.KERNEL_ADDR]) == 0x100000
    assert field(setup, "type_of_loader") == 0xFF
    assert field(setup, "ramdisk_image") == number(items[fw_cfg.INITRD_ADDR]) != 0
    touched = {0x210, *range(0x218, 0x220)}
    if version >= 0x201:
        assert field(setup, "loadflags") & 0x80
        assert real_mode + field(setup, "heap_end_ptr") + 0x200 == cmdline
        touched |= {0x211, 0x224, 0x225}
    if version >= 0x202:
        assert (real_mode, cmdline) == (0x10000, 0x20000)
        assert field(setup, "cmd_line_ptr") == cmdline
        touched |= set(range(0x228, 0x22C))
    else:
        assert real_mode == 0x90000
        assert struct.unpack_from("<HH", setup, 0x20) == (0xA33F, cmdline - 0x90000)
        assert 0x90000 + len(setup) < cmdline <= 0x9A000 - 4
        touched |= set(range(0x20, 0x24))
    assert {n for n in range(len(setup)) if setup[n] != before[n]} <= touched


def test_a_zimage_goes_to_64_kib(memory: GuestMemory) -> None:
    kernel = x86_images.bzimage(loadflags=0, version=0x203)
    items = linuxboot.kernel_items(memory, kernel)
    assert number(items[fw_cfg.KERNEL_ADDR]) == 0x10000
    assert number(items[fw_cfg.SETUP_ADDR]) == 0x90000
    assert field(items[fw_cfg.SETUP_DATA], "cmd_line_ptr") == number(items[fw_cfg.CMDLINE_ADDR])
    with pytest.raises(ConfigError, match="a zImage of 528384 bytes, too long"):
        linuxboot.kernel_items(memory, x86_images.bzimage(loadflags=0, code_bytes=0x8_1000))


@pytest.mark.parametrize(("version", "most"), [(0x203, 255), (0x205, 255), (0x206, 2047)])
def test_how_long_a_command_line_an_old_kernel_takes(memory: GuestMemory, version: int, most: int) -> None:
    kernel = x86_images.bzimage(version=version)
    linuxboot.kernel_items(memory, kernel, append="x" * most)
    with pytest.raises(ConfigError, match=f"takes {most}: shorten it"):
        linuxboot.kernel_items(memory, kernel, append="x" * (most + 1))


def test_no_initrd(memory: GuestMemory) -> None:
    items = linuxboot.kernel_items(memory, x86_images.bzimage())
    assert number(items[fw_cfg.INITRD_SIZE]) == number(items[fw_cfg.INITRD_ADDR]) == 0
    assert field(items[fw_cfg.SETUP_DATA], "ramdisk_size") == 0
    assert items[fw_cfg.CMDLINE_DATA] == b"\0"


def test_kernel_and_initrd_are_not_copied(memory: GuestMemory) -> None:
    kernel, initrd = bytearray(x86_images.bzimage()), bytearray(100)
    items = linuxboot.kernel_items(memory, kernel, initrd=initrd)
    kernel[-1] ^= 0xFF
    initrd[3] = 77
    assert items[fw_cfg.KERNEL_DATA][-1] == kernel[-1]
    assert items[fw_cfg.INITRD_DATA][3] == 77


def test_a_guest_fetches_them(memory: GuestMemory) -> None:
    device = fw_cfg.FwCfg(memory)
    kernel = x86_images.bzimage()
    for key, data in linuxboot.kernel_items(memory, kernel).items():
        device.add(key, data)
    control = fw_cfg.KERNEL_DATA << 16 | fw_cfg.DMA_SELECT | fw_cfg.DMA_READ
    size = len(kernel) - 5 * 512
    memory.write(0x9000, struct.pack(">IIQ", control, size, 0x100000))
    device.dma.write(4, 4, int.from_bytes((0x9000).to_bytes(4, "big"), "little"))
    assert memory.read(0x9000, 4) == bytes(4)
    assert memory.read(0x100000, size) == kernel[5 * 512 :]
    device.close()
    assert device.save()["contents"] == {}


def test_what_is_no_bzimage(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="vmlinux is no bzImage"):
        linuxboot.kernel_items(memory, x86_images.elf([]), name="vmlinux")


def test_a_command_line_too_long(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="takes 2047: shorten it"):
        linuxboot.kernel_items(memory, x86_images.bzimage(), append="x" * 2048)


def test_an_initrd_that_the_firmware_leaves_no_room_for(memory: GuestMemory) -> None:
    _, end = bzimage.BzImage(memoryview(x86_images.bzimage()), "x").runtime_span()
    most = (64 * MIB - linuxboot.FIRMWARE_BYTES - end) & -4096
    linuxboot.kernel_items(memory, x86_images.bzimage(), initrd=bytes(most))
    with pytest.raises(ConfigError, match=r"the initrd .* does not fit"):
        linuxboot.kernel_items(memory, x86_images.bzimage(), initrd=bytes(most + 1))


def test_the_rom_has_what_a_bios_looks_at() -> None:
    rom = linuxboot.option_rom(guests.image("linuxboot"))
    assert rom[:2] == b"\x55\xaa"
    assert rom[2] * 512 == len(rom)
    assert sum(rom) & 0xFF == 0
    (pnp,) = struct.unpack_from("<H", rom, 0x1A)
    assert rom[pnp : pnp + 4] == b"$PnP"
    assert rom[pnp + 5] * 16 == 32
    assert sum(rom[pnp : pnp + 32]) & 0xFF == 0
    maker, product = struct.unpack_from("<HH", rom, pnp + 14)
    assert rom[maker:].startswith(b"pyvmm\0")
    assert rom[product:].startswith(b"Linux kernel from fw_cfg\0")
    connection, entry = struct.unpack_from("<H2xH", rom, pnp + 0x16)
    assert connection == 0
    assert 0 < entry < len(rom)


@pytest.mark.parametrize("size", [511, 512, 1000])
def test_a_rom_is_filled_up_with_room_for_its_sum(size: int) -> None:
    code = b"\x55\xaa" + bytes(range(1, 100)) * 20
    rom = linuxboot.option_rom(code[:size])
    assert len(rom) == (size // 512 + 1) * 512
    assert rom[3:size] == code[3:size]
    assert sum(rom) & 0xFF == 0


@pytest.mark.parametrize("code", [b"", b"\x55", b"\xaa\x55" + bytes(100), b"\x55\xaa" + bytes(255 * 512)])
def test_what_is_no_rom(code: bytes) -> None:
    with pytest.raises(ValueError, match="no option ROM"):
        linuxboot.option_rom(code)
