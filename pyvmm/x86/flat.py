"""A flat binary: bytes at an address, entered at the first one in real, 32-bit or 64-bit mode."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_state, image, layout
from pyvmm.x86.cpu_state import BootState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.guest_memory import GuestMemory

MODES = ("real16", "protected32", "long64")


def load(
    memory: GuestMemory, view: memoryview, *, address: int, mode: str = "real16", name: str = "kernel"
) -> BootState:
    """Copy ``view`` to ``address`` and start there.

    real16: below 64 KiB CS is 0 as at a boot sector, above it the image's paragraph; DS and ES are the same.
    The stack is at 0:0x7c00, or right below an image that covers that. protected32, long64: flat segments,
    stack below 0x90000, and in long64 the first 4 GiB mapped one-to-one.
    """
    if mode not in MODES:
        raise ConfigError(f"{mode!r} is no mode a flat binary starts in: choose one of {', '.join(MODES)}")
    if not view.nbytes:
        raise ConfigError(f"{name} is empty: give a binary with code in it")
    span = (address, address + view.nbytes)
    if mode == "real16":
        if span[0] >= layout.MIB:
            raise ConfigError(f"{name} is to start in real mode at {address:#x}: give an address below 1 MiB")
        image.copy_in(memory, address, view, name)
        cs, ip = (0, address) if address < 0x1_0000 else (address >> 4, address & 0xF)
        sp = address & ~1 if span[0] < layout.BOOT_SECTOR < span[1] else layout.BOOT_SECTOR
        return BootState("flat", mode, ip, rsp=sp, cs=cs, image=span)
    kept = (layout.BOOT_GDT, layout.BOOT_GDT + len(cpu_state.gdt(True)), "the boot GDT")
    tables = (layout.PAGE_TABLES, layout.PAGE_TABLES + layout.PAGE_TABLES_BYTES, "the boot page tables")
    image.require_ram(
        memory, layout.BOOT_AREA, layout.BOOT_AREA_END - layout.BOOT_AREA, f"{name} in {mode} mode"
    )
    if mode == "long64":
        image.refuse_overlap(name, [span], kept, tables)
        image.copy_in(memory, address, view, name)
        cpu_state.write_long_mode_tables(memory)
    else:
        image.refuse_overlap(name, [span], kept)
        image.copy_in(memory, address, view, name)
        memory.write(layout.BOOT_GDT, cpu_state.gdt(False))
    return BootState("flat", mode, address, rsp=layout.BOOT_STACK_TOP, image=span)
