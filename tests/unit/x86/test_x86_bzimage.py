"""The bzImage header, the zero page a loader hands over, and unpacking the vmlinux inside."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import pytest
import x86_images
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, bzimage, e820, layout

MIB = 1 << 20
VMLINUX = x86_images.elf([(x86_images.PT_LOAD, 0x100_0000, bytes(range(256)) * 64, 0x10000)])


def header(image: bytes) -> bzimage.BzImage:
    return bzimage.BzImage(memoryview(image), "vmlinuz")


def field(page: bytes, name: str) -> int:
    offset, form = bzimage.FIELDS[name]
    return int(struct.unpack_from("<" + form, page, offset)[0])


def test_fields_do_not_overlap_and_reach_as_far_as_the_protocol_says() -> None:
    at = 0x1F1
    for name, (offset, form) in bzimage.FIELDS.items():
        assert offset >= at, name
        at = offset + struct.calcsize("<" + form)
    assert at == 0x26C  # the end of setup_header in protocol 2.15


def test_the_header_by_name() -> None:
    kernel = header(x86_images.bzimage(init_size=0x123000))
    assert (kernel["version"], kernel["init_size"], kernel["cmdline_size"]) == (0x20F, 0x123000, 2047)
    assert kernel.is_64bit
    assert kernel.version_string == "6.1.0-test (x)"
    assert kernel.setup_bytes == 5 * 512


def test_no_setup_sectors_means_four() -> None:
    assert header(x86_images.bzimage(setup_sects=0)).setup_bytes == 5 * 512


def test_a_field_past_the_headers_end_is_zero() -> None:
    image = bytearray(x86_images.bzimage(version=0x206))
    image[0x201] = 0x3A  # the header ends behind cmdline_size, at 0x23c
    kernel = header(bytes(image))
    assert kernel["cmdline_size"] == 2047
    assert kernel["init_size"] == kernel["pref_address"] == 0
    assert not kernel.is_64bit


def test_what_the_kernel_uses_at_run_time() -> None:
    end = header(x86_images.bzimage(pref_address=0x100_0000, init_size=0x30_0000)).runtime_span()[1]
    assert end == 0x130_0000
    # A relocatable kernel preferring 1 MiB runs where it was loaded, rounded up to its alignment.
    end = header(x86_images.bzimage(pref_address=0x10_0000, init_size=0x30_0000)).runtime_span()[1]
    assert end == 0x50_0000
    end = header(
        x86_images.bzimage(pref_address=0x10_0000, init_size=0x30_0000, relocatable=0)
    ).runtime_span()[1]
    assert end == 0x40_0000


def test_the_hand_over(memory: GuestMemory) -> None:
    image = x86_images.bzimage()
    initrd = b"initrd" * 1000
    state = boot.load(memory, image, initrd=initrd, append="console=ttyS0 quiet", acpi_rsdp=0xE0000)
    assert (state.protocol, state.mode, state.rip) == ("bzimage", "long64", 0x100200)
    assert state.regs == {"rsi": layout.ZERO_PAGE}
    code = image[5 * 512 :]
    assert memory.read(layout.KERNEL, len(code)) == code

    page = memory.read(layout.ZERO_PAGE, 4096)
    assert page[:0x70] == bytes(0x70)
    assert page[0x1EF] == 0  # the sentinel
    assert page[0x1F1:0x210] == image[0x1F1:0x1FA] + b"\xff\xff" + image[0x1FC:0x210]
    assert field(page, "type_of_loader") == 0xFF
    assert field(page, "code32_start") == layout.KERNEL
    assert field(page, "init_size") == 0x10_0000
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    cmdline = field(page, "cmd_line_ptr")
    assert memory.read(cmdline, 20) == b"console=ttyS0 quiet\0"
    gpa, size = field(page, "ramdisk_image"), field(page, "ramdisk_size")
    assert memory.read(gpa, size) == initrd
    assert gpa % 4096 == 0
    assert 64 * MIB - (gpa + size) < 4096
    table = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert table == e820.memory_map(memory.regions)


def test_without_initrd(memory: GuestMemory) -> None:
    boot.load(memory, x86_images.bzimage())
    page = memory.read(layout.ZERO_PAGE, 4096)
    assert (field(page, "ramdisk_image"), field(page, "ramdisk_size")) == (0, 0)
    assert memory.read(layout.CMDLINE, 1) == b"\0"


def test_the_initrd_ends_where_the_kernel_can_reach(large_memory: GuestMemory) -> None:
    boot.load(large_memory, x86_images.bzimage(initrd_addr_max=0x37FF_FFFF), initrd=bytes(5000))
    page = large_memory.read(layout.ZERO_PAGE, 4096)
    assert field(page, "ramdisk_image") == 0x3800_0000 - 8192


def test_the_initrd_stays_below_the_hole(large_memory: GuestMemory) -> None:
    boot.load(large_memory, x86_images.bzimage(initrd_addr_max=0xFFFF_FFFF), initrd=bytes(5000))
    page = large_memory.read(layout.ZERO_PAGE, 4096)
    assert field(page, "ramdisk_image") == 0xC000_0000 - 8192


@pytest.mark.parametrize(("version", "xloadflags"), [(0x206, 0), (0x20B, 1), (0x20F, 0)])
def test_a_kernel_with_no_64_bit_entry_starts_in_protected_mode(
    memory: GuestMemory, version: int, xloadflags: int
) -> None:
    state = boot.load(memory, x86_images.bzimage(version=version, xloadflags=xloadflags))
    assert (state.mode, state.rip, state.regs) == ("protected32", 0x100000, {"rsi": layout.ZERO_PAGE})


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (x86_images.bzimage(version=0x205), r"protocol 2\.05, older than 2\.06\): add --firmware"),
        (x86_images.bzimage(version=0x200), r"started by a BIOS.* 2\.00, .*: add --firmware"),
        (x86_images.bzimage(loadflags=0), "started by a BIOS.*zImage.*: add --firmware"),
        # iPXE's .lkrn: its header says 2.07, no 32-bit entry, and what is loaded at 1 MiB is no code.
        (x86_images.bzimage(version=0x207, code32_start=0), "started by a BIOS.*32-bit entry, 0x0,.*: add --firmware"),
        (x86_images.bzimage(version=0x20F, xloadflags=0, code32_start=0), "started by a BIOS"),
        (x86_images.bzimage(version=0x20B, xloadflags=1, code32_start=0x1000), "started by a BIOS"),
        (x86_images.bzimage()[:-17], "truncated"),
        (x86_images.bzimage()[:1024], "truncated"),
        (x86_images.bzimage()[: 5 * 512], "truncated"),
        (x86_images.bzimage(init_size=64 * MIB), "at least 80 MiB"),
        (x86_images.bzimage(pref_address=1 << 63), "no RAM"),
    ],
)
def test_refusals(memory: GuestMemory, image: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        boot.load(memory, image)


def test_a_64_bit_entry_is_enough(memory: GuestMemory) -> None:
    assert boot.load(memory, x86_images.bzimage(code32_start=0)).mode == "long64"


def test_a_command_line_has_the_kernels_limit(memory: GuestMemory) -> None:
    image = x86_images.bzimage(cmdline_size=20)
    boot.load(memory, image, append="x" * 20)
    with pytest.raises(ConfigError, match="21 bytes, this kernel takes 20"):
        boot.load(memory, image, append="x" * 21)
    with pytest.raises(ConfigError, match="NUL"):
        boot.load(memory, image, append="a\0b")


def test_an_initrd_must_fit(memory: GuestMemory) -> None:
    image = x86_images.bzimage()
    with pytest.raises(ConfigError, match=r"initrd of 67108864 bytes .* at least 81 MiB"):
        boot.load(memory, image, initrd=bytes(64 * MIB))
    with pytest.raises(ConfigError, match="does not fit below 0x1200000: make it smaller"):
        boot.load(memory, x86_images.bzimage(initrd_addr_max=0x11F_FFFF), initrd=bytes(4 * MIB))
    with pytest.raises(ConfigError, match="one initrd: concatenate the 2"):
        boot.load(memory, image, initrd=[(b"a", ""), (b"b", "")])


def lz4_frame(data: bytes) -> bytes:
    import lz4.block

    frame = struct.pack("<I", 0x184C2102)
    for start in range(0, len(data), 8 * MIB):
        block = lz4.block.compress(data[start : start + 8 * MIB], store_size=False)
        frame += struct.pack("<I", len(block)) + block
    return frame


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def with_size(data: bytes) -> bytes:
    return data + struct.pack("<I", len(VMLINUX))


def xz(data: bytes) -> bytes:
    """As scripts/xz_wrap.sh: the x86 filter before LZMA2."""
    return lzma.compress(
        data,
        check=lzma.CHECK_CRC32,
        filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 * MIB}],
    )


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": lambda data: with_size(bz2.compress(data)),
    "lzma": lambda data: with_size(lzma.compress(data, lzma.FORMAT_ALONE)),
    "xz": lambda data: with_size(xz(data)),
    "lz4": lambda data: with_size(lz4_frame(data)),
    "zstd": lambda data: with_size(zstd(data)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_packing_unpacks(kind: str) -> None:
    assert bzimage.extract_vmlinux(x86_images.bzimage(FORMATS[kind](VMLINUX))) == VMLINUX


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_payloads_are_refused(kind: str) -> None:
    """Bytes are missing in the middle: all formats notice, those with no checksum too."""
    payload = FORMATS[kind](VMLINUX)
    half = len(payload) // 2
    with pytest.raises(ConfigError, match="vmlinuz has a damaged"):
        bzimage.extract_vmlinux(x86_images.bzimage(payload[:half] + payload[half + 9 :]), "vmlinuz")


@pytest.mark.parametrize("block", [b"\xff" * 20, b"\x0f\xff\xff", b""])
def test_damaged_lz4_blocks_are_refused(block: bytes) -> None:
    payload = struct.pack("<II", 0x184C2102, len(block)) + block + struct.pack("<I", 4096)
    with pytest.raises(ConfigError, match="damaged"):
        bzimage.extract_vmlinux(x86_images.bzimage(payload))


def test_lz4_in_several_blocks() -> None:
    big = VMLINUX + bytes(9 * MIB)
    payload = lz4_frame(big) + struct.pack("<I", len(big))
    assert bzimage.extract_vmlinux(x86_images.bzimage(payload)) == big


def test_a_bomb_stops_at_the_size_it_claims() -> None:
    bomb = gzip.compress(bytes(200 * MIB), 9)
    payload = bomb[:-4] + struct.pack("<I", 4096)
    with pytest.raises(ConfigError, match="does not unpack to 4096 bytes"):
        bzimage.extract_vmlinux(x86_images.bzimage(payload))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (x86_images.bzimage(), "does not say where its payload is"),
        (x86_images.bzimage(gzip.compress(VMLINUX), version=0x207), "does not say"),
        (
            x86_images.bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100) + b"\1\0\0\0"),
            "lzo, which pyvmm can't unpack",
        ),
        (x86_images.bzimage(bytes(32)), "claims 0 bytes"),
        (x86_images.bzimage(b"mystery!" * 4 + b"\1\0\0\0"), "unknown format"),
        (x86_images.bzimage(gzip.compress(b"text, no kernel")), "bytes of ELF"),
        (VMLINUX, "no bzImage"),
    ],
)
def test_what_can_not_be_unpacked(image: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        bzimage.extract_vmlinux(image)


def test_a_payload_beyond_the_file() -> None:
    image = bytearray(x86_images.bzimage(gzip.compress(VMLINUX)))
    struct.pack_into("<I", image, 0x24C, 1 << 30)
    with pytest.raises(ConfigError, match="truncated inside its payload"):
        bzimage.extract_vmlinux(bytes(image))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([*FORMATS]))
    image = bytearray(x86_images.bzimage(FORMATS[kind](VMLINUX)))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.one_of(st.integers(0x1F1, 0x26C), st.integers(0, len(image) - 1)))
        image[at] = data.draw(st.integers(0, 255))
    cut = bytes(image[: data.draw(st.one_of(st.just(len(image)), st.integers(0, len(image))))])
    for use in (bzimage.extract_vmlinux, load_into_64_mib):
        try:
            use(cut)
        except ConfigError as error:
            assert "\n" not in str(error)


def load_into_64_mib(image: bytes) -> None:
    guest = GuestMemory(64 * MIB)
    try:
        boot.load(guest, image, initrd=b"initrd", append="quiet")
    finally:
        guest.close()
