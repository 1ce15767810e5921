"""The debug console."""

from __future__ import annotations

import pytest

from pyvmm.chardev import CallableChardev
from pyvmm.devices.debugcon import LINE_BYTES, DebugCon


@pytest.fixture
def got() -> list[bytes]:
    return []


@pytest.fixture
def debugcon(got: list[bytes]) -> DebugCon:
    return DebugCon(CallableChardev(got.append))


def send(debugcon: DebugCon, data: bytes) -> None:
    for byte in data:
        debugcon.write(0, 1, byte)


def test_read_tells_that_somebody_listens(debugcon: DebugCon) -> None:
    assert debugcon.read(0, 1) == 0xE9


def test_read_value_can_be_chosen() -> None:
    assert DebugCon(CallableChardev(lambda data: None), readback=0x42).read(0, 1) == 0x42


def test_whole_lines_go_out(debugcon: DebugCon, got: list[bytes]) -> None:
    send(debugcon, b"SeaBIOS\nBUILD: ")
    assert got == [b"SeaBIOS\n"]
    send(debugcon, b"gcc\n")
    assert got == [b"SeaBIOS\n", b"BUILD: gcc\n"]


def test_endless_line_goes_out_in_pieces(debugcon: DebugCon, got: list[bytes]) -> None:
    send(debugcon, b"x" * (2 * LINE_BYTES + 1))
    assert got == [b"x" * LINE_BYTES] * 2


def test_flush_and_reset_send_the_open_line(debugcon: DebugCon, got: list[bytes]) -> None:
    send(debugcon, b"last words")
    debugcon.flush()
    debugcon.flush()
    send(debugcon, b"and more")
    debugcon.reset()
    assert got == [b"last words", b"and more"]


def test_open_line_is_saved(debugcon: DebugCon) -> None:
    send(debugcon, b"half a ")
    lines: list[bytes] = []
    other = DebugCon(CallableChardev(lines.append))
    other.load(debugcon.save())
    send(other, b"line\n")
    assert lines == [b"half a line\n"]
