"""What happens to machines, in Python's own log: the logger "pyvmm". Imported once somebody has imported ``logging``
and wants to hear (Events.tell): a process that does not log has none of it.

A record's message is a sentence; ``event`` is the event's name (events.py), ``machine`` which machine it is of,
``data`` what belongs to it, as plain data. Where it goes is the process's own to say: nothing is configured here.
"""

from __future__ import annotations

import logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Data = dict[str, Any]

LOGGER = logging.getLogger("pyvmm")
LOGGER.addHandler(logging.NullHandler())  # with nobody to hear it nothing is printed


def write(level: int, machine: str, name: str, data: Data, time_ns: int) -> None:
    """An event, which has happened at ``time_ns``."""
    if not LOGGER.isEnabledFor(level):
        return
    text = SENTENCES[name](data) if name in SENTENCES else name
    extra = {"event": name, "machine": machine, "data": {key: plain(value) for key, value in data.items()}}
    record = LOGGER.makeRecord("pyvmm", level, "", 0, text, (), None, None, extra)
    record.created, record.msecs = time_ns / 1e9, time_ns // 1_000_000 % 1000
    LOGGER.handle(record)


def plain(value: Any) -> Any:
    """As JSON has it: states and errors are words, what else is no plain value too."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):  # ExitStatus is one, with a reason
        return int(value)
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return str(value)


def stop(data: Data) -> str:
    where = "" if data.get("cpu") is None else f", by vCPU {data['cpu']}"
    why = data.get("error") or data.get("status")
    reason = getattr(why, "reason", "") or (str(why).partition("\n")[0] if why is not None else "")
    return f"the machine stands: {plain(data['state'])}{where}" + (f": {reason}" if reason else "")


def shutdown(data: Data) -> str:
    status = data["status"]
    return f"the guest has ended: status {int(status)}, {status.reason}"


def io_error(data: Data) -> str:
    from os import strerror

    follows = {"stop": "the machine stops", "report": "the guest is told", "ignore": "nobody is told"}
    return f"drive {data['drive']}: {data['operation']}: {strerror(data['errno'])}: {follows[data['action']]}"


def migration(data: Data) -> str:
    return f"migration to {data['address']}: {data['state']}" + (f": {data['why']}" if data.get("why") else "")


def trace(data: Data) -> str:
    if data["on"]:
        return f"a trace is written to {data['path']}"
    return str(data.get("error") or f"the trace in {data['path']} is at its end, {data['dropped']} records are missing")


def reset(data: Data) -> str:
    return f"reset{' by the guest' if data['guest'] else ''}" + (f": {data['by']}" if data["by"] else "")


SENTENCES: dict[str, Callable[[Data], str]] = {
    "resume": lambda data: "the guest begins" if str(data["state"]) == "prelaunch" else "the guest goes on",
    "stop": stop,
    "shutdown": shutdown,
    "reset": reset,
    "suspend": lambda data: "the guest has suspended itself to RAM",
    "wakeup": lambda data: "the guest is awake again",
    "io-error": io_error,
    "console-port": lambda data: f"port {data['console']} is {'open' if data['open'] else 'closed'} in the guest",
    "console-lost": lambda data: f"output of console {data['console']} is lost: nobody reads it fast enough",
    "balloon": lambda data: f"{data['actual_bytes'] >> 20} MiB are in the balloon",
    "device-broken": lambda data: f"{data['device']} waits for a reset: {data['why']}",
    "powerdown": lambda data: "the power button was pressed",
    "tray": lambda data: f"the tray of {data['drive']} is {'open' if data['open'] else 'closed'}",
    "panic": lambda data: "the guest's kernel has panicked",
    "rx-filter": lambda data: f"{data['device']} lets other frames through",
    "saved": lambda data: f"a snapshot is in {data['path']}",
    "loaded": lambda data: f"back to the snapshot in {data['path']}",
    "migration": migration,
    "client": lambda data: f"a client of {data['protocol']} {data['did']}",
    "trace": trace,
}
