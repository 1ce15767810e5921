"""The registers of a VGA in text mode (IBM VGA/XGA Technical Reference, chapter 2), and what is then on the screen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.vga_text import FRAME_NS, MEMORY_BYTES, VgaText


class Bench:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.memory = bytearray(MEMORY_BYTES)
        self.vga = VgaText(lambda: bytes(self.memory), self.clock)
        self.pio = AddressSpace("pio", 1 << 16)
        self.pio.map(0x3C0, 32, self.vga)
        self.pio.map(0x3B0, 12, self.vga, read=self.vga.read_mono, write=self.vga.write_mono)

    def inb(self, port: int) -> int:
        return self.pio.read(port, 1)

    def outb(self, port: int, value: int) -> None:
        self.pio.write(port, 1, value)

    def put(self, port: int, index: int, value: int) -> None:
        """Index and data in one word, as most programs do it."""
        self.pio.write(port, 2, value << 8 | index)

    def get(self, port: int, index: int) -> int:
        self.outb(port, index)
        return self.inb(port + 1)

    def print(self, cell: int, text: str) -> None:
        for n, character in enumerate(text.encode("cp437")):
            at = 2 * (cell + n) % MEMORY_BYTES
            self.memory[at : at + 2] = bytes((character, 7))

    def attribute(self, index: int) -> int:
        self.inb(0x3DA)
        self.outb(0x3C0, index | 0x20)
        value = self.inb(0x3C1)
        self.inb(0x3DA)
        return value


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_comes_up_in_mode_3(bench: Bench) -> None:
    """As the VGA BIOS leaves it: 80 columns, cursor on lines 13 and 14, colour addresses, blinking."""
    assert bench.inb(0x3CC) == 0x67
    assert [bench.get(0x3D4, n) for n in (0x01, 0x09, 0x0A, 0x0B, 0x12, 0x13)] == [0x4F, 0x4F, 0x0D, 0x0E, 0x8F, 0x28]
    assert [bench.get(0x3C4, n) for n in range(5)] == [3, 0, 3, 0, 2]
    assert bench.get(0x3CE, 6) == 0x0E
    assert bench.attribute(0x10) == 0x0C
    assert bench.vga.cursor == (0, 0)
    assert bench.vga.lines() == [""] * 25


def test_lines_are_those_of_text_memory(bench: Bench) -> None:
    bench.print(0, "first")
    bench.print(80 * 24 + 75, "last!")
    assert bench.vga.lines()[0] == "first"
    assert bench.vga.lines()[24] == " " * 75 + "last!"


def test_start_address_scrolls_and_wraps(bench: Bench) -> None:
    for line in range(205):  # 204.8 fit
        bench.print(80 * line, f"line {line} ".ljust(80))
    bench.put(0x3D4, 0x0C, 800 >> 8)
    bench.put(0x3D4, 0x0D, 800 & 0xFF)
    assert bench.vga.lines()[0] == "line 10"
    start = 16384 - 40
    bench.print(start, "the end of memory".ljust(40) + "and its beginning".ljust(40))
    bench.put(0x3D4, 0x0C, start >> 8)
    bench.put(0x3D4, 0x0D, start & 0xFF)
    assert bench.vga.lines()[0] == "the end of memory".ljust(40) + "and its beginning"


def test_offset_register_gives_the_length_of_a_line(bench: Bench) -> None:
    bench.put(0x3D4, 0x13, 50)
    bench.print(100, "second")
    assert bench.vga.lines()[1] == "second"


def test_cursor(bench: Bench) -> None:
    bench.put(0x3D4, 0x0E, 2)
    bench.put(0x3D4, 0x0F, 3)  # 0x203 is row 6, column 35
    assert bench.vga.cursor == (6, 35)
    bench.put(0x3D4, 0x0D, 80)
    assert bench.vga.cursor == (5, 35)  # relative to what is shown
    bench.put(0x3D4, 0x0D, 0)
    bench.put(0x3D4, 0x0A, 0x2D)  # off
    assert bench.vga.cursor is None
    bench.put(0x3D4, 0x0A, 0x0F)  # begins below its end: not shown
    assert bench.vga.cursor is None
    bench.put(0x3D4, 0x0A, 0)
    assert bench.vga.cursor == (6, 35)
    bench.put(0x3D4, 0x0E, 0xFF)
    assert bench.vga.cursor is None


def test_crtc_registers_read_back_and_0_to_7_are_protected(bench: Bench) -> None:
    bench.put(0x3D4, 0x00, 0x12)
    bench.put(0x3D4, 0x07, 0x0F)  # of this one the line compare bit can always be written
    assert (bench.get(0x3D4, 0), bench.get(0x3D4, 7)) == (0x5F, 0x0F)
    bench.put(0x3D4, 0x11, bench.get(0x3D4, 0x11) & 0x7F)
    bench.put(0x3D4, 0x00, 0x12)
    assert bench.get(0x3D4, 0) == 0x12
    bench.put(0x3D4, 0x0F, 0x99)
    assert bench.get(0x3D4, 0x0F) == 0x99
    assert bench.inb(0x3D4) == 0x0F


def test_the_register_says_which_addresses_answer(bench: Bench) -> None:
    """Miscellaneous output register, bit 0: 0x3dx, or 0x3bx."""
    assert [bench.inb(0x3B0 + n) for n in (4, 5, 10)] == [0xFF] * 3
    bench.put(0x3B4, 0x0F, 0x55)
    assert bench.get(0x3D4, 0x0F) == 0
    bench.outb(0x3C2, 0x66)
    assert [bench.inb(0x3D0 + n) for n in (4, 5, 10)] == [0xFF] * 3
    bench.put(0x3B4, 0x0F, 0x55)
    assert bench.get(0x3B4, 0x0F) == 0x55
    assert bench.vga.cursor == (1, 5)
    assert bench.inb(0x3BA) & ~9 == 0


def test_attribute_controller_takes_index_and_data_in_turn(bench: Bench) -> None:
    bench.inb(0x3DA)
    bench.outb(0x3C0, 0x30)
    bench.outb(0x3C0, 0x04)  # mode control: bright backgrounds in place of blinking
    assert bench.attribute(0x10) == 0x04
    assert not bench.vga.frame().blink
    bench.outb(0x3C0, 0x30)
    bench.inb(0x3DA)  # after this an index again
    bench.outb(0x3C0, 0x32)
    bench.outb(0x3C0, 0x0F)
    assert (bench.attribute(0x10), bench.attribute(0x12)) == (0x04, 0x0F)


def test_palette_is_written_while_the_screen_is_off(bench: Bench) -> None:
    """Attribute address register, bit 5: internal palette address source."""
    for index, written in ((0x21, 1), (0x01, 0x3F)):
        bench.inb(0x3DA)
        bench.outb(0x3C0, index)
        bench.outb(0x3C0, 0x3F)
        assert bench.attribute(1) == written


def test_dac(bench: Bench) -> None:
    bench.outb(0x3C8, 5)
    for value in (0x10, 0x20, 0xFF, 0x01):
        bench.outb(0x3C9, value)
    assert bench.inb(0x3C7) == 0
    bench.outb(0x3C7, 5)
    assert bench.inb(0x3C7) == 3
    assert [bench.inb(0x3C9) for _ in range(4)] == [0x10, 0x20, 0x3F, 0x01]
    bench.outb(0x3C8, 0xFF)
    for value in (1, 2, 3, 4):  # goes on at colour 0
        bench.outb(0x3C9, value)
    bench.outb(0x3C7, 0)
    assert bench.inb(0x3C9) == 4


def test_retrace_comes_and_goes(bench: Bench) -> None:
    """Input status 1: bit 3 in vertical retrace, bit 0 whenever nothing is shown."""
    seen = set()
    edges = 0
    before = 0
    for _ in range(2 * FRAME_NS // 5_000):
        status = bench.inb(0x3DA)
        seen.add(status)
        edges += (status & 8) > before
        before = status & 8
        bench.clock.step(5_000)
    assert seen == {0, 1, 9}
    assert edges == 2


@pytest.mark.parametrize(("port", "index", "value"), [(0x3C4, 1, 0x20), (0x3CE, 6, 0x05)], ids=["off", "graphics"])
def test_nothing_is_shown(bench: Bench, port: int, index: int, value: int) -> None:
    bench.print(0, "hidden")
    before = bench.get(port, index)
    bench.put(port, index, value)
    assert bench.vga.lines()[0] == ""
    bench.put(port, index, before)
    assert bench.vga.lines()[0] == "hidden"


@pytest.mark.parametrize("act", [VgaText.reset, VgaText.wake])
def test_reset_keeps_the_memory(bench: Bench, act: Callable[[VgaText], None]) -> None:
    bench.print(0, "stays")
    bench.put(0x3D4, 0x0D, 7)
    bench.outb(0x3C2, 0)
    act(bench.vga)
    assert bench.vga.lines()[0] == "stays"
    assert bench.inb(0x3CC) == 0x67


def test_saved_state(bench: Bench) -> None:
    bench.put(0x3D4, 0x0F, 42)
    bench.put(0x3C4, 2, 1)
    bench.outb(0x3C0, 0x13)
    bench.outb(0x3C8, 9)
    bench.outb(0x3C9, 33)
    other = Bench()
    other.vga.load(bench.vga.save())
    other.vga.after_load()
    assert other.vga.save() == bench.vga.save()
    assert other.vga.cursor == (0, 42)


def test_every_port_takes_everything(bench: Bench) -> None:
    for port in (*range(0x3B0, 0x3BC), *range(0x3C0, 0x3E0)):
        for value in range(256):
            bench.outb(port, value)
            assert 0 <= bench.inb(port) <= 0xFF
            assert len(bench.vga.lines()) == 25
        bench.vga.reset()
