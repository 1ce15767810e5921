"""Which drive goes to which place of a pc's two IDE channels, and what answers there."""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.block.backend import BlockBackend
    from pyvmm.block.options import DriveOptions
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk

PLACES = 4  # two channels of two drives
# A CD goes to the second channel first, as everywhere.
FREE_PLACES = {"disk": (0, 1, 2, 3), "cdrom": (2, 3, 1, 0)}


def placed(drives: Iterable[DriveOptions]) -> list[tuple[int, DriveOptions]]:
    """(index, drive), each with its own place filled in: 0 and 1 are master and slave of the first channel, 2 and 3 of
    the second. What the caller has given stays as it is. ConfigError where two want one place, or there are too many.
    """
    drives = list(drives)
    taken: dict[int, DriveOptions] = {}
    for drive in drives:
        if drive.index is None:
            continue
        if drive.index in taken:
            raise ConfigError(f"drives {taken[drive.index].file} and {drive.file} both want index={drive.index}")
        taken[drive.index] = drive
    for drive in drives:
        if drive.index is None:
            index = next((n for n in FREE_PLACES[drive.media] if n not in taken), None)
            if index is None:
                raise ConfigError(f"drive {drive.file}: all {PLACES} places on the IDE channels are taken")
            taken[index] = at(index, drive)
    return sorted(taken.items())


def at(index: int, drive: DriveOptions) -> DriveOptions:
    """The same drive, with its place told."""
    from copy import copy

    moved = copy(drive)
    moved.index = index
    return moved


def make_drive(index: int, drive: DriveOptions, backend: BlockBackend) -> IdeDisk | AtapiDrive:
    """What the guest finds at that place."""
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk

    serial = drive.serial if drive.serial is not None else f"PV{index + 1:05}"
    if drive.media == "cdrom":
        return AtapiDrive(backend if backend.inserted else None, serial=serial, **named(drive))
    from pyvmm.boards.geometry import disk_geometry

    geometry, translation = disk_geometry(drive, backend)
    return IdeDisk(backend, serial=serial, geometry=geometry, bios_translation=translation, **named(drive))


def named(drive: DriveOptions) -> dict[str, str]:
    """The model and the firmware's version, where they are given."""
    named = {"model": drive.model, "revision": drive.ver}
    return {name: text for name, text in named.items() if text is not None}
