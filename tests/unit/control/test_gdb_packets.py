"""Packets of gdb's protocol: cut anywhere, escaped, damaged, too long, and what stands between them."""

from __future__ import annotations

import random

import pytest

from pyvmm.control.gdb.packets import (
    ACK,
    DAMAGED,
    INTERRUPT,
    NACK,
    PACKET_BYTES,
    PacketReader,
    escape,
    frame,
    unescape,
)


def items(*pieces: bytes) -> list[bytes | str]:
    reader = PacketReader()
    found: list[bytes | str] = []
    for piece in pieces:
        reader.feed(piece)
        while (item := reader.next()) is not None:
            found.append(item)
    return found


STREAM = b"+$g#67$m0,4#fd\x03-noise$X0,2:\x7d\x03\x03#a5++$qRcmd,#xx$#00$a$b#62"
MEANT: list[bytes | str] = [ACK, b"g", b"m0,4", INTERRUPT, NACK, b"X0,2:#\x03", ACK, ACK, DAMAGED, b"", b"b"]


def test_whole() -> None:
    stream = STREAM.replace(b"#a5", b"#" + frame(b"X0,2:\x7d\x03\x03")[-2:])
    assert items(stream) == MEANT


def test_a_byte_at_a_time_and_cut_anywhere() -> None:
    stream = STREAM.replace(b"#a5", b"#" + frame(b"X0,2:\x7d\x03\x03")[-2:])
    assert items(*(stream[n : n + 1] for n in range(len(stream)))) == MEANT
    for cut in range(len(stream)):
        assert items(stream[:cut], stream[cut:]) == MEANT


def test_checksums_in_either_case() -> None:
    assert items(b"$/=*#96", b"$zz#F4") == [b"/=*", b"zz"]


@pytest.mark.parametrize("size", [PACKET_BYTES, PACKET_BYTES + 1, 3 * PACKET_BYTES])
def test_too_long(size: int) -> None:
    data = b"a" * size
    expected: list[bytes | str] = [data if size <= PACKET_BYTES else DAMAGED, b"g"]
    assert items(frame(data), b"$g#67") == expected
    stream = frame(data) + b"$g#67"
    assert items(*(stream[n : n + 1000] for n in range(0, len(stream), 1000))) == expected
    assert items(stream[: size + 2], stream[size + 2 : size + 3], stream[size + 3 :]) == expected


def test_what_waits_is_bounded() -> None:
    reader = PacketReader()
    reader.feed(b"$")
    for _ in range(1000):
        reader.feed(b"x" * 4096)
        assert reader.next() is None
        assert len(reader._pending) <= PACKET_BYTES + 4096 + 2
    for _ in range(1000):
        reader.feed(b"#")
        reader.next()
    assert len(reader._pending) <= 3


def test_noise_is_dropped_at_once() -> None:
    reader = PacketReader()
    reader.feed(b"n" * 1_000_000)
    assert reader.next() is None
    assert len(reader._pending) == 0


def test_escapes() -> None:
    every = bytes(range(256)) * 2
    assert unescape(escape(every)) == every
    assert all(byte not in escape(every).replace(b"}", b"") for byte in b"#$*")
    assert unescape(b"a}") == b"a"
    assert unescape(b"}]}]") == b"}}"
    assert unescape(b"}}") == b"]"
    assert unescape(b"}}x}\x03") == b"]x#"
    assert escape(b"plain") == b"plain"


def test_random_streams_never_fail() -> None:
    chance = random.Random(14)
    for _ in range(2000):
        data = bytes(chance.choices(b"$#+-\x03}*0g\xff", k=chance.randrange(60)))
        whole = items(data)
        cut = chance.randrange(len(data) + 1)
        assert items(data[:cut], data[cut:]) == whole
