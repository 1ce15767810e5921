"""A guest that goes on in another process, ``pyvmm run --incoming`` (QEMU qapi/migration.json)."""

from __future__ import annotations

from time import time_ns

from pyvmm.control.qmp.kinds import BOOL, SIZE, STR, Enum, Optional, QmpError, Struct
from pyvmm.control.qmp.news import line_of
from pyvmm.control.qmp.table import command, event
from pyvmm.errors import StateError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served

STATUS = Enum("none", "active", "cancelling", "cancelled", "completed", "failed")
INFO = Struct({
    "status": Optional(STATUS), "total-time": Optional(SIZE), "downtime": Optional(SIZE), "error-desc": Optional(STR),
})  # fmt: skip
NS_A_MS = 1_000_000

event("MIGRATION", {"status": STATUS})


def told(served: Served, status: str, **more: Any) -> None:
    """How it stands, for who asks and for who listens."""
    served.migration = {"status": status, **more}
    served.tell(line_of("MIGRATION", {"status": status}, time_ns()))


@command("migrate", {"uri": STR, "detach": Optional(BOOL)})
def migrate(served: Served, uri: str, detach: bool = True) -> None:
    """``uri``: unix:PATH or tcp:HOST:PORT. Answered at once, whatever ``detach`` says, as by QEMU; event MIGRATION and
    query-migrate tell what came of it.
    """
    from pyvmm.migration import parsed

    kind, colon, place = uri.partition(":")
    if kind not in ("unix", "tcp") or not colon or not place:
        raise QmpError("Parameter 'uri' expects unix:PATH or tcp:HOST:PORT")
    parsed(uri)
    with served.migrating:
        if served.migration["status"] in ("active", "cancelling"):
            raise QmpError("There's a migration process in progress")
        told(served, "active")
    served.sockets.work(lambda: go(served, place if kind == "unix" else uri), lambda: None)


def go(served: Served, address: str) -> None:
    """On a thread of its own."""
    try:
        gone = served.machine.migrate_to(address)
    except (VmmError, OSError) as error:
        with served.migrating:
            cancelled = served.migration["status"] == "cancelling"
            told(served, "cancelled" if cancelled else "failed", **{"error-desc": " ".join(str(error).split())})
    else:
        with served.migrating:
            times = {"total-time": gone.took_ns // NS_A_MS, "downtime": gone.stood_ns // NS_A_MS}
            told(served, "completed", **times)


@command("migrate_cancel", waits=True)
def migrate_cancel(served: Served) -> None:
    """Nothing where none is under way, as with QEMU."""
    with served.migrating:
        if served.migration["status"] != "active":
            return
        told(served, "cancelling")
    try:
        served.machine.cancel_migration()
    except StateError:
        pass  # it was over a moment before, and says so itself


@command("query-migrate", returns=INFO)
def query_migrate(served: Served) -> dict[str, Any]:
    """Nothing before there has been one, as with QEMU; times are in milliseconds."""
    with served.migrating:
        return {} if served.migration["status"] == "none" else dict(served.migration)
