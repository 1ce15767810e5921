"""Traces, on and off (docs/trace.md). QEMU's trace-event-set-state names its own trace points, and has no file."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import FILE, SIZE, Struct
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.control.qmp.subject import Served


@command("x-pyvmm-trace-start", {"filename": FILE})
def x_pyvmm_trace_start(served: Served, filename: str) -> None:
    """Write what the machine does into the file ``filename``, from now on."""
    served.machine.start_trace(filename)


@command("x-pyvmm-trace-stop", returns=Struct({"dropped": SIZE}), waits=True)
def x_pyvmm_trace_stop(served: Served) -> dict[str, int]:
    """End it. ``dropped``: records that are missing."""
    return {"dropped": served.machine.stop_trace()}
