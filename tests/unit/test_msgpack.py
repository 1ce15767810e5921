"""Plain data as MessagePack (the specification's "Formats"), with msgspec as the other side."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.msgpack import pack, unpack

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.binary(max_size=300) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
    max_leaves=40,
)


def theirs() -> Any:
    """msgspec's side, imported when it is wanted: it may be missing on this host."""
    import msgspec

    return msgspec.msgpack


@given(PLAIN)
def test_there_and_back(value: Any) -> None:
    packed = pack(value)
    assert same(unpack(packed), value)
    assert same(theirs().decode(packed), value)
    assert same(unpack(theirs().encode(value)), value)


def same(one: Any, other: Any) -> bool:
    """Equal, and True is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_every_form_of_a_length(size: int) -> None:
    for value in (b"x" * size, "x" * size, [7] * size, {str(n): n for n in range(size)}):
        packed = pack(value)
        assert unpack(packed) == value
        assert packed == theirs().encode(value), "the shortest form"


@pytest.mark.parametrize("edge", [0, 0x7F, 0x80, 0xFF, 1 << 16, 1 << 32, 1 << 63, 1 << 64])
def test_numbers_at_the_edges_of_their_forms(edge: int) -> None:
    for value in (edge - 1, -edge, -edge - 1):
        if -(1 << 63) <= value < 1 << 64:
            assert unpack(pack(value)) == value
            assert unpack(theirs().encode(value)) == value


def test_views_are_bytes_and_tuples_lists() -> None:
    assert unpack(pack({"a": memoryview(b"abcd")[1:3], "b": (1, 2), "c": bytearray(b"x")})) == {
        "a": b"bc",
        "b": [1, 2],
        "c": b"x",
    }
    assert unpack(memoryview(pack([1]))) == [1]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": {"b": [0, 1.5]}}, r"a\.b\[1\] is a float"),
        ({"a": {1: 2}}, "a has a key 1"),
        (1 << 64, "a number of 65 bits"),
        (-(1 << 63) - 1, "64 are the most"),
        ({"a": object()}, "a is a object"),
    ],
)
def test_what_is_no_plain_data_is_named(value: object, said: str) -> None:
    with pytest.raises(StateError, match=said):
        pack(value)


def test_nesting_is_bounded_both_ways() -> None:
    value: list[Any] = []
    for _ in range(100):
        value = [value]
    with pytest.raises(StateError, match="64 dicts and lists deep"):
        pack(value)
    with pytest.raises(StateError, match="64 dicts and lists deep"):
        unpack(b"\x91" * 1_000_000 + b"\xc0")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "ends early"),
        (b"\xc0\xc0", "goes on for 1 bytes"),
        (b"\xc1", "0xc1, which begins no plain data"),
        (b"\xcb" + bytes(8), "0xcb"),  # a float
        (b"\xd4\x00\x00", "0xd4"),  # an extension
        (b"\x81\x01\x02", "a key that is no string"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (b"\xa1\xff", "no UTF-8"),
        (b"\xc6\xff\xff\xff\xff", "ends early"),
        (b"\xdd\xff\xff\xff\xff", "ends early"),
        (b"\xdf\xff\xff\xff\xff", "ends early"),
        (b"\xdb\xff\xff\xff\xffabc", "ends early"),
        (b"\xcf\x00", "ends early"),
    ],
)
def test_what_can_not_be_is_told(data: bytes, said: str) -> None:
    with pytest.raises(StateError, match=said):
        unpack(data)


def test_any_change_of_any_byte_is_data_or_a_state_error() -> None:
    good = pack({"parts": {"serial": {"fifo": b"abc", "n": [1, 300, -5, None, True]}, "x" * 40: 1 << 40}})
    source = random.Random(1)
    for n in range(len(good)):
        for _ in range(20):
            changed = bytearray(good)
            changed[n] = source.randrange(256)
            try:
                unpack(changed[: source.randrange(len(changed) + 1)])
                unpack(changed)
            except StateError:
                pass
