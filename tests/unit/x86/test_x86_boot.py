"""Telling kernels apart, images that are no kernels, and no copy more than needed."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path

import pytest
import x86_images
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import boot, layout
from pyvmm.x86.bzimage import extract_vmlinux

MIB = 1 << 20


@pytest.mark.parametrize(
    ("image", "protocol"),
    [
        (x86_images.bzimage(), "bzimage"),
        (x86_images.pvh_kernel(), "pvh"),
        (x86_images.multiboot_elf(), "multiboot"),
    ],
)
def test_each_kind_is_known_by_its_bytes(memory: GuestMemory, image: bytes, protocol: str) -> None:
    assert boot.load(memory, image).protocol == protocol
    assert boot.load(memory, bytearray(image)).protocol == protocol
    assert boot.load(memory, memoryview(image)).protocol == protocol


def test_a_32_bit_kernel_with_both_is_a_multiboot_kernel(memory: GuestMemory) -> None:
    contents = x86_images.multiboot_header() + bytes(20)
    for bits, protocol in ((32, "multiboot"), (64, "pvh")):
        image = x86_images.elf(
            [(1, 0x10_0000, contents, 0x1000)],
            bits=bits,
            entry=0x10_000C,
            note=x86_images.pvh_note(0x10_000C),
        )
        assert boot.load(memory, image).protocol == protocol


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "is no kernel pyvmm knows"),
        (bytes(1 << 20), "is no kernel pyvmm knows .* flat binary"),
        (b"\x7fELF", "truncated inside its ELF header"),
        (x86_images.multiboot_header(0), "is no kernel pyvmm knows"),
        (x86_images.bzimage()[:0x300], "truncated"),
    ],
)
def test_what_is_no_kernel(memory: GuestMemory, image: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as raised:
        boot.load(memory, image, name="path/to/file")
    assert str(raised.value).startswith("path/to/file ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("image", [x86_images.bzimage(), x86_images.pvh_kernel(), x86_images.multiboot_elf()])
def test_less_than_a_mib_of_memory(image: bytes) -> None:
    guest = GuestMemory(512 << 10)
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        boot.load(guest, image)
    guest.close()


def test_a_refused_image_leaves_memory_alone(memory: GuestMemory) -> None:
    """The second segment is the bad one: the first must not have been copied by then."""
    segments = [(1, 0x10_0000, b"first", 0x1000), (1, 0x1000_0000, b"second", 0x1000)]
    with pytest.raises(ConfigError, match="at least 257 MiB"):
        boot.load(memory, x86_images.elf(segments, note=x86_images.pvh_note(0x10_0000)))
    assert memory.read(0x10_0000, 5) == bytes(5)


@pytest.mark.parametrize(
    "image",
    [
        x86_images.bzimage(code_bytes=8 * MIB),
        x86_images.pvh_kernel(code=b"\x90" * (8 * MIB), bss=8 * MIB),
        x86_images.multiboot_elf(code=b"\x90" * (8 * MIB)),
    ],
    ids=["bzimage", "pvh", "multiboot"],
)
def test_a_large_image_is_copied_once(memory: GuestMemory, tmp_path: Path, image: bytes) -> None:
    """Straight from the file's pages into the guest's: Python allocates next to nothing on the way."""
    path = tmp_path / "kernel"
    path.write_bytes(image)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        boot.load(memory, mapped, initrd=mapped)  # imports and first-time tables
        tracemalloc.start()
        boot.load(memory, mapped, initrd=mapped)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Leaving the with block closed the mapping: nothing of ours still exports it.
    assert peak < 256 << 10


@pytest.mark.parametrize(
    "image",
    [
        b"no kernel",
        x86_images.bzimage(init_size=1 << 30),
        x86_images.pvh_kernel(0x400_0000),
        x86_images.multiboot_elf(0x400_0000),
        x86_images.bzimage(b"garbage!" * 3 + b"\1\0\0\0"),
    ],
)
def test_a_refused_mapping_can_be_closed(memory: GuestMemory, tmp_path: Path, image: bytes) -> None:
    """A traceback holds frames and they hold views; a mapping with views would refuse to close."""
    path = tmp_path / "kernel"
    path.write_bytes(image)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for use in (
            lambda: boot.load(memory, mapped, initrd=bytes(64 * MIB)),
            lambda: extract_vmlinux(mapped),
        ):
            with pytest.raises(ConfigError) as raised:
                use()
            assert raised.traceback
    assert mapped.closed


def test_the_same_image_loads_again_after_the_guest_wrote_over_it(memory: GuestMemory) -> None:
    image = x86_images.pvh_kernel(0x100_0000, b"code", bss=0x1000)
    boot.load(memory, image)
    before = memory.read(0, 32 * MIB)
    memory.write(0x100_0000, b"\xcc" * 0x1004)
    memory.write(layout.BOOT_AREA, b"\xcc" * 64)
    memory.write(layout.PVH_START_INFO, b"\xcc" * 64)
    memory.write(layout.BOOT_GDT, b"\xcc" * 48)
    boot.load(memory, image)
    after = memory.read(0, 32 * MIB)
    after = (
        after[: layout.BOOT_AREA]
        + before[layout.BOOT_AREA : layout.BOOT_AREA + 64]
        + after[layout.BOOT_AREA + 64 :]
    )
    assert after == before


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_image_raises_anything_but_config_error(data: st.DataObject) -> None:
    base = data.draw(
        st.sampled_from(
            [
                x86_images.bzimage(code_bytes=256),
                x86_images.pvh_kernel(),
                x86_images.multiboot_elf(),
                x86_images.elf(
                    [(1, 0x10_0000, x86_images.multiboot_header(), 99)], note=x86_images.pvh_note(1)
                ),
            ]
        )
    )
    image = bytearray(base)
    for _ in range(data.draw(st.integers(0, 8))):
        at = data.draw(st.integers(0, len(image) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        image[at : at + len(new)] = new
    guest = GuestMemory(4 * MIB)
    try:
        state = boot.load(
            guest, bytes(image[: data.draw(st.integers(len(image) // 2, len(image)))]), initrd=b"x"
        )
        state.apply({}, {})
    except ConfigError as error:
        assert str(error).startswith(("kernel ", "the initrd", "a multiboot module"))
    finally:
        guest.close()
