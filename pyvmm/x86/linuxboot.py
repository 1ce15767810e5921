"""A Linux kernel booted by firmware: in fw_cfg for the option ROM guests/linuxboot.S, which is put right here.

Its real-mode code runs, as with QEMU's -kernel: so this is also how a program boots that only looks like a kernel.
QEMU docs/specs/fw_cfg.rst and Linux Documentation/arch/x86/boot.rst, "the real-mode code" and "the kernel command
line": where the parts go, and the header's fields that are the loader's. PCI Firmware Specification 3.3, 5.1 (option
ROM header), Plug and Play BIOS Specification 1.0A, 3.2 (expansion header).
"""

from __future__ import annotations

from struct import pack_into, unpack_from

from pyvmm.errors import ConfigError
from pyvmm.x86 import image, layout
from pyvmm.x86.bzimage import FIELDS, VERSION_CMD_LINE_PTR, VERSION_HEAP, BzImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory

ROM_NAME = "linuxboot.bin"

# fw_cfg's items for a kernel; devices/fw_cfg.py has all keys, but lies above.
KERNEL_ADDR = 0x0007
KERNEL_SIZE = 0x0008
INITRD_ADDR = 0x000A
INITRD_SIZE = 0x000B
KERNEL_DATA = 0x0011
INITRD_DATA = 0x0012
CMDLINE_ADDR = 0x0013
CMDLINE_SIZE = 0x0014
CMDLINE_DATA = 0x0015
SETUP_ADDR = 0x0016
SETUP_SIZE = 0x0017
SETUP_DATA = 0x0018

# In conventional memory: the real-mode part with its heap and stack in one segment, and the command line behind it.
REAL_MODE = 0x1_0000
CMDLINE = 0x2_0000
# Kernels before protocol 2.02 and zImages know one place only, and a zImage's protected-mode part lies below it.
OLD_REAL_MODE = 0x9_0000
OLD_CMDLINE_END = 0x9_A000
ZIMAGE = 0x1_0000
HEAP_GAP = 0x200  # heap_end_ptr is counted from 0x200 behind the segment's start
LOADER_TYPE = 0xFF  # of one with no number assigned
# Where a kernel before 2.02 is told of its command line: a magic number, and the offset in the real-mode segment.
OLD_CMDLINE_MAGIC_AT = 0x20
OLD_CMDLINE_MAGIC = 0xA33F
CAN_USE_HEAP = 1 << 7

# What firmware may keep for its tables at the top of RAM: an initrd that would need it is refused beforehand.
FIRMWARE_BYTES = 0x8_0000

ROM_BLOCK_BYTES = 512
ROM_MAX_BLOCKS = 0xFF
ROM_SIGNATURE = b"\x55\xaa"
ROM_PNP_POINTER = 0x1A
PNP_SIGNATURE = b"$PnP"
PNP_LENGTH = 5  # in units of 16 bytes
PNP_CHECKSUM = 9


def kernel_items(
    memory: GuestMemory, kernel: Buffer, *, name: str = "kernel", initrd: Buffer | None = None, append: str = ""
) -> dict[int, bytes | memoryview]:
    """{key: content} of fw_cfg's items. Kernel and initrd are views of what was given, not copies.

    ConfigError unless it has a kernel's setup header, and there is memory for it, the initrd and the firmware.
    """
    view = image.as_bytes_view(kernel)
    parsed = BzImage(view, name)
    rest = parsed.protected_mode_part
    old = parsed["version"] < VERSION_CMD_LINE_PTR or not parsed.is_high
    place = layout.KERNEL
    _, end = parsed.runtime_span()
    if not parsed.is_high:
        place, end = ZIMAGE, layout.KERNEL
        if place + len(rest) > OLD_REAL_MODE:
            raise ConfigError(f"{name} is a zImage of {len(rest)} bytes, too long to be one: give an intact kernel")
    image.require_ram(memory, layout.KERNEL, end - layout.KERNEL, name)
    room = (OLD_CMDLINE_END - OLD_REAL_MODE if old else layout.EBDA - CMDLINE) - 1
    cmdline = image.encode_cmdline(append, min(parsed.cmdline_size, room))
    real_mode, cmdline_at = REAL_MODE, CMDLINE
    if old:
        real_mode, cmdline_at = OLD_REAL_MODE, OLD_CMDLINE_END - image.align_up(len(cmdline), 16)
    module: bytes | memoryview = b"" if initrd is None else image.as_bytes_view(initrd)
    at = _initrd_place(memory, parsed, end, len(module))
    setup = _real_mode_part(parsed, at, len(module), cmdline_at - real_mode, cmdline_at)

    def number(value: int) -> bytes:
        return value.to_bytes(4, "little")

    return {
        SETUP_ADDR: number(real_mode),
        SETUP_SIZE: number(len(setup)),
        SETUP_DATA: setup,
        CMDLINE_ADDR: number(cmdline_at),
        CMDLINE_SIZE: number(len(cmdline)),
        CMDLINE_DATA: cmdline,
        KERNEL_ADDR: number(place),
        KERNEL_SIZE: number(len(rest)),
        KERNEL_DATA: rest,
        INITRD_ADDR: number(at),
        INITRD_SIZE: number(len(module)),
        INITRD_DATA: module,
    }


