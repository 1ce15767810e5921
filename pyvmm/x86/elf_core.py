"""A guest's memory and registers as an ELF core: what gdb and crash open.

The form is QEMU's (dump/dump.c, target/i386/arch_dump.c), whatever mode the guest is in ELF64: a note NT_PRSTATUS of
each vCPU for gdb (struct elf_prstatus, linux/elfcore.h) and a note "QEMU" for crash (QEMUCPUState), then memory, each
piece of RAM once. Without ``paging`` a segment's virtual address is its physical one; with it there is a segment for
each range that a vCPU's tables map, and behind those the physical ones.
"""

from __future__ import annotations

import os
from struct import Struct, pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.guest_memory import GuestMemory, RamRegion
    from pyvmm.kvm.vcpu import Vcpu

HEADER = Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
SEGMENT = Struct("<IIQQQQQQ")  # Elf64_Phdr
IDENT = b"\x7fELF\2\1\1"  # 64 bits, little endian, version 1
ET_CORE, EM_X86_64, EV_CURRENT = 4, 62, 1
PT_LOAD, PT_NOTE = 1, 4
READ_WRITE_EXECUTE = 7
NT_PRSTATUS = 1
MOST_SEGMENTS = 0xFFFE  # Elf64_Ehdr.e_phnum, short of PN_XNUM
PAGE_BYTES = 4096
PIECE_BYTES = 1 << 20
MSR_KERNEL_GS_BASE = 0xC000_0102
# struct user_regs_struct (asm/user_64.h), as far as KVM's general registers name them.
BEFORE_ORIG = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi")
PRSTATUS_BEFORE = bytes(32)  # signals
PRSTATUS_TIMES = bytes(64)
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr")
CPU_STATE_VERSION, CPU_STATE_BYTES = 1, 440


class Segment:
    """``size`` bytes at ``linear`` and ``gpa``."""

    __slots__ = ("gpa", "linear", "size")

    def __init__(self, linear: int, gpa: int, size: int) -> None:
        self.linear = linear
        self.gpa = gpa
        self.size = size


class Core:
    """Of vCPUs that stand. ``segments`` is what of memory will be in it. StateError for tables without end."""

    def __init__(self, vcpus: Sequence[Vcpu], memory: GuestMemory, *, paging: bool) -> None:
        self._ram: list[tuple[RamRegion, int, int]] = [(r, 0, r.size_bytes) for r in memory.ram]
        self.segments: list[Segment] = []
        if paging:
            from pyvmm.x86.page_tables import mapped

            ranges = {m: None for vcpu in vcpus for m in mapped(memory, vcpu.sregs)}
            self.segments += [Segment(*each) for each in ranges]
        self.segments += [Segment(r.gpa, r.gpa, r.size_bytes) for r in memory.ram]
        self.cut(0, 1 << 64)  # tables may name what is no RAM
        self._notes = b"".join(prstatus(n, vcpu) for n, vcpu in enumerate(vcpus))
        self._notes += b"".join(cpu_state(vcpu) for vcpu in vcpus)

    def cut(self, begin: int, end: int) -> None:
        """Leave out what is not between these guest-physical addresses."""
        kept = []
        for region, offset, size in self._ram:
            first, last = max(begin, region.gpa + offset), min(end, region.gpa + offset + size)
            if first < last:
                kept.append((region, first - region.gpa, last - first))
        self._ram = kept
        self.segments = [part for segment in self.segments for part in self._in_ram(segment)]

    def _in_ram(self, segment: Segment) -> list[Segment]:
        """What of a segment is there."""
        parts = []
        for region, offset, size in self._ram:
            base = region.gpa + offset
            first, last = max(segment.gpa, base), min(segment.gpa + segment.size, base + size)
            if first < last:
                parts.append(Segment(segment.linear + first - segment.gpa, first, last - first))
        return parts

    def write(self, fd: int, check: Callable[[], object]) -> None:
        """All of it into an empty file; pages of zeros are left as holes. ``check()`` may raise, to end it. OSError."""
        segments = self.segments[: MOST_SEGMENTS - 1]
        notes_at = HEADER.size + SEGMENT.size * (1 + len(segments))
        at = aligned(notes_at + len(self._notes))
        places: list[tuple[int, int, int]] = []  # gpa, bytes, where in the file
        for region, offset, size in self._ram:
            places.append((region.gpa + offset, size, at))
            at += aligned(size)
        head = [
            HEADER.pack(
                IDENT, ET_CORE, EM_X86_64, EV_CURRENT, 0, HEADER.size, 0, 0, HEADER.size, SEGMENT.size,
                1 + len(segments), 0, 0, 0,
            ),
            SEGMENT.pack(PT_NOTE, 0, notes_at, 0, 0, len(self._notes), len(self._notes), 0),
        ]  # fmt: skip
        for s in segments:
            file_at = next(where + s.gpa - base for base, size, where in places if base <= s.gpa < base + size)
            head.append(SEGMENT.pack(PT_LOAD, READ_WRITE_EXECUTE, file_at, s.linear, s.gpa, s.size, s.size, 0))
        write_all(fd, b"".join([*head, self._notes]), 0)
        for (region, offset, size), (_, _, where) in zip(self._ram, places, strict=True):
            copy(fd, memoryview(region)[offset : offset + size], where, check)
        os.ftruncate(fd, at)


