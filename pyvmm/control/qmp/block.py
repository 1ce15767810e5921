"""Drives: what they are, what they have done, their media and limits (QEMU qapi/block-core.json, qapi/block.json)."""

from __future__ import annotations

import os

from pyvmm.control.qmp.kinds import BOOL, FILE, INT, SIZE, STR, Enum, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block.backend import BlockBackend
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.control.qmp.subject import Machine, Served

CACHE = Struct({"writeback": BOOL, "direct": BOOL, "no-flush": BOOL})
IMAGE = Struct({"filename": STR, "format": STR, "virtual-size": SIZE, "actual-size": Optional(SIZE)})
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
    "file": STR, "node-name": Optional(STR), "ro": BOOL, "drv": STR, "backing_file_depth": INT, "encrypted": BOOL,
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
    if backend.inserted:
        info["inserted"] = inserted(drive, backend)
    if "stop" in (drive.rerror, drive.werror) or drive.werror == "enospc":
        info["io-status"] = "failed" if backend.stalled else "ok"
    return info


def inserted(drive: PlacedDrive, backend: BlockBackend) -> dict[str, Any]:
    from pyvmm.block.open import image_path

    options = backend.options
    path = image_path(drive)
    image: dict[str, Any] = {"filename": path, "format": backend.format, "virtual-size": backend.size_bytes}
    try:
        image["actual-size"] = os.stat(path).st_blocks * 512
    except OSError:  # it has another name by now, or none
        pass
    return {
        "file": drive.file,
        "node-name": drive.id,
        "ro": backend.read_only,
        "drv": backend.format,
        "backing_file_depth": 1 if drive.keeps_writes else 0,
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


COUNTED = {"rd": "read", "wr": "write", "flush": "flush", "unmap": "discard"}
STATS = Struct({
    **{f"{name}_{what}": SIZE for name in ("rd", "wr", "unmap") for what in ("bytes", "operations", "merged")},
    "flush_operations": SIZE,
    **{f"{name}_total_time_ns": SIZE for name in COUNTED}, **{f"failed_{name}_operations": SIZE for name in COUNTED},
    "in_flight": SIZE, "max_in_flight": SIZE,
})  # fmt: skip


@command("query-blockstats", returns=ListOf(Struct({"device": STR, "qdev": STR, "stats": STATS})))
def query_blockstats(served: Served) -> list[dict[str, Any]]:
    return [
        {"device": name, "qdev": f"/machine/drives/{name}", "stats": stats_of(backend)}
        for name, backend in list(served.machine.backends.items())
    ]


def stats_of(backend: BlockBackend) -> dict[str, int]:
    stats = backend.stats
    told = {"in_flight": stats.in_flight, "max_in_flight": stats.max_in_flight}
    for name, ours in COUNTED.items():
        kind = getattr(stats, ours)
        told[f"{name}_operations"] = kind.operations
        told[f"{name}_total_time_ns"] = kind.time_ns
        told[f"failed_{name}_operations"] = kind.failed
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
    {**WHICH, "filename": FILE, "format": Optional(Enum("raw", "qcow2")), "force": Optional(BOOL)},
    waits=True,
)
def blockdev_change_medium(
    served: Served,
    filename: str,
    device: str | None = None,
    id: str | None = None,
    format: str | None = None,
    force: bool = False,
) -> None:
    drive = cd_named(served, device, id)
    change(served, drive, filename, format, force)


def change(served: Served, drive: PlacedDrive, file: str | None, format: str | None, force: bool) -> None:
    if not served.machine.change_medium(drive.id, file, format=format, force=force):
        why = f"Device '{drive.id}' is locked and force was not specified, wait for tray to open and try again"
        raise QmpError(why)
    served.machine.events.flush()


@command("block_resize", {**WHICH, "size": SIZE}, waits=True)
def block_resize(served: Served, size: int, device: str | None = None, id: str | None = None) -> None:
    served.machine.block_resize(drive_named(served, device, id).id, size)


# -- limits -----------------------------------------------------------------------------------------------------------


@command(
    "block_set_io_throttle",
    {**WHICH, **dict.fromkeys(LIMITS, SIZE), **{name: Optional(SIZE) for name in BURSTS}},
    waits=True,
)
def block_set_io_throttle(
    served: Served, device: str | None = None, id: str | None = None, **limits: int
) -> None:
    drive = drive_named(served, device, id)
    ours = {**LIMITS, **BURSTS}
    served.machine.set_limits(drive.id, **{ours[name]: value for name, value in limits.items()})
