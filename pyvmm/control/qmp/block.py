"""Drives: what they are, what they have done, their media and limits (QEMU qapi/block-core.json, qapi/block.json)."""

from __future__ import annotations

import os

from pyvmm.block.driver import SECTOR_BYTES
from pyvmm.control.qmp.kinds import ANY, BOOL, FILE, INT, SIZE, STR, Enum, ListOf, Optional, QmpError, Struct, shown
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block.backend import BlockBackend
    from pyvmm.block.driver import FormatDriver
    from pyvmm.block.options import DriveOptions
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.control.qmp.subject import Machine, Served

CACHE = Struct({"writeback": BOOL, "direct": BOOL, "no-flush": BOOL})
IMAGE = Struct({
    "filename": STR, "format": STR, "virtual-size": SIZE, "actual-size": Optional(SIZE), "dirty-flag": Optional(BOOL),
    "cluster-size": Optional(SIZE), "backing-filename": Optional(STR), "full-backing-filename": Optional(STR),
    "backing-filename-format": Optional(STR), "format-specific": Optional(Struct({"type": STR, "data": ANY})),
})  # fmt: skip
IMAGE.members["backing-image"] = Optional(IMAGE)
# QEMU's name of a limit, and ours.
LIMITS = {
    "bps": "throttle_bps",
    "bps_rd": "throttle_bps_read",
    "bps_wr": "throttle_bps_write",
    "iops": "throttle_iops",
    "iops_rd": "throttle_iops_read",
    "iops_wr": "throttle_iops_write",
}
BURSTS = {
    "bps_max": "throttle_bps_max",
    "bps_rd_max": "throttle_bps_read_max",
    "bps_wr_max": "throttle_bps_write_max",
    "iops_max": "throttle_iops_max",
    "iops_rd_max": "throttle_iops_read_max",
    "iops_wr_max": "throttle_iops_write_max",
}
INSERTED = Struct({
    "file": STR, "node-name": Optional(STR), "ro": BOOL, "drv": STR, "backing_file": Optional(STR),
    "backing_file_depth": INT, "encrypted": BOOL,
    "detect_zeroes": Enum("off", "on", "unmap"), **dict.fromkeys(LIMITS, SIZE),
    **{name: Optional(SIZE) for name in BURSTS}, "image": IMAGE, "cache": CACHE, "write_threshold": INT,
})  # fmt: skip
BLOCK_INFO = Struct({
    "device": STR, "qdev": Optional(STR), "type": STR, "removable": BOOL, "locked": BOOL,
    "inserted": Optional(INSERTED), "tray_open": Optional(BOOL), "io-status": Optional(Enum("ok", "failed", "nospace")),
})  # fmt: skip


def drive_named(served: Served, device: str | None, id: str | None) -> PlacedDrive:
    """Of the two names that QEMU has for a drive's device one is to be given; here they are the same. QmpError."""
    if (device is None) == (id is None):
        raise QmpError("Need exactly one of 'device' and 'id'")
    name = device if id is None else id
    for drive in served.machine.config.drives:
        if drive.id == name:
            return drive
    raise QmpError(f"Device '{name}' not found", "DeviceNotFound")


def cd_named(served: Served, device: str | None, id: str | None) -> PlacedDrive:
    drive = drive_named(served, device, id)
    if drive.media != "cdrom":
        raise QmpError(f"Device '{drive.id}' is not removable")
    return drive


def unit_of(machine: Machine, drive: PlacedDrive) -> Any:
    """The CD drive itself: tray and lock are its."""
    return machine.board.units[drive.index]  # type: ignore[attr-defined]  # a pc, for it has such a drive


@command("query-block", returns=ListOf(BLOCK_INFO))
def query_block(served: Served) -> list[dict[str, Any]]:
    return drives_of(served.machine)


def drives_of(machine: Machine) -> list[dict[str, Any]]:
    return [block_info(machine, drive, machine.backends[drive.id]) for drive in machine.config.drives]


def block_info(machine: Machine, drive: PlacedDrive, backend: BlockBackend) -> dict[str, Any]:
    cd = drive.media == "cdrom"
    info: dict[str, Any] = {
        "device": drive.id,
        "qdev": f"/machine/drives/{drive.id}",
        "type": "unknown",
        "removable": cd,
        "locked": False,
    }
    if cd:
        unit = unit_of(machine, drive)
        info |= {"locked": unit.locked, "tray_open": unit.tray_open}
    if (driver := backend.driver) is not None:
        info["inserted"] = inserted(drive, backend, driver)
    if "stop" in (drive.rerror, drive.werror) or drive.werror == "enospc":
        info["io-status"] = "failed" if backend.stalled else "ok"
    return info


def inserted(drive: PlacedDrive, backend: BlockBackend, driver: FormatDriver) -> dict[str, Any]:
    options, image = backend.options, image_info(drive, driver)
    depth, below = int(drive.keeps_writes), image
    while "backing-image" in below:
        depth, below = depth + 1, below["backing-image"]
    return {
        "file": drive.file,
        "node-name": drive.id,
        "ro": backend.read_only,
        "drv": backend.format,
        **({"backing_file": image["full-backing-filename"]} if "backing-image" in image else {}),
        "backing_file_depth": depth,
        "encrypted": False,
        "detect_zeroes": options.detect_zeroes,
        **{name: getattr(options, ours) for name, ours in LIMITS.items()},
        **{name: value for name, ours in BURSTS.items() if (value := getattr(options, ours))},
        "image": image,
        "cache": {
            "writeback": backend.write_cache,
            "direct": options.cache in ("none", "directsync"),
            "no-flush": options.cache == "unsafe",
        },
        "write_threshold": 0,
    }


