"""Putting images into guest memory: bounds with a remedy, one copy, and a place as high as allowed for what follows.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory
    from pyvmm.x86.elf import Elf

_ZEROS = bytes(1 << 16)


def as_bytes_view(data: Buffer) -> memoryview:
    """Any contiguous bytes-like object (bytes, an mmap of the file, ...) as a flat view, not copied."""
    return memoryview(data).cast("B")


def require_ram(memory: GuestMemory, gpa: int, size: int, what: str) -> None:
    """ConfigError, with the memory size that would do, unless gpa..gpa+size lies in one region of RAM."""
    for base, length in memory.regions:
        if base <= gpa and gpa + size <= base + length:
            return
    end = gpa + size
    if end <= layout.RAM_HOLE:
        raise ConfigError(
            f"{what} needs guest memory up to {end:#x}: give the machine at least {mib(end)} MiB of memory"
        )
    raise ConfigError(
        f"{what} is to stand at {gpa:#x}-{end:#x}, where this machine has no RAM: "
        f"link it below {layout.RAM_HOLE:#x}"
    )


def copy_in(memory: GuestMemory, gpa: int, data: Buffer, what: str) -> None:
    """Write an image straight into guest memory. ConfigError where it does not fit."""
    source = as_bytes_view(data)
    require_ram(memory, gpa, source.nbytes, what)
    if source.nbytes:
        memory.view(gpa, source.nbytes)[:] = source


def clear(memory: GuestMemory, gpa: int, size: int, what: str) -> None:
    """Zero a range of guest memory. ConfigError where there is none."""
    require_ram(memory, gpa, size, what)
    if size:
        view = memory.view(gpa, size)
        for start in range(0, size, len(_ZEROS)):
            piece = view[start : start + len(_ZEROS)]
            piece[:] = _ZEROS[: len(piece)]


def load_segments(memory: GuestMemory, elf: Elf, *, clean: bool) -> None:
    """Copy an ELF file's segments to their physical addresses and zero the rest of each.

    ``clean`` says that the memory is known to be zero, as that of a machine that never ran is: nothing is cleared then.
    """
    # The highest first: the size that a refusal names does for all of them.
    for segment in sorted(elf.load_segments, key=lambda segment: -segment.paddr - segment.memsz):
        require_ram(memory, segment.paddr, segment.memsz, elf.name)
    for segment in elf.load_segments:
        copy_in(memory, segment.paddr, elf.contents(segment), elf.name)
        if not clean:
            clear(memory, segment.paddr + segment.filesz, segment.memsz - segment.filesz, elf.name)


def hull(spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The lowest start and the highest end."""
    return min(start for start, _ in spans), max(end for _, end in spans)


def refuse_overlap(what: str, spans: Sequence[tuple[int, int]], *kept: tuple[int, int, str]) -> None:
    """ConfigError when one of the image's (start, end) spans touches a (start, end, name) the loader needs itself.
    """
    for start, end in spans:
        for low, high, name in kept:
            if start < high and low < end:
                raise ConfigError(
                    f"{what} at {start:#x}-{end:#x} covers {name} at {low:#x}-{high:#x}: link it elsewhere"
                )


def place_high(memory: GuestMemory, size: int, *, floor: int, limit: int, what: str) -> int:
    """The highest page-aligned address in low RAM for ``size`` bytes that end at or below ``limit``, start at
    or above ``floor``.
    """
    top = min(low_ram_end(memory), limit)
    gpa = (top - size) & -layout.PAGE_BYTES
    if gpa < floor:
        need = floor + align_up(size, layout.PAGE_BYTES)
        if need <= min(limit, layout.RAM_HOLE):
            raise ConfigError(
                f"{what} of {size} bytes does not fit above the kernel: "
                f"give the machine at least {mib(need)} MiB of memory"
            )
        raise ConfigError(
            f"{what} of {size} bytes does not fit below {min(limit, layout.RAM_HOLE):#x}: make it smaller"
        )
    return gpa


def low_ram_end(memory: GuestMemory) -> int:
    """The end of the RAM that starts at address 0."""
    base, size = memory.regions[0]
    return base + size


def encode_cmdline(text: str, limit: int, what: str = "the command line") -> bytes:
    """With its NUL. ConfigError when longer than ``limit`` bytes without it, or a NUL is inside."""
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise ConfigError(f"{what} has a NUL character in it: leave it out")
    if len(data) > limit:
        raise ConfigError(f"{what} has {len(data)} bytes, this kernel takes {limit}: shorten it")
    return data + b"\0"


def align_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment


def mib(size: int) -> int:
    """Bytes as MiB, rounded up."""
    return -(-size // layout.MIB)
