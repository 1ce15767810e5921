"""A text screen on a terminal: drawn when it is shown, again when it has changed, never while it is not."""

from __future__ import annotations

from test_screen import SmallTerminal, frame

from pyvmm.clock import VirtualClock
from pyvmm.screen import ENTER, LEAVE, Frame
from pyvmm.terminal_screen import REFRESH_NS, TerminalScreen


class Bench:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.frame = frame("one")
        self.typed = b""
        self.sent: list[bytes] = []
        self.screen = TerminalScreen(self.look, self.clock, self.type)

    def look(self) -> Frame:
        return self.frame

    def type(self, data: bytes) -> None:
        self.typed += data


def test_it_is_drawn_as_long_as_it_is_shown() -> None:
    bench = Bench()
    terminal = SmallTerminal()
    bench.screen.refresh()
    bench.clock.step(10 * REFRESH_NS)
    assert bench.sent == []
    bench.screen.show(bench.sent.append)
    assert bench.sent[0] == ENTER
    terminal.take(b"".join(bench.sent[1:]))
    assert terminal.lines()[0] == "one"
    bench.sent.clear()
    bench.clock.step(10 * REFRESH_NS)
    assert bench.sent == []  # nothing has changed
    bench.frame = frame("one\ntwo")
    bench.clock.step(REFRESH_NS)
    terminal.take(b"".join(bench.sent))
    assert terminal.lines()[:2] == ["one", "two"]
    bench.sent.clear()
    bench.screen.hide()
    assert bench.sent == [LEAVE]
    bench.frame = frame("three")
    bench.clock.step(10 * REFRESH_NS)
    assert bench.sent == [LEAVE]
    assert bench.clock.next_deadline_ns is None
    bench.sent.clear()
    bench.screen.show(bench.sent.append)
    terminal.take(b"".join(bench.sent[1:]))
    assert terminal.lines()[:2] == ["three", ""]


def test_what_was_written_last_is_drawn_before_it_goes() -> None:
    bench = Bench()
    bench.screen.show(bench.sent.append)
    bench.sent.clear()
    bench.frame = frame("one!")
    bench.screen.hide()
    assert b"!" in bench.sent[0] and bench.sent[-1] == LEAVE


def test_keys_and_last_words() -> None:
    bench = Bench()
    bench.screen.type(b"abc")
    assert bench.typed == b"abc"
    assert bench.screen.last_words() == b"one\n"
    bench.frame = frame("\n  two  \n")
    assert bench.screen.last_words() == b"\n  two\n"
    bench.frame = frame()
    assert bench.screen.last_words() == b""


def test_a_terminal_that_does_not_keep_up_gets_the_last_frame_later() -> None:
    bench = Bench()
    ready = True
    bench.screen = TerminalScreen(bench.look, bench.clock, bench.type, lambda: ready)
    bench.screen.show(bench.sent.append)
    terminal = SmallTerminal()
    terminal.take(b"".join(bench.sent[1:]))
    bench.sent.clear()
    ready = False
    for n in range(10):
        bench.frame = frame(f"line {n}")
        bench.clock.step(REFRESH_NS)
    assert bench.sent == []
    ready = True
    bench.clock.step(REFRESH_NS)
    terminal.take(b"".join(bench.sent))
    assert terminal.lines()[0] == "line 9"
