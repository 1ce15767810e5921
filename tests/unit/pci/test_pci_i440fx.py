"""The host bridge: what it says it is, and who answers from 0xa0000 to 1 MiB."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pci_bench import COMMAND, HOST, INITIAL_LAYOUT, Board

PAM0, SMRAM = 0x59, 0x72
D_OPEN, D_CLS, D_LCK, G_SMRAME = 0x40, 0x20, 0x10, 0x08
KINDS = ["rom", "ram-ro", "rom-wram", "ram-rw"]


@pytest.fixture
def board() -> Board:
    return Board()


def test_power_on(board: Board) -> None:
    # The defaults of the data sheet's register table.
    assert board.get(HOST, 0) == 0x1237_8086
    assert board.get(HOST, COMMAND) == 0x0280_0006
    assert board.get(HOST, 8) == 0x0600_0002
    assert board.config(HOST)[PAM0 : PAM0 + 7] == bytes(7)
    assert board.config(HOST)[0x60:0x68] == b"\x01" * 8
    assert board.get(HOST, SMRAM, 1) == 0x02
    assert board.bridge.segments() == INITIAL_LAYOUT
    assert board.layouts == []


def test_it_is_always_a_bus_master_and_decodes_memory(board: Board) -> None:
    board.set(HOST, COMMAND, 0, 2)
    assert board.get(HOST, COMMAND, 2) == 0x0006


def area(nibble: int) -> tuple[int, int]:
    """Of PAM's thirteen areas, by nibble counted from PAM0's high one."""
    return (0xF0000, 0x10000) if nibble == 0 else (0xC0000 + 0x4000 * (nibble - 1), 0x4000)


@pytest.mark.parametrize("nibble", range(13))
@pytest.mark.parametrize("value", [1, 2, 3])
def test_each_area_by_its_nibble(board: Board, nibble: int, value: int) -> None:
    register, shift = PAM0 + (nibble + 1) // 2, 4 * ((nibble + 1) % 2)
    board.set(HOST, register, value << shift, 1)
    gpa, size = area(nibble)
    assert board.layouts == [board.bridge.segments()]
    assert (gpa, size, KINDS[value]) in board.layouts[-1]
    others = [segment for segment in board.layouts[-1] if segment[0] != gpa]
    assert {kind for _, _, kind in others} == {"mmio", "rom"}
    board.set(HOST, register, 0, 1)
    assert board.layouts[-1] == INITIAL_LAYOUT
    assert len(board.layouts) == 2


@given(st.lists(st.tuples(st.integers(PAM0, SMRAM), st.integers(0, 255))))
def test_segments_cover_everything_once_and_neighbours_differ(writes: list[tuple[int, int]]) -> None:
    board = Board()
    for register, value in writes:
        before = board.bridge.segments(), len(board.layouts)
        board.set(HOST, register, value, 1)
        segments = board.bridge.segments()
        assert len(board.layouts) - before[1] == (segments != before[0])
        at = 0xA0000
        for gpa, size, _ in segments:
            assert gpa == at
            at += size
        assert at == 0x100000
        kinds = [kind for _, _, kind in segments]
        assert all(a != b for a, b in itertools.pairwise(kinds))
        for nibble in range(13):
            pam = board.get(HOST, PAM0 + (nibble + 1) // 2, 1) >> 4 * ((nibble + 1) % 2)
            kind = next(kind for gpa, size, kind in segments if gpa <= area(nibble)[0] < gpa + size)
            assert kind == KINDS[pam & 3]


def test_reserved_bits_stay_zero(board: Board) -> None:
    for register in range(PAM0, PAM0 + 7):
        board.set(HOST, register, 0xFF, 1)
    assert board.config(HOST)[PAM0 : PAM0 + 7] == bytes([0x30] + [0x33] * 6)


def test_one_dword_is_one_change(board: Board) -> None:
    board.set(HOST, 0x5C, 0x3333_3333)
    assert len(board.layouts) == 1
    assert board.layouts[0] == [
        (0xA0000, 0x20000, "mmio"),
        (0xC0000, 0x10000, "rom"),
        (0xD0000, 0x20000, "ram-rw"),
        (0xF0000, 0x10000, "rom"),
    ]


def test_smram_opens_and_closes(board: Board) -> None:
    board.set(HOST, SMRAM, 0x02 | D_OPEN | G_SMRAME, 1)
    assert board.layouts[-1][0] == (0xA0000, 0x20000, "ram-rw")
    board.set(HOST, SMRAM, 0x02 | G_SMRAME, 1)
    assert board.layouts[-1] == INITIAL_LAYOUT


@pytest.mark.parametrize("how", [D_LCK, D_LCK | D_OPEN])
def test_smram_lock(board: Board, how: int) -> None:
    board.set(HOST, SMRAM, D_OPEN, 1)
    assert len(board.layouts) == 1
    board.set(HOST, SMRAM, how, 1)
    assert board.get(HOST, SMRAM, 1) == 0x02 | D_LCK
    assert board.layouts[1:] == [INITIAL_LAYOUT]
    board.set(HOST, SMRAM, D_OPEN | G_SMRAME, 1)
    board.set(HOST, 0x70, D_OPEN << 16)
    assert board.get(HOST, SMRAM, 1) & (D_OPEN | D_LCK) == D_LCK
    assert len(board.layouts) == 2
    state = board.bridge.save()
    board.bridge.reset()
    assert board.get(HOST, SMRAM, 1) == 0x02
    board.set(HOST, SMRAM, D_OPEN, 1)
    assert board.layouts[-1][0][2] == "ram-rw"
    board.bridge.load(state)  # the lock comes with the state
    board.bridge.after_load()
    assert board.layouts[-1] == INITIAL_LAYOUT
    board.set(HOST, SMRAM, D_OPEN, 1)
    assert board.layouts[-1] == INITIAL_LAYOUT


def test_reset_brings_the_rom_back(board: Board) -> None:
    board.bridge.post_firmware()
    assert board.layouts == [[(0xA0000, 0x20000, "mmio"), (0xC0000, 0x40000, "ram-rw")]]
    board.bridge.reset()
    assert board.layouts[1:] == [INITIAL_LAYOUT]
    board.bridge.reset()
    assert len(board.layouts) == 2
