"""Where in a configuration file something stands: tomllib and json tell what is in a file, and no lines.

``places`` looks through a text that one of them has read, so it need not check: only strings, brackets, keys and
comments are told apart (TOML 1.0, "Keyboard", "Array of Tables"; RFC 8259). A JSON document is such a value.
"""

from __future__ import annotations

import json
import re
import tomllib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Path = tuple[str | int, ...]

BETWEEN = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})' r"|'''.*?'''(?:'{0,2})" r'|"(?:\\.|[^"\\])*"' r"|'[^']*'", re.DOTALL
)
# A date and a time may have a space between them.
SCALAR = re.compile(r"\d{4}-\d\d-\d\d \d\d:[^\s,\]}#]*|[^\s,\]}#]+")


class Lost(Exception):
    """The text is not what was read: nothing more is known of it."""


class Search:
    def __init__(self, text: str, unquoted: Callable[[str], str]) -> None:
        self._text = text
        self._unquoted = unquoted
        self._at = 0
        self._line, self._counted = 1, 0
        self._last: dict[Path, int] = {}  # of each array of tables, the table that was begun last
        self.lines: dict[Path, int] = {}

    def _note(self, path: Path) -> None:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        self.lines.setdefault(path, self._line)

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise Lost
        self._at = found.end()
        return found[0]

    def _next(self, ahead: int = 1) -> str:
        """What comes after blanks and comments; "" at the end."""
        self._take(BETWEEN)
        return self._text[self._at : self._at + ahead]

    def document(self) -> None:
        """Of TOML."""
        here: Path = ()
        while begin := self._next(2):
            if begin[0] != "[":
                self._pair(here)
                continue
            several = begin == "[["
            self._at += 1 + several
            self._next()
            *before, name = self._keys()
            here = (*self._within((), before), name)
            if several:
                self._note(here)
                self._last[here] = self._last.get(here, -1) + 1
                here = (*here, self._last[here])
            self._note(here)
            self._next()
            self._at += 1 + several

    def _within(self, path: Path, names: list[str]) -> Path:
        """The path of a table that is named so; of an array of tables that is the last."""
        for name in names:
            path = (*path, name)
            self._note(path)
            if path in self._last:
                path = (*path, self._last[path])
        return path

    def _keys(self) -> list[str]:
        """Of a dotted key."""
        names = []
        while True:
            quoted = self._next() in ('"', "'")
            names.append(self._unquoted(self._take(STRING)) if quoted else self._take(BARE_KEY))
            if self._next() != ".":
                return names
            self._at += 1

    def _pair(self, path: Path) -> None:
        self._next()
        for name in self._keys():
            path = (*path, name)
            self._note(path)
        if self._next() not in ("=", ":"):
            raise Lost
        self._at += 1
        self.value(path)

    def value(self, path: Path) -> None:
        begin = self._next()
        if begin in ('"', "'"):
            self._take(STRING)
        elif begin == "[":
            self._at += 1
            index = 0
            while self._next() != "]":
                self._note((*path, index))
                self.value((*path, index))
                self._comma()
                index += 1
            self._at += 1
        elif begin == "{":
            self._at += 1
            while self._next() != "}":
                self._pair(path)
                self._comma()
            self._at += 1
        else:
            self._take(SCALAR)

    def _comma(self) -> None:
        if self._next() == ",":
            self._at += 1
        elif self._next() not in ("]", "}"):
            raise Lost


def toml_string(token: str) -> str:
    text: str = tomllib.loads(f"x = {token}")["x"]
    return text


def toml_places(text: str) -> dict[Path, int]:
    """The line of each key and of each element of a list, by its path: ("drives", 0, "file")."""
    search = Search(text.replace("\r\n", "\n"), toml_string)
    return found(search, search.document)


def json_places(text: str) -> dict[Path, int]:
    """The same of a JSON document."""
    search = Search(text, json.loads)
    return found(search, lambda: search.value(()))


def found(search: Search, look: Callable[[], None]) -> dict[Path, int]:
    try:
        look()
    except (Lost, RecursionError, ValueError):
        pass  # what stands before that is known
    return search.lines
