"""The guests of ``pyvmm bench exits``, one a case: their bytes, and what different VMMs boot them from.

Assembled when they are wanted, where GNU as and ld are there; else the binaries that an installed package carries.
``rom``: 64 KiB that end at the reset vector. ``elf``: with a PVH note, or entered in long mode. ``bzimage``: for
loaders of Linux in real mode.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from pyvmm.errors import ConfigError

SOURCES = Path(__file__).resolve().parent / "guests" / "exits"

LOAD = 0x10_0000
ENTRY_PROTECTED = LOAD + 16  # flat 32-bit protected mode; LOAD itself is for long mode
ROM_BYTES = 0x1_0000
RESET_BYTES = 0x100  # reset.S, at the ROM's end

# ELF and its notes: System V ABI, "Object Files"; Xen's public/elfnote.h for the PVH entry.
ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
NOTE = struct.Struct("<III4sQ")
ET_EXEC, EM_X86_64, PT_LOAD, PT_NOTE = 2, 62, 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18

SYSSIZE_AT = 0x1F4  # Linux Documentation/arch/x86/boot.rst
PARAGRAPH = 16
# Not guests: what others are begun with.
BEGINNINGS = ("reset", "setup")


def names() -> list[str]:
    """Of all guests."""
    return sorted(path.stem for path in SOURCES.glob("*.S") if path.stem not in BEGINNINGS)


@functools.cache
def payload(name: str) -> bytes:
    """The guest itself, to be loaded at LOAD."""
    return assembled(SOURCES / f"{name}.S", LOAD)


@functools.cache
def rom(name: str) -> bytes:
    """A guest as a ROM."""
    return as_rom(payload(name))


def as_rom(guest: bytes) -> bytes:
    """64 KiB for the end of the first MiB and of the fourth GiB, where the reset vector is."""
    reset = assembled(SOURCES / "reset.S", ROM_BYTES - RESET_BYTES)
    if len(reset) != RESET_BYTES or len(guest) > ROM_BYTES - RESET_BYTES:
        raise ValueError(f"a guest of {len(guest)} bytes and {len(reset)} of reset.S do not make a ROM")
    return guest.ljust(ROM_BYTES - RESET_BYTES, b"\0") + reset


@functools.cache
def elf(name: str, *, pvh: bool) -> bytes:
    """A 64-bit ELF: with a note for PVH's 32-bit entry, or with the long-mode entry only."""
    image = payload(name)
    note = NOTE.pack(4, 8, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", ENTRY_PROTECTED)
    count = 2 if pvh else 1
    note_at = ELF_HEADER.size + count * PROGRAM_HEADER.size
    image_at = 0x1000
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64-bit, little-endian
    header = ELF_HEADER.pack(
        ident, ET_EXEC, EM_X86_64, 1, LOAD, ELF_HEADER.size, 0, 0, ELF_HEADER.size, PROGRAM_HEADER.size, count, 0, 0, 0
    )
    segments = PROGRAM_HEADER.pack(PT_LOAD, 7, image_at, LOAD, LOAD, len(image), len(image), 0x1000)
    if pvh:
        segments += PROGRAM_HEADER.pack(PT_NOTE, 4, note_at, 0, 0, len(note), len(note), 4)
    head = header + segments + (note if pvh else b"")
    return head.ljust(image_at, b"\0") + image


@functools.cache
def bzimage(name: str) -> bytes:
    """As a Linux kernel, to be entered in real mode."""
    setup = bytearray(assembled(SOURCES / "setup.S", 0))
    image = payload(name).ljust(-(-len(payload(name)) // PARAGRAPH) * PARAGRAPH, b"\0")
    struct.pack_into("<I", setup, SYSSIZE_AT, len(image) // PARAGRAPH)
    return bytes(setup) + image


def assembled(source: Path, address: int) -> bytes:
    """``source`` linked at ``address``. ConfigError where there is neither an assembler nor a binary."""
    if shutil.which("as") and shutil.which("ld") and source.exists():
        return assemble(source, address)
    try:
        return source.with_suffix(".bin").read_bytes()
    except OSError:
        raise ConfigError(f"guest {source.stem} is not assembled: install GNU as and ld (Debian: binutils)") from None


def assemble(source: Path, address: int) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        places = [word for place in (source.parent, SOURCES, SOURCES.parent) for word in ("-I", str(place))]
        obj, binary = f"{directory}/guest.o", Path(directory, "guest.bin")
        run("as", "--64", *places, "-o", obj, str(source))
        flat = ("-melf_x86_64", "--oformat", "binary", "-N", "-e", "0", f"-Ttext={address:#x}")
        run("ld", *flat, "-o", str(binary), obj)
        return binary.read_bytes()


def run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise ConfigError(f"{' '.join(command)}: {ran.stderr.strip()}")
