"""A text screen as VGA shows one, 25 lines of 80 characters with their colours, and what draws it on a terminal.

``draw`` is a pure function: from two frames to the bytes that turn what shows the first into what shows the second.
Control sequences are those of ECMA-48 (CUP 8.3.21, SGR 8.3.117, ED 8.3.39) and DEC's private modes 25 and 1049.
"""

from __future__ import annotations

ROWS = 25
COLUMNS = 80
CELL_BYTES = 2  # character, attribute
ROW_BYTES = COLUMNS * CELL_BYTES
FRAME_BYTES = ROWS * ROW_BYTES

PLAIN = 0x07  # light grey on black: what a terminal shows without being told
BLINK = 0x80
BLANKS = b"\x00 \xff"  # characters of code page 437 that show nothing
PLAIN_BLANK = bytes((0x20, PLAIN))

# VGA's colours in ECMA-48's order: there bit 0 is red, here it is blue.
COLOURS = (0, 4, 2, 6, 1, 5, 3, 7)
# What code page 437 shows for the codes that its codec takes for control characters.
GLYPHS = dict(enumerate(" ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼")) | {0x7F: "⌂", 0xA0: " "}

HIDE_CURSOR = b"\x1b[?25l"
SHOW_CURSOR = b"\x1b[?25h"
CLEAR = b"\x1b[0m\x1b[2J"
ENTER = b"\x1b[?1049h"  # the terminal's other screen
LEAVE = b"\x1b[0m\x1b[?25h\x1b[?1049l"


class Frame:
    """``cells``: FRAME_BYTES, a character of code page 437 and its attribute each. ``cursor``: (row, column) or None.

    ``blink``: the attribute's highest bit means that, not a bright background.
    """

    __slots__ = ("blink", "cells", "cursor")

    def __init__(self, cells: bytes, cursor: tuple[int, int] | None = None, blink: bool = True) -> None:
        self.cells = cells
        self.cursor = cursor
        self.blink = blink

    def row(self, n: int) -> bytes:
        return self.cells[n * ROW_BYTES : (n + 1) * ROW_BYTES]

    def lines(self) -> list[str]:
        """The characters of each line, without the blanks at its end."""
        return [text(self.row(n)[::CELL_BYTES]).rstrip() for n in range(ROWS)]

    def same(self, other: Frame) -> bool:
        """Whether both show the same."""
        return (self.cells, self.cursor, self.blink) == (other.cells, other.cursor, other.blink)


BLANK = Frame(PLAIN_BLANK * (ROWS * COLUMNS))


def text(characters: bytes) -> str:
    """Characters of code page 437 as a terminal shows them."""
    return characters.decode("cp437").translate(GLYPHS)


def draw(before: Frame | None, after: Frame) -> bytes:
    """What to send to a terminal that shows ``before``; None: it may show anything."""
    out = bytearray()
    if before is None:
        out += CLEAR
        before = BLANK
        moved = True
    else:
        moved = before.cursor != after.cursor
    for n in range(ROWS):
        old, new = before.row(n), after.row(n)
        if old != new or before.blink != after.blink:
            out += draw_row(n, plain_blanks(old), plain_blanks(new), after.blink, before.blink != after.blink)
    if not (out or moved):
        return b""
    if after.cursor is None:
        return HIDE_CURSOR + out
    return HIDE_CURSOR + out + goto(*after.cursor) + SHOW_CURSOR


def plain_blanks(row: bytes) -> bytes:
    """The row with all that shows as an empty black cell made one: most of a screen."""
    cells = bytearray(row)
    for at in range(0, ROW_BYTES, CELL_BYTES):
        if cells[at] in BLANKS and not cells[at + 1] & 0x70:
            cells[at : at + CELL_BYTES] = PLAIN_BLANK
    return bytes(cells)


def draw_row(n: int, old: bytes, new: bytes, blink: bool, everything: bool) -> bytes:
    """From the first cell that differs to the last."""
    changed = [at for at in range(0, ROW_BYTES, CELL_BYTES) if everything or old[at : at + 2] != new[at : at + 2]]
    if not changed:
        return b""
    first, end = changed[0], changed[-1] + CELL_BYTES
    out = bytearray(goto(n, first // CELL_BYTES))
    at = first
    while at < end:
        attribute, start = new[at + 1], at
        while at < end and new[at + 1] == attribute:
            at += CELL_BYTES
        out += colours(attribute, blink) + text(new[start:at:CELL_BYTES]).encode()
    return bytes(out) + b"\x1b[0m"


def goto(row: int, column: int) -> bytes:
    return b"\x1b[%d;%dH" % (row + 1, column + 1)


def colours(attribute: int, blink: bool) -> bytes:
    """SGR for a VGA attribute: foreground in bits 3 to 0, background in 6 to 4, bit 7 as ``blink`` says."""
    if attribute == PLAIN:
        return b"\x1b[0m"
    fore = (90 if attribute & 0x08 else 30) + COLOURS[attribute & 7]
    back = (100 if attribute & BLINK and not blink else 40) + COLOURS[attribute >> 4 & 7]
    return b"\x1b[0;%d;%d%sm" % (fore, back, b";5" if attribute & BLINK and blink else b"")
