"""The geometry a pc's disks show and what CMOS says of it: as QEMU's hw/block/hd-geometry.c decides, or as told."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from pyvmm import ConfigError, Machine
from pyvmm.block.options import DriveOptions
from pyvmm.boards.drive_places import place
from pyvmm.boards.geometry import by_partition_table, guess

SMALL, LARGE = 61440, 8388608  # the sectors of QEMU's hd-geo-test
NONE, LBA, ECHS, RECHS = range(4)


def entry(head: int, sector: int, cylinder: int = 0, count: int = 8001) -> bytes:
    """A partition that ends there."""
    end = bytes((head, sector | cylinder >> 2 & 0xC0, cylinder & 0xFF))
    return b"\x80\1\1\0\6" + end + struct.pack("<II", 63, count)


def mbr(*entries: bytes, signature: bytes = b"\x55\xaa") -> bytes:
    return bytes(0x1BE) + b"".join(entries).ljust(64, b"\0") + signature


BLANK = bytes(512)
MBR_LBA, MBR_CHS = mbr(entry(127, 63)), mbr(entry(15, 63, 7))
EMPTY = bytes(16)


@pytest.mark.parametrize(
    ("sectors", "boot_sector", "chs", "translation"),
    [
        # hd-geo-test's table
        (SMALL, BLANK, (60, 16, 63), NONE),
        (SMALL, MBR_LBA, (60, 16, 63), ECHS),
        (SMALL, MBR_CHS, (60, 16, 63), NONE),
        (LARGE, BLANK, (8322, 16, 63), LBA),
        (LARGE, MBR_LBA, (8322, 16, 63), LBA),
        (LARGE, MBR_CHS, (8322, 16, 63), NONE),
        # a disk of 306/4/17
        (20808, mbr(entry(3, 17, 305)), (306, 4, 17), NONE),
        (20808, BLANK, (20, 16, 63), NONE),
        # where LARGE ends: cylinders times heads up to 131072
        (8192 * 1008, mbr(entry(254, 63)), (8192, 16, 63), ECHS),
        (8193 * 1008, mbr(entry(254, 63)), (8193, 16, 63), LBA),
        (1 << 32, mbr(entry(254, 63)), (16383, 16, 63), LBA),
        # where a BIOS call's ten bits of cylinder end
        (1024 * 1008, BLANK, (1024, 16, 63), NONE),
        (1025 * 1008, BLANK, (1025, 16, 63), LBA),
        (8192 * 1008, BLANK, (8192, 16, 63), LBA),
        # partitions that tell nothing: none, no sector, no head, the first cylinder is not full, too many cylinders
        (SMALL, mbr(entry(3, 17, count=0)), (60, 16, 63), NONE),
        (SMALL, mbr(entry(3, 0xC0)), (60, 16, 63), NONE),
        (SMALL, mbr(entry(0, 17)), (60, 16, 63), NONE),
        (10, mbr(entry(3, 17)), (1, 1, 10), NONE),
        (1 << 24, mbr(entry(1, 1)), (16383, 16, 63), LBA),
        # the first that tells
        (SMALL, mbr(EMPTY, entry(0, 17), entry(7, 32), entry(3, 17)), (240, 8, 32), NONE),
        (SMALL, mbr(EMPTY, EMPTY, EMPTY, entry(3, 17)), (903, 4, 17), NONE),
        # no MBR at all
        (SMALL, mbr(entry(3, 17), signature=b"\xaa\x55"), (60, 16, 63), NONE),
        (SMALL, b"", (60, 16, 63), NONE),
        (SMALL, mbr(entry(3, 17))[:-1], (60, 16, 63), NONE),
    ],
)
def test_guesses(sectors: int, boot_sector: bytes, chs: tuple[int, int, int], translation: int) -> None:
    assert guess(sectors, boot_sector) == (chs, translation)


def test_every_last_head_and_sector() -> None:
    for head in range(256):
        for sector in range(64):
            found = by_partition_table(1 << 22, mbr(entry(head, sector, 1023)))
            heads = head + 1
            cylinders = (1 << 22) // (heads * sector) if sector else 0
            told = head and 1 <= cylinders <= 16383
            assert found == ((cylinders, heads, sector) if told else None)


# -- on the board -------------------------------------------------------------------------------------------------


def disk(tmp_path: Path, name: str, sectors: int, boot_sector: bytes = BLANK) -> str:
    path = tmp_path / name
    path.write_bytes(boot_sector)
    os.truncate(path, 512 * sectors)
    return str(path)


def cmos(m: Machine, index: int) -> int:
    m.pio.write(0x70, 1, index)
    return m.pio.read(0x71, 1)


def words(m: Machine, base: int, unit: int) -> tuple[int, ...]:
    m.pio.write(base + 6, 1, 0xA0 | unit << 4)
    m.pio.write(base + 7, 1, 0xEC)
    return tuple(m.pio.read(base, 2) for _ in range(256))


def about(m: Machine, first: int) -> list[int]:
    return [cmos(m, first + n) for n in range(9)]


def nine(cylinders: int, heads: int, track: int) -> list[int]:
    low, high = cylinders & 0xFF, cylinders >> 8
    return [low, high, heads, 0xFF, 0xFF, 0xC0 | (8 if heads > 8 else 0), low, high, track]


def board(*drives: Any) -> Machine:
    return Machine(accel="qtest", memory_mib=4, drives=list(drives))


def test_hd_geo_test(tmp_path: Path) -> None:
    """As QEMU's hd-geo-test looks at it: a small and a large disk and an empty CD drive, by what their MBRs say."""
    for boot_sector, small, large in ((BLANK, NONE, LBA), (MBR_LBA, ECHS, LBA), (MBR_CHS, NONE, NONE)):
        with board(
            DriveOptions(disk(tmp_path, "small", SMALL, boot_sector), index=0),
            DriveOptions(disk(tmp_path, "large", LARGE, boot_sector), index=1),
            DriveOptions(None, media="cdrom", index=2),
        ) as m:
            assert [cmos(m, n) for n in (0x12, 0x19, 0x1A)] == [0xFF, 47, 47]
            assert (about(m, 0x1B), about(m, 0x24)) == (nine(60, 16, 63), nine(8322, 16, 63))
            assert cmos(m, 0x39) == small | large << 2
            assert (cmos(m, 0x38), cmos(m, 0x3D)) == (0x30, 0x12)


