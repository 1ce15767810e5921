"""News: what happens to a machine (events.py), as QMP's events (QEMU qapi/run-state.json and its neighbours)."""

from __future__ import annotations

from errno import ENOSPC
from os import strerror

from pyvmm.control.qmp.kinds import BOOL, SIZE, STR, Enum, Optional
from pyvmm.control.qmp.table import event
from pyvmm.control.qmp.wire import encode
from pyvmm.run_control import STATUS_RESET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.control.qmp.subject import Machine
    from pyvmm.events import Event

    Data = dict[str, Any]

CAUSES = Enum(
    *("none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui", "guest-shutdown"),
    *("guest-reset", "guest-panic", "subsystem-reset", "snapshot-load"),
)

event("STOP")
event("RESUME")
event("RESET", {"guest": BOOL, "reason": CAUSES})
event("SHUTDOWN", {"guest": BOOL, "reason": CAUSES})
event("POWERDOWN")
event("SUSPEND")
event("WAKEUP")
event("BLOCK_IO_ERROR", {
    "qom-path": STR, "device": STR, "node-name": Optional(STR), "operation": Enum("read", "write"),
    "action": Enum("ignore", "report", "stop"), "nospace": Optional(BOOL), "reason": STR,
})  # fmt: skip
event("DEVICE_TRAY_MOVED", {"device": STR, "id": STR, "tray-open": BOOL})
event("GUEST_PANICKED", {"action": Enum("pause", "poweroff", "run")})
event("GUEST_CRASHLOADED", {"action": Enum("pause", "poweroff", "run")})
event("BALLOON_CHANGE", {"actual": SIZE})
event("NIC_RX_FILTER_CHANGED", {"name": Optional(STR), "path": STR})
event("VSERPORT_CHANGE", {"id": STR, "open": BOOL})

# How a run has ended (ExitStatus.reason): whether the guest did it, and QEMU's word for the cause.
ENDS = {
    "shutdown": (True, "guest-shutdown"),
    "debug-exit": (True, "guest-shutdown"),
    "guest-panic": (True, "guest-panic"),
    "quit": (False, "host-ui"),
    "qmp-quit": (False, "host-qmp-quit"),
    "migrated": (False, "none"),
    "reader-gone": (False, "host-signal"),
}


class News:
    """``tell(line)`` gets each event, encoded, on the machine's event loop's thread. Nobody is to hold that up."""

    def __init__(self, machine: Machine, tell: Callable[[bytes], object]) -> None:
        self._machine = machine
        self._tell = tell

    def listen(self) -> None:
        self._machine.events.listen(self._heard, *TOLD)

    def forget(self) -> None:
        self._machine.events.forget(self._heard)

    def _heard(self, heard: Event) -> None:
        name, data = TOLD[heard.name](self._machine, heard.data)
        self._tell(line_of(name, data, heard.time_ns))


def line_of(name: str, data: Data, at_ns: int) -> bytes:
    """An event as it is sent; ``at_ns`` is when it happened."""
    seconds, microseconds = divmod(at_ns // 1000, 1_000_000)
    message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name}
    if data:
        message["data"] = data
    return encode(message)


def stop(machine: Machine, data: Data) -> tuple[str, Data]:
    return "STOP", {}


def resume(machine: Machine, data: Data) -> tuple[str, Data]:
    return "RESUME", {}


def reset(machine: Machine, data: Data) -> tuple[str, Data]:
    return "RESET", {"guest": data["guest"], "reason": "guest-reset" if data["guest"] else "host-qmp-system-reset"}


def shutdown(machine: Machine, data: Data) -> tuple[str, Data]:
    status = data["status"]
    if status == STATUS_RESET:
        guest, cause = True, "guest-reset"
    else:
        guest, cause = ENDS.get(status.reason, (False, "host-ui"))
    return "SHUTDOWN", {"guest": guest, "reason": cause}


def powerdown(machine: Machine, data: Data) -> tuple[str, Data]:
    return "POWERDOWN", {}


def suspend(machine: Machine, data: Data) -> tuple[str, Data]:
    return "SUSPEND", {}


def wakeup(machine: Machine, data: Data) -> tuple[str, Data]:
    return "WAKEUP", {}


def io_error(machine: Machine, data: Data) -> tuple[str, Data]:
    return "BLOCK_IO_ERROR", {
        "qom-path": f"/machine/drives/{data['drive']}",
        "device": data["drive"],
        "operation": "read" if data["operation"] == "read" else "write",
        "action": data["action"],
        "nospace": data["errno"] == ENOSPC,
        "reason": strerror(data["errno"]),
    }


def tray(machine: Machine, data: Data) -> tuple[str, Data]:
    return "DEVICE_TRAY_MOVED", {"device": data["drive"], "id": data["drive"], "tray-open": data["open"]}


def panic(machine: Machine, data: Data) -> tuple[str, Data]:
    if data["goes_on"]:
        return "GUEST_CRASHLOADED", {"action": "run"}
    return "GUEST_PANICKED", {"action": "poweroff"}


def balloon(machine: Machine, data: Data) -> tuple[str, Data]:
    return "BALLOON_CHANGE", {"actual": machine.memory.size_bytes - data["actual_bytes"]}


def rx_filter(machine: Machine, data: Data) -> tuple[str, Data]:
    return "NIC_RX_FILTER_CHANGED", {"name": data["device"], "path": f"/machine/devices/{data['device']}"}


def console_port(machine: Machine, data: Data) -> tuple[str, Data]:
    return "VSERPORT_CHANGE", {"id": data["console"], "open": data["open"]}


TOLD: dict[str, Callable[[Machine, Data], tuple[str, Data]]] = {
    "stop": stop,
    "resume": resume,
    "reset": reset,
    "shutdown": shutdown,
    "powerdown": powerdown,
    "suspend": suspend,
    "wakeup": wakeup,
    "io-error": io_error,
    "tray": tray,
    "panic": panic,
    "rx-filter": rx_filter,
    "balloon": balloon,
    "console-port": console_port,
}
