"""Bochs' BIOS, which nobody here wrote, boots an IDE disk. It goes by what old BIOSes go by: IDENTIFY's words for bytes
a track and a sector, the geometry of the partition table, CMOS's translation.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import asm
import boot_assets
import disk_images
import pytest

import pyvmm

HERE = Path(__file__).parent
TIMEOUT_S = 120
TEXT = b"a sector of the disk\0"

# (cylinders, heads, sectors a track) of the disk, and whether its partition table says so.
PARTITIONED = ((306, 4, 17), True)
BY_SIZE = ((520, 16, 63), False)
TRANSLATED = ((2080, 16, 63), False)  # more than 1024 cylinders: by LBA, which has heads enough for them


def disk(path: Path, geometry: tuple[int, int, int], partitioned: bool, chs: tuple[int, int, int], lba: int) -> None:
    program = asm.assemble((HERE / "bios_read.S").read_text(), "real16")
    cylinders, heads, track = geometry
    cylinder, head, sector = chs
    image = bytearray(program.image)
    at = program.symbols["chs"] - program.address
    struct.pack_into("<HH", image, at, (cylinder & 0xFF) << 8 | cylinder >> 2 & 0xC0 | sector, head << 8)
    struct.pack_into("<Q", image, program.symbols["block"] - program.address, lba)
    if partitioned:
        end = bytes((heads - 1, track | (cylinders - 1) >> 2 & 0xC0, cylinders - 1 & 0xFF))
        sectors = cylinders * heads * track
        image[0x1BE:0x1CE] = b"\x80\1\1\0\6" + end + struct.pack("<II", track, sectors - track)
    path.write_bytes(image)
    os.truncate(path, cylinders * heads * track * disk_images.SECTOR)
    disk_images.write_at(path, lba, TEXT)


@pytest.mark.parametrize(
    ("made", "bios", "chs"),
    [
        (PARTITIONED, (306, 4, 17), (300, 3, 17)),
        (BY_SIZE, (520, 16, 63), (500, 15, 63)),
        (TRANSLATED, (1024, 32, 63), (1000, 31, 63)),
    ],
)
def test_a_disk(
    tmp_path: Path, made: tuple[tuple[int, int, int], bool], bios: tuple[int, int, int], chs: tuple[int, int, int]
) -> None:
    path = tmp_path / "disk.img"
    cylinder, head, sector = chs
    disk(path, *made, chs, (cylinder * bios[1] + head) * bios[2] + sector - 1)
    said = bytearray()
    firmware = boot_assets.bochs_firmware()
    with pyvmm.Machine(drives=[str(path)], firmware=firmware, memory_mib=32, serial=said.extend) as m:
        assert m.run(TIMEOUT_S) == 7 << 1 | 1
    geometry, by_chs, by_block = said.decode().splitlines()
    found = int(geometry, 16)
    assert (found >> 24 & 0xFF, found & 0x3F) == (bios[1] - 1, bios[2])  # last head, sectors a track
    last_cylinder = found >> 8 & 0xFF | found << 2 & 0x300
    assert bios[0] - 2 <= last_cylinder <= bios[0] - 1  # a BIOS may keep the last cylinder for itself
    assert by_chs == f"00000001 {TEXT[:-1].decode()}"  # no error, one sector
    status, _, text = by_block.partition(" ")
    assert int(status, 16) & 0xFFFF_FF00 == 0  # no error
    assert text == TEXT[:-1].decode()
