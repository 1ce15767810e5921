"""System control port A."""

from __future__ import annotations

from pyvmm.devices.port92 import Port92


def test_value_can_be_read_back() -> None:
    port = Port92(lambda: None)
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x0E)
    assert port.read(0, 1) == 0x0E


def test_rising_edge_of_bit_0_resets() -> None:
    resets: list[int] = []
    port = Port92(lambda: resets.append(1))
    port.write(0, 1, 0x02)
    assert resets == []
    port.write(0, 1, 0x03)
    port.write(0, 1, 0x01)
    assert resets == [1]
    port.write(0, 1, 0x00)
    port.write(0, 1, 0x01)
    assert resets == [1, 1]


def test_a20_is_told_of_changes_only() -> None:
    seen: list[bool] = []
    port = Port92(lambda: None, seen.append)
    for value in (0, 2, 2, 0x0E, 0):
        port.write(0, 1, value)
    assert seen == [True, False]


def test_reset_arms_the_fast_reset_again_and_keeps_the_gate() -> None:
    resets: list[int] = []
    port = Port92(lambda: resets.append(1))
    port.write(0, 1, 0x03)
    port.reset()
    assert port.read(0, 1) == 0x02
    port.write(0, 1, 0x03)
    assert resets == [1, 1]


def test_save_and_load() -> None:
    port, other = Port92(lambda: None), Port92(lambda: None)
    port.write(0, 1, 0x06)
    other.load(port.save())
    assert other.read(0, 1) == 0x06
