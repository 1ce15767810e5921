"""The registers a virtual processor starts with: after reset, and in each mode a loader enters a guest in.

Every function fills the two dicts of KVM_GET_REGS and KVM_GET_SREGS (the kernel's field names) completely but
for ``apic_base`` and ``interrupt_bitmap``, which belong to KVM. Intel SDM vol. 3: table 10-1 (state after
reset), 3.4.5 (segment descriptors), 4.5 (4-level paging), 10.8.5 (what long mode needs).
"""

from __future__ import annotations

from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.guest_memory import GuestMemory

    State = dict[str, Any]

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)))

RFLAGS_FIXED = 1 << 1  # reads as one always; IF, TF, VM and all others clear

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Segment types (SDM vol. 3, tables 3-1 and 3-2), with the accessed or busy bit as loading the register sets it.
DATA_RW = 0x3
CODE_READ = 0xB
LDT = 0x2
TSS_BUSY = 0xB

# Selectors of the GDT a loader leaves: __BOOT_CS and __BOOT_DS of the Linux boot protocol, then a TSS because
# VM entry wants a busy one in TR and a guest that reloads TR should find the same there.
BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20
TSS_LIMIT = 0x67

# Page-table entry bits.
PRESENT = 1 << 0
WRITABLE = 1 << 1
ACCESSED = 1 << 5
DIRTY = 1 << 6
LARGE = 1 << 7


def segment(
    selector: int = 0,
    base: int = 0,
    limit: int = 0xFFFF,
    type: int = DATA_RW,
    *,
    s: int = 1,
    db: int = 0,
    l: int = 0,  # noqa: E741  the kernel's name
    g: int = 0,
    present: int = 1,
) -> State:
    """One struct kvm_segment. ``limit`` in bytes, as KVM has it whatever ``g`` is."""
    return {
        "base": base,
        "limit": limit,
        "selector": selector,
        "type": type,
        "present": present,
        "dpl": 0,
        "db": db,
        "s": s,
        "l": l,
        "g": g,
        "avl": 0,
        "unusable": 0 if present else 1,
        "padding": 0,
    }


