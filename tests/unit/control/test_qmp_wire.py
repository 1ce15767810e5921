"""QMP's messages out of a stream of bytes: cut anywhere, nested, broken, too long."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.control.qmp import wire
from pyvmm.control.qmp.wire import Broken, Splitter, decode, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=10), JSON, max_size=5)


def fed(*pieces: bytes) -> list[bytes | str]:
    """What comes out: messages, and why there is none."""
    splitter = Splitter()
    found = [message for piece in pieces for message in splitter.feed(piece)]
    return [message.args[0] if isinstance(message, Broken) else message for message in found]


@given(st.lists(OBJECTS, max_size=5), st.data())
def test_whatever_they_are_and_wherever_they_are_cut(objects: list[dict[str, object]], data: st.DataObject) -> None:
    blank = st.sampled_from(["", " ", "\n", "\r\n \t"])
    stream = "".join(
        data.draw(blank) + json.dumps(each, ensure_ascii=data.draw(st.booleans())) + data.draw(blank)
        for each in objects
    ).encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    messages = fed(*pieces)
    assert [json.loads(m) for m in messages if isinstance(m, bytes)] == objects
    assert len(messages) == len(objects)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_garbage_never_raises_and_ends_with_a_line(pieces: list[bytes]) -> None:
    splitter = Splitter()
    for piece in pieces:
        for message in splitter.feed(piece):
            if isinstance(message, bytes):
                try:
                    decode(message)
                except Broken:
                    pass


@pytest.mark.parametrize("line", [b"hello", b"[1, 2]", b"42", b"]", b"}", b'"{"', b"\xff\xfe", b"quit {}"])
def test_what_is_no_object_is_one_error_a_line(line: bytes) -> None:
    assert fed(line + b'\n{"a": 1}\n') == ["JSON parse error, expecting an object", b'{"a": 1}']


def test_two_in_a_line_and_one_over_many() -> None:
    assert fed(b'{"a":1}{"b":"}"} {\n"c":\n[{}]\n}') == [b'{"a":1}', b'{"b":"}"}', b'{\n"c":\n[{}]\n}']


def test_escapes_in_strings() -> None:
    assert fed(b'{"a\\', b'"}": "\\\\"}x\n') == [b'{"a\\"}": "\\\\"}', "JSON parse error, expecting an object"]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (b"{'execute': 'stop'}", {"execute": "stop"}),
        (b"""{'a"b': "c'd", "e": ['}', "'"]}""", {'a"b': "c'd", "e": ["}", "'"]}),
        (rb"""{'a\'b': '\"\\', 'c': '\u0041\n'}""", {"a'b": '"\\', "c": "A\n"}),
        (b"{'a': ''}", {"a": ""}),
    ],
)
def test_single_quotes(said: bytes, meant: dict[str, object]) -> None:
    for cut in range(len(said)):
        (message,) = fed(said[:cut], said[cut:])
        assert isinstance(message, bytes)
        assert decode(message) == meant


@pytest.mark.parametrize("line", [b'{"execute: "stop"}', b"""{'execute": "stop"}""", b'{"a\\"}'])
def test_a_quote_that_was_forgotten(line: bytes) -> None:
    why, *more = fed(line + b'\n{"a": 1}\n')
    assert (why, more) == ("JSON parse error, a line ends inside of a string", [b'{"a": 1}'])


def test_one_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MESSAGE_MOST_BYTES", 100)
    for begin in (b'{"a": "', b"x"):
        splitter = Splitter()
        found = [m for _ in range(20) for m in splitter.feed(begin + b"." * 50)]
        assert [str(m) for m in found if isinstance(m, Broken)] == ["a message is longer than 100 bytes"]
        assert list(splitter.feed(b'..."}\n{"b": 2}')) == [b'{"b": 2}']


def test_nested_too_deeply() -> None:
    deep = b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"
    assert fed(deep + b'\n{"b": 2}') == ["JSON nesting depth limit exceeded", b'{"b": 2}']


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"{]}", "Expecting property name enclosed in double quotes"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key"),
        (b'{"a": NaN}', "invalid text or number"),
        (b'{"a": -Infinity}', "invalid text or number"),
        (b'{"a": "\xff"}', "invalid text or number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid text or number"),
        (b'{"a": 1e400}', "invalid text or number"),
        (b'{"a": -1e999}', "invalid text or number"),
        (b'{"a": "\t"}', "Invalid control character at"),
    ],
)
def test_an_object_that_is_none(message: bytes, why: str) -> None:
    with pytest.raises(Broken, match="JSON parse error") as broken:
        decode(message)
    assert why in str(broken.value)


@given(OBJECTS)
def test_a_line_for_a_message(value: dict[str, object]) -> None:
    line = encode(value)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\r\n")
    assert json.loads(line) == value