def test_no_disks_at_all() -> None:
    with board() as m:
        assert [cmos(m, n) for n in (0x12, 0x19, 0x1A, 0x39, *range(0x1B, 0x2D))] == [0] * 22


def test_where_the_disks_are_not_is_nothing(tmp_path: Path) -> None:
    with board(
        DriveOptions(None, media="cdrom", index=0),
        DriveOptions(disk(tmp_path, "slave", SMALL), index=1),
        DriveOptions(disk(tmp_path, "third", LARGE), index=3),
    ) as m:
        assert [cmos(m, n) for n in (0x12, 0x19, 0x1A)] == [0x0F, 0, 47]
        assert (about(m, 0x1B), about(m, 0x24)) == ([0] * 9, nine(60, 16, 63))
        assert cmos(m, 0x39) == LBA << 6


@pytest.mark.parametrize("options", [{}, {"cache": "none"}, {"snapshot": True}, {"read_only": True}])
def test_a_disk_that_was_partitioned_elsewhere(tmp_path: Path, options: dict[str, Any]) -> None:
    """306 cylinders, 4 heads, 17 sectors: its partitions' addresses are found where they say."""
    path = disk(tmp_path, "old", 20808, mbr(entry(3, 17, 305)))
    with open(path, "r+b") as file:
        file.seek(512 * ((100 * 4 + 2) * 17 + 8))
        file.write(b"here" * 128)
    with board(DriveOptions(path, **options)) as m:
        found = words(m, 0x1F0, 0)
        assert (found[1], found[3], found[6], found[4]) == (306, 4, 17, 17 * 512)
        assert about(m, 0x1B) == nine(306, 4, 17)
        for port, value in ((2, 1), (3, 9), (4, 100), (5, 0), (6, 0xA2), (7, 0x20)):  # READ, C/H/S 100/2/9
            m.pio.write(0x1F0 + port, 1, value)
        m.drain()
        assert m.pio.read(0x1F0, 2) == int.from_bytes(b"he", "little")


def test_a_window_has_its_own_mbr(tmp_path: Path) -> None:
    path = disk(tmp_path, "window", 20808 + 100)
    with open(path, "r+b") as file:
        file.seek(51200)
        file.write(mbr(entry(3, 17, 305)))
    with board(DriveOptions(path, offset=51200)) as m:
        assert about(m, 0x1B) == nine(306, 4, 17)


