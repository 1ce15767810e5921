"""Our ELF reader against pyelftools, and against files that lie."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

import pytest
import x86_images
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.x86.elf import Elf

SEGMENTS = [
    (x86_images.PT_LOAD, 0x100_0000, b"code" * 100, 0x1000),
    (x86_images.PT_LOAD, 0x200_0000, b"data", 0x8000),
    (0x6474_E551, 0, b"", 0),
]


@pytest.mark.parametrize("bits", [32, 64])
def test_the_same_as_pyelftools(bits: int) -> None:
    note = x86_images.pvh_note(1, name=b"GNU\0", kind=3, size=8) + x86_images.pvh_note(
        0x100_0040, size=bits // 8
    )
    image = x86_images.elf(SEGMENTS, bits=bits, entry=0x100_0004, note=note, virtual=0x4000_0000)
    ours = Elf(memoryview(image), "kernel")
    theirs = ELFFile(io.BytesIO(image))
    assert ours.bits == theirs.elfclass
    assert ours.entry == theirs.header.e_entry
    for mine, segment in zip(ours.segments, theirs.iter_segments(), strict=True):
        header = segment.header
        assert (mine.offset, mine.vaddr, mine.paddr) == (header.p_offset, header.p_vaddr, header.p_paddr)
        assert (mine.filesz, mine.memsz, mine.flags) == (header.p_filesz, header.p_memsz, header.p_flags)
        assert mine.align == header.p_align
        assert bytes(ours.contents(mine)) == segment.data()
    wanted = [
        (note.n_name.encode(), note.n_type, note.n_descsz)
        for segment in theirs.iter_segments()
        if isinstance(segment, NoteSegment)
        for note in segment.iter_notes()
    ]
    assert len(wanted) == 2
    assert [(name, size) for name, _, size in wanted] == [(n, len(d)) for n, _, d in ours.notes()]
    assert ours.pvh_entry() == 0x100_0040


def test_our_own_compiler_output(tmp_path: object) -> None:
    """A file from the system's linker: this interpreter."""
    import sys

    with open(sys.executable, "rb") as file:
        image = file.read()
    ours = Elf(memoryview(image), "python")
    theirs = ELFFile(io.BytesIO(image))
    assert [(s.offset, s.vaddr, s.filesz, s.memsz) for s in ours.load_segments] == [
        (s.header.p_offset, s.header.p_vaddr, s.header.p_filesz, s.header.p_memsz)
        for s in theirs.iter_segments()
        if s.header.p_type == "PT_LOAD"
    ]
    assert ours.pvh_entry() is None


GNU_PROPERTY = struct.pack("<III", 4, 16, 5) + b"GNU\0" + struct.pack("<IIII", 0xC000_0002, 4, 3, 0)  # 8-aligned
SHORT = struct.pack("<III", 4, 4, 1) + b"GNU\0" + b"abcd"  # 20 bytes: padded to 24 where it is 8-aligned
LINUX = struct.pack("<III", 4, 6, 6) + b"Xen\0" + b"linux\0\0\0"  # XEN_ELFNOTE_GUEST_OS: 24 bytes
LOADER = struct.pack("<III", 4, 8, 8) + b"Xen\0" + b"generic\0"
PAD = bytes(4)


@pytest.mark.parametrize("align", [0, 4, 8])
@pytest.mark.parametrize(
    "notes",
    [
        [SHORT, "entry"],
        [SHORT, PAD, "entry"],
        [GNU_PROPERTY, "entry"],
        [GNU_PROPERTY, SHORT, LINUX, "entry", LOADER],
        ["entry", PAD, GNU_PROPERTY],
        [SHORT, LINUX, LOADER, PAD, GNU_PROPERTY, SHORT, "entry"],
    ],
)
@pytest.mark.parametrize("size", [4, 8])
def test_the_pvh_entry_is_found_whatever_the_alignment_says(notes: list[object], align: int, size: int) -> None:
    """Xen's notes are 4-aligned (linux/elfnote.h), also in a segment that 8-aligned ones made one of p_align 8."""
    data = b"".join(x86_images.pvh_note(0x1234, size=size) if note == "entry" else note for note in notes)  # type: ignore[misc]
    image = bytearray(x86_images.elf([(x86_images.PT_LOAD, 0, b"x", 1)], note=data))
    struct.pack_into("<Q", image, 64 + 56 + 48, align)
    assert Elf(memoryview(image), "kernel").pvh_entry() == 0x1234


