"""Small synthetic kernels: ELF files, bzImages and multiboot images made field by field."""

from __future__ import annotations

import struct
import zlib

PT_LOAD = 1
PT_NOTE = 4


def pvh_note(entry: int, *, size: int = 4, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    """One ELF note, padded to 4 bytes."""
    descriptor = entry.to_bytes(size, "little")
    note = struct.pack("<III", len(name), len(descriptor), kind) + name
    note += b"\0" * (-len(note) % 4) + descriptor
    return note + b"\0" * (-len(note) % 4)


def elf(
    segments: list[tuple[int, int, bytes, int]],
    *,
    bits: int = 64,
    entry: int = 0,
    note: bytes = b"",
    virtual: int = 0,
    machine: int | None = None,
) -> bytes:
    """An ELF file of ``segments`` (type, physical address, contents, size in memory), a note segment last."""
    parts = list(segments)
    if note:
        parts.append((PT_NOTE, 0, note, len(note)))
    header_bytes, entry_bytes = (64, 56) if bits == 64 else (52, 32)
    offset = header_bytes + entry_bytes * len(parts)
    headers, data = b"", b""
    for kind, paddr, contents, memsz in parts:
        fields = (offset + len(data), paddr + virtual, paddr, len(contents), memsz)
        if bits == 64:
            headers += struct.pack("<II6Q", kind, 5, *fields, 4)
        else:
            headers += struct.pack("<I5III", kind, *fields, 5, 4)
        data += contents
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    word = "Q" if bits == 64 else "I"
    ehdr = ident + struct.pack(
        f"<HHI{word}{word}{word}I6H",
        2,
        machine or (62 if bits == 64 else 3),
        1,
        entry,
        header_bytes,
        0,
        0,
        header_bytes,
        entry_bytes,
        len(parts),
        0,
        0,
        0,
    )
    return ehdr + headers + data


def pvh_kernel(load: int = 0x100_0000, code: bytes = b"\xf4" * 64, bss: int = 4096, entry: int = 0) -> bytes:
    return elf([(PT_LOAD, load, code, len(code) + bss)], note=pvh_note(entry or load, size=8))


PATTERN = bytes((n >> 8 ^ n) & 0xFF for n in range(0x1_0000))


def bzimage(
    payload: bytes = b"",
    *,
    version: int = 0x20F,
    setup_sects: int = 4,
    xloadflags: int = 1,
    code_bytes: int = 0x4000,
    init_size: int = 0x10_0000,
    pref_address: int = 0x100_0000,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFF_FFFF,
    loadflags: int = 1,
    relocatable: int = 1,
    code32_start: int = 0x10_0000,
) -> bytes:
    """A bzImage whose code is an easily recognised pattern, ``payload`` in its middle."""
    setup = bytearray((setup_sects + 1) * 512 if setup_sects else 5 * 512)
    payload_at = code_bytes // 2
    code = bytearray((PATTERN * -(-code_bytes // len(PATTERN)))[:code_bytes])
    code[payload_at:payload_at] = payload
    code += bytes(-len(code) % 16)
    struct.pack_into("<BHIHHHH", setup, 0x1F1, setup_sects, 1, len(code) // 16, 0, 0, 0x301, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<H", setup, 0x20E, 0x80)
    setup[0x280:0x290] = b"6.1.0-test (x)\0\0"
    struct.pack_into("<BBHI", setup, 0x210, 0, loadflags, 0x8000, code32_start)
    struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
    struct.pack_into("<IBBHI", setup, 0x230, 0x20_0000, relocatable, 21, xloadflags, cmdline_size)
    struct.pack_into("<IIQQI", setup, 0x248, payload_at, len(payload), 0, pref_address, init_size)
    return bytes(setup + code)


def gzip_payload(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def multiboot_header(flags: int = 3, addresses: tuple[int, int, int, int, int] | None = None) -> bytes:
    header = struct.pack("<III", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF)
    return header + (struct.pack("<5I", *addresses) if addresses else b"")


def multiboot_elf(
    load: int = 0x10_0000, *, flags: int = 0, bss: int = 4096, code: bytes = b"\xf4" * 52
) -> bytes:
    """An ELF32 with its header first in its one segment; entry behind the header."""
    contents = multiboot_header(flags) + code
    return elf([(PT_LOAD, load, contents, len(contents) + bss)], bits=32, entry=load + 12)