def descriptor(seg: State) -> int:
    """The 8-byte GDT descriptor of a kvm_segment."""
    limit = seg["limit"] >> 12 if seg["g"] else seg["limit"]
    access = seg["type"] | seg["s"] << 4 | seg["dpl"] << 5 | seg["present"] << 7
    flags = seg["avl"] | seg["l"] << 1 | seg["db"] << 2 | seg["g"] << 3
    base = seg["base"]
    return int(
        (limit & 0xFFFF)
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def flat_segments(long_mode: bool) -> tuple[State, State, State]:
    """Code, data and TSS of a flat 4 GiB address space: as in the registers and, by gdt(), in memory."""
    code = segment(BOOT_CS, 0, 0xFFFF_FFFF, CODE_READ, db=0 if long_mode else 1, l=1 if long_mode else 0, g=1)
    data = segment(BOOT_DS, 0, 0xFFFF_FFFF, DATA_RW, db=1, g=1)
    tss = segment(BOOT_TSS, 0, TSS_LIMIT, TSS_BUSY, s=0)
    return code, data, tss


def gdt(long_mode: bool) -> bytes:
    """Two empty descriptors, code, data, TSS (16 bytes in long mode, the upper half zero)."""
    from _struct import pack

    code, data, tss = flat_segments(long_mode)
    return pack("<6Q", 0, 0, descriptor(code), descriptor(data), descriptor(tss), 0)


def identity_page_tables(gpa: int) -> bytes:
    """Six pages to be written at ``gpa``, which is then CR3: the first 4 GiB one-to-one in 2 MiB pages."""
    from _struct import pack

    table = PRESENT | WRITABLE | ACCESSED
    page = table | DIRTY | LARGE
    pml4 = pack("<Q", gpa + layout.PAGE_BYTES | table)
    pdpt = pack("<4Q", *(gpa + (2 + n) * layout.PAGE_BYTES | table for n in range(4)))
    directories = pack("<2048Q", *range(page, page + 4 * layout.GIB, 2 * layout.MIB))
    return pml4.ljust(layout.PAGE_BYTES, b"\0") + pdpt.ljust(layout.PAGE_BYTES, b"\0") + directories


def write_long_mode_tables(memory: GuestMemory) -> None:
    """The page tables and the GDT that ``long_mode`` points at, at their places in layout."""
    memory.write(layout.PAGE_TABLES, identity_page_tables(layout.PAGE_TABLES))
    memory.write(layout.BOOT_GDT, gdt(True))


def reset(regs: State, sregs: State, signature: int = 0x600) -> None:
    """After RESET or INIT: real mode, CS base 0xffff0000, the first fetch from 0xfffffff0.

    ``signature`` is CPUID leaf 1's EAX, which reset leaves in EDX.
    """
    real_mode(regs, sregs, cs=0xF000, ip=0xFFF0)
    sregs["cs"]["base"] = 0xFFFF_0000
    sregs["cr0"] = CR0_CD | CR0_NW | CR0_ET
    regs["rdx"] = signature


def real_mode(
    regs: State, sregs: State, cs: int, ip: int, *, data: int = 0, ss: int = 0, sp: int = 0
) -> None:
    """Real mode at cs:ip with interrupts off; ``data`` goes into DS, ES, FS and GS. Caches on, as a BIOS leaves them.
    """
    _general(regs, ip, sp)
    _system(sregs, cr0=CR0_ET)
    sregs["cs"] = segment(cs, cs << 4, type=CODE_READ)
    for name in ("ds", "es", "fs", "gs"):
        sregs[name] = segment(data, data << 4)
    sregs["ss"] = segment(ss, ss << 4)
    sregs["tr"] = segment(type=TSS_BUSY, s=0)


def protected_mode(
    regs: State, sregs: State, eip: int, *, esp: int = 0, gdt_gpa: int = layout.BOOT_GDT
) -> None:
    """Flat 32-bit protected mode, paging and interrupts off. gdt(False) is to stand at ``gdt_gpa``."""
    _general(regs, eip, esp)
    _system(sregs, cr0=CR0_PE | CR0_ET)
    _flat(sregs, False, gdt_gpa)


def long_mode(
    regs: State,
    sregs: State,
    rip: int,
    *,
    rsp: int = 0,
    gdt_gpa: int = layout.BOOT_GDT,
    cr3: int = layout.PAGE_TABLES,
) -> None:
    """64-bit mode, interrupts off. gdt(True) and page tables that map ``rip`` are to stand at ``gdt_gpa`` and ``cr3``.
    """
    _general(regs, rip, rsp)
    _system(sregs, cr0=CR0_PE | CR0_ET | CR0_PG)
    sregs["cr3"] = cr3
    sregs["cr4"] = CR4_PAE
    sregs["efer"] = EFER_LME | EFER_LMA
    _flat(sregs, True, gdt_gpa)


def _general(regs: State, rip: int, rsp: int) -> None:
    for name in GENERAL:
        regs[name] = 0
    regs["rip"] = rip
    regs["rsp"] = rsp
    regs["rflags"] = RFLAGS_FIXED


def _system(sregs: State, cr0: int) -> None:
    """What is alike in all modes until said otherwise: table 10-1's values."""
    sregs["ldt"] = segment(type=LDT, s=0)
    sregs["gdt"] = {"base": 0, "limit": 0xFFFF, "padding": [0, 0, 0]}
    sregs["idt"] = {"base": 0, "limit": 0xFFFF, "padding": [0, 0, 0]}
    sregs["cr0"] = cr0
    for name in ("cr2", "cr3", "cr4", "cr8", "efer"):
        sregs[name] = 0


def _flat(sregs: State, long_mode: bool, gdt_gpa: int) -> None:
    code, data, tss = flat_segments(long_mode)
    sregs["cs"] = code
    for name in ("ds", "es", "fs", "gs", "ss"):
        sregs[name] = dict(data)
    sregs["tr"] = tss
    sregs["gdt"] = {"base": gdt_gpa, "limit": len(gdt(long_mode)) - 1, "padding": [0, 0, 0]}
    # No interrupt table: an exception before the guest loads its own is a triple fault, not a jump anywhere.
    sregs["idt"] = {"base": 0, "limit": 0, "padding": [0, 0, 0]}


# What BootState.registers gave, by all that it depends on: entries of one kind differ in nothing.
MOST_ENTRIES = 64
_entries: dict[tuple[object, ...], tuple[State, State]] = {}


class BootState:
    """The registers of the first processor at a kernel's entry.

    ``protocol`` bzimage, pvh, multiboot or flat; ``mode`` real16, protected32 or long64; ``rip`` an offset in
    ``cs`` in real16, else an address; ``regs`` the general registers that are not zero but for rsp; ``image``
    (start, end) of the kernel in guest memory.
    """

    __slots__ = ("cs", "gdt_gpa", "image", "mode", "protocol", "regs", "rip", "rsp")

    def __init__(
        self,
        protocol: str,
        mode: str,
        rip: int,
        *,
        rsp: int = 0,
        regs: dict[str, int] | None = None,
        cs: int = 0,
        gdt_gpa: int = layout.BOOT_GDT,
        image: tuple[int, int] = (0, 0),
    ) -> None:
        self.protocol = protocol
        self.mode = mode
        self.rip = rip
        self.rsp = rsp
        self.regs = regs or {}
        self.cs = cs
        self.gdt_gpa = gdt_gpa
        self.image = image

    def apply(self, regs: State, sregs: State) -> None:
        """Fill the dicts of KVM_GET_REGS and KVM_GET_SREGS; KVM's own (the APIC base) stays."""
        if self.mode == "real16":
            real_mode(regs, sregs, self.cs, self.rip, data=self.cs, sp=self.rsp)
        elif self.mode == "protected32":
            protected_mode(regs, sregs, self.rip, esp=self.rsp, gdt_gpa=self.gdt_gpa)
        else:
            long_mode(regs, sregs, self.rip, rsp=self.rsp, gdt_gpa=self.gdt_gpa)
        regs.update(self.regs)

    def registers(self) -> tuple[State, State]:
        """General and system registers as ``apply`` fills them, and no others; not to be changed."""
        key = (self.mode, self.cs, self.rip, self.rsp, self.gdt_gpa, *self.regs.items())
        if (found := _entries.get(key)) is None:
            regs: State = {}
            sregs: State = {}
            self.apply(regs, sregs)
            if len(_entries) >= MOST_ENTRIES:
                _entries.clear()
            found = _entries[key] = regs, sregs
        return found
