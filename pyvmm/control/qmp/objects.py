"""The tree of what a machine is made of, to read: qom-list and qom-get (QEMU qapi/qom.json).

    /machine/{cpus/N, devices/NAME, drives/NAME, consoles/NAME}

A device's properties are the fields of its saved state that are numbers, words or flags, as they are at this moment.
"""

from __future__ import annotations

from pyvmm.control.qmp.kinds import ANY, STR, ListOf, QmpError, Struct, shown
from pyvmm.control.qmp.table import command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from pyvmm.control.qmp.subject import Machine, Served

    # A name, and what is there: a node further down, or a value that is looked at when it is asked for.
    Node = Mapping[str, "Node | Callable[[], Any]"]

PROPERTY = Struct({"name": STR, "type": STR})


def tree(machine: Machine) -> Node:
    return {
        "type": container,
        "machine": {
            "type": lambda: f"{machine.config.machine}-machine",
            "memory-bytes": lambda: machine.memory.size_bytes,
            "state": lambda: machine.state.value,
            "cpus": {"type": container, **{str(cpu.index): cpu_node(cpu) for cpu in machine.cpus}},
            "devices": {"type": container, **{name: device_node(each) for name, each in machine.devices.items()}},
            "drives": {"type": container, **{name: drive_node(each) for name, each in machine.backends.items()}},
            "consoles": {"type": container, **{n: {"type": kind(each)} for n, each in machine.consoles.items()}},
        },
    }


def container() -> str:
    return "container"


def kind(thing: object) -> Callable[[], str]:
    return lambda: type(thing).__name__


def cpu_node(cpu: Any) -> Node:
    return {"type": lambda: "Cpu", "index": lambda: cpu.index, "thread-id": lambda: cpu.thread_id}


def drive_node(backend: Any) -> Node:
    return {
        "type": lambda: "BlockBackend",
        "size-bytes": lambda: backend.size_bytes,
        "read-only": lambda: backend.read_only,
        "inserted": lambda: backend.inserted,
        "write-cache": lambda: backend.write_cache,
    }


def device_node(device: Any) -> Node:
    """What state it is in, as far as plain values say it."""

    def look(name: str) -> Callable[[], Any]:
        def value() -> Any:
            with device.lock:
                return getattr(device, name)

        return value

    fields = {name.lstrip("_"): look(name) for name in device.STATE if is_plain(getattr(device, name, None))}
    return {"type": kind(device), **fields}


def is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, str))


def find(machine: Machine, path: str) -> Node | Callable[[], Any]:
    """QmpError where there is nothing."""
    node: Any = tree(machine)
    for part in path.split("/")[1:] if path != "/" else ():
        if not isinstance(node, dict) or part not in node:
            raise QmpError(f"Device '{shown(path)}' not found", "DeviceNotFound")
        node = node[part]
    if path[:1] != "/" or not isinstance(node, dict):
        raise QmpError(f"Device '{shown(path)}' not found", "DeviceNotFound")
    return node


def type_of(thing: Any) -> str:
    """A node's is what it is a child of; a value's its own."""
    if isinstance(thing, dict):
        return f"child<{thing['type']()}>"
    value = thing()
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "string"


@command("qom-list", {"path": STR}, ListOf(PROPERTY))
def qom_list(served: Served, path: str) -> list[dict[str, str]]:
    node: Any = find(served.machine, path)
    return [{"name": name, "type": type_of(thing)} for name, thing in node.items()]


@command("qom-get", {"path": STR, "property": STR}, ANY)
def qom_get(served: Served, path: str, property: str) -> Any:
    node: Any = find(served.machine, path)
    thing = node.get(property)
    if thing is None:
        raise QmpError(f"Property '{node['type']()}.{shown(property)}' not found")
    return f"{path.rstrip('/')}/{property}" if isinstance(thing, dict) else thing()
