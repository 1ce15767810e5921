"""A program that boots from a disk and writes it, through the BIOS and by itself: the host finds every sector."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import asm
import disk_images
from console import pyvmm_run
from disk_images import SECTOR

LIMIT_S = 60.0
CHS, EDD, PIO, PIO_MULTIPLE, PIO_48, PIO_MULTIPLE_48 = range(6)  # as disk_copy.S numbers them
SOURCE_SECTOR = 100
SOURCE_SECTORS = 400

# (read by, written by, sectors): one after the other from SOURCE_SECTOR on.
JOBS = (
    (CHS, CHS, 1),
    (EDD, EDD, 1),
    (PIO, PIO, 1),
    (EDD, CHS, 20),
    (CHS, EDD, 33),
    (EDD, PIO, 7),
    (PIO, EDD, 9),
    (CHS, PIO_MULTIPLE, 48),
    (PIO_MULTIPLE, CHS, 16),
    (PIO_48, PIO_MULTIPLE_48, 35),
    (PIO_MULTIPLE_48, PIO_48, 18),
    (PIO_MULTIPLE, PIO_MULTIPLE, 31),
)


def copying(jobs: list[tuple[int, int, int, int, int]]) -> asm.Program:
    """disk_copy.S with this table."""
    rows = [
        f".byte {read}, {write}\n.word {count}\n.long {source}, {destination}"
        for read, write, count, source, destination in jobs
    ]
    source = Path(__file__).with_name("disk_copy.S").read_text()
    table = "\n".join(["jobs:", *rows, ".byte 0, 0", ".word 0", ".org 512 * (1 + MORE_SECTORS)"])
    return asm.assemble(f"{source}\n{table}", "real16")


def copying_disk(disk: Path, jobs: Sequence[tuple[int, int, int]]) -> dict[int, bytes]:
    """A disk that boots, does these jobs and says "copied": what it has written then, by the sector where it stands."""
    noise = disk_images.seeded("to be copied", SOURCE_SECTORS * SECTOR)
    placed, expected, source, destination = [], {}, SOURCE_SECTOR, 1000
    for read, write, count in jobs:
        placed.append((read, write, count, source, destination))
        at = (source - SOURCE_SECTOR) * SECTOR
        expected[destination] = noise[at : at + count * SECTOR]
        source, destination = source + count, destination + count + 5
    assert source <= SOURCE_SECTOR + SOURCE_SECTORS
    disk_images.program(disk, copying(placed))
    disk_images.write_at(disk, SOURCE_SECTOR, noise)
    return expected


def with_written(disk: Path, written: dict[int, bytes]) -> str:
    """The hash of the whole image with that in it."""
    whole = bytearray(disk.read_bytes())
    for sector, data in written.items():
        whole[sector * SECTOR : sector * SECTOR + len(data)] = data
    return hashlib.sha256(whole).hexdigest()


def test_what_a_guest_writes_by_the_bios_and_by_pio_is_in_the_image(tmp_path: Path, firmware: Path) -> None:
    disk = tmp_path / "disk.img"
    expected = copying_disk(disk, JOBS)
    whole = with_written(disk, expected)

    with pyvmm_run(str(disk), "--firmware", str(firmware), "--timeout", str(LIMIT_S)) as console:
        assert "failed" not in console.expect("copied", LIMIT_S)
        assert console.wait(LIMIT_S) == 0

    after = disk.read_bytes()
    for sector, data in expected.items():
        found = after[sector * SECTOR : sector * SECTOR + len(data)]
        assert hashlib.sha256(found).hexdigest() == hashlib.sha256(data).hexdigest(), f"at sector {sector}"
    assert hashlib.sha256(after).hexdigest() == whole, "something else has changed"
