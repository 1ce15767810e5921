"""What a text screen says as lines, and what draws it: checked against a small terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.screen import BLANK, COLUMNS, FRAME_BYTES, ROWS, Frame, draw

SEQUENCE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|([^\x1b])", re.S)


class SmallTerminal:
    """Characters and colours by place, from the few sequences of ECMA-48 that draw sends."""

    def __init__(self) -> None:
        self.cells = {(row, column): ("#", "?") for row in range(ROWS) for column in range(COLUMNS)}
        self.row = self.column = 0
        self.colour = "?"
        self.cursor = True

    def take(self, data: bytes) -> None:
        text = data.decode()
        at = 0
        while at < len(text):
            found = SEQUENCE.match(text, at)
            assert found, text[at : at + 20]
            at = found.end()
            private, numbers, final, character = found.groups()
            if character:
                self.cells[self.row, self.column] = (character, self.colour)
                self.column += 1
            elif final == "H":
                self.row, self.column = (int(n) - 1 for n in numbers.split(";"))
            elif final == "m":
                self.colour = numbers
            elif final == "J":
                self.cells = dict.fromkeys(self.cells, (" ", "0"))
            else:
                assert (private, numbers) == ("?", "25")
                self.cursor = final == "h"

    def lines(self) -> list[str]:
        return ["".join(self.cells[row, column][0] for column in range(COLUMNS)).rstrip() for row in range(ROWS)]


def frame(text: str = "", attribute: int = 7, cursor: tuple[int, int] | None = None, blink: bool = True) -> Frame:
    lines = text.split("\n")
    cells = b"".join(line.ljust(COLUMNS).encode("cp437") for line in lines).ljust(FRAME_BYTES // 2)
    return Frame(b"".join(bytes((c, attribute)) for c in cells), cursor, blink)


def test_lines() -> None:
    assert BLANK.lines() == [""] * ROWS
    shown = frame("one\n\n  three  ")
    assert shown.lines() == ["one", "", "  three", *[""] * 22]
    assert Frame(bytes(FRAME_BYTES)).lines() == [""] * ROWS  # memory as it comes up


def test_code_page_437() -> None:
    """IBM's character set: its picture of the codes below 0x20 and of 0x7f, line drawing, Greek."""
    codes = bytes((0x01, 0x03, 0x0D, 0x1A, 0x1B, 0x7F, 0xB3, 0xC9, 0xCD, 0xDB, 0xE4, 0xFE, 0x00, 0x41))
    cells = b"".join(bytes((code, 7)) for code in codes).ljust(FRAME_BYTES, b"\0")
    assert Frame(cells).lines()[0] == "☺♥♪→←⌂│╔═█Σ■ A"
    terminal = SmallTerminal()
    terminal.take(draw(None, Frame(cells)))
    assert terminal.lines()[0] == "☺♥♪→←⌂│╔═█Σ■ A"
    every = b"".join(bytes((code, 7)) for code in range(256)).ljust(FRAME_BYTES, b"\0")
    drawn = draw(None, Frame(every)).decode()
    assert all(character.isprintable() or character == "\x1b" for character in drawn)  # nothing a guest can do with it


@pytest.mark.parametrize(
    ("attribute", "blink", "sgr"),
    [
        (0x07, True, "0"),
        (0x1F, True, "0;97;44"),
        (0x4E, True, "0;93;41"),
        (0x20, True, "0;30;42"),
        (0x87, True, "0;37;40;5"),
        (0x87, False, "0;37;100"),
        (0xF1, False, "0;34;107"),
    ],
)
def test_colours(attribute: int, blink: bool, sgr: str) -> None:
    """VGA's blue is bit 0 and its red bit 2; SGR has them the other way round (ECMA-48, 8.3.117)."""
    terminal = SmallTerminal()
    terminal.take(draw(None, frame("x", attribute, blink=blink)))
    assert terminal.cells[0, 0] == ("x", sgr)


def test_only_what_differs_is_drawn() -> None:
    assert draw(frame("one\ntwo"), frame("one\ntwo")) == b""
    drawn = draw(frame("one\ntwo"), frame("one\ntWo"))
    assert drawn == b"\x1b[?25l\x1b[2;2H\x1b[0mW\x1b[0m"
    assert draw(frame("a", cursor=(0, 0)), frame("a", cursor=(3, 4))) == b"\x1b[?25l\x1b[4;5H\x1b[?25h"
    assert draw(frame("a", cursor=(0, 0)), frame("a")) == b"\x1b[?25l"


CELLS = st.lists(st.sampled_from([b"A\x07", b"B\x07", b" \x07", b"\0\0", b" \x1f", b"A\x9e"]), min_size=40, max_size=40)
FRAMES = st.builds(
    lambda cells, cursor, blink: Frame(b"".join(cells * (FRAME_BYTES // 80)), cursor, blink),
    CELLS,
    st.none() | st.tuples(st.integers(0, ROWS - 1), st.integers(0, COLUMNS - 1)),
    st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(FRAMES, min_size=1, max_size=4))
def test_a_terminal_that_follows_shows_the_last_frame(frames: list[Frame]) -> None:
    followed, fresh = SmallTerminal(), SmallTerminal()
    before = None
    for each in frames:
        followed.take(draw(before, each))
        before = each
    fresh.take(draw(None, frames[-1]))
    assert followed.cells == fresh.cells
    assert followed.lines() == frames[-1].lines()
    assert followed.cursor == fresh.cursor == (frames[-1].cursor is not None)
    if frames[-1].cursor is not None:
        assert (followed.row, followed.column) == frames[-1].cursor
