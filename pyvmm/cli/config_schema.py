"""The JSON Schema of configuration files, and their reference: made of the options' rows, as all of their faces are.

``python -m pyvmm.cli.config_schema`` writes pyvmm/machine.schema.json, and the table in docs/configuration.md: after a
change of an option (tests/unit/cli/test_config_schema.py compares).
"""

from __future__ import annotations

import json
from pathlib import Path

from pyvmm.cli.run import OPTIONS
from pyvmm.config import MachineConfig
from pyvmm.config_file import COMMAND, IGNORED
from pyvmm.options import listed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.cli.options import Option
    from pyvmm.options import Options, Row

PACKAGE = Path(__file__).parent.parent
SCHEMA = PACKAGE / "machine.schema.json"
REFERENCE = PACKAGE.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- the options, by python -m pyvmm.cli.config_schema -->\n", "<!-- the options end -->\n"
DIALECT = "http://json-schema.org/draft-07/schema#"  # what editors know
WORDS = {"string": "text", "integer": "number", "boolean": "true or false", "array": "list", "object": "table"}


# -- the schema --------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    properties = {name: of_row(row, definitions) for name, row in in_files(MachineConfig)}
    command = {option.key: of_option(option) for option in OPTIONS if option.file}
    properties[COMMAND] = {"description": "what is no machine's, but the command's: pyvmm run", **table_of(command)}
    properties[IGNORED] = {"description": "for editors", "type": "string"}
    return {
        "$schema": DIALECT,
        "title": "a machine of pyvmm's",
        "description": "What pyvmm run machine.toml runs.",
        **table_of(properties),
        "definitions": definitions,
    }


def in_files(options: type[Options]) -> Iterator[tuple[str, Row]]:
    return ((name, row) for name, row in options.rows.items() if row.kind.file)


def table_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def of_row(row: Row, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = row.kind
    about: dict[str, Any] = {"description": row.help}
    if isinstance(row.default, (bool, int, str)) and row.default != "":
        about["default"] = row.default
    tables: list[dict[str, Any]] = []
    if kind.table is not None:
        options = kind.table()
        name = options.__name__
        if name not in definitions:
            rows = {name: of_row(row, definitions) for name, row in in_files(options)}
            definitions[name] = {"description": options.thing, **table_of(rows)}
        tables = [{"$ref": f"#/definitions/{name}"}]
    if kind.file == "array":
        return {**about, "type": "array", "items": one_of([{"type": "string"}, *tables])}
    if kind.file == "object":
        return {**about, "type": "object", "additionalProperties": {"type": "string"}}
    return {**about, **one_of([of_type(word, row) for word in kind.file.split()] + tables)}


def of_type(word: str, row: Row) -> dict[str, Any]:
    told: dict[str, Any] = {"type": word}
    least, most = row.kind.bounds
    if word == "string" and row.kind.choices:
        told["enum"] = list(row.kind.choices)
    if word == "integer":
        told |= {} if least is None else {"minimum": least}
        told |= {} if most is None else {"maximum": most}
    return told


def one_of(types: list[dict[str, Any]]) -> dict[str, Any]:
    return types[0] if len(types) == 1 else {"anyOf": types}


def of_option(option: Option) -> dict[str, Any]:
    types = one_of([{"type": word} for word in option.file.split()])
    return {"description": option.help, **({"type": "array", "items": types} if option.many else types)}


# -- the reference -----------------------------------------------------------------------------------------------------


def reference() -> str:
    """Tables in Markdown: a machine's options, those of what has options of its own, and the command's."""
    parts = ["### Of a machine\n", table(entries(MachineConfig))]
    for name, row in in_files(MachineConfig):
        if row.kind.table is not None:
            options = row.kind.table()
            head = f"[[{name}]]" if row.kind.file == "array" else f"[{name}]"
            parts += [f"### `{head}`\n", table(entries(options))]
    parts += [f"### `[{COMMAND}]`\n", table(command_entries())]
    return "\n".join(parts)


def entries(options: type[Options]) -> Iterator[tuple[str, str, str]]:
    for name, row in in_files(options):
        default = f" (default {toml_word(row.default)})" if row.has_default_to_tell else ""
        spelled = row.cli or (f"{row.words[0]}=" if row.words else "")
        told = row.kind.choices and all(choice in row.help for choice in row.kind.choices)
        yield name, spelled, f"{'' if told else f'{values(row)}: '}{row.help}{default}"


def values(row: Row) -> str:
    if row.kind.choices:
        return listed([toml_word(word) for word in row.kind.choices], "or")
    words = [WORDS[word] for word in row.kind.file.split()]
    if row.kind.table is not None:
        words[-1] += " of tables" if words[-1] == "list" else ""
        words += ["text"] if "text" not in words else []
        words += ["table"] if "of" not in words[0] else []
    return listed(words, "or")


def toml_word(value: object) -> str:
    return json.dumps(value) if isinstance(value, (bool, int, str)) else str(value)


def command_entries() -> Iterator[tuple[str, str, str]]:
    for option in OPTIONS:
        if option.file:
            kind = "list" if option.many else listed([WORDS.get(word, word) for word in option.file.split()], "or")
            yield option.key, " ".join(option.names), f"{kind}: {option.help}"


def table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ["| key | command line | |", "|---|---|---|"]
    for name, spelled, told in rows:
        lines.append(f"| `{name}` | {f'`{spelled}`' if spelled else ''} | {told.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def with_reference(page: str) -> str:
    """The page with its tables as they should be."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{reference()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
    REFERENCE.write_text(with_reference(REFERENCE.read_text()))
