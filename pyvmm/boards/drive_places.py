"""Where drives go: which bus each is on, its place there, its name and its serial number.

Nothing here opens anything: a Spec has its drives placed. What only IDE asks is in ide_places.py.
"""

from __future__ import annotations

from pyvmm.block.options import GEOMETRY, DriveOptions
from pyvmm.boards import ide_places
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

BUS = {"pc": "ide", "microvm": "virtio"}  # for a drive that asks for none
MOST_INDEX = 255
MOST_QUEUES = 8  # by itself
SERIAL_CHARACTERS = 20  # virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID
# As far as the fields of virtio's geometry reach (5.2.4).
GEOMETRY_LIMITS = dict(zip(GEOMETRY, (0xFFFF, 255, 255), strict=True))
NOT_ON_VIRTIO = ("bus", "unit", "model", "ver")
NOT_ON_IDE = ("logical_block_size", "physical_block_size", "num_queues", "disable_legacy", "disable_modern")


class PlacedDrive(DriveOptions):
    """DriveOptions whose ``interface``, ``index``, ``id`` and ``serial`` are there; of virtio also ``num_queues``."""

    if TYPE_CHECKING:
        interface: str
        index: int
        id: str
        serial: str


def place(drives: Sequence[DriveOptions], machine: str = "pc", cpus: int = 1) -> tuple[PlacedDrive, ...]:
    """Each drive at the place it asks for, or the next that is free: those on IDE first, then those on virtio, both in
    the order of places. ConfigError for a place that there is none of, or twice, for two drives of one name, and for
    what a drive on its bus can't be asked.
    """
    on: dict[str, list[DriveOptions]] = {"ide": [], "virtio": []}
    for drive in drives:
        bus = drive.interface or ("ide" if drive.media == "cdrom" else BUS[machine])
        if bus == "ide":
            refuse(drive, NOT_ON_IDE, "ide", "use if=virtio, or leave it out")
        else:
            check_virtio(drive)
        on[bus].append(drive)
    queues = min(cpus, MOST_QUEUES) if machine == "pc" else 1
    placed = (
        *(placed_drive(drive, values) for drive, values in ide_places.place(on["ide"])),
        *(placed_drive(drive, values) for drive, values in place_virtio(on["virtio"], queues)),
    )
    names = [drive.id for drive in placed]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two drives are called {name}: give each an id of its own")
    return placed


def placed_drive(drive: DriveOptions, values: dict[str, object]) -> PlacedDrive:
    """``values`` by its place, where the user has said nothing else."""
    given = drive.given()
    for name in ("id", "serial", "num_queues"):
        if given.get(name) is not None:
            values.pop(name, None)
    return PlacedDrive(**{**given, **values})


def place_virtio(drives: Sequence[DriveOptions], queues: int) -> list[tuple[DriveOptions, dict[str, object]]]:
    """In order of ``index``."""
    taken: dict[int, DriveOptions] = {}
    for drive in drives:
        index = drive.index
        if index is None:
            continue
        if index in taken:
            raise ConfigError(f"drives {taken[index].file} and {drive.file} both want index={index} of virtio")
        taken[index] = drive
    for drive in drives:
        if drive.index is None:
            taken[next(n for n in range(len(taken) + 1) if n not in taken)] = drive
    return [
        (drive, {
            "interface": "virtio", "index": n, "id": f"virtio{n}", "serial": f"PVV{n + 1:05}", "num_queues": queues,
        })
        for n, drive in sorted(taken.items())
    ]  # fmt: skip


def check_virtio(drive: DriveOptions) -> None:
    """ConfigError for what a disk on virtio can't be asked."""
    if drive.media == "cdrom":
        raise ConfigError(f"drive {drive.file}: virtio has no CD-ROM drive: use if=ide, or media=disk,read-only=on")
    refuse(drive, NOT_ON_VIRTIO, "virtio", "leave it out")
    if drive.trans != "auto":
        raise ConfigError(f"drive option trans={drive.trans} with if=virtio: leave it out")
    if drive.index is not None and drive.index > MOST_INDEX:
        raise ConfigError(f"drive option index={drive.index}: use 0 to {MOST_INDEX}")
    if drive.serial is not None and len(drive.serial) > SERIAL_CHARACTERS:
        raise ConfigError(f"drive option serial={drive.serial!r}: use at most {SERIAL_CHARACTERS} characters")
    for name, most in GEOMETRY_LIMITS.items():
        value = getattr(drive, name)
        if value is not None and value > most:
            raise ConfigError(f"drive option {name}={value!r}: give a whole number from 1 to {most}")


def refuse(drive: DriveOptions, names: Sequence[str], bus: str, give: str) -> None:
    """ConfigError where one of these options is given: there is no such thing on that bus."""
    for name in names:
        if getattr(drive, name) is not None:
            raise ConfigError(f"drive option {name}={getattr(drive, name)!r} with if={bus}: {give}")