def _initrd_place(memory: GuestMemory, kernel: BzImage, floor: int, size: int) -> int:
    """An address that will do; the ROM goes higher where the firmware leaves room. 0 where there is no initrd."""
    if not size:
        return 0
    limit = min(kernel.initrd_addr_max + 1, image.low_ram_end(memory) - FIRMWARE_BYTES)
    return image.place_high(memory, size, floor=floor, limit=limit, what="the initrd")


def _real_mode_part(kernel: BzImage, initrd: int, initrd_bytes: int, segment_bytes: int, cmdline: int) -> bytes:
    """The setup sectors, with what a loader fills in. ConfigError where they leave no room for their heap.

    ``segment_bytes`` is what they have with heap and stack, up to the command line at ``cmdline``.
    """
    heap_end = segment_bytes - HEAP_GAP
    version = kernel["version"]
    if kernel.setup_bytes > heap_end:
        raise ConfigError(f"{kernel.name} has a real-mode part of {kernel.setup_bytes} bytes: give a whole bzImage")
    setup = bytearray(kernel.image[: kernel.setup_bytes])

    def put(field: str, value: int) -> None:
        offset, form = FIELDS[field]
        pack_into("<" + form, setup, offset, value)

    put("type_of_loader", LOADER_TYPE)
    if version >= VERSION_HEAP:
        put("loadflags", kernel["loadflags"] | CAN_USE_HEAP)
        put("heap_end_ptr", heap_end)
    if version >= VERSION_CMD_LINE_PTR:
        put("cmd_line_ptr", cmdline)
    else:
        pack_into("<HH", setup, OLD_CMDLINE_MAGIC_AT, OLD_CMDLINE_MAGIC, segment_bytes)
    put("ramdisk_image", initrd)
    put("ramdisk_size", initrd_bytes)
    return bytes(setup)


def option_rom(code: bytes) -> bytes:
    """An assembled ROM made whole: filled up to its size, which it states, with the checksums that a BIOS looks at.

    ValueError where there is no ROM header, or more code than a ROM can have.
    """
    blocks = len(code) // ROM_BLOCK_BYTES + 1  # at least one byte more, which makes the sum zero
    if code[:2] != ROM_SIGNATURE or blocks > ROM_MAX_BLOCKS:
        raise ValueError(f"no option ROM of at most {ROM_MAX_BLOCKS * ROM_BLOCK_BYTES} bytes")
    rom = bytearray(code.ljust(blocks * ROM_BLOCK_BYTES, b"\0"))
    rom[2] = blocks
    (pnp,) = unpack_from("<H", rom, ROM_PNP_POINTER)
    if rom[pnp : pnp + len(PNP_SIGNATURE)] == PNP_SIGNATURE:
        rom[pnp + PNP_CHECKSUM] = 0
        header = rom[pnp : pnp + 16 * rom[pnp + PNP_LENGTH]]
        rom[pnp + PNP_CHECKSUM] = -sum(header) & 0xFF
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)