def test_a_kernel_linked_with_gnu_property_starts(tmp_path: Path) -> None:
    """What the linker makes of both kinds of note in one segment."""
    source = tmp_path / "k.s"
    source.write_text(
        """
        .section .note.gnu.property, "a", @note
        .p2align 3
        .long 4, 16, 5
        .asciz "GNU"
        .long 0xc0000002, 4, 3, 0
        .section .note.Xen, "a", @note
        .p2align 2
        .long 4, 4, 18
        .asciz "Xen"
        .long start
        .text
        .globl start
        start: hlt
        """
    )
    script = tmp_path / "k.ld"
    script.write_text(
        "PHDRS { text PT_LOAD; note PT_NOTE; } SECTIONS { . = 0x100000; .text : { *(.text) } :text"
        " .notes : { *(.note.gnu.property) *(.note.Xen) } :text :note }"
    )
    kernel = tmp_path / "kernel"
    subprocess.run(["as", "-o", tmp_path / "k.o", source], check=True)
    subprocess.run(["ld", "-T", script, "-o", kernel, tmp_path / "k.o"], check=True)
    parsed = Elf(memoryview(kernel.read_bytes()), "kernel")
    assert [s.align for s in parsed.segments if s.type == x86_images.PT_NOTE] == [8]
    assert parsed.pvh_entry() == 0x10_0000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda image: image[:40], "truncated inside its ELF header"),
        (lambda image: image[:100], "truncated inside its ELF program headers"),
        (lambda image: image[:-300], "truncated: a segment ends"),
        (lambda image: b"\x7fELG" + image[4:], "no ELF file"),
        (lambda image: image[:4] + b"\x03" + image[5:], "class 3"),
        (lambda image: image[:5] + b"\x02" + image[6:], "encoding 2"),
        (lambda image: image[:18] + b"\xb7\0" + image[20:], "machine 183"),
        (lambda image: image[:54] + b"\x10\0" + image[56:], "program headers of 16 bytes"),
        (lambda image: image[:56] + b"\xff\xff" + image[58:], "65535 ELF program headers"),
        (lambda image: image[: 64 + 40] + bytes(8) + image[64 + 48 :], "larger in the file than in memory"),
    ],
)
def test_damage_is_named(change, complaint: str) -> None:  # type: ignore[no-untyped-def]
    image = x86_images.elf(SEGMENTS, note=x86_images.pvh_note(1))
    with pytest.raises(ConfigError, match=complaint):
        Elf(memoryview(change(image)), "kernel")


def test_a_note_that_runs_out_of_its_segment_is_no_note() -> None:
    note = struct.pack("<III", 4, 0xFFFF_FFF0, 18) + b"Xen\0" + bytes(8)
    image = x86_images.elf(SEGMENTS, note=note)
    assert Elf(memoryview(image), "kernel").pvh_entry() is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([32, 64]))
    image = bytearray(x86_images.elf(SEGMENTS, bits=bits, note=x86_images.pvh_note(0x100_0000)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(4, 300))
        value = data.draw(
            st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1])
        )
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        image[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    cut = image[: data.draw(st.integers(0, len(image)))]
    try:
        parsed = Elf(memoryview(cut), "kernel")
    except ConfigError:
        return
    for segment in parsed.load_segments:
        assert len(parsed.contents(segment)) == segment.filesz
    parsed.pvh_entry()
