"""The ISA bridge's interrupt routing, and the IDE function's BAR and timing registers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pci_bench import BAR4, COMMAND, IDE, IO, ISA, MASTER, MEMORY, Board

PIRQRC, OFF = 0x60, 0x80
ROUTABLE = {3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15}


@pytest.fixture
def board() -> Board:
    return Board()


def test_power_on(board: Board) -> None:
    assert board.get(ISA, 0) == 0x7000_8086
    assert board.get(ISA, 4) == 0x0200_0007
    assert board.get(ISA, 8) == 0x0601_0000
    assert board.get(ISA, PIRQRC) == 0x8080_8080
    assert board.get(ISA, 0x4C, 1) == 0x4D
    assert board.get(IDE, 0) == 0x7010_8086
    assert board.get(IDE, 4) == 0x0280_0000
    assert board.get(IDE, 8) == 0x0101_8000
    assert board.get(IDE, BAR4) == 1
    assert board.get(IDE, 0x40) == 0


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_routes(board: Board) -> None:
    for n, irq in enumerate((10, 10, 11, 5)):
        board.set(ISA, PIRQRC + n, irq, 1)
    for slot in range(1, 32):
        for pin in range(4):
            board.set_pin(slot, pin, 1)
            assert board.up() == {(10, 10, 11, 5)[(slot - 1 + pin) % 4]}
            board.set_pin(slot, pin, 0)
            assert board.up() == set()


def test_an_interrupt_is_the_or_of_all_that_reach_it(board: Board) -> None:
    board.set(ISA, PIRQRC, 0x0B0B_0A0A)
    for slot, pin in ((1, 0), (5, 0), (1, 1)):  # PIRQA twice, PIRQB
        board.set_pin(slot, pin, 1)
    for slot, pin, left in ((1, 0, {10}), (1, 1, {10}), (5, 0, set())):
        board.set_pin(slot, pin, 0)
        assert board.up() == left


def test_a_line_that_is_up_follows_its_route(board: Board) -> None:
    board.set_pin(2, 0, 1)  # PIRQB
    assert board.up() == set()
    board.set(ISA, PIRQRC + 1, 11, 1)
    assert board.up() == {11}
    board.set(ISA, PIRQRC + 1, 9, 1)
    assert board.up() == {9}
    board.set(ISA, PIRQRC + 1, OFF | 9, 1)
    assert board.up() == set()


def test_reserved_interrupts_route_nowhere(board: Board) -> None:
    board.set_pin(1, 0, 1)
    for irq in range(16):
        board.set(ISA, PIRQRC, irq, 1)
        assert board.up() == {irq} & ROUTABLE
        assert board.isa.route(0) == (irq if irq in ROUTABLE else None)


@given(st.lists(st.one_of(
    st.tuples(st.just("pin"), st.integers(0, 31), st.integers(0, 3), st.integers(0, 1)),
    st.tuples(st.just("route"), st.integers(0, 3), st.integers(0, 255), st.just(0)),
)))  # fmt: skip
def test_levels_against_a_model(steps: list[tuple[str, int, int, int]]) -> None:
    board, pins = Board(), set()
    for what, a, b, level in steps:
        if what == "pin":
            board.set_pin(a, b, level)
            (pins.add if level else pins.discard)((a, b))
        else:
            board.set(ISA, PIRQRC + a, b, 1)
        routes = board.config(ISA)[PIRQRC : PIRQRC + 4]
        up = {routes[(slot + pin + 3) % 4] for slot, pin in pins}
        assert board.up() == up & ROUTABLE
    # The functions bring the levels of their pins, before the router's state or after it.
    other = Board()
    for n, (slot, pin) in enumerate(sorted(pins)):
        if n == len(pins) // 2:
            other.isa.load(board.isa.save())
        other.set_pin(slot, pin, 1)
    other.isa.load(board.isa.save())
    other.isa.after_load()
    assert other.up() == board.up()
    for slot, pin in pins:
        other.set_pin(slot, pin, 0)
    assert other.up() == set()


def test_reset_unroutes_and_keeps_what_devices_drive(board: Board) -> None:
    board.isa.post_firmware((10, 10, 11, 11))
    board.set_pin(1, 0, 1)
    assert board.up() == {10}
    board.isa.reset()
    assert board.up() == set()
    board.isa.post_firmware((10, 10, 11, 11))
    assert board.up() == {10}


# -- IDE ---------------------------------------------------------------------------------------------------------------


def test_the_bus_masters_are_at_bar_4(board: Board) -> None:
    board.set(IDE, BAR4, 0xC000)
    assert board.pio.read(0xC000, 4) == 0xFFFF_FFFF
    board.set(IDE, COMMAND, IO, 2)
    assert [board.pio.read(0xC000 + n, 4) for n in (0, 8, 16)] == [0x1111_1111, 0x2222_2222, 0xFFFF_FFFF]
    board.pio.write(0xC00C, 4, 0x0012_3456)
    assert board.channels[1].bus_master.data[4:] == bytes.fromhex("56341200")
    board.set(IDE, BAR4, 0xFF00)
    assert board.mapped() == {"ide0.bus_master": 0xFF00, "ide1.bus_master": 0xFF08}
    board.set(IDE, BAR4, 0xFFFF_FFFF)
    assert board.get(IDE, BAR4) == 0xFFFF_FFF1
    assert board.mapped() == {}


def test_what_drivers_enable_reads_back(board: Board) -> None:
    """QEMU's libqos (qpci_device_enable) sets all three and looks; nothing decodes memory here."""
    board.set(IDE, COMMAND, 0xFFFF, 2)
    assert board.get(IDE, COMMAND, 2) == IO | MEMORY | MASTER
    board.set(IDE, BAR4, 0xC000)
    board.set(IDE, COMMAND, MEMORY, 2)
    assert board.mapped() == {}


def test_bus_mastering_is_the_channels_business(board: Board) -> None:
    def enabled() -> list[bool]:
        return [channel.bus_master.enabled for channel in board.channels]

    assert enabled() == [False, False]
    board.set(IDE, COMMAND, MASTER, 2)
    assert enabled() == [True, True]
    board.set(IDE, COMMAND, IO, 2)
    assert enabled() == [False, False]
    board.set(IDE, COMMAND, MASTER, 1)
    board.ide.reset()
    assert enabled() == [False, False]


def test_timing_registers_are_kept(board: Board) -> None:
    board.set(IDE, 0x40, 0xA344_8000)
    board.set(IDE, 0x44, 0xFF, 1)
    assert board.get(IDE, 0x40) == 0xA344_8000
    assert board.get(IDE, 0x44) == 0xFF
    board.ide.reset()
    assert (board.get(IDE, 0x40), board.get(IDE, 0x44)) == (0, 0)


def test_post_firmware(board: Board) -> None:
    board.isa.post_firmware((10, 10, 11, 11))
    board.ide.post_firmware(0xC000)
    assert board.get(ISA, PIRQRC) == 0x0B0B_0A0A
    assert board.get(IDE, BAR4) == 0xC001
    assert board.get(IDE, 0x40) == 0x8000_8000
    assert board.mapped() == {"ide0.bus_master": 0xC000, "ide1.bus_master": 0xC008}
