"""Configuration files: the options of a machine in TOML, or JSON, by the names that they have in Python.

    kernel = "vmlinuz"
    memory_mib = "2G"

    [[drives]]
    file = "root.img"
    interface = "virtio"

    [run]
    timeout = 60

What an option may be there, its Kind says (options.py): a value, and for what has options of its own a table of them,
or the words of the command line. What is wrong is told with its line.
"""

from __future__ import annotations

import json
import tomllib

from pyvmm.config import MachineConfig, read_file
from pyvmm.config_places import json_places, toml_places
from pyvmm.errors import ConfigError, remedy_for_path
from pyvmm.options import is_int, listed, near_match

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pyvmm.config_places import Path
    from pyvmm.options import Options, Row

MOST_BYTES = 1 << 18  # a machine of everything, each option with a comment of its own, is a tenth of it
COMMAND = "run"  # the table with what is no machine's, but the command's
IGNORED = "$schema"  # what editors look for in JSON
TABLES = {"array": "a list", "object": "a table"}
WORDS = {"string": "a string", "integer": "a whole number", "boolean": "true or false", "number": "a number", **TABLES}


def from_file(path: str, options: type[Options] = MachineConfig) -> dict[str, Any]:
    """The options in a TOML or JSON file, checked each by itself: for MachineConfig(**options). ConfigError, with line.
    """
    given = ConfigFile(path).options(options.rows)
    if "fw_cfg" in given:
        given["fw_cfg"] = {name: read_file(file) for name, file in given["fw_cfg"]}
    return given


