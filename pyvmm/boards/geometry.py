"""The geometry of a pc's disks, and how a BIOS is to translate it: told, or guessed as QEMU's hw/block/hd-geometry.c.

A disk that was partitioned elsewhere has its partitions' ends in cylinders, heads and sectors: a partition ends at the
end of a cylinder, so that its last head and sector are the disk's last ones. With up to 16 heads that is the disk's own
geometry, and a BIOS translates nothing. More heads are a BIOS's translation of the default geometry: "large" (ECHS), as
far as that reaches, else by LBA.
"""

from __future__ import annotations

from pyvmm.devices.ide.identify import HEADS, MAX_CYLINDERS, SECTORS_PER_TRACK, geometry
from pyvmm.x86.firmware_files import (
    BIOS_CYLINDERS,
    LARGE_LIMIT,
    TRANSLATION_LARGE,
    TRANSLATION_LBA,
    TRANSLATION_NONE,
    TRANSLATION_RECHS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block import BlockBackend
    from pyvmm.block.options import DriveOptions

    Chs = tuple[int, int, int]

TRANSLATIONS = {
    "none": TRANSLATION_NONE,
    "lba": TRANSLATION_LBA,
    "large": TRANSLATION_LARGE,
    "rechs": TRANSLATION_RECHS,
}

# The partition table of a master boot record: four entries of 16 bytes.
TABLE, ENTRY_BYTES, ENTRIES = 0x1BE, 16, 4
SIGNATURE_AT, SIGNATURE = 510, b"\x55\xaa"
END_HEAD, END_SECTOR, SECTOR_COUNT = 5, 6, 12  # in an entry
SECTOR_MASK = 0x3F  # above it are bits of the cylinder


def disk_geometry(options: DriveOptions, backend: BlockBackend) -> tuple[Chs, int]:
    """((cylinders, heads, sectors a track), TRANSLATION_) of the disk in ``backend``, before its guest runs."""
    told = options.geometry
    if told is not None:
        found, translation = told, automatic(told)
    else:
        found, translation = guess(backend.sectors, backend.peek(0, 1))
    return found, TRANSLATIONS.get(options.trans, translation)


def guess(sectors: int, boot_sector: bytes) -> tuple[Chs, int]:
    """By the partition table in ``boot_sector``, or by the size."""
    default = geometry(sectors)
    partitioned = by_partition_table(sectors, boot_sector)
    if partitioned is None:
        return default, automatic(default)
    if partitioned[1] <= HEADS:
        return partitioned, TRANSLATION_NONE
    cylinders, heads, _ = default
    return default, TRANSLATION_LARGE if cylinders * heads <= LARGE_LIMIT else TRANSLATION_LBA


def by_partition_table(sectors: int, boot_sector: bytes) -> Chs | None:
    """From the first partition that tells; None where none does."""
    if boot_sector[SIGNATURE_AT:] != SIGNATURE:
        return None
    for n in range(ENTRIES):
        entry = boot_sector[TABLE + ENTRY_BYTES * n : TABLE + ENTRY_BYTES * (n + 1)]
        heads, track = entry[END_HEAD] + 1, entry[END_SECTOR] & SECTOR_MASK
        if any(entry[SECTOR_COUNT:]) and heads > 1 and track:
            cylinders = sectors // (heads * track)
            if 1 <= cylinders <= MAX_CYLINDERS:
                return cylinders, heads, track
    return None


def automatic(chs: Chs) -> int:
    """The translation of a geometry that nobody has translated yet."""
    cylinders, heads, track = chs
    fits = cylinders <= BIOS_CYLINDERS and heads <= HEADS and track <= SECTORS_PER_TRACK
    return TRANSLATION_NONE if fits else TRANSLATION_LBA
