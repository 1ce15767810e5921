"""What a guest finds at the places of a pc's drives (drive_places.py)."""

from __future__ import annotations

from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.chassis import Chassis
    from pyvmm.clock import Clock
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.channel import IdeChannel
    from pyvmm.devices.ide.disk import IdeDisk
    from pyvmm.events import Events

    class Board(Protocol):
        """What of a Pc is needed here."""

        chassis: Chassis
        clock: Clock
        channels: tuple[IdeChannel, IdeChannel]
        units: list[IdeDisk | AtapiDrive | None]


def make_drive(drive: PlacedDrive, backend: BlockBackend, events: Events) -> IdeDisk | AtapiDrive:
    """The device in front of the drive."""
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk

    if drive.media == "cdrom":
        cd = AtapiDrive(backend if backend.inserted else None, serial=drive.serial, **named(drive))
        cd.on_tray = lambda is_open: events.tell("tray", drive=drive.id, open=is_open)
        return cd
    from pyvmm.boards.geometry import disk_geometry

    geometry, translation = disk_geometry(drive, backend)
    return IdeDisk(backend, serial=drive.serial, geometry=geometry, bios_translation=translation, **named(drive))


def named(drive: PlacedDrive) -> dict[str, str]:
    """The model and the firmware's version, where they are given."""
    named = {"model": drive.model, "revision": drive.ver}
    return {name: text for name, text in named.items() if text is not None}


def change_medium(pc: Board, drive: PlacedDrive, *, force: bool) -> bool:
    """Board.change_medium has what it does; the new one is open before the old one goes."""
    from pyvmm.block.open import open_drive

    drives = pc.chassis.drives
    before = drives.backends[drive.id]
    if before.stalled:
        raise StateError(f"drive {drive.id} waits for its medium after an error: let the machine go on first")
    backend = open_drive(drive, loop=pc.chassis.loop, clock=pc.clock, on_error=drives.failed)
    cd = pc.units[drive.index]
    with pc.channels[drive.index // 2].lock:
        gone = cd.eject(force)  # type: ignore[union-attr]  # it is a CD drive
        if gone and backend.inserted:
            cd.insert(backend)  # type: ignore[union-attr]
    if not gone:
        backend.close()
        return False
    drives.replace(backend)
    return True
