"""What the machine is doing, and having it do something else: run state, power, who and what it is."""

from __future__ import annotations

import sys

from pyvmm.control.qmp.kinds import BOOL, INT, NOTHING, SIZE, STR, Enum, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.table import command
from pyvmm.errors import StateError
from pyvmm.run_control import ALIVE, ENDED
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.control.qmp.subject import Served

NO_UUID = "00000000-0000-0000-0000-000000000000"
VERSION_TRIPLE = Struct({"major": INT, "minor": INT, "micro": INT})
# A closed machine has no clients: what one hears that is still there, is that the guest has ended.
STATUS = Struct({"running": BOOL, "status": Enum(*(state for state in RunState if state is not RunState.CLOSED))})


def version() -> dict[str, Any]:
    """Our own number stands where clients look for QEMU's: what can be done is in query-commands and the schema."""
    number = str(vars(sys.modules["pyvmm"])["__version__"])  # the package is a layer above
    major, minor, micro = (int(part) for part in number.split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"pyvmm-{number}"}


@command("qmp_capabilities", {"enable": Optional(ListOf(Enum("oob")))})
def qmp_capabilities(served: Served, enable: Sequence[str] = ()) -> None:
    """The session looks at when it may be said, and goes on from there."""
    if enable:
        raise QmpError("This monitor does not support Out-Of-Band (OOB)")


@command("query-version", returns=Struct({"qemu": VERSION_TRIPLE, "package": STR}))
def query_version(served: Served) -> dict[str, Any]:
    return version()


@command("query-status", returns=STATUS)
def query_status(served: Served) -> dict[str, Any]:
    state = served.machine.state
    told = RunState.SHUTDOWN if state is RunState.CLOSED else state
    return {"running": state is RunState.RUNNING, "status": told.value}


@command("query-name", returns=Struct({"name": Optional(STR)}))
def query_name(served: Served) -> dict[str, Any]:
    name = served.machine.config.name
    return {} if name is None else {"name": name}


@command("query-uuid", returns=Struct({"UUID": STR}))
def query_uuid(served: Served) -> dict[str, Any]:
    return {"UUID": served.machine.config.uuid or NO_UUID}


@command("query-kvm", returns=Struct({"enabled": BOOL, "present": BOOL}))
def query_kvm(served: Served) -> dict[str, Any]:
    runs = bool(served.machine.cpus)
    return {"enabled": runs, "present": runs}


@command("query-target", returns=Struct({"arch": Enum("x86_64")}))
def query_target(served: Served) -> dict[str, Any]:
    return {"arch": "x86_64"}


CURRENT_MACHINE = Struct({"wakeup-suspend-support": BOOL})


@command("query-current-machine", returns=CURRENT_MACHINE)
def query_current_machine(served: Served) -> dict[str, Any]:
    return {"wakeup-suspend-support": not served.machine.config.no_s3}


@command("query-memory-size-summary", returns=Struct({"base-memory": SIZE, "plugged-memory": Optional(SIZE)}))
def query_memory_size_summary(served: Served) -> dict[str, Any]:
    return {"base-memory": served.machine.memory.size_bytes, "plugged-memory": 0}


# -- running. Each waits until the machine is what it says, so that the events have been told before the answer. ------


@command("stop", returns=NOTHING, waits=True)
def stop(served: Served) -> None:
    served.machine.pause()
    served.machine.events.flush()


@command("cont", waits=True)
def cont(served: Served) -> None:
    machine = served.machine
    if machine.state in ENDED:
        raise QmpError("Resetting the Virtual Machine is required")
    if machine.control.debugged and machine.state not in ALIVE:
        raise QmpError("a debugger has the machine: let it continue there, or detach it")
    machine.resume()
    machine.events.flush()


@command("system_reset", waits=True)
def system_reset(served: Served) -> None:
    served.machine.reset()
    served.machine.events.flush()


@command("system_powerdown", waits=True)
def system_powerdown(served: Served) -> None:
    if served.machine.state in ENDED:
        raise QmpError(f"the guest has ended, the machine is in state {served.machine.state}")
    served.machine.powerdown()
    served.machine.events.flush()


@command("system_wakeup", waits=True)
def system_wakeup(served: Served) -> None:
    if not served.machine.control.suspended:
        raise QmpError("Unable to wake up: guest is not in suspended state")
    try:
        served.machine.wakeup()
    except StateError as error:  # it has woken meanwhile
        raise QmpError(str(error)) from None
    served.machine.events.flush()


@command("quit")
def quit(served: Served) -> None:
    """The run ends with status 0; of a `pyvmm run` that is the process. The answer is on its way before."""
    served.machine.stop(0, "qmp-quit")


@command("inject-nmi", waits=True)
def inject_nmi(served: Served) -> None:
    """Into every vCPU, as QEMU's does on a PC."""
    if not served.machine.cpus:
        raise QmpError("machine does not provide NMIs")
    for cpu in served.machine.cpus:
        served.machine.nmi(cpu.index)