class ConfigFile:
    """What stands in one. ConfigError where nothing can be had from it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._json = path.endswith(".json")
        self._text = self._read()
        self.data = self._parsed()

    def _read(self) -> str:
        try:
            with open(self._path, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            # A path with a zero in it is a ValueError.
            why = str(error)
            if isinstance(error, OSError):
                why = remedy_for_path(self._path, error, "give a TOML or JSON file that can be read")
            raise ConfigError(f"config file {self._path}: {why}") from None
        if len(data) > MOST_BYTES:
            raise ConfigError(f"config file {self._path}: it is longer than {MOST_BYTES} bytes: that is no machine's")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(data.count(b"\n", 0, error.start) + 1, "this is no UTF-8: save it as such") from None

    def _parsed(self) -> dict[str, Any]:
        try:
            data = json.loads(self._text, object_pairs_hook=each_once) if self._json else tomllib.loads(self._text)
        except json.JSONDecodeError as error:
            raise self._wrong(error.lineno, f"this is no JSON: {error.msg}") from None
        except tomllib.TOMLDecodeError as error:
            sentence, _, place = str(error).rpartition(" (at ")
            number = place.partition(",")[0].removeprefix("line ")
            line = int(number) if number.isdigit() else self._text.count("\n") + 1
            raise self._wrong(line, f"this is no TOML: {sentence}") from None
        except Twice as twice:
            raise ConfigError(f"config file {self._path}: {twice.args[0]!r} is there twice: give it once") from None
        except ValueError:  # of the digits that an int may have
            raise ConfigError(f"config file {self._path}: a number in it is too long: options are smaller") from None
        except RecursionError:
            raise ConfigError(f"config file {self._path}: nested too deeply: options are plain values") from None
        if not isinstance(data, dict):
            raise self._wrong(1, 'give an object of options: {"kernel": ...}')
        return data

    def _wrong(self, line: int | None, sentence: str) -> ConfigError:
        return ConfigError(f"{self._path}{'' if line is None else f':{line}'}: {sentence}")

    def error(self, where: Path, sentence: object) -> ConfigError:
        """What is wrong with what stands at ``where``, or in it."""
        places = (json_places if self._json else toml_places)(self._text)
        while where and where not in places:
            where = where[:-1]
        return self._wrong(places.get(where), str(sentence))

    # -- what it says ------------------------------------------------------------------------------------------------

    def options(self, rows: dict[str, Row]) -> dict[str, Any]:
        """The values of a machine's options, as the command line gives them."""
        known = [name for name, row in rows.items() if row.kind.file]
        given = {}
        for name, value in self.data.items():
            if name in (COMMAND, IGNORED):
                continue
            if name not in known:
                raise self.unknown((name,), "there is no option", [*known, COMMAND])
            given[name] = self._option(rows[name], value, (name,))
        return given

    def unknown(self, where: Path, what: str, known: Iterable[str]) -> ConfigError:
        near = near_match(str(where[-1]), known)
        return self.error(where, f"{what} {where[-1]!r}{near or ': docs/configuration.md has those there are'}")

    def _option(self, row: Row, value: Any, where: Path) -> Any:
        kind = row.kind
        self.fits(kind.file + (" object" if kind.table and "array" not in kind.file else ""), value, where)
        if isinstance(value, list):
            taken: Any = [self._item(row, item, (*where, n)) for n, item in enumerate(value)]
        elif "object" in kind.file:
            for name, file in value.items():
                self.fits("string", file, (*where, name))
            return list(value.items())
        else:
            taken = self._item(row, value, where)
        self._taken(row, taken, where)
        return taken

    def _item(self, row: Row, value: Any, where: Path) -> Any:
        """A value by itself, or one of a list."""
        kind = row.kind
        if kind.table is not None and isinstance(value, dict):
            return self._table(kind.table(), value, where)
        if "array" in kind.file:
            self.fits("string" + (" object" if kind.table else ""), value, where)
            if kind.table is not None:
                self._taken(row, [value], where)
                return value
        return self._from_text(row, value, where)

    def _from_text(self, row: Row, value: Any, where: Path) -> Any:
        if not isinstance(value, str) or row.kind.file == "string":
            return value
        try:
            return row.kind.from_text(value)
        except ValueError:
            raise self.error(where, f"{row.name}={value!r}: that is no {row.metavar} ({row.help})") from None

    def _taken(self, row: Row, value: Any, where: Path, noun: str = "") -> None:
        try:
            row.kind.take(noun + row.name, value)
        except ConfigError as error:
            raise self.error(where, error) from None

    def _table(self, options: type[Options], table: dict[str, Any], where: Path) -> Options:
        values = {}
        for name, value in table.items():
            at = (*where, name)
            row = options.rows.get(name)
            if row is None:
                raise self.error(at, self._unknown_in(options, name))
            self.fits(row.kind.file, value, at)
            values[name] = value if isinstance(value, list) else self._from_text(row, value, at)
            self._taken(row, values[name], at, options.noun)
        try:
            return options(**values)
        except ConfigError as error:
            raise self.error(where, error) from None

    def _unknown_in(self, options: type[Options], name: str) -> str:
        """A word of the command line's is told what it is called here."""
        ours = next((row.name for row in options.rows.values() if name in row.words), None)
        return options.unknown(name) if ours is None else f"{options.thing} has no option {name!r}: here it is {ours}"

    def fits(self, types: str, value: Any, where: Path) -> None:
        """ConfigError for a value of another type than one of these."""
        words = types.split()
        if not any(is_a(word, value) for word in words):
            shown = TABLES["object"] if isinstance(value, dict) else repr(value)
            want = listed([WORDS[word] for word in words], "or")
            name = f"{where[-2]}[{where[-1]}]" if isinstance(where[-1], int) else where[-1]
            raise self.error(where, f"{name} is {shown[:80]}: give {want}")


def is_a(word: str, value: Any) -> bool:
    if word == "integer":
        return is_int(value)
    if word == "number":
        return is_int(value) or isinstance(value, float)
    types: dict[str, type] = {"string": str, "boolean": bool, "array": list, "object": dict}
    return isinstance(value, types[word])


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Twice(twice)
    return members


class Twice(Exception):
    """A key of JSON's; TOML has its own words for it."""
