"""The lines of what stands in a file: as many places as the file's own reader finds values, each where its key is."""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.config_places import json_places, toml_places

TEXT = "\n".join([
    '# a comment with [ and "',
    'title = "a # in it" # another',
    'dotted . "key.with.dots" = 1',
    "dotted.b.c = 1979-05-27 07:32:00",
    "'single' = '''",
    "[no.table]",
    "x = 1''''",
    r'esc = "\" ]"',
    "many = [ 1, # one",
    "  [2,",
    '   "]"], { a = 1, b.c = "}" },',
    "]",
    r'multi = """\" \\',
    "[x]",
    r'"\""""',
    r'[ table . "\u0061" ]',
    "x = -inf",
    "[[list]]",
    "a = 1",
    "[[list]]",
    "b = []",
    "[list.sub]",
    "c = {}",
    "[[list.inner]]",
    "d = 1",
    "[[list]]",
    "",
])  # fmt: skip


def paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield from paths(each, (*path, name))


def check(places: dict[tuple[str | int, ...], int], data: Any) -> None:
    places.pop((), None)
    assert set(places) == set(paths(data))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_with_everything(end: str) -> None:
    text = TEXT.replace("\n", end)
    places = toml_places(text)
    check(places, tomllib.loads(text))
    lines = {path: places[path] for path in [
        ("title",), ("dotted", "b", "c"), ("single",), ("esc",), ("many", 1), ("many", 1, 1), ("many", 2, "b", "c"),
        ("multi",), ("table", "a"), ("list", 0), ("list", 1, "sub", "c"), ("list", 1, "inner", 0, "d"), ("list", 2),
    ]}  # fmt: skip
    assert list(lines.values()) == [2, 4, 5, 8, 10, 11, 11, 13, 16, 18, 23, 25, 26]


KEYS = st.sampled_from(["a", "b-1", "3", "x y", "é", "q\"t", "a.b", "", "#", "[", "line\nend"])
SCALARS = st.one_of(
    st.integers(-5, 1 << 40),
    st.booleans(),
    st.sampled_from(["", "]", "}", "#", '"', "'", "\\", "a\nb", '"""', "=,", "é"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
DATA = st.dictionaries(KEYS, VALUES, max_size=4)


class Writer:
    """TOML, each thing written in one of the ways there are for it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.lines: list[str] = []

    def string(self, text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        ways = ['"' + escaped.replace("\n", "\\n") + '"', f'"""\n{escaped}"""']
        if "'" not in text:
            ways += [f"'''\n{text}'''"] + ([f"'{text}'"] if "\n" not in text else [])
        return self.chance.choice(ways)

    def key(self, name: str) -> str:
        bare = name.isascii() and name.replace("-", "").isalnum()
        if bare and self.chance.random() < 0.7:
            return name
        return '"' + name.replace('"', '\\"').replace("\n", "\\n") + '"'

    def value(self, value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, list):
            between = self.chance.choice([", ", ",\n  # one, [more\n ", " , "])
            return "[" + between.join(map(self.value, value)) + self.chance.choice(["", "\n"]) + "]"
        if isinstance(value, dict):
            # Strings of several lines may stand in it, it may not.
            return "{ " + ", ".join(f"{self.key(k)} = {self.value(v)}" for k, v in value.items()) + " }"
        return str(value)

    def table(self, table: dict[str, Any], names: list[str]) -> None:
        later = []
        for name, value in table.items():
            tables = isinstance(value, dict) or (
                isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
            )
            if tables and self.chance.random() < 0.7:
                later.append((name, value))
            else:
                note = self.chance.choice(["", "  # note [x] = 1"])
                self.lines.append(f"{self.chance.choice(['', '  '])}{self.key(name)} = {self.value(value)}{note}")
        for name, value in later:
            head = " . ".join(map(self.key, [*names, name]))
            for each in [value] if isinstance(value, dict) else value:
                self.lines.append(f"[ {head} ]" if isinstance(value, dict) else f"[[{head}]] # x")
                self.table(each, [*names, name])


@settings(max_examples=300, deadline=None)
@given(DATA, st.integers(0, 1 << 30))
def test_there_are_as_many_places_in_toml_as_values(data: dict[str, Any], seed: int) -> None:
    writer = Writer(seed)
    writer.table(data, [])
    text = "\n".join(writer.lines)
    assert tomllib.loads(text) == data
    places = toml_places(text)
    check(places, data)
    lines = text.split("\n")
    for path, line in places.items():
        if isinstance(path[-1], str):
            shown = path[-1].replace('"', '\\"').replace("\n", "\\n")
            assert shown in lines[line - 1]


@settings(max_examples=100, deadline=None)
@given(DATA, st.sampled_from([None, 1]))
def test_there_are_as_many_places_in_json_as_values(data: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(data, indent=indent)
    check(json_places(text), data)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[]{}\"'#=,.\\\n a1", max_size=40))
def test_of_any_text_at_all_nothing_is_raised(text: str) -> None:
    toml_places(text)
    json_places(text)
