"""Linear addresses to guest-physical ones, through the guest's own page tables, for whoever looks in from outside.

Intel SDM vol. 3, chapter 4: no paging, 32-bit paging, PAE, and 4 or 5 levels in long mode, as CR0, CR4 and EFER have
it. KVM_TRANSLATE would do the same, but its walk sets accessed bits, as the processor's own does: a debugger's look is
to leave the guest as it is. Rights are not looked at: a debugger may read and write whatever is mapped.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Read = Callable[[int, int], bytes]

PAGE_BYTES = 4096
CR0_PG = 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA = 1 << 10
PRESENT, LARGE = 1 << 0, 1 << 7
FRAME = 0x000F_FFFF_FFFF_F000  # bits 51:12 of an entry, table 4-12
LOW_4_GIB = 0xFFFF_FFFF


def translate(linear: int, sregs: Mapping[str, Any], read: Read) -> int | None:
    """Where ``linear`` is in guest-physical space; None where nothing is mapped there.

    ``sregs`` are KVM's, of the vCPU whose address it is; ``read(gpa, size)`` reads guest memory, and raises where there
    is none. What it raises comes through.
    """
    if not sregs["cr0"] & CR0_PG:
        return linear & LOW_4_GIB
    if not sregs["cr4"] & CR4_PAE:
        return two_levels(linear & LOW_4_GIB, sregs, read)
    if not sregs["efer"] & EFER_LMA:
        # The processor holds the four top entries in registers since CR3 was written (4.4.1); here they are read as
        # memory has them now, as QEMU does.
        return levels(linear & LOW_4_GIB, sregs["cr3"] & 0xFFFF_FFE0, 3, read)
    count = 5 if sregs["cr4"] & CR4_LA57 else 4
    bits = 12 + 9 * count
    if (linear >> bits - 1) not in (0, (1 << 65 - bits) - 1):
        return None  # not canonical (SDM vol. 1, 3.3.7.1)
    return levels(linear & (1 << bits) - 1, sregs["cr3"] & FRAME, count, read)


def levels(linear: int, table: int, count: int, read: Read) -> int | None:
    """Tables of 512 entries of 8 bytes, ``count`` of them one behind the other (4.4, 4.5)."""
    for level in range(count - 1, -1, -1):
        shift = 12 + 9 * level
        entry = int.from_bytes(read(table + 8 * (linear >> shift & 0x1FF), 8), "little")
        if not entry & PRESENT:
            return None
        # Pages of 1 GiB in long mode only: the top entries of PAE have a reserved bit there.
        if not level or (entry & LARGE and (level == 1 or (level == 2 and count > 3))):
            inside = (1 << shift) - 1
            return (entry & FRAME & ~inside) | (linear & inside)
        table = entry & FRAME
    return None


def two_levels(linear: int, sregs: Mapping[str, Any], read: Read) -> int | None:
    """32-bit paging (4.3): 1024 entries of 4 bytes, twice; pages of 4 MiB may lie above 4 GiB (PSE-36)."""
    entry = int.from_bytes(read((sregs["cr3"] & 0xFFFF_F000) + 4 * (linear >> 22), 4), "little")
    if not entry & PRESENT:
        return None
    if entry & LARGE and sregs["cr4"] & CR4_PSE:
        return (entry >> 13 & 0xFF) << 32 | (entry & 0xFFC0_0000) | (linear & 0x3F_FFFF)
    entry = int.from_bytes(read((entry & 0xFFFF_F000) + 4 * (linear >> 12 & 0x3FF), 4), "little")
    return (entry & 0xFFFF_F000) | (linear & 0xFFF) if entry & PRESENT else None
