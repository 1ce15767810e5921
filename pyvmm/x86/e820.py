"""The memory map: which guest-physical ranges are RAM the guest may use, and its form in each boot protocol.

ACPI 6.5, chapter 15 (INT 15h E820); Linux zero-page.rst; Xen hvm_memmap_table_entry; Multiboot 0.6.96, 3.3.
"""

from __future__ import annotations

from _struct import pack

from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Entry = tuple[int, int, int]

RAM = 1
RESERVED = 2
ACPI = 3  # tables: RAM again once they have been read
NVS = 4
UNUSABLE = 5

# Not RAM to a guest that a loader starts: the BIOS area (its tables must survive) and KVM's own pages in the hole.
HOLES = (
    (layout.EBDA, layout.BIOS_AREA_END - layout.EBDA, RESERVED),
    (layout.KVM_PAGES, layout.KVM_PAGES_BYTES, RESERVED),
)


def memory_map(regions: Iterable[tuple[int, int]], reserved: Sequence[Entry] = HOLES) -> list[Entry]:
    """GuestMemory.regions less ``reserved``, as (base, size_bytes, type), lowest first, nothing overlapping.

    Memory mapped into the hole below 4 GiB (a ROM, a test device) is no RAM to offer.
    """
    entries = list(reserved)
    for base, size in regions:
        if not layout.RAM_HOLE <= base < layout.RAM_HIGH:
            entries += [(at, length, RAM) for at, length in _subtract(base, size, reserved)]
    return sorted(entries)


def _subtract(base: int, size: int, cuts: Sequence[Entry]) -> list[tuple[int, int]]:
    """The pieces of one range that no cut covers."""
    end = base + size
    pieces = []
    for cut, length, _ in sorted(cuts):
        if cut + length <= base or cut >= end:
            continue
        if cut > base:
            pieces.append((base, cut - base))
        base = cut + length
    if base < end:
        pieces.append((base, end - base))
    return pieces


def pack_zero_page(entries: Iterable[Entry]) -> bytes:
    """struct boot_e820_entry: u64 base, u64 size, u32 type, packed to 20 bytes."""
    return b"".join(pack("<QQI", *entry) for entry in entries)


def pack_fw_cfg(regions: Iterable[tuple[int, int]]) -> bytes:
    """The file etc/e820: the same 20 bytes, but whole regions of RAM: firmware reserves by itself what it uses. KVM's
    pages are in it as reserved, because firmware can't know of them.
    """
    return pack_zero_page(memory_map(regions, HOLES[1:]))


def pack_pvh(entries: Iterable[Entry]) -> bytes:
    """struct hvm_memmap_table_entry: u64 base, u64 size, u32 type, u32 reserved."""
    return b"".join(pack("<QQII", *entry, 0) for entry in entries)


def pack_multiboot(entries: Iterable[Entry]) -> bytes:
    """Each entry behind its own size, which does not count itself: u32 20, u64 base, u64 size, u32 type."""
    return b"".join(pack("<IQQI", 20, *entry) for entry in entries)


def conventional_kib(entries: Iterable[Entry]) -> int:
    """RAM from address 0 up, in KiB: multiboot's mem_lower."""
    return _ram_from(0, entries) // layout.KIB


def extended_kib(entries: Iterable[Entry]) -> int:
    """RAM from 1 MiB up to the first hole, in KiB: multiboot's mem_upper."""
    return _ram_from(layout.MIB, entries) // layout.KIB


def _ram_from(start: int, entries: Iterable[Entry]) -> int:
    for base, size, kind in entries:
        if kind == RAM and base <= start < base + size:
            return base + size - start
    return 0
