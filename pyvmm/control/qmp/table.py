"""The table of commands and events: each is declared once, and from that come the check of its arguments, its errors,
query-commands and the schema.

    @command("set_link", {"name": STR, "up": BOOL})
    def set_link(served: Served, name: str, up: bool) -> None: ...

A function gets what it is asked of and its arguments by name, ``-`` in names as ``_``. It returns what the client is
told, by ``returns``; None is ``{}``. What it may raise: QmpError, and every error of pyvmm's (errors.py), of which the
client is told the sentence.
"""

from __future__ import annotations

from pyvmm.control.qmp.kinds import NOTHING, Kind, Optional, QmpError, Struct, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])


class Command:
    """``waits``: it may wait for the machine, the guest or the host, and is carried out on a thread of its own."""

    def __init__(
        self, name: str, function: Callable[..., Any], arguments: Struct, returns: Kind, *, waits: bool
    ) -> None:
        self.name = name
        self.function = function
        self.arguments = arguments
        self.returns = returns
        self.waits = waits

    def check(self, given: Any) -> dict[str, Any]:
        """The arguments, checked, as the function takes them. QmpError."""
        taken = self.arguments.take("", {} if given is None else given)
        return {name.replace("-", "_"): value for name, value in taken.items()}

    def carry_out(self, served: Any, taken: dict[str, Any]) -> Any:
        result = self.function(served, **taken)
        return {} if result is None else result


COMMANDS: dict[str, Command] = {}
EVENTS: dict[str, Struct] = {}


def command(
    name: str, arguments: dict[str, Kind | Optional] | None = None, returns: Kind = NOTHING, *, waits: bool = False
) -> Callable[[Function], Function]:
    """Declares a command."""

    def declare(function: Function) -> Function:
        assert name not in COMMANDS, name
        COMMANDS[name] = Command(name, function, Struct(arguments or {}), returns, waits=waits)
        return function

    return declare


def event(name: str, data: dict[str, Kind | Optional] | None = None) -> str:
    """Declares an event; its name."""
    EVENTS[name] = Struct(data or {})
    return name


def find(name: str) -> Command:
    """QmpError where there is none of that name."""
    found = COMMANDS.get(name)
    if found is None:
        raise QmpError(f"The command {shown(name)} has not been found", "CommandNotFound")
    return found
