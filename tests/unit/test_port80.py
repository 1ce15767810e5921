"""The POST code port."""

from __future__ import annotations

from pyvmm.devices.port80 import Port80


def test_last_code_and_history() -> None:
    port = Port80()
    assert port.read(0, 1) == 0
    for code in (0x01, 0x7F, 0xAA):
        port.write(0, 1, code)
    assert port.read(0, 1) == port.last == 0xAA
    assert list(port.history) == [0x01, 0x7F, 0xAA]
    assert port.count == 3


def test_history_is_bounded_and_keeps_the_latest() -> None:
    port = Port80(history=4)
    for code in range(200):
        port.write(0, 1, code)
    assert list(port.history) == [196, 197, 198, 199]
    assert port.count == 200


def test_reset_keeps_the_history() -> None:
    port = Port80()
    port.write(0, 1, 0x42)
    port.reset()
    assert port.read(0, 1) == 0
    assert list(port.history) == [0x42]


def test_save_and_load() -> None:
    port, other = Port80(), Port80()
    port.write(0, 1, 1)
    port.write(0, 1, 2)
    other.write(0, 1, 9)
    other.load(port.save())
    assert (other.last, list(other.history), other.count) == (2, [1, 2], 2)
