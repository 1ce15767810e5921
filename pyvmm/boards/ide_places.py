"""Places of drives on IDE: two channels, two drives on each; their names, and what ATA lets them say.

Part of drive_places.py.
"""

from __future__ import annotations

from pyvmm.block.options import GEOMETRY, DriveOptions
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PLACES = 4  # 0 and 1 are master and slave of the first channel, 2 and 3 of the second
# In which order a drive looks for a free place: a CD on the second channel first, as everywhere.
DISK_ORDER = (0, 1, 2, 3)
CD_ORDER = (2, 3, 1, 0)

# As far as ATA's registers for a cylinder (16 bits), a head (4) and a sector (8, from 1 on) reach.
GEOMETRY_LIMITS = dict(zip(GEOMETRY, (0xFFFF, 16, 255), strict=True))
SERIAL_CHARACTERS = 20  # ATA IDENTIFY words 10-19
MODEL_CHARACTERS = 40  # words 27-46
REVISION_CHARACTERS = 8  # words 23-26
CD_REVISION_CHARACTERS = 4  # INQUIRY's field (SPC-2, 7.3.2)


def place(drives: Sequence[DriveOptions]) -> list[tuple[DriveOptions, dict[str, object]]]:
    """Each drive at the place it asks for, or the next that is free, and what follows from that; in the order of
    places. ConfigError for a place that there is none of, or twice, and for what an IDE drive can't say of itself.
    """
    taken: dict[int, DriveOptions] = {}
    for drive in drives:
        check_identity(drive)
        index = asked_for(drive)
        if index is not None:
            if index in taken:
                raise ConfigError(f"drives {taken[index].file} and {drive.file} both want index={index}")
            taken[index] = drive
    for drive in drives:
        if asked_for(drive) is None:
            order = CD_ORDER if drive.media == "cdrom" else DISK_ORDER
            index = next((n for n in order if n not in taken), None)
            if index is None:
                raise ConfigError(f"drive {drive.file}: all {PLACES} places on the IDE channels are taken")
            taken[index] = drive
    return [(drive, by_place(index, drive)) for index, drive in sorted(taken.items())]


def asked_for(drive: DriveOptions) -> int | None:
    """The place that its options ask for; None where they leave it open."""
    for name, value, last, what in (
        ("index", drive.index, PLACES - 1, "0 or 1 (primary master, slave), 2 or 3 (secondary ones)"),
        ("bus", drive.bus, 1, "0 (the first channel) or 1 (the second)"),
        ("unit", drive.unit, 1, "0 (master) or 1 (slave)"),
    ):
        if value is not None and value > last:
            raise ConfigError(f"drive option {name}={value}: use {what}")
    if drive.bus is not None or drive.unit is not None:
        return (drive.bus or 0) * 2 + (drive.unit or 0)
    return drive.index


def by_place(index: int, drive: DriveOptions) -> dict[str, object]:
    """What its place says of a drive; its name is as in QEMU: index 2 is ide1-hd0 or ide1-cd0."""
    kind = "cd" if drive.media == "cdrom" else "hd"
    named = {"id": f"ide{index // 2}-{kind}{index % 2}", "serial": f"PV{index + 1:05}"}
    return {"interface": "ide", "index": index, "bus": None, "unit": None, **named}


def check_identity(drive: DriveOptions) -> None:
    """ConfigError for what does not fit into what an IDE drive says of itself."""
    revision = CD_REVISION_CHARACTERS if drive.media == "cdrom" else REVISION_CHARACTERS
    for name, limit in (("serial", SERIAL_CHARACTERS), ("model", MODEL_CHARACTERS), ("ver", revision)):
        text = getattr(drive, name)
        if text is not None and len(text) > limit:
            raise ConfigError(f"drive option {name}={text!r}: use at most {limit} characters")
    for name, most in GEOMETRY_LIMITS.items():
        value = getattr(drive, name)
        if value is not None and value > most:
            raise ConfigError(f"drive option {name}={value!r}: give a whole number from 1 to {most}")