def image_info(options: DriveOptions, driver: FormatDriver) -> dict[str, Any]:
    """Of an image, and of those that it stands on; ``options`` say where it is."""
    from pyvmm.block.open import beside, image_path

    path = image_path(options)
    info = {"filename": path, "format": driver.format, **driver.about(), "virtual-size": driver.size_bytes}
    try:
        info["actual-size"] = os.stat(path).st_blocks * SECTOR_BYTES
    except (OSError, ValueError):  # it has another name by now, or none
        pass
    if driver.backing is not None:
        below = options.changed(file=beside(path, info["backing-filename"]))
        info["backing-image"] = image_info(below, driver.backing)
        info["full-backing-filename"] = info["backing-image"]["filename"]
    return info


COUNTED = {"rd": "read", "wr": "write", "flush": "flush", "unmap": "discard"}
STATS = Struct({
    **{f"{name}_{what}": SIZE for name in ("rd", "wr", "unmap") for what in ("bytes", "operations", "merged")},
    "flush_operations": SIZE,
    **{f"{name}_total_time_ns": SIZE for name in COUNTED}, **{f"failed_{name}_operations": SIZE for name in COUNTED},
    **{f"invalid_{name}_operations": SIZE for name in COUNTED}, "account_invalid": BOOL, "account_failed": BOOL,
    "timed_stats": ListOf(ANY), "in_flight": SIZE, "max_in_flight": SIZE,
})  # fmt: skip


DRIVE_STATS = Struct({"device": STR, "qdev": STR, "node-name": STR, "stats": STATS})


@command("query-blockstats", returns=ListOf(DRIVE_STATS))
def query_blockstats(served: Served) -> list[dict[str, Any]]:
    return [
        {"device": name, "qdev": f"/machine/drives/{name}", "node-name": name, "stats": stats_of(backend)}
        for name, backend in list(served.machine.backends.items())
    ]


def stats_of(backend: BlockBackend) -> dict[str, Any]:
    """Time is that of requests that succeeded. One that is none does not come this far: its device refuses it."""
    stats = backend.stats
    told: dict[str, Any] = {"account_invalid": False, "account_failed": False, "timed_stats": []}
    told |= {"in_flight": stats.in_flight, "max_in_flight": stats.max_in_flight}
    for name, ours in COUNTED.items():
        kind = getattr(stats, ours)
        told[f"{name}_operations"] = kind.operations
        told[f"{name}_total_time_ns"] = kind.time_ns
        told[f"failed_{name}_operations"] = kind.failed
        told[f"invalid_{name}_operations"] = 0
        if name != "flush":
            told |= {f"{name}_bytes": kind.bytes, f"{name}_merged": kind.merged}
    return told


# -- media ------------------------------------------------------------------------------------------------------------

WHICH: dict[str, Optional] = {"device": Optional(STR), "id": Optional(STR)}


@command("eject", {**WHICH, "force": Optional(BOOL)}, waits=True)
def eject(served: Served, device: str | None = None, id: str | None = None, force: bool = False) -> None:
    drive = cd_named(served, device, id)
    change(served, drive, None, None, force)


@command(
    "blockdev-change-medium",
    {**WHICH, "filename": FILE, "format": Optional(STR), "force": Optional(BOOL),
     "read-only-mode": Optional(Enum("retain", "read-only", "read-write"))},
    waits=True,
)  # fmt: skip
def blockdev_change_medium(
    served: Served,
    filename: str,
    device: str | None = None,
    id: str | None = None,
    format: str | None = None,
    force: bool = False,
    read_only_mode: str = "retain",
) -> None:
    """``read_only_mode``: such a drive never writes, so an image that may be written is no other medium."""
    drive = cd_named(served, device, id)
    if format not in (None, "raw", "qcow2"):
        raise QmpError(f"Unknown driver '{shown(str(format))}'")
    change(served, drive, filename, format, force)


def change(served: Served, drive: PlacedDrive, file: str | None, format: str | None, force: bool) -> None:
    if not served.machine.change_medium(drive.id, file, format=format, force=force):
        why = f"Device '{drive.id}' is locked and force was not specified, wait for tray to open and try again"
        raise QmpError(why)
    served.machine.events.flush()


@command("block_resize", {"device": Optional(STR), "node-name": Optional(STR), "size": SIZE}, waits=True)
def block_resize(served: Served, size: int, device: str | None = None, node_name: str | None = None) -> None:
    """query-block tells both names, and they are the same."""
    if (device is None) == (node_name is None):
        raise QmpError("Need exactly one of 'device' and 'node-name'")
    served.machine.block_resize(drive_named(served, device, node_name).id, size)


# -- limits -----------------------------------------------------------------------------------------------------------


@command(
    "block_set_io_throttle",
    {**WHICH, **dict.fromkeys(LIMITS, SIZE), **{name: Optional(SIZE) for name in BURSTS}},
    waits=True,
)
def block_set_io_throttle(served: Served, device: str | None = None, id: str | None = None, **limits: int) -> None:
    drive = drive_named(served, device, id)
    ours = {**LIMITS, **BURSTS}
    served.machine.set_limits(drive.id, **{ours[name]: value for name, value in limits.items()})
