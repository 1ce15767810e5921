"""What a guest finds at the places of a pc's drives (drive_places.py)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk


def make_drive(drive: PlacedDrive, backend: BlockBackend) -> IdeDisk | AtapiDrive:
    """The device in front of the drive."""
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk

    if drive.media == "cdrom":
        return AtapiDrive(backend if backend.inserted else None, serial=drive.serial, **named(drive))
    from pyvmm.boards.geometry import disk_geometry

    geometry, translation = disk_geometry(drive, backend)
    return IdeDisk(backend, serial=drive.serial, geometry=geometry, bios_translation=translation, **named(drive))


def named(drive: PlacedDrive) -> dict[str, str]:
    """The model and the firmware's version, where they are given."""
    named = {"model": drive.model, "revision": drive.ver}
    return {name: text for name, text in named.items() if text is not None}
