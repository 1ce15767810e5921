"""The host's end of a console as a user names it: none, stdio, pty, file:PATH; in Python a function or a Chardev too.

consoles.py makes it.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.options import GIVEN, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from pyvmm.chardev import Chardev

    HostEnd = str | Chardev | Callable[[bytes], object] | None


def take_console(name: str, value: Any) -> Any:
    """The host's side of a console."""
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    if isinstance(value, str):
        is_file = value.startswith("file:") and len(value) > len("file:")
        if not is_file and value not in ("none", "stdio", "pty"):
            raise ConfigError(f"{name} {value!r}: use none, stdio, pty or file:PATH")
        return None if value == "none" else value
    from pyvmm.chardev import Chardev

    if isinstance(value, type):
        raise ConfigError(f"{name}={value!r} is a class: give an instance of it, or a function that takes bytes")
    if not isinstance(value, Chardev):
        raise ConfigError(f"{name}={value!r}: use none, stdio, pty, file:PATH, a function of bytes, or a Chardev")
    return value


def unplain_console(name: str, data: Any, given: Mapping[str, Any]) -> Any:
    if not isinstance(data, dict):
        return data
    if given.get(name) is None:
        raise ConfigError(f"{name} was an object of the process: give a function of bytes, a Chardev or a word")
    return given[name]


CONSOLE = Kind(
    take_console,
    metavar="WHERE",
    plain=lambda console: console if console is None or isinstance(console, str) else {GIVEN: "object"},
    unplain=unplain_console,
)
