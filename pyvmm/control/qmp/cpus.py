"""The vCPUs."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import INT, STR, Enum, ListOf, Optional, Struct
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served

PROPS = Struct({"socket-id": Optional(INT), "core-id": Optional(INT), "thread-id": Optional(INT)})
CPU = Struct({
    "cpu-index": INT, "qom-path": STR, "thread-id": INT, "props": Optional(PROPS), "target": Enum("x86_64"),
})  # fmt: skip


@command("query-cpus-fast", returns=ListOf(CPU))
def query_cpus_fast(served: Served) -> list[dict[str, Any]]:
    """No vCPU is interrupted. ``thread-id`` is 0 until the machine has first run: there is no thread before that."""
    return [
        {
            "cpu-index": cpu.index,
            "qom-path": f"/machine/cpus/{cpu.index}",
            "thread-id": cpu.thread_id,
            "props": {"socket-id": cpu.index, "core-id": 0, "thread-id": 0},
            "target": "x86_64",
        }
        for cpu in served.machine.cpus
    ]
