"""A reader of what a loader needs from an ELF file: the header, the program headers, the notes.

The image is hostile: every offset and count is checked, and what is wrong is a ConfigError. (pyelftools does all this
and more, but costs 60 ms of import on the way to the first guest instruction; the tests hold this reader against it.)

System V ABI (gABI) 4.1, chapters 4 and 5; Xen public/elfnote.h for the PVH note.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"\x7fELF"
CLASS32 = 1
CLASS64 = 2
LITTLE_ENDIAN = 1
EM_386 = 3
EM_X86_64 = 62
PT_LOAD = 1
PT_NOTE = 4
PN_XNUM = 0xFFFF  # more program headers than e_phnum can say: the count would be in a section header

XEN_ELFNOTE_PHYS32_ENTRY = 18

IDENT_BYTES = 16
# After e_ident: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, shentsize,
# shnum, shstrndx.
EHDR = {CLASS32: Struct("<HHIIIIIHHHHHH"), CLASS64: Struct("<HHIQQQIHHHHHH")}
PHDR = {CLASS32: Struct("<8I"), CLASS64: Struct("<IIQQQQQQ")}
NHDR = Struct("<III")


class Segment:
    """One program header. Sizes and offsets in bytes; its ``filesz`` bytes are known to be in the file."""

    __slots__ = ("align", "filesz", "flags", "memsz", "offset", "paddr", "type", "vaddr")

    def __init__(
        self, type: int, flags: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int, align: int
    ) -> None:
        self.type = type
        self.flags = flags
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.filesz = filesz
        self.memsz = memsz
        self.align = align


class Elf:
    """The headers of a little-endian x86 ELF file. ``bits`` is 32 or 64, ``entry`` as the file says (often virtual).
    """

    __slots__ = ("bits", "entry", "image", "machine", "name", "segments")

    def __init__(self, image: memoryview, name: str) -> None:
        """ConfigError unless ``image`` is such a file and its program headers make sense."""
        self.image = image
        self.name = name
        if image[:4] != MAGIC:
            raise ConfigError(f"{name} is no ELF file: give a kernel image")
        if len(image) < IDENT_BYTES + EHDR[CLASS64].size:
            raise ConfigError(f"{name} is truncated inside its ELF header: give the whole file")
        elf_class, encoding = image[4], image[5]
        if elf_class not in EHDR or encoding != LITTLE_ENDIAN:
            raise ConfigError(
                f"{name} is an ELF file of class {elf_class}, encoding {encoding}: give an x86 kernel"
            )
        self.bits = 32 * elf_class
        self.entry: int
        self.machine: int
        _, self.machine, _, self.entry, phoff, _, _, _, phentsize, phnum, _, _, _ = EHDR[
            elf_class
        ].unpack_from(image, IDENT_BYTES)
        if self.machine not in (EM_386, EM_X86_64):
            raise ConfigError(f"{name} is an ELF file for machine {self.machine}: give an x86 kernel")
        self.segments = self._program_headers(elf_class, phoff, phentsize, phnum)

    def _program_headers(self, elf_class: int, phoff: int, phentsize: int, phnum: int) -> list[Segment]:
        layout = PHDR[elf_class]
        if phnum and (phentsize < layout.size or phnum == PN_XNUM):
            raise ConfigError(
                f"{self.name} has {phnum} ELF program headers of {phentsize} bytes: give another kernel"
            )
        if phoff + phnum * phentsize > len(self.image):
            raise ConfigError(f"{self.name} is truncated inside its ELF program headers: give the whole file")
        segments = []
        for at in range(phoff, phoff + phnum * phentsize, phentsize or 1):
            fields = layout.unpack_from(self.image, at)
            if elf_class == CLASS32:
                # The 32-bit header has the flags after the sizes.
                p_type, offset, vaddr, paddr, filesz, memsz, flags, align = fields
            else:
                p_type, flags, offset, vaddr, paddr, filesz, memsz, align = fields
            segment = Segment(p_type, flags, offset, vaddr, paddr, filesz, memsz, align)
            self._check(segment)
            segments.append(segment)
        return segments

    def _check(self, segment: Segment) -> None:
        if segment.type not in (PT_LOAD, PT_NOTE):
            return
        if segment.offset + segment.filesz > len(self.image):
            raise ConfigError(
                f"{self.name} is truncated: a segment ends at byte {segment.offset + segment.filesz}, "
                f"the file at {len(self.image)}; give the whole file"
            )
        if segment.type == PT_LOAD and segment.filesz > segment.memsz:
            raise ConfigError(
                f"{self.name} has an ELF segment larger in the file than in memory: give another kernel"
            )

    @property
    def load_segments(self) -> list[Segment]:
        """What is to be in memory: the PT_LOADs that are not empty, in the file's order."""
        return [s for s in self.segments if s.type == PT_LOAD and s.memsz]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of each of those in physical memory."""
        return [(s.paddr, s.paddr + s.memsz) for s in self.load_segments]

    def contents(self, segment: Segment) -> memoryview:
        """The bytes a segment has in the file."""
        return self.image[segment.offset : segment.offset + segment.filesz]

    def notes(self) -> Iterator[tuple[bytes, int, memoryview]]:
        """(name without its NUL, type, descriptor) of every note, 4-aligned whatever the segment's alignment says
        (linux/elfnote.h). A note that does not fit ends its segment's list.
        """
        return self._all_notes((4,))

    def _all_notes(self, alignments: tuple[int, ...]) -> Iterator[tuple[bytes, int, memoryview]]:
        for segment in self.segments:
            if segment.type == PT_NOTE:
                yield from _notes(self.contents(segment), alignments)

    def pvh_entry(self) -> int | None:
        """The 32-bit physical entry of the PVH boot protocol, None where the kernel has no such note.

        The ABI says a 32-bit value; Linux writes a pointer of its own width. A linker may have put the note into one
        segment with 8-aligned ones (.note.gnu.property), with padding between them: where the plain walk finds no
        entry, both alignments are tried after each note.
        """
        for alignments in ((4,), (4, 8)):
            for name, kind, descriptor in self._all_notes(alignments):
                if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(descriptor) in (4, 8):
                    return int.from_bytes(descriptor, "little")
        return None


def _notes(data: memoryview, alignments: tuple[int, ...]) -> Iterator[tuple[bytes, int, memoryview]]:
    """Every note that is met from the first on, in file order where there is one alignment to try.

    Each place is looked at once, so that a hostile file can't make the walk longer than it is itself.
    """
    todo, seen = [0], {0}
    while todo:
        at = todo.pop()
        if at + NHDR.size > len(data):
            continue
        name_bytes, descriptor_bytes, kind = NHDR.unpack_from(data, at)
        name_at = at + NHDR.size
        for descriptor_at in sorted({at + _align(NHDR.size + name_bytes, n) for n in alignments}):
            end = descriptor_at + descriptor_bytes
            if end > len(data):
                break
            yield bytes(data[name_at : name_at + name_bytes]).rstrip(b"\0"), kind, data[descriptor_at:end]
            for place in {_align(end, n) for n in alignments} - seen:
                seen.add(place)
                todo.append(place)


def _align(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment
