"""Multiboot version 1: an ELF32 kernel or one with address fields, its modules, the information structure.

Multiboot Specification 0.6.96: 3.1 (header), 3.2 (machine state), 3.3 (boot information).
"""

from __future__ import annotations

from struct import Struct, pack, pack_into

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_state, e820, image, layout
from pyvmm.x86.cpu_state import BootState
from pyvmm.x86.elf import Elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory

HEADER_MAGIC = 0x1BAD_B002
BOOTLOADER_MAGIC = 0x2BAD_B002  # in EAX
SEARCH_BYTES = 8192  # the header lies wholly in these, 4-byte aligned

# Header flags. Bits 0-15 are requirements: a loader that does not know one must refuse the image.
PAGE_ALIGN = 1 << 0
MEMORY_INFO = 1 << 1
VIDEO_MODE = 1 << 2  # a wish: the information says, by flags not set, that there is no such mode
ADDRESS_FIELDS = 1 << 16
REQUIREMENTS = 0xFFFF
UNDERSTOOD = PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE

# Which fields of the information structure are valid.
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODS = 1 << 3
INFO_MMAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9

# Up to vbe_interface_len: flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4],
# mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name, ...
INFO_BYTES = 88
MODULE_BYTES = 16
LOADER_NAME = "pyvmm"

_HEADER = Struct("<III")
_ADDRESSES = Struct("<IIIII")


class Header:
    """Where the header is in the file, its flags, and its address fields where bit 16 says there are any."""

    __slots__ = ("bss_end", "entry", "flags", "header", "load", "load_end", "offset")

    def __init__(self, view: memoryview, offset: int, flags: int) -> None:
        self.offset = offset
        self.flags = flags
        self.header = self.load = self.load_end = self.bss_end = self.entry = 0
        if flags & ADDRESS_FIELDS and offset + _HEADER.size + _ADDRESSES.size <= len(view):
            self.header, self.load, self.load_end, self.bss_end, self.entry = _ADDRESSES.unpack_from(
                view, offset + _HEADER.size
            )


def find_header(view: memoryview) -> Header | None:
    """The multiboot header of an image, or None."""
    window = bytes(view[:SEARCH_BYTES])
    magic = HEADER_MAGIC.to_bytes(4, "little")
    at = window.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + _HEADER.size <= len(window):
            _, flags, checksum = _HEADER.unpack_from(window, at)
            if (HEADER_MAGIC + flags + checksum) & 0xFFFF_FFFF == 0:
                return Header(view, at, flags)
        at = window.find(magic, at + 1)
    return None


def load(
    memory: GuestMemory,
    view: memoryview,
    header: Header,
    *,
    name: str = "kernel",
    modules: Sequence[tuple[Buffer, str]] = (),
    module_names: Sequence[str] = (),
    append: str = "",
    clean: bool = False,
) -> BootState:
    """Load kernel and modules, write the information structure, enter flat 32-bit mode.

    Each command line, the kernel's and the modules', is a name and then the arguments: kernels take its first word for
    the name of what they were given, as boot loaders and QEMU have it. A module without a name is called "module".
    """
    unknown = header.flags & REQUIREMENTS & ~UNDERSTOOD
    if unknown:
        raise ConfigError(
            f"{name} requires multiboot features {unknown:#x} that version 0.6.96 has not: build it without"
        )
    if header.flags & ADDRESS_FIELDS:
        entry, spans = _load_by_addresses(memory, view, header, name, clean)
    else:
        entry, spans = _load_elf(memory, Elf(view, name), clean)

    # Modules stand right above the kernel, at 1 MiB at the lowest, in their order and page-aligned.
    placed = []
    next_gpa = image.align_up(max(layout.KERNEL, *(end for _, end in spans)), layout.PAGE_BYTES)
    for n, (data, text) in enumerate(modules):
        module = image.as_bytes_view(data)
        image.copy_in(memory, next_gpa, module, "a multiboot module")
        module_name = module_names[n] if n < len(module_names) else "module"
        placed.append((next_gpa, next_gpa + module.nbytes, command_line(module_name, text)))
        next_gpa = image.align_up(next_gpa + module.nbytes, layout.PAGE_BYTES)

    info = Info(command_line(name, append), placed, e820.memory_map(memory.regions))
    gpa = _find_room(memory, info.size, spans, name)
    memory.write(gpa, info.build(gpa))
    return BootState(
        "multiboot",
        "protected32",
        entry,
        regs={"rax": BOOTLOADER_MAGIC, "rbx": gpa},
        gdt_gpa=gpa + info.gdt_offset,
        image=image.hull(spans),
    )


def command_line(name: str, arguments: str) -> str:
    return f"{name} {arguments}" if arguments else name


