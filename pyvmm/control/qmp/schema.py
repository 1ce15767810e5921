"""What can be asked and is told: query-commands and the schema, out of the table itself (QEMU qapi/introspect.json)."""

from __future__ import annotations

from pyvmm.control.qmp.kinds import ANY, STR, AnyKind, Builtin, Kind, ListOf, Struct
from pyvmm.control.qmp.table import COMMANDS, EVENTS, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.qmp.subject import Served

COMMAND = Struct({"name": STR})


@command("query-commands", returns=ListOf(COMMAND))
def query_commands(served: Served) -> list[dict[str, str]]:
    return [{"name": name} for name in COMMANDS]


@command("query-qmp-schema", returns=ListOf(ANY))
def query_qmp_schema(served: Served) -> list[dict[str, Any]]:
    return made_schema()


def made_schema() -> list[dict[str, Any]]:
    """Types have numbers for names, as QEMU's have: a client is to go by what they are."""
    names: dict[Kind, str] = {}
    entries: dict[str, dict[str, Any]] = {}

    def name_of(kind: Kind) -> str:
        if kind not in names:
            if isinstance(kind, (Builtin, AnyKind)):
                names[kind] = kind.name
            else:
                names[kind] = ""  # a kind does not hold itself
                inner = [name_of(part) for part in kind.parts()]
                names[kind] = f"[{inner[0]}]" if isinstance(kind, ListOf) else str(len(entries))
            entries.setdefault(names[kind], kind.entry(names))
        return names[kind]

    faces = []
    for name, declared in COMMANDS.items():
        about = {"arg-type": name_of(declared.arguments), "ret-type": name_of(declared.returns)}
        faces.append({"name": name, "meta-type": "command", **about})
    for name, data in EVENTS.items():
        faces.append({"name": name, "meta-type": "event", "arg-type": name_of(data)})
    return [*faces, *({"name": name, **entry} for name, entry in entries.items())]
