"""Snapshots in our form: a file each (snapshot.py), not a part of a disk image as QEMU's are."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import FILE, SIZE, Optional, Struct
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served

SAVED = Struct({"written-bytes": SIZE, "stood-ns": SIZE})


@command("snapshot-load", {"filename": FILE}, waits=True)
def snapshot_load(served: Served, filename: str) -> None:
    """Back to it: the machine goes on from there if it ran, else it is paused there."""
    served.machine.load(filename)
    served.machine.events.flush()


@command("snapshot-save", {"filename": FILE, "base": Optional(FILE)}, SAVED, waits=True)
def snapshot_save(served: Served, filename: str, base: str | None = None) -> dict[str, Any]:
    """Answered when all of it is on the disk. `pyvmm run --restore` goes on from there."""
    from pyvmm.snapshot import Snapshot

    machine = served.machine
    if base is None:
        saved = machine.save(filename)
    else:
        with Snapshot(base) as before:
            saved = machine.save(filename, base=before)
    return {"written-bytes": saved.written_bytes, "stood-ns": saved.stood_ns}
