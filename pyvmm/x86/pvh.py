"""An ELF kernel entered by its PVH note: 32-bit flat mode, EBX points at the start info.

Xen docs/misc/pvh.pandoc (x86/HVM direct boot ABI) and public/arch-x86/hvm/start_info.h, version 1.
"""

from __future__ import annotations

from struct import pack

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_state, e820, image, layout
from pyvmm.x86.cpu_state import BootState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory
    from pyvmm.x86.elf import Elf

START_INFO_MAGIC = 0x336E_C578
START_INFO_VERSION = 1
START_INFO_BYTES = 56
MODULE_BYTES = 32
MAX_MODULES = 32  # with the memory map they share a page with the start info


def load(
    memory: GuestMemory,
    elf: Elf,
    *,
    modules: Sequence[tuple[Buffer, str]] = (),
    append: str = "",
    acpi_rsdp: int = 0,
    clean: bool = False,
) -> BootState:
    """Load the segments and start where the note says. Modules stand as high as possible below 4 GiB."""
    entry = elf.pvh_entry()
    if entry is None:
        raise ConfigError(
            f"{elf.name} has no PVH entry note: build the kernel with CONFIG_PVH=y, or give its bzImage"
        )
    if not elf.spans:
        raise ConfigError(f"{elf.name} has no segment to load: give a linked kernel")
    image.refuse_overlap(
        elf.name,
        elf.spans,
        (layout.PVH_START_INFO, layout.BOOT_AREA_END, "the boot information"),
        (layout.EBDA, layout.BIOS_AREA_END, "the BIOS area"),
    )
    if not any(start <= entry < end for start, end in elf.spans):
        raise ConfigError(
            f"{elf.name} has its PVH entry {entry:#x} outside its segments: give an intact kernel"
        )
    image.load_segments(memory, elf, clean=clean)

    strings = Strings(memory)
    cmdline_gpa = strings.add(append, "the command line")
    placed = _load_modules(
        memory, modules, image.align_up(max(end for _, end in elf.spans), layout.PAGE_BYTES)
    )
    modlist = b"".join(
        pack("<4Q", gpa, size, strings.add(text, "a module's command line") if text else 0, 0)
        for gpa, size, text in placed
    )
    entries = e820.memory_map(memory.regions)
    modlist_gpa = layout.PVH_START_INFO + START_INFO_BYTES
    memmap_gpa = modlist_gpa + len(modlist)
    start_info = pack(
        "<4I4Q2I",
        START_INFO_MAGIC,
        START_INFO_VERSION,
        0,  # flags
        len(placed),
        modlist_gpa if placed else 0,
        cmdline_gpa,
        acpi_rsdp,
        memmap_gpa,
        len(entries),
        0,
    )
    memory.write(layout.PVH_START_INFO, start_info + modlist + e820.pack_pvh(entries))
    memory.write(layout.BOOT_GDT, cpu_state.gdt(False))
    return BootState(
        "pvh", "protected32", entry, regs={"rbx": layout.PVH_START_INFO}, image=image.hull(elf.spans)
    )


def _load_modules(
    memory: GuestMemory, modules: Sequence[tuple[Buffer, str]], floor: int
) -> list[tuple[int, int, str]]:
    """From the top of low RAM downwards: (gpa, size_bytes, command line) of each."""
    if len(modules) > MAX_MODULES:
        raise ConfigError(f"{len(modules)} modules are too many for PVH: give at most {MAX_MODULES}")
    placed = []
    limit = layout.RAM_HOLE
    for data, text in modules:
        view = image.as_bytes_view(data)
        limit = image.place_high(memory, view.nbytes, floor=floor, limit=limit, what="the initrd")
        image.copy_in(memory, limit, view, "the initrd")
        placed.append((limit, view.nbytes, text))
    return placed


class Strings:
    """Command lines, one behind the other in their place in the boot area."""

    __slots__ = ("memory", "next")

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.next = layout.CMDLINE

    def add(self, text: str, what: str) -> int:
        """Write one and return its address. ConfigError when the place is full."""
        data = image.encode_cmdline(text, layout.CMDLINE + layout.CMDLINE_BYTES - self.next - 1, what)
        gpa = self.next
        image.copy_in(self.memory, gpa, data, what)
        self.next += len(data)
        return gpa