def copy(fd: int, view: memoryview, where: int, check: Callable[[], object]) -> None:
    zeros = bytes(PIECE_BYTES)
    for at in range(0, len(view), PIECE_BYTES):
        check()
        piece = bytes(view[at : at + PIECE_BYTES])
        if piece != zeros[: len(piece)]:
            write_all(fd, piece, where + at)


def write_all(fd: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, at)
        left, at = left[count:], at + count


def aligned(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def note(name: bytes, kind: int, data: bytes) -> bytes:
    """Names and data are filled up to four bytes each."""
    padded = name + b"\0"
    body = padded.ljust(-(-len(padded) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")
    return pack("<III", len(padded), len(data), kind) + body


def prstatus(index: int, vcpu: Vcpu) -> bytes:
    """gdb's: vCPU 0 is thread 1."""
    regs, sregs = vcpu.regs, vcpu.sregs
    selectors = {name: sregs[name]["selector"] for name in SEGMENTS}
    values = [
        *(regs[name] for name in BEFORE_ORIG),
        0,  # orig_rax
        regs["rip"],
        selectors["cs"],
        regs["rflags"],
        regs["rsp"],
        selectors["ss"],
        sregs["fs"]["base"],
        sregs["gs"]["base"],
        *(selectors[name] for name in ("ds", "es", "fs", "gs")),
    ]
    ids = pack("<4i", index + 1, 0, 0, 0)
    return note(b"CORE", NT_PRSTATUS, PRSTATUS_BEFORE + ids + PRSTATUS_TIMES + pack("<27Q", *values) + bytes(8))


def cpu_state(vcpu: Vcpu) -> bytes:
    """crash's."""
    regs, sregs = vcpu.regs, vcpu.sregs
    gs = vcpu.get_msrs([MSR_KERNEL_GS_BASE]).get(MSR_KERNEL_GS_BASE, 0)
    data = pack("<II", CPU_STATE_VERSION, CPU_STATE_BYTES) + pack("<18Q", *(regs[name] for name in GENERAL))
    data += b"".join(descriptor(sregs[name]) for name in SEGMENTS)
    data += b"".join(pack("<IIIIQ", 0, sregs[t]["limit"], 0, 0, sregs[t]["base"]) for t in ("gdt", "idt"))
    data += pack("<6Q", sregs["cr0"], 0, sregs["cr2"], sregs["cr3"], sregs["cr4"], gs)
    assert len(data) == CPU_STATE_BYTES
    return note(b"QEMU", 0, data)


def descriptor(s: dict[str, Any]) -> bytes:
    """A segment, its attributes where the second word of a descriptor has them (SDM vol. 3, 3.4.5)."""
    flags = s["type"] << 8 | s["s"] << 12 | s["dpl"] << 13 | s["present"] << 15
    flags |= s["avl"] << 20 | s["l"] << 21 | s["db"] << 22 | s["g"] << 23
    return pack("<IIIIQ", s["selector"], s["limit"], flags, 0, s["base"])
