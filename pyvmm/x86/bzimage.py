"""Linux's bzImage: the setup header, the hand-over of the zero page, and the vmlinux packed inside.

Linux Documentation/arch/x86/boot.rst (protocol 2.06 and newer; 64-bit entry from 2.12, 32-bit entry
otherwise) and zero-page.rst. What has the header but neither entry (older kernels, and other programs in a kernel's
clothes) must run its real-mode code under a BIOS: x86/linuxboot.py.
"""

from __future__ import annotations

from struct import Struct, calcsize, pack_into, unpack_from

from pyvmm.errors import ConfigError
from pyvmm.x86 import cpu_state, e820, image, layout
from pyvmm.x86.cpu_state import BootState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory

# struct setup_header: offset in the image (and in the zero page) and struct format of each field.
FIELDS = {
    "setup_sects": (0x1F1, "B"),
    "root_flags": (0x1F2, "H"),
    "syssize": (0x1F4, "I"),  # of the protected-mode part, in 16-byte paragraphs
    "ram_size": (0x1F8, "H"),
    "vid_mode": (0x1FA, "H"),
    "root_dev": (0x1FC, "H"),
    "boot_flag": (0x1FE, "H"),
    "jump": (0x200, "H"),  # its second byte is the distance to the end of the header
    "header": (0x202, "I"),
    "version": (0x206, "H"),
    "realmode_swtch": (0x208, "I"),
    "start_sys_seg": (0x20C, "H"),
    "kernel_version": (0x20E, "H"),  # offset of its string, less 0x200
    "type_of_loader": (0x210, "B"),
    "loadflags": (0x211, "B"),
    "setup_move_size": (0x212, "H"),
    "code32_start": (0x214, "I"),
    "ramdisk_image": (0x218, "I"),
    "ramdisk_size": (0x21C, "I"),
    "bootsect_kludge": (0x220, "I"),
    "heap_end_ptr": (0x224, "H"),
    "ext_loader_ver": (0x226, "B"),
    "ext_loader_type": (0x227, "B"),
    "cmd_line_ptr": (0x228, "I"),
    "initrd_addr_max": (0x22C, "I"),  # the last byte an initrd may occupy
    "kernel_alignment": (0x230, "I"),
    "relocatable_kernel": (0x234, "B"),
    "min_alignment": (0x235, "B"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),  # without the NUL
    "hardware_subarch": (0x23C, "I"),
    "hardware_subarch_data": (0x240, "Q"),
    "payload_offset": (0x248, "I"),  # from the start of the protected-mode part
    "payload_length": (0x24C, "I"),
    "setup_data": (0x250, "Q"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
    "handover_offset": (0x264, "I"),
    "kernel_info_offset": (0x268, "I"),
}
HEADER_START = 0x1F1
HEADER_MAX_END = 0x290  # the EDD signatures follow it in the zero page
BOOT_FLAG = 0xAA55
HDRS = 0x53726448  # "HdrS"
SETUP_SECTOR_BYTES = 512  # what setup_sects counts
VERSION_HEAP = 0x0201  # heap_end_ptr
VERSION_CMD_LINE_PTR = 0x0202
VERSION_INITRD_ADDR_MAX = 0x0203
VERSION_SYSSIZE = 0x0204  # four bytes of it, which can be relied on
VERSION_CMDLINE_SIZE = 0x0206
VERSION_DIRECT = 0x0206  # the oldest that is entered here without its real-mode code
INITRD_ADDR_MAX = 0x37FF_FFFF  # of those that don't say
CMDLINE_SIZE = 255
VERSION_PAYLOAD = 0x0208
VERSION_INIT_SIZE = 0x020A
VERSION_XLOADFLAGS = 0x020C
LOADED_HIGH = 1 << 0  # loadflags: the protected-mode part goes to 1 MiB
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200  # from the load address
LOADER_UNDEFINED = 0xFF  # type_of_loader of one with no number assigned
NORMAL_VIDEO = 0xFFFF

# Fields of the zero page outside the header.
ZP_ACPI_RSDP = 0x070
ZP_E820_ENTRIES = 0x1E8
ZP_E820_TABLE = 0x2D0
ZP_E820_MAX = 128


class BzImage:
    """A bzImage; ``kernel["init_size"]`` is the field of that name in its setup header."""

    __slots__ = ("fields", "image", "name", "setup_bytes")

    def __init__(self, view: memoryview, name: str) -> None:
        """ConfigError unless ``view`` is a whole kernel with a setup header, of any protocol since 2.00."""
        self.image = view
        self.name = name
        if not is_bzimage(view):
            raise ConfigError(f"{name} is no bzImage: give arch/x86/boot/bzImage of a kernel build")
        # A field past the end of an old, short header reads as zero, which is what boot.rst has unset ones mean.
        self.fields = dict.fromkeys(FIELDS, 0)
        for field, (offset, form) in FIELDS.items():
            if offset + calcsize("<" + form) <= self.header_end:
                (self.fields[field],) = unpack_from("<" + form, view, offset)
        # Zero sectors means four, from before the field was.
        self.setup_bytes = ((self.fields["setup_sects"] or 4) + 1) * SETUP_SECTOR_BYTES
        size = self.fields["syssize"] * 16 if self.fields["version"] >= VERSION_SYSSIZE else 0
        end = self.setup_bytes + size
        # syssize is rounded up to a paragraph, the file need not be.
        if len(view) <= end - 16 or len(view) <= self.setup_bytes:
            raise ConfigError(f"{name} is truncated: it has {len(view)} bytes of {end}; give the whole file")

    @property
    def header_end(self) -> int:
        """Where the header ends in the file: it says itself, and newer fields lie past an older one's end."""
        return min(0x202 + self.image[0x201], HEADER_MAX_END, len(self.image))

    def __getitem__(self, field: str) -> int:
        return int(self.fields[field])

    @property
    def is_64bit(self) -> bool:
        """Whether it has the 64-bit entry point at load address + 0x200."""
        return self["version"] >= VERSION_XLOADFLAGS and bool(self["xloadflags"] & XLF_KERNEL_64)

    @property
    def is_high(self) -> bool:
        """Whether its protected-mode part goes to 1 MiB: False for a zImage, which goes to 64 KiB."""
        return bool(self["loadflags"] & LOADED_HIGH)

    @property
    def initrd_addr_max(self) -> int:
        """The last address that an initrd may occupy."""
        return self["initrd_addr_max"] if self["version"] >= VERSION_INITRD_ADDR_MAX else INITRD_ADDR_MAX

    @property
    def cmdline_size(self) -> int:
        """How long a command line may be, without its NUL; what all take where the header does not say."""
        said = self["cmdline_size"] if self["version"] >= VERSION_CMDLINE_SIZE else 0
        return said or CMDLINE_SIZE

    def require_direct_entry(self) -> None:
        """ConfigError unless it has an entry behind its real-mode code, so that it needs no BIOS."""
        version = self["version"]
        if version < VERSION_DIRECT:
            why = f"it speaks Linux boot protocol {version >> 8}.{version & 0xFF:02}, older than 2.06"
        elif not self.is_high:
            why = "it is a zImage, loaded below 1 MiB"
        elif not self.is_64bit and self["code32_start"] != layout.KERNEL:
            # boot.rst: the 32-bit entry is where the protected-mode part is loaded, and that is this field's default.
            why = f"its 32-bit entry, {self['code32_start']:#x}, is not where it is loaded"
        else:
            return
        raise ConfigError(
            f"{self.name} has to be started by a BIOS, which runs its real-mode code ({why}): "
            "add --firmware FILE (firmware=...), a SeaBIOS image such as /usr/share/seabios/bios-256k.bin"
        )

    @property
    def protected_mode_part(self) -> memoryview:
        """What is loaded at 1 MiB: everything after the setup sectors."""
        return self.image[self.setup_bytes :]

    @property
    def version_string(self) -> str:
        """Like uname -r and -v in one, or an empty string."""
        at = self["kernel_version"] + 0x200
        if not self["kernel_version"] or at >= len(self.image):
            return ""
        return bytes(self.image[at : at + 256]).split(b"\0", 1)[0].decode("ascii", "replace")

    def runtime_span(self) -> tuple[int, int]:
        """(start, end) of what the kernel uses before it has read the memory map, loaded at layout.KERNEL.

        It unpacks itself to its preferred address when loaded below that, and wants init_size bytes there.
        """
        end = layout.KERNEL + len(self.protected_mode_part)
        if self["version"] >= VERSION_INIT_SIZE:
            start = self["pref_address"]
            if self["relocatable_kernel"]:
                start = max(start, image.align_up(layout.KERNEL, self["kernel_alignment"] or 1))
            end = max(end, start + self["init_size"])
        return layout.KERNEL, end


def is_bzimage(view: memoryview) -> bool:
    """By the two magic numbers of the header."""
    if len(view) < 0x208:
        return False
    (flag,) = unpack_from("<H", view, 0x1FE)
    (magic,) = unpack_from("<I", view, 0x202)
    return bool(flag == BOOT_FLAG and magic == HDRS)


def load(
    memory: GuestMemory,
    view: memoryview,
    *,
    name: str = "kernel",
    modules: Sequence[tuple[Buffer, str]] = (),
    append: str = "",
    acpi_rsdp: int = 0,
) -> BootState:
    """Load by the 64-bit boot protocol, or the 32-bit one where the kernel has no other.

    It takes at most one module: the initrd.
    """
    kernel = BzImage(view, name)
    kernel.require_direct_entry()
    start, end = kernel.runtime_span()
    image.require_ram(memory, start, end - start, name)
    cmdline = image.encode_cmdline(append, min(kernel.cmdline_size, layout.CMDLINE_BYTES - 1))
    initrd, initrd_bytes = _load_initrd(memory, kernel, end, modules)

    image.copy_in(memory, layout.KERNEL, kernel.protected_mode_part, name)
    memory.write(layout.CMDLINE, cmdline)
    zero_page = build_zero_page(kernel, e820.memory_map(memory.regions), acpi_rsdp, initrd, initrd_bytes)
    memory.write(layout.ZERO_PAGE, zero_page)
    regs = {"rsi": layout.ZERO_PAGE}
    if kernel.is_64bit:
        cpu_state.write_long_mode_tables(memory)
        return BootState("bzimage", "long64", layout.KERNEL + ENTRY_64, regs=regs, image=(start, end))
    memory.write(layout.BOOT_GDT, cpu_state.gdt(False))
    return BootState("bzimage", "protected32", layout.KERNEL, regs=regs, image=(start, end))


def _load_initrd(
    memory: GuestMemory, kernel: BzImage, floor: int, modules: Sequence[tuple[Buffer, str]]
) -> tuple[int, int]:
    if not modules:
        return 0, 0
    if len(modules) > 1:
        raise ConfigError(
            f"{kernel.name} is a bzImage and takes one initrd: concatenate the {len(modules)} archives"
        )
    data = image.as_bytes_view(modules[0][0])
    gpa = image.place_high(
        memory, data.nbytes, floor=floor, limit=kernel["initrd_addr_max"] + 1, what="the initrd"
    )
    image.copy_in(memory, gpa, data, "the initrd")
    return gpa, data.nbytes


def build_zero_page(
    kernel: BzImage, entries: Sequence[e820.Entry], acpi_rsdp: int, initrd: int, initrd_bytes: int
) -> bytearray:
    """struct boot_params: the kernel's own header with what a loader must set, and the memory map.

    Everything else is zero, the sentinel byte 0x1ef among it, by which Linux tells a loader that copied too much.
    """
    page = bytearray(layout.PAGE_BYTES)
    page[HEADER_START : kernel.header_end] = kernel.image[HEADER_START : kernel.header_end]
    put(page, "type_of_loader", LOADER_UNDEFINED)
    put(page, "vid_mode", NORMAL_VIDEO)
    put(page, "code32_start", layout.KERNEL)
    put(page, "cmd_line_ptr", layout.CMDLINE)
    put(page, "ramdisk_image", initrd)
    put(page, "ramdisk_size", initrd_bytes)
    put(page, "setup_data", 0)
    pack_into("<Q", page, ZP_ACPI_RSDP, acpi_rsdp)
    entries = entries[:ZP_E820_MAX]
    page[ZP_E820_ENTRIES] = len(entries)
    table = e820.pack_zero_page(entries)
    page[ZP_E820_TABLE : ZP_E820_TABLE + len(table)] = table
    return page


def put(page: bytearray, field: str, value: int) -> None:
    """Set one field of the setup header in a zero page."""
    offset, form = FIELDS[field]
    pack_into("<" + form, page, offset, value)


# The kernel packed inside: what arch/x86/boot/compressed/Makefile may have made, told apart by its first bytes.

# Nothing unpacks to more than this; a size word beyond it is damage or an attack.
MAX_VMLINUX_BYTES = layout.GIB
LZ4_LEGACY_MAGIC = 0x184C_2102
LZ4_LEGACY_BLOCK_BYTES = 8 * layout.MIB
U32 = Struct("<I")


def extract_vmlinux(kernel: Buffer, name: str = "kernel") -> bytes:
    """The ELF kernel inside a bzImage, unpacked. ConfigError where there is none or it is damaged."""
    view = image.as_bytes_view(kernel)
    try:
        return _extract(view, name)
    except ConfigError as error:
        raise error.with_traceback(None) from None  # see boot.load
    finally:
        view.release()


def _extract(view: memoryview, name: str) -> bytes:
    header = BzImage(view, name)
    start, length = header["payload_offset"], header["payload_length"]
    part = header.protected_mode_part
    if header["version"] < VERSION_PAYLOAD or not length:
        raise ConfigError(f"{name} does not say where its payload is: give the vmlinux file itself")
    if length < 8 or start + length > len(part):
        raise ConfigError(f"{name} is truncated inside its payload: give the whole file")
    payload = part[start : start + length]
    # gzip's trailer is the unpacked size; behind the other formats the kernel's build appends the same word.
    (size,) = U32.unpack_from(payload, length - U32.size)
    if not 0 < size <= MAX_VMLINUX_BYTES:
        raise ConfigError(
            f"{name} has a damaged payload (it claims {size} bytes unpacked): give an intact file"
        )
    vmlinux = _unpack(payload, size, name)
    if len(vmlinux) != size or vmlinux[:4] != b"\x7fELF":
        raise ConfigError(
            f"{name} has a damaged payload: it does not unpack to {size} bytes of ELF; give an intact file"
        )
    return vmlinux


def _unpack(payload: memoryview, size: int, name: str) -> bytes:
    """At most ``size`` + 1 bytes out of a compressed payload: a liar is found without filling memory."""
    for magic, kind, unpack in _FORMATS:
        if payload[: len(magic)] == magic:
            if unpack is None:
                raise ConfigError(
                    f"{name} is packed with {kind}, which pyvmm can't unpack: give the vmlinux file itself"
                )
            try:
                return unpack(payload, size)
            except (EOFError, OSError, ValueError) as error:
                raise ConfigError(
                    f"{name} has a damaged {kind} payload ({error}): give an intact file"
                ) from None
    raise ConfigError(
        f"{name} has a payload of unknown format {bytes(payload[:6]).hex()}: give the vmlinux file itself"
    )


def _gzip(payload: memoryview, size: int) -> bytes:
    import zlib

    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _bz2(payload: memoryview, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size + 1)


def _lzma(payload: memoryview, size: int) -> bytes:
    import lzma

    try:
        return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=1 << 28).decompress(payload, size + 1)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from None


def _lz4(payload: memoryview, size: int) -> bytes:
    """The legacy frame: the magic, then blocks, each behind its packed size, each 8 MiB unpacked but the last.
    """
    import lz4.block  # type: ignore[import-untyped]

    out = bytearray()
    at, end = U32.size, len(payload) - U32.size
    while at + U32.size <= end and len(out) <= size:
        (packed,) = U32.unpack_from(payload, at)
        at += U32.size
        if packed == LZ4_LEGACY_MAGIC:  # frames may follow one another
            continue
        if not 0 < packed <= end - at:
            raise ValueError(f"a block of {packed} bytes with {end - at} left")
        try:
            out += lz4.block.decompress(payload[at : at + packed], uncompressed_size=LZ4_LEGACY_BLOCK_BYTES)
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from None
        at += packed
    return bytes(out)


def _zstd(payload: memoryview, size: int) -> bytes:
    import zstandard

    # The kernel packs with windows of up to 128 MiB.
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload)
    try:
        return reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


_FORMATS = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bz2),
    (b"\xfd7zXZ\x00", "xz", _lzma),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (b"\x89LZO", "lzo", None),
    (U32.pack(LZ4_LEGACY_MAGIC), "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)
