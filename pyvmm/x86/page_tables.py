"""What a vCPU's page tables map, all of it: memory as the guest sees it (Intel SDM vol. 3, chapter 4).

One address is KVM's to translate (KVM_TRANSLATE); this is for whole cores.
"""

from __future__ import annotations

from pyvmm.errors import BusError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.guest_memory import GuestMemory

    Mapping = tuple[int, int, int]  # linear address, guest-physical address, bytes

CR0_PG = 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA = 1 << 10
PRESENT, LARGE = 1, 1 << 7
PAGE_BYTES = 4096
ADDRESS_BITS = 52
# Of one level: the lowest bit of the linear address that it looks at, how many, and whether an entry may be a page.
LONG = ((39, 9, False), (30, 9, True), (21, 9, True), (12, 9, True))
LA57 = ((48, 9, False), *LONG)
PAE = ((30, 2, False), (21, 9, True), (12, 9, True))
TWO_LEVELS = ((22, 10, True), (12, 10, True))
# Tables may hold themselves, and map without end.
MOST_PAGES = 1 << 20


def mapped(memory: GuestMemory, sregs: dict[str, Any]) -> list[Mapping]:
    """Every range that is mapped, in order of linear addresses, neighbours joined. ``sregs`` as Vcpu.sregs has them.
    Without paging all of RAM, as it is. StateError where there is more than a guest should have.
    """
    if not sregs["cr0"] & CR0_PG:
        return [(base, base, size) for base, size in memory.regions]
    joined: list[list[int]] = []
    for n, (linear, gpa, size) in enumerate(pages(memory, sregs)):
        if n >= MOST_PAGES:
            raise StateError(f"the guest's page tables map more than {MOST_PAGES} pages: dump without paging")
        last = joined[-1] if joined else None
        if last is not None and last[0] + last[2] == linear and last[1] + last[2] == gpa:
            last[2] += size
        else:
            joined.append([linear, gpa, size])
    return [(linear, gpa, size) for linear, gpa, size in joined]


def pages(memory: GuestMemory, sregs: dict[str, Any]) -> Iterator[Mapping]:
    """One by one."""
    cr3, cr4 = sregs["cr3"], sregs["cr4"]
    if sregs["efer"] & EFER_LMA:
        levels = LA57 if cr4 & CR4_LA57 else LONG
        sign = 1 << levels[0][0] + 8
        for linear, gpa, size in walk(memory, cr3 & (1 << ADDRESS_BITS) - PAGE_BYTES, 0, levels, 8, large=True):
            yield linear | (1 << 64) - sign if linear & sign else linear, gpa, size
    elif cr4 & CR4_PAE:
        yield from walk(memory, cr3 & 0xFFFF_FFE0, 0, PAE, 8, large=True)
    else:
        yield from walk(memory, cr3 & 0xFFFF_F000, 0, TWO_LEVELS, 4, large=bool(cr4 & CR4_PSE))


def walk(
    memory: GuestMemory, table: int, linear: int, levels: tuple[tuple[int, int, bool], ...], entry_bytes: int,
    *, large: bool,
) -> Iterator[Mapping]:  # fmt: skip
    """A table and all below it."""
    (shift, bits, may_be_page), *below = levels
    try:
        entries = memory.read(table, entry_bytes << bits)
    except BusError:
        return  # a table that is nowhere maps nothing
    for n in range(1 << bits):
        entry = int.from_bytes(entries[n * entry_bytes : (n + 1) * entry_bytes], "little")
        if not entry & PRESENT:
            continue
        at = linear | n << shift
        target = entry & (1 << (ADDRESS_BITS if entry_bytes == 8 else 32)) - PAGE_BYTES
        if not below or (may_be_page and large and entry & LARGE):
            yield at, page_address(entry, target, shift, entry_bytes), 1 << shift
        else:
            yield from walk(memory, target, at, tuple(below), entry_bytes, large=large)


def page_address(entry: int, target: int, shift: int, entry_bytes: int) -> int:
    """Where a page begins. A 4 MiB one has bits 39 to 32 of its address in bits 20 to 13 (PSE-36, SDM 4.3)."""
    if entry_bytes == 4 and shift > 12:
        return target & ~((1 << shift) - 1) | (entry >> 13 & 0xFF) << 32
    return target & ~((1 << shift) - 1)
