"""Nothing a guest sends piles up in the host: every port flooded with every value, and the watch itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.guest import RESETS, Choices, Guest
from fuzz.harness import FencedBoard
from fuzz.memory_watch import ANONYMOUS_LIMIT_BYTES, BLOCKS_LIMIT, Grown, MemoryWatch, flood

import pyvmm

WRITES = 64


@pytest.fixture
def board(tmp_path: Path) -> Iterator[FencedBoard]:
    made = FencedBoard(tmp_path)
    made.power_up()
    gc.collect()  # what is garbage now must not make up for what grows
    yield made
    made.close()


def ports(board: FencedBoard) -> list[int]:
    return [region.base + offset for region in board.pio.regions for offset in range(region.size)]


def test_no_value_at_any_port_piles_up(board: FencedBoard) -> None:
    for port in ports(board):
        gc.collect()  # empties the lists of spare objects, from which a queue could be made without more blocks
        for value in range(256):
            # Some values there reset the machine each time.
            if port not in RESETS or (port == 0x64 and (value < 0xF0 or value & 1)):
                flood(board.pio, port, 1, value, WRITES)
                board.settle()
    board.check_errors()


def test_no_wide_write_piles_up(board: FencedBoard) -> None:
    for port in ports(board):
        if port not in RESETS and port != 0xCF8:
            for size in (2, 4):
                for value in (0, 0xFFFF_FFFF, 0x2020_2020, 0xD4D4_D4D4):
                    flood(board.pio, port, size, value & (1 << 8 * size) - 1, WRITES)
                    board.settle()
    board.check_errors()


@pytest.mark.parametrize("command", [0x20, 0xAA, 0xAB, 0xA9, 0xC0, 0xD0])
def test_keyboard_controller_commands_whose_answers_nobody_reads(board: FencedBoard, command: int) -> None:
    """As public bug reports have it: 809,000 answers in 8 s."""
    flood(board.pio, 0x64, 1, command, 20_000)


def test_bytes_for_the_keyboard(board: FencedBoard) -> None:
    for value in (0xEE, 0xF2, 0xFF, 0xED, 0x00):
        flood(board.pio, 0x60, 1, value, 20_000)


class Hoarder(pyvmm.Device):
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def write(self, offset: int, size: int, value: int) -> None:
        self.kept.append(object())


def test_a_device_that_keeps_everything_is_noticed(board: FencedBoard) -> None:
    region = board.pio.map(0x5000, 1, Hoarder(), name="hoarder")
    try:
        with pytest.raises(Grown, match="1000 writes of 0x1, 1 bytes at pio 0x5000"):
            flood(board.pio, 0x5000, 1, 1, 1000)
        guest = Guest(board, Choices(1))
        with pytest.raises(Grown, match="300 writes of"):
            for _ in range(1000):
                guest.flood()
    finally:
        board.pio.unmap(region)


def test_the_watch_looks_at_objects_and_at_memory() -> None:
    watch = MemoryWatch()
    watch.look(0)
    watch.look(1000)
    kept: list[Any] = [[n] for n in range(2 * BLOCKS_LIMIT)]
    with pytest.raises(Grown, match="in 2000 accesses"):
        watch.look(2000)
    del kept
    watch = MemoryWatch()
    watch.look(3000)
    # Far more than what earlier tests may have left, which can go between the two looks.
    kept = [b"x" * (6 * ANONYMOUS_LIMIT_BYTES)]
    with pytest.raises(Grown, match="something keeps"):
        watch.look(4000)
    del kept