def test_looking_is_no_request(tmp_path: Path) -> None:
    """Neither a counter nor a rule of blkdebug nor a limit of rate sees it."""
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\niotype = "read"\n')
    path = f"blkdebug:{rules}:{disk(tmp_path, 'old', 20808, mbr(entry(3, 17, 305)))}"
    with board(DriveOptions(path, throttle_iops=1, rerror="stop")) as m:
        assert about(m, 0x1B) == nine(306, 4, 17)
        backend = m.backends["ide0-hd0"]
        assert (backend.stats.read.operations, backend.stats.read.failed, backend.stalled) == (0, 0, 0)


# -- as told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chs", "translation"),
    [
        ("cyls=480,heads=4,secs=32", (480, 4, 32), NONE),
        ("cyls=480,heads=4,secs=32,trans=lba", (480, 4, 32), LBA),
        ("cyls=480,heads=4,secs=32,bios-chs-trans=lba", (480, 4, 32), LBA),
        ("cyls=1025,heads=4,secs=15", (1025, 4, 15), LBA),
        ("cyls=1024,heads=16,secs=64", (1024, 16, 64), LBA),
        ("cyls=65535,heads=16,secs=255,trans=none", (65535, 16, 255), NONE),
        ("trans=large", (60, 16, 63), ECHS),
        ("trans=rechs", (60, 16, 63), RECHS),
        ("trans=auto", (60, 16, 63), ECHS),
    ],
)
def test_as_told(tmp_path: Path, text: str, chs: tuple[int, int, int], translation: int) -> None:
    path = disk(tmp_path, "disk", SMALL, MBR_LBA)
    with board(f"file={path},{text}") as m:
        found = words(m, 0x1F0, 0)
        assert (found[1], found[3], found[6]) == found[54:57] == chs
        assert about(m, 0x1B) == nine(*chs)
        assert cmos(m, 0x39) == translation


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cyls=0,heads=4,secs=17", "cyls=0: give a whole number from 1"),
        ("cyls=65536,heads=4,secs=17", "cyls=65536: give a whole number from 1 to 65535"),
        ("cyls=-1,heads=4,secs=17", "cyls=-1: give a whole number from 1"),
        ("cyls=306,heads=17,secs=17", "heads=17: give a whole number from 1 to 16"),
        ("cyls=306,heads=4,secs=256", "secs=256: give a whole number from 1 to 255"),
        ("cyls=x,heads=4,secs=17", "cyls=x: give a number"),
        ("cyls=306", "cyls without heads and secs: a geometry is cyls, heads and secs, give all three"),
        ("cyls=306,secs=17", "cyls and secs without heads: a geometry is"),
        ("trans=chs", "trans='chs': use auto, none, lba, large or rechs"),
        ("media=cdrom,cyls=306,heads=4,secs=17", "cyls on a CD drive: a CD has no geometry, leave it out"),
        ("media=cdrom,trans=lba", "trans on a CD drive"),
    ],
)
def test_mistakes_are_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place([DriveOptions.parse(f"file=x,{text}")])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names(tmp_path: Path) -> None:
    """QEMU's ide-test (identify): words 10 to 19, and 23 to 26."""
    path = disk(tmp_path, "disk", SMALL)
    with board(f"file={path},serial=testdisk,ver=version", "media=cdrom,index=2,ver=v1") as m:
        found = words(m, 0x1F0, 0)
        text = b"".join(word.to_bytes(2, "big") for word in found)
        assert text[20:40] == b"testdisk".ljust(20)
        assert text[46:54] == b"version ".ljust(8)
        m.pio.write(0x176, 1, 0xA0)
        m.pio.write(0x177, 1, 0xA1)  # IDENTIFY PACKET DEVICE
        text = b"".join(m.pio.read(0x170, 2).to_bytes(2, "big") for _ in range(256))
        assert text[46:54] == b"v1".ljust(8)


@pytest.mark.parametrize("value", [1.5, "306", True])
def test_no_whole_numbers(value: object) -> None:
    with pytest.raises(ConfigError, match="give a whole number from 1"):
        DriveOptions("x", cyls=value, heads=4, secs=17)