def _load_by_addresses(
    memory: GuestMemory, view: memoryview, header: Header, name: str, clean: bool
) -> tuple[int, list[tuple[int, int]]]:
    """By 3.1.3: the file holds one block that goes to load_addr, header included."""
    start = header.offset - (header.header - header.load)
    size = header.load_end - header.load if header.load_end else len(view) - start
    if header.load > header.header or start < 0 or size <= 0:
        raise ConfigError(
            f"{name} has multiboot address fields that contradict each other: correct its header"
        )
    if start + size > len(view):
        raise ConfigError(
            f"{name} is truncated: it has {len(view)} bytes of {start + size}; give the whole file"
        )
    end = max(header.load + size, header.bss_end)
    if not header.load <= header.entry < end:
        raise ConfigError(
            f"{name} has its multiboot entry {header.entry:#x} outside the image: correct its header"
        )
    image.require_ram(memory, header.load, end - header.load, name)
    image.copy_in(memory, header.load, view[start : start + size], name)
    if not clean:
        image.clear(memory, header.load + size, end - header.load - size, name)
    return header.entry, [(header.load, end)]


def _load_elf(memory: GuestMemory, elf: Elf, clean: bool) -> tuple[int, list[tuple[int, int]]]:
    if elf.bits != 32:
        raise ConfigError(
            f"{elf.name} is a 64-bit ELF, multiboot wants 32: convert it with objcopy -O elf32-i386"
        )
    if not elf.spans:
        raise ConfigError(f"{elf.name} has no segment to load: give a linked kernel")
    entry = _physical_entry(elf)
    image.load_segments(memory, elf, clean=clean)
    return entry, elf.spans


def _physical_entry(elf: Elf) -> int:
    """The entry is physical by custom, but kernels linked high leave a virtual one: both are understood."""
    if any(start <= elf.entry < end for start, end in elf.spans):
        return elf.entry
    for segment in elf.load_segments:
        if segment.vaddr <= elf.entry < segment.vaddr + segment.memsz:
            return elf.entry - segment.vaddr + segment.paddr
    raise ConfigError(f"{elf.name} has its entry {elf.entry:#x} outside its segments: give a linked kernel")


class Info:
    """The information structure and all it points at, as one block that can stand anywhere below 4 GiB.

    In order: structure, module list, memory map, a GDT (the specification promises the kernel none, but many
    load a selector before their own table), strings.
    """

    __slots__ = (
        "entries",
        "gdt_offset",
        "mmap",
        "mmap_offset",
        "mods_offset",
        "modules",
        "size",
        "strings",
        "strings_offset",
    )

    def __init__(
        self, cmdline: str, modules: Sequence[tuple[int, int, str]], entries: Sequence[e820.Entry]
    ) -> None:
        texts = [cmdline, LOADER_NAME] + [text for _, _, text in modules]
        self.strings = [
            image.encode_cmdline(text, layout.CMDLINE_BYTES, "a multiboot command line") for text in texts
        ]
        self.modules = modules
        self.entries = entries
        self.mmap = e820.pack_multiboot(entries)
        self.mods_offset = INFO_BYTES
        self.mmap_offset = self.mods_offset + MODULE_BYTES * len(modules)
        self.gdt_offset = image.align_up(self.mmap_offset + len(self.mmap), 8)
        self.strings_offset = self.gdt_offset + len(cpu_state.gdt(False))
        self.size = self.strings_offset + sum(len(text) for text in self.strings)

    def build(self, gpa: int) -> bytearray:
        """The block's bytes for that address."""
        block = bytearray(self.size)
        where = []
        at = self.strings_offset
        for text in self.strings:
            block[at : at + len(text)] = text
            where.append(gpa + at)
            at += len(text)
        flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_BOOT_LOADER_NAME
        pack_into(
            "<7I",
            block,
            0,
            flags,
            e820.conventional_kib(self.entries),
            e820.extended_kib(self.entries),
            0,  # boot_device: invalid without its flag
            where[0],
            len(self.modules),
            gpa + self.mods_offset,
        )
        pack_into("<2I", block, 44, len(self.mmap), gpa + self.mmap_offset)
        pack_into("<I", block, 64, where[1])
        mods = b"".join(
            pack("<4I", start, end, text, 0)
            for (start, end, _), text in zip(self.modules, where[2:], strict=True)
        )
        block[self.mods_offset : self.mods_offset + len(mods)] = mods
        block[self.mmap_offset : self.mmap_offset + len(self.mmap)] = self.mmap
        table = cpu_state.gdt(False)
        block[self.gdt_offset : self.gdt_offset + len(table)] = table
        return block


def _find_room(memory: GuestMemory, size: int, spans: Sequence[tuple[int, int]], name: str) -> int:
    """A page-aligned place for the information: 0x7000 if it can be, else the first conventional page."""
    taken = [*spans, layout.MULTIBOOT_KEEP_CLEAR]
    end = min(layout.EBDA, image.low_ram_end(memory))
    gpa: int
    for gpa in (layout.MULTIBOOT_INFO, *range(layout.PAGE_BYTES, end, layout.PAGE_BYTES)):
        if gpa + size <= end and not any(gpa < high and low < gpa + size for low, high in taken):
            return gpa
    raise ConfigError(
        f"{name} leaves no {size} bytes below {end:#x} for the multiboot information: "
        "link it higher or shorten the command lines"
    )
