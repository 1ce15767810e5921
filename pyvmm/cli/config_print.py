"""``pyvmm run --print-config``: the configuration file of a command line."""

from __future__ import annotations

from pyvmm.config import MachineConfig
from pyvmm.config_file import COMMAND
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyvmm.options import Options, Row

ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def config_text(given: dict[str, Any], command: dict[str, Any]) -> str:
    """TOML of what is given of a machine's options and of the command's own. ConfigError for what is no text."""
    lines: list[str] = []
    tables: list[str] = []
    for name, row in MachineConfig.rows.items():
        if name in given:
            add_option(row, given[name], lines, tables)
    if command:
        tables += ["", f"[{COMMAND}]", *pairs(command.items())]
    return "\n".join([*lines, *tables]).lstrip("\n") + "\n"


def add_option(row: Row, value: Any, lines: list[str], tables: list[str]) -> None:
    """Where it is a table or several it comes at the end: what follows a table's head is in it."""
    kind = row.kind
    if kind.table is not None:
        taken = kind.take(row.name, value)
        several = isinstance(taken, tuple)
        head = f"[[{row.name}]]" if several else f"[{row.name}]"
        for one in taken if several else [taken] if taken is not None else []:
            tables += ["", head, *pairs(own(one))]
    elif "object" in kind.file:
        tables += ["", f"[{row.name}]", *pairs(dict(value).items())]  # of two of one name the later is what counts
    elif row.name == "modules":
        lines += pairs([(row.name, [f"{file} {line}" if line else file for file, line in value])])
    else:
        lines += pairs([(row.name, "none" if value is None else value)])


def own(options: Options) -> Iterable[tuple[str, Any]]:
    """What is not as it would be anyway."""
    for name, row in options.rows.items():
        value = getattr(options, name)
        if value != row.default:
            yield name, "none" if value is None else value


def pairs(values: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{key(name)} = {toml(value)}" for name, value in values]


def key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "").replace("-", "").isalnum() else toml(name)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    return f"[{', '.join(map(toml, value))}]"


def quoted(text: str) -> str:
    """A basic string (TOML 1.0, String). ConfigError for what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is no UTF-8, and a configuration file is: give a path that is") from None
    return '"' + "".join(map(escaped, text)) + '"'


def escaped(letter: str) -> str:
    if letter in ESCAPES:
        return ESCAPES[letter]
    return f"\\u{ord(letter):04x}" if letter < " " or letter == "\x7f" else letter
