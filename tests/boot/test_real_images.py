"""The loaders and Debian's own kernels: no guest runs, images are compared with what others read there."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boot_assets
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, bzimage, layout
from pyvmm.x86.elf import Elf

MIB = 1 << 20
FLAVOURS = ["cloud", "generic"]


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        yield image


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    guest = GuestMemory(512 * MIB)
    yield guest
    guest.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_vmlinux_inside_comes_out_whole(flavour: str) -> None:
    kernel = boot_assets.kernel(flavour)
    with mapped(kernel.bzimage) as image:
        header = bzimage.BzImage(memoryview(image), kernel.bzimage.name)
        assert header.version_string.split()[0] == kernel.release
        assert header.is_64bit
        assert bzimage.extract_vmlinux(image) == kernel.vmlinux.read_bytes()
        header.image.release()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_bzimage_is_loaded_as_it_is(memory: GuestMemory, flavour: str) -> None:
    path = boot_assets.kernel(flavour).bzimage
    with mapped(path) as image:
        state = boot.load(memory, image, initrd=bytes(5 * MIB), append="console=ttyS0", acpi_rsdp=0xE0000)
    assert (state.protocol, state.mode, state.rip) == ("bzimage", "long64", 0x10_0200)
    data = path.read_bytes()
    setup = (data[0x1F1] + 1) * 512
    assert memory.read(layout.KERNEL, len(data) - setup) == data[setup:]
    page = memory.read(layout.ZERO_PAGE, 4096)
    assert page[0x202:0x210] == data[0x202:0x210]
    gpa, size = struct.unpack_from("<II", page, 0x218)
    assert gpa + size == 512 * MIB
    assert gpa >= state.image[1]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_vmlinux_is_read_as_pyelftools_reads_it(memory: GuestMemory, flavour: str) -> None:
    path = boot_assets.kernel(flavour).vmlinux
    with mapped(path) as image:
        ours = Elf(memoryview(image), "vmlinux")
        theirs = ELFFile(image)
        segments = [segment for segment in theirs.iter_segments() if segment.header.p_type == "PT_LOAD"]
        assert [(s.offset, s.paddr, s.filesz, s.memsz) for s in ours.load_segments] == [
            (s.header.p_offset, s.header.p_paddr, s.header.p_filesz, s.header.p_memsz) for s in segments
        ]
        (entry,) = [
            int.from_bytes(note.n_descdata, "little")
            for segment in theirs.iter_segments()
            if isinstance(segment, NoteSegment)
            for note in segment.iter_notes()
            if note.n_name == "Xen" and note.n_type in (18, "XEN_ELFNOTE_PHYS32_ENTRY")
        ]
        assert ours.pvh_entry() == entry
        ours.image.release()
        state = boot.load(memory, image, append="console=ttyS0")
    assert (state.protocol, state.mode, state.rip) == ("pvh", "protected32", entry)
    for segment in segments:
        assert memory.read(segment.header.p_paddr, segment.header.p_filesz) == segment_bytes(
            path, segment.header
        )


def segment_bytes(path: Path, header: object) -> bytes:
    with path.open("rb") as file:
        file.seek(header.p_offset)  # type: ignore[attr-defined]
        return file.read(header.p_filesz)  # type: ignore[attr-defined]


def test_the_multiboot_packages_example(memory: GuestMemory) -> None:
    path = boot_assets.multiboot_kernel()
    with mapped(path) as image:
        state = boot.load(memory, image, name="kernel", initrd=[(b"module", "one"), (b"two", "")])
    assert (state.protocol, state.mode) == ("multiboot", "protected32")
    with path.open("rb") as file:
        elf = ELFFile(file)
        assert state.rip == elf.header.e_entry
        (code,) = [s for s in elf.iter_segments() if s.header.p_type == "PT_LOAD" and s.header.p_flags & 1]
        assert memory.read(code.header.p_paddr, code.header.p_filesz) == code.data()
    fields = struct.unpack("<7I", memory.read(state.regs["rbx"], 28))
    assert fields[5] == 2
