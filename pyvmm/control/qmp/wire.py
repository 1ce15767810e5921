"""JSON values out of a stream of bytes, cut anywhere: what a QMP client sends.

QEMU's monitor reads objects, wherever they begin and end (qobject/json-streamer.c): several in a line, one over many
lines. So does this. A string may stand in single quotes too, for who types it into a shell (qobject/json-lexer.c).
What is no object is one error a line, and the next object is read again. What a client can make grow is one message,
of MESSAGE_MOST_BYTES.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

MESSAGE_MOST_BYTES = 1 << 20
MOST_NESTED = 128
LINE_END = b"\n"
INFINITY = float("inf")
_OUTSIDE = re.compile(rb"""["'\[\]{}]""")  # what counts in an object
_INSIDE = {b'"': re.compile(rb'["\\\n]'), b"'": re.compile(rb"['\\\n]")}  # and in a string, by its quotes
_STRING = re.compile(rb""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
_QUOTED = re.compile(rb'\\.|"', re.DOTALL)
_NO_BLANK = re.compile(rb"[^ \t\r\n]")


class Broken(Exception):
    """What came is no message; ``args[0]`` says why."""


class Splitter:
    """``feed(data)`` gives each message that is complete: bytes of an object, or a Broken."""

    def __init__(self) -> None:
        self._clear()
        self._skips = False  # a message was refused: nothing is looked at up to the end of its line

    def _clear(self) -> None:
        self._pending = bytearray()
        self._at = 0  # how much of it has been looked at
        self._depth = 0
        self._quote = b""  # of the string that it is in

    def feed(self, data: bytes) -> Iterator[bytes | Broken]:
        self._pending += data
        while True:
            found = self._next()
            if found is None:
                break
            yield found
        if len(self._pending) > MESSAGE_MOST_BYTES:
            self._refuse()
            yield Broken(f"a message is longer than {MESSAGE_MOST_BYTES} bytes")

    def _refuse(self) -> None:
        """What has come of this line is no message, and what will come of it is none either."""
        self._clear()
        self._skips = True

    def _next(self) -> bytes | Broken | None:
        pending = self._pending
        if self._skips:
            end = pending.find(LINE_END)
            if end < 0:
                self._clear()
                return None
            self._skips = False
            del pending[: end + 1]
        if not self._depth:
            begin = _NO_BLANK.search(pending)
            if begin is None:
                self._clear()
                return None
            del pending[: begin.start()]
            self._at = 0
            if pending[:1] != b"{":
                return self._stray()
        return self._object()

    def _stray(self) -> Broken | None:
        """Something else than an object, up to the end of the line."""
        end = self._pending.find(LINE_END)
        if end < 0:
            return None
        del self._pending[: end + 1]
        return Broken("JSON parse error, expecting an object")

    def _object(self) -> bytes | Broken | None:
        pending = self._pending
        while True:
            found = (_INSIDE[self._quote] if self._quote else _OUTSIDE).search(pending, self._at)
            if found is None:
                self._at = len(pending)
                return None
            byte, self._at = found[0], found.end()
            if byte in _INSIDE:
                self._quote = b"" if self._quote else byte
            elif byte == LINE_END:  # a quote was forgotten: who waits for its answer would wait for ever
                rest = bytes(pending[self._at :])
                self._clear()
                self._pending += rest
                return Broken("JSON parse error, a line ends inside of a string")
            elif byte == b"\\":
                if self._at == len(pending):  # what it escapes has not come yet
                    self._at -= 1
                    return None
                self._at += 1
            elif byte in b"[{":
                self._depth += 1
                if self._depth > MOST_NESTED:
                    # The rest is in the buffer still, and may hold a line's end.
                    rest = bytes(pending[self._at :])
                    self._refuse()
                    self._pending += rest
                    return Broken("JSON nesting depth limit exceeded")
            else:
                self._depth -= 1
                if not self._depth:
                    message = bytes(pending[: self._at])
                    del pending[: self._at]
                    self._at = 0
                    return message


def decode(message: bytes) -> dict[str, Any]:
    """The object. Broken where it is none."""
    if b"'" in message:
        message = _STRING.sub(in_double_quotes, message)
    try:
        value = json.loads(message.decode(), parse_float=finite, parse_constant=no_number, object_pairs_hook=each_once)
    except Broken:
        raise
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "invalid text or number"
        raise Broken(f"JSON parse error, {why}") from None
    assert isinstance(value, dict)  # it begins with a brace
    return value


def in_double_quotes(found: re.Match[bytes]) -> bytes:
    """A string as JSON has it."""
    string = found[0]
    if string[:1] == b'"':
        return string
    inner = _QUOTED.sub(lambda one: {b"\\'": b"'", b'"': b'\\"'}.get(one[0], one[0]), string[1:-1])
    return b'"' + inner + b'"'


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A member that is there twice is no matter of taste."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Broken("JSON parse error, duplicate key")
    return members


def finite(word: str) -> float:
    """Python makes an infinity of 1e400, and could not say that back in JSON."""
    value = float(word)
    if value in (INFINITY, -INFINITY):
        raise ValueError(word)
    return value


def no_number(word: str) -> Any:
    """NaN and infinities, which Python takes and JSON has not."""
    raise ValueError(word)


def encode(value: dict[str, Any]) -> bytes:
    """One line of ASCII. A lone surrogate of a client's own word is escaped, as it was when it came."""
    return json.dumps(value).encode("ascii") + b"\r\n"
