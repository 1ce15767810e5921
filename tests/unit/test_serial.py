"""The 16550A, register by register (PC16550D data sheet), and the sequences real drivers rely on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.chardev import CallableChardev, Chardev
from pyvmm.clock import VirtualClock
from pyvmm.devices.serial import Serial
from pyvmm.event_loop import EventLoop
from pyvmm.irq import IrqLine
from pyvmm.terminal import Terminal

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
RDI, THRI, RLSI, MSI = 1, 2, 4, 8  # in IER
LOOP = 0x10
CHAR_9600_NS = 1_041_666  # ten bits: start, eight, stop


class Line(Chardev):
    """A host's side that does exactly what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.accepted = 0
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> None:
        self.sent += data
        self.on_write()

    def accept_input(self) -> None:
        self.accepted += 1

    def type(self, data: bytes) -> None:
        """Deliver at once, room or not: as a real line does."""
        assert self._receive is not None
        self._receive(data)

    def type_politely(self, data: bytes) -> bytes:
        """Deliver what there is room for; the rest."""
        assert self._receive is not None
        while data and (room := self._room()):
            self._receive(data[:room])
            data = data[room:]
        return data

    def send_break(self) -> None:
        assert self._on_break is not None
        self._on_break()

    def drained(self) -> None:
        self.can_write = True
        assert self._on_writable is not None
        self._on_writable()


class Bench:
    def __init__(self, gather_ns: int = 0) -> None:
        self.clock = VirtualClock()
        self.line = Line()
        self.edges: list[int] = []
        self.irq = IrqLine(self.edges.append)
        self.uart = Serial(self.irq, self.line, self.clock, gather_ns=gather_ns)

    def inb(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def outb(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def drain(self) -> bytes:
        """Read RBR while LSR says there is something."""
        got = bytearray()
        while self.inb(LSR) & 1:
            got.append(self.inb(RBR))
        return bytes(got)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def fifo(bench: Bench) -> Bench:
    bench.outb(FCR, 0x01)
    return bench


# -- registers ----------------------------------------------------------------------------------------------

# PC16550D data sheet, 8.1: LCR bits 0 and 1 give the word's length; LCR, and the bits of a byte that a word has.
WORDS = [(0, 0x1F), (1, 0x3F), (2, 0x7F), (3, 0xFF), (0x1C, 0x1F), (0x1A, 0x7F), (0x46, 0x7F)]


@pytest.mark.parametrize(("lcr", "mask"), WORDS)
@pytest.mark.parametrize("fcr", [0, 1])
@pytest.mark.parametrize("gather_ns", [0, 10_000_000])
def test_a_word_has_the_bits_lcr_says(lcr: int, mask: int, fcr: int, gather_ns: int) -> None:
    """Out, in and in loopback: 0xc1 with seven bits is 0x41."""
    bench = Bench(gather_ns)
    bench.outb(FCR, fcr)
    bench.outb(LCR, lcr)
    for byte in (0xC1, 0xFF, 0x00, 0x80):
        bench.line.sent = b""
        bench.outb(THR, byte)
        bench.uart.flush()
        assert bench.line.sent == bytes([byte & mask])
        bench.line.type(bytes([byte]))
        assert bench.drain() == bytes([byte & mask])
        bench.outb(MCR, LOOP)
        bench.outb(THR, byte)
        assert bench.drain() == bytes([byte & mask])
        bench.outb(MCR, 0)
    assert bench.inb(LSR) == 0x60


@pytest.mark.parametrize(("lcr", "mask"), WORDS)
def test_word_length_holds_for_what_waits_for_the_host(fifo: Bench, lcr: int, mask: int) -> None:
    fifo.outb(LCR, lcr)
    fifo.line.can_write = False
    for byte in (0xC1, 0xE2, 0xFF):
        fifo.outb(THR, byte)
    fifo.line.drained()
    assert fifo.line.sent == bytes(byte & mask for byte in (0xC1, 0xE2, 0xFF))


def test_word_length_with_the_thre_interrupt(bench: Bench) -> None:
    bench.outb(LCR, 2)
    bench.outb(IER, THRI)
    assert bench.inb(IIR) & 0x0F == 0x02
    bench.outb(THR, 0xC1)
    assert bench.line.sent == b"A"
    assert bench.irq.level == 1 and bench.inb(IIR) & 0x0F == 0x02


def test_word_length_survives_a_saved_state_and_ends_with_a_reset(bench: Bench) -> None:
    bench.outb(LCR, 2)
    other = Bench()
    other.uart.load(bench.uart.save())
    other.uart.after_load()
    other.outb(THR, 0xC1)
    assert other.line.sent == b"A"
    other.uart.reset()
    # Table I: LCR is zero. Nobody has chosen a length yet, though, and a guest without set-up wants its text.
    assert other.inb(LCR) == 0
    other.outb(THR, 0xC1)
    assert other.line.sent == b"A\xc1"


def test_bytes_gathered_before_the_word_is_shortened_go_out_whole() -> None:
    bench = Bench(10_000_000)
    space = AddressSpace("pio", 1 << 16)
    space.add(0x3F8, bench.uart.region)
    bench.outb(LCR, 3)
    bench.clock.step(1)
    for byte in b"\xc1\xc2\xc3\xc4":
        space.write(0x3F8, 1, byte)
        bench.clock.step(1)
    space.write(0x3F8 + LCR, 1, 2)
    space.write(0x3F8, 1, 0xC5)
    bench.uart.flush()
    assert bench.line.sent == b"\xc1\xc2\xc3\xc4E"


def test_values_after_reset(bench: Bench) -> None:
    assert [bench.inb(n) for n in range(1, 8)] == [0, 0x01, 0, 0x08, 0x60, 0xB0, 0]
    assert bench.inb(RBR) == 0
    assert bench.irq.level == 0 and bench.edges == []


def test_scratch_register(bench: Bench) -> None:
    for value in (0x00, 0xFF, 0xA5):
        bench.outb(SCR, value)
        assert bench.inb(SCR) == value


def test_line_control_is_readable(bench: Bench) -> None:
    bench.outb(LCR, 0x1B)
    assert bench.inb(LCR) == 0x1B


def test_divisor_latch_hides_data_and_interrupt_enable(bench: Bench) -> None:
    bench.outb(IER, 0x05)
    bench.outb(LCR, 0x83)
    assert (bench.inb(DLL), bench.inb(DLM)) == (12, 0)
    bench.outb(DLL, 0x34)
    bench.outb(DLM, 0x12)
    assert (bench.inb(DLL), bench.inb(DLM)) == (0x34, 0x12)
    assert bench.line.sent == b""
    bench.outb(LCR, 0x03)
    assert bench.inb(IER) == 0x05
    bench.outb(THR, 0x41)
    assert bench.line.sent == b"A"


def test_upper_bits_of_ier_and_mcr_are_zero(bench: Bench) -> None:
    bench.outb(IER, 0xF0)
    assert bench.inb(IER) == 0
    bench.outb(MCR, 0xEB)
    assert bench.inb(MCR) == 0x0B


def test_lsr_and_msr_are_read_only(bench: Bench) -> None:
    bench.outb(LSR, 0xFF)
    bench.outb(MSR, 0xFF)
    assert (bench.inb(LSR), bench.inb(MSR)) == (0x60, 0xB0)


def test_fifo_is_shown_in_iir(bench: Bench) -> None:
    assert bench.inb(IIR) == 0x01
    bench.outb(FCR, 0x01)
    assert bench.inb(IIR) == 0xC1
    bench.outb(FCR, 0x00)
    assert bench.inb(IIR) == 0x01


# -- transmitter --------------------------------------------------------------------------------------------


def test_console_output_byte_by_byte(bench: Bench) -> None:
    for byte in b"Linux version":
        assert bench.inb(LSR) & 0x20
        bench.outb(THR, byte)
    assert bench.line.sent == b"Linux version"
    assert bench.inb(LSR) == 0x60
    assert bench.edges == []
    assert bench.uart._thr_open  # by the short way


def test_enabling_thri_raises_it_and_reading_iir_clears_it(bench: Bench) -> None:
    bench.outb(IER, THRI)
    assert bench.irq.level == 1
    assert bench.inb(IIR) == 0x02
    assert bench.irq.level == 0
    assert bench.inb(IIR) == 0x01


def test_writing_ier_again_raises_thri_only_if_it_was_off(bench: Bench) -> None:
    bench.outb(IER, THRI)
    bench.inb(IIR)
    bench.outb(IER, THRI)
    bench.outb(IER, THRI | RDI)
    assert bench.irq.level == 0
    bench.outb(IER, 0)
    bench.outb(IER, THRI)
    assert bench.irq.level == 1
    bench.outb(IER, 0)
    assert bench.irq.level == 0


def test_each_byte_sent_raises_thri_anew(bench: Bench) -> None:
    bench.outb(IER, THRI)
    bench.inb(IIR)
    bench.outb(THR, 0x41)
    assert bench.irq.level == 1
    bench.edges.clear()
    bench.outb(THR, 0x42)  # without a look at IIR: an edge all the same, for an edge-triggered controller
    assert bench.edges == [0, 1]
    assert bench.inb(IIR) == 0x02
    assert bench.line.sent == b"AB"


def test_linux_thre_quirk_test_finds_a_good_uart(bench: Bench) -> None:
    """drivers/tty/serial/8250: the interrupt must come back after IER was 0, and IIR show it at once."""
    bench.outb(IER, THRI)
    first = bench.inb(IIR)
    bench.outb(IER, 0)
    bench.outb(IER, THRI)
    second = bench.inb(IIR)
    bench.outb(IER, 0)
    assert not first & 1 and not second & 1
    bench.outb(IER, THRI)
    lsr, iir = bench.inb(LSR), bench.inb(IIR)
    assert lsr & 0x40 and not iir & 1  # no "transmitter needs a kick"


def test_higher_priority_interrupt_keeps_thri_pending(fifo: Bench) -> None:
    fifo.outb(IER, RDI | THRI)
    fifo.line.type(b"x")
    assert fifo.inb(IIR) == 0xC4
    assert fifo.inb(IIR) == 0xC4  # reading it does not clear received data
    fifo.inb(RBR)
    assert fifo.inb(IIR) == 0xC2
    assert fifo.inb(IIR) == 0xC1


def test_transmitter_holds_back_while_the_host_does_not_keep_up(fifo: Bench) -> None:
    fifo.line.on_write = lambda: setattr(fifo.line, "can_write", False)
    fifo.outb(THR, 0x41)
    assert fifo.inb(LSR) == 0x60  # the first one is on its way
    fifo.outb(THR, 0x42)
    fifo.outb(THR, 0x43)
    assert fifo.inb(LSR) == 0x00
    assert fifo.line.sent == b"A"
    fifo.outb(IER, THRI)
    assert fifo.irq.level == 0
    fifo.line.on_write = lambda: None
    fifo.line.drained()
    assert fifo.line.sent == b"ABC"
    assert fifo.inb(LSR) == 0x60
    assert fifo.irq.level == 1 and fifo.inb(IIR) == 0xC2


def test_short_way_out_is_open_again_after_a_stall(bench: Bench) -> None:
    bench.line.on_write = lambda: setattr(bench.line, "can_write", False)
    bench.outb(THR, 0x41)
    assert not bench.uart._thr_open
    bench.line.drained()
    assert bench.uart._thr_open


def test_overrun_of_the_transmitter_fifo_drops_the_oldest(fifo: Bench) -> None:
    fifo.line.can_write = False
    fifo.outb(MCR, 0x0B)  # makes it look at the line again
    for byte in range(20):
        fifo.outb(THR, byte)
    fifo.line.drained()
    assert fifo.line.sent == bytes(range(4, 20))


def test_without_fifo_only_the_last_byte_waits(bench: Bench) -> None:
    bench.line.can_write = False
    bench.outb(MCR, 0x0B)
    bench.outb(THR, 0x41)
    bench.outb(THR, 0x42)
    bench.line.drained()
    assert bench.line.sent == b"B"


def test_transmitter_fifo_reset_drops_what_waits(fifo: Bench) -> None:
    fifo.line.can_write = False
    fifo.outb(MCR, 0x0B)
    fifo.outb(THR, 0x41)
    assert fifo.inb(LSR) == 0
    fifo.outb(FCR, 0x81)  # another trigger level alone drops nothing
    assert fifo.inb(LSR) == 0
    fifo.outb(FCR, 0x05)
    assert fifo.inb(LSR) == 0x60
    fifo.line.drained()
    assert fifo.line.sent == b""


def test_transmitter_fifo_reset_raises_thri(fifo: Bench) -> None:
    fifo.outb(IER, THRI)
    fifo.inb(IIR)
    fifo.outb(FCR, 0x05)
    assert fifo.irq.level == 1 and fifo.inb(IIR) == 0xC2


def test_what_waits_is_looped_back_when_loopback_begins(fifo: Bench) -> None:
    fifo.line.can_write = False
    fifo.outb(MCR, 0x0B)
    fifo.outb(THR, 0x41)
    fifo.outb(MCR, LOOP)
    assert fifo.drain() == b"A" and fifo.line.sent == b""


# -- receiver -----------------------------------------------------------------------------------------------


def test_one_byte_without_fifo(bench: Bench) -> None:
    bench.outb(IER, RDI)
    bench.line.type(b"x")
    assert bench.inb(LSR) == 0x61
    assert bench.inb(IIR) == 0x04 and bench.irq.level == 1
    assert bench.inb(RBR) == ord("x")
    assert bench.inb(LSR) == 0x60
    assert bench.irq.level == 0


def test_overrun_without_fifo_loses_the_unread_byte(bench: Bench) -> None:
    bench.outb(IER, RLSI)
    bench.line.type(b"ab")
    assert bench.irq.level == 1 and bench.inb(IIR) == 0x06
    assert bench.inb(LSR) == 0x63
    assert bench.irq.level == 0
    assert bench.inb(LSR) == 0x61  # told once
    assert bench.inb(RBR) == ord("b")


def test_overrun_with_fifo_loses_the_new_byte(fifo: Bench) -> None:
    fifo.line.type(bytes(range(16)))
    assert fifo.inb(LSR) == 0x61
    fifo.line.type(b"\xff")
    assert fifo.inb(LSR) == 0x63
    assert fifo.drain() == bytes(range(16))


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_levels(bench: Bench, fcr: int, level: int) -> None:
    bench.outb(FCR, fcr)
    bench.outb(IER, RDI)
    bench.line.type(bytes(level - 1))
    assert bench.irq.level == 0
    bench.line.type(b"x")
    assert bench.irq.level == 1 and bench.inb(IIR) == 0xC4
    bench.inb(RBR)
    assert bench.irq.level == 0  # below the level again


def test_character_timeout_after_four_characters_time(bench: Bench) -> None:
    bench.outb(FCR, 0x81)
    bench.outb(LCR, 0x03)
    bench.outb(IER, RDI)
    bench.line.type(b"ab")
    bench.clock.step(4 * CHAR_9600_NS - 10)
    assert bench.irq.level == 0
    bench.clock.step(20)
    assert bench.irq.level == 1 and bench.inb(IIR) == 0xCC
    assert bench.inb(RBR) == ord("a")
    assert bench.irq.level == 0 and bench.inb(IIR) == 0xC1
    bench.clock.step(4 * CHAR_9600_NS + 10)  # one is left: it times out again
    assert bench.inb(IIR) == 0xCC
    assert bench.inb(RBR) == ord("b")
    bench.clock.step(10 * CHAR_9600_NS)
    assert bench.irq.level == 0


def test_each_character_puts_the_timeout_off(bench: Bench) -> None:
    bench.outb(FCR, 0x81)
    bench.outb(LCR, 0x03)
    bench.outb(IER, RDI)
    for _ in range(5):
        bench.line.type(b"x")
        bench.clock.step(3 * CHAR_9600_NS)
        assert bench.irq.level == 0
    bench.clock.step(CHAR_9600_NS + 10)
    assert bench.inb(IIR) == 0xCC


def test_timeout_follows_the_baud_rate_and_the_frame(bench: Bench) -> None:
    bench.outb(FCR, 0x81)
    bench.outb(LCR, 0x83)
    bench.outb(DLL, 1)
    bench.outb(LCR, 0x1F)  # 8 bits, two stop bits, parity: twelve bits of 8.68 us
    bench.outb(IER, RDI)
    bench.line.type(b"x")
    bench.clock.step(4 * 12 * 8680)
    assert bench.irq.level == 0
    bench.clock.step(100)
    assert bench.irq.level == 1


def test_no_timeout_without_fifo(bench: Bench) -> None:
    bench.outb(IER, RDI)
    bench.line.type(b"x")
    bench.clock.step(100 * CHAR_9600_NS)
    assert bench.inb(IIR) == 0x04
    assert bench.clock.next_deadline_ns is None


def test_receiver_fifo_reset(fifo: Bench) -> None:
    fifo.outb(IER, RDI)
    fifo.line.type(b"abc")
    fifo.outb(FCR, 0x03)
    assert fifo.inb(LSR) == 0x60 and fifo.irq.level == 0
    fifo.clock.step(100 * CHAR_9600_NS)
    assert fifo.irq.level == 0
    assert fifo.inb(RBR) == 0


def test_switching_the_fifo_clears_both(bench: Bench) -> None:
    bench.line.type(b"a")
    bench.outb(FCR, 0x01)
    assert bench.inb(LSR) == 0x60
    bench.line.type(b"bc")
    bench.outb(FCR, 0x00)
    assert bench.inb(LSR) == 0x60


def test_other_writes_to_fcr_keep_the_data(fifo: Bench) -> None:
    fifo.line.type(b"abc")
    fifo.outb(FCR, 0xC1)
    assert fifo.drain() == b"abc"


def test_break_is_a_zero_byte_with_bi(bench: Bench) -> None:
    bench.outb(IER, RLSI)
    bench.line.send_break()
    assert bench.irq.level == 1 and bench.inb(IIR) == 0x06
    assert bench.inb(LSR) == 0x71
    assert bench.inb(LSR) == 0x61
    assert bench.inb(RBR) == 0


def test_break_shows_when_its_character_is_on_top_of_the_fifo(fifo: Bench) -> None:
    fifo.outb(FCR, 0xC1)
    fifo.outb(IER, RLSI)
    fifo.line.type(b"ab")
    fifo.line.send_break()
    fifo.line.type(b"c")
    assert fifo.irq.level == 0
    assert fifo.inb(LSR) == 0xE1  # bit 7: somewhere in there
    assert fifo.inb(RBR) == ord("a")
    assert fifo.inb(RBR) == ord("b")
    assert fifo.irq.level == 1
    assert fifo.inb(LSR) == 0xF1
    assert fifo.inb(LSR) == 0x61
    assert fifo.irq.level == 0
    assert fifo.drain() == b"\0c"


def test_break_into_an_empty_fifo_shows_at_once(fifo: Bench) -> None:
    fifo.line.send_break()
    assert fifo.inb(LSR) == 0xF1
    assert fifo.drain() == b"\0"


def test_input_is_asked_for_up_to_the_trigger_level(bench: Bench) -> None:
    bench.outb(FCR, 0x81)
    rest = bench.line.type_politely(bytes(range(20)))
    assert rest == bytes(range(8, 20))
    assert bench.line.accepted == 0
    bench.inb(RBR)
    assert bench.line.accepted == 1
    bench.inb(RBR)
    assert bench.line.accepted == 1  # asked once is enough
    assert len(bench.line.type_politely(rest)) == 10


def test_input_waits_for_the_byte_to_be_read_without_fifo(bench: Bench) -> None:
    assert bench.line.type_politely(b"abc") == b"bc"
    assert bench.inb(RBR) == ord("a")
    assert bench.line.accepted == 1
    assert bench.line.type_politely(b"bc") == b"c"
    bench.outb(FCR, 0x01)  # the byte is dropped, so there is room
    assert bench.line.accepted == 2


# -- loopback and modem lines -------------------------------------------------------------------------------


def test_loopback_returns_what_is_sent(bench: Bench) -> None:
    bench.outb(MCR, LOOP | 0x08)
    bench.outb(IER, RDI)
    bench.outb(THR, 0x55)
    assert bench.line.sent == b""
    assert bench.irq.level == 1
    assert bench.inb(LSR) == 0x61
    assert bench.inb(RBR) == 0x55
    bench.outb(MCR, 0x08)
    bench.outb(THR, 0x56)
    assert bench.line.sent == b"V" and bench.inb(LSR) == 0x60


def test_loopback_fills_and_overruns_the_fifo(fifo: Bench) -> None:
    fifo.outb(MCR, LOOP)
    for byte in range(17):
        fifo.outb(THR, byte)
    assert fifo.inb(LSR) == 0x63
    assert fifo.drain() == bytes(range(16))


def test_loopback_disconnects_the_input(bench: Bench) -> None:
    bench.outb(MCR, LOOP)
    assert bench.line.type_politely(b"x") == b"x"
    bench.line.send_break()
    assert bench.inb(LSR) == 0x60
    bench.outb(MCR, 0)
    assert bench.line.accepted == 1


def test_break_in_loopback_is_received(bench: Bench) -> None:
    bench.outb(LCR, 0x43)
    assert bench.inb(LSR) == 0x60
    bench.outb(LCR, 0x03)
    bench.outb(MCR, LOOP)
    bench.outb(LCR, 0x43)
    assert bench.inb(LSR) == 0x71


@pytest.mark.parametrize(
    ("mcr", "lines"), [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80), (0x0F, 0xF0), (0, 0)]
)
def test_loopback_of_the_modem_lines(bench: Bench, mcr: int, lines: int) -> None:
    bench.outb(MCR, LOOP | mcr)
    assert bench.inb(MSR) & 0xF0 == lines


def test_linux_autoconfig_sees_a_uart(bench: Bench) -> None:
    bench.outb(MCR, 0x1A)
    assert bench.inb(MSR) & 0xF0 == 0x90


def test_modem_status_interrupt_and_deltas(bench: Bench) -> None:
    bench.outb(MCR, LOOP)  # all lines drop
    assert bench.irq.level == 0
    assert bench.inb(MSR) == 0x0B  # CTS, DSR and DCD changed
    assert bench.inb(MSR) == 0
    bench.outb(IER, MSI)
    assert bench.irq.level == 0
    bench.outb(MCR, LOOP | 0x04)  # RI rises: no trailing edge, no interrupt
    assert bench.inb(MSR) == 0x40 and bench.irq.level == 0
    bench.outb(MCR, LOOP)
    assert bench.irq.level == 1 and bench.inb(IIR) == 0x00
    assert bench.inb(MSR) == 0x04
    assert bench.irq.level == 0


def test_interrupts_do_not_depend_on_out2(bench: Bench) -> None:
    bench.outb(MCR, 0x03)
    bench.outb(IER, RDI)
    bench.line.type(b"x")
    assert bench.irq.level == 1


def test_priorities_from_the_top(fifo: Bench) -> None:
    fifo.outb(FCR, 0x41)
    fifo.outb(IER, RDI | THRI | RLSI | MSI)
    fifo.outb(MCR, LOOP)
    fifo.outb(MCR, 0x08)
    fifo.line.type(bytes(17))
    seen = []
    fifo.clock.step(100 * CHAR_9600_NS)
    for clear in (LSR, RBR):
        seen.append(fifo.inb(IIR))
        fifo.inb(clear)
    seen.append(fifo.inb(IIR))
    fifo.drain()
    seen += [fifo.inb(IIR), fifo.inb(IIR)]
    fifo.inb(MSR)
    seen.append(fifo.inb(IIR))
    assert seen == [0xC6, 0xCC, 0xC4, 0xC2, 0xC0, 0xC1]


# -- reset, save, load --------------------------------------------------------------------------------------


def test_reset(fifo: Bench) -> None:
    fifo.outb(IER, 0x0F)
    fifo.outb(LCR, 0x1B)
    fifo.outb(SCR, 0x77)
    assert fifo.line.type_politely(b"abc") == b"bc"
    fifo.uart.reset()
    assert fifo.irq.level == 0
    assert [fifo.inb(n) for n in range(1, 8)] == [0, 0x01, 0, 0x08, 0x60, 0xB0, 0]
    fifo.clock.step(100 * CHAR_9600_NS)
    assert fifo.irq.level == 0
    assert fifo.line.accepted == 1  # the waiting input may come


def test_saved_state_is_plain_and_goes_on_exactly(fifo: Bench) -> None:
    fifo.outb(FCR, 0xC1)
    fifo.outb(LCR, 0x03)
    fifo.outb(IER, RDI | RLSI)
    fifo.line.can_write = False
    fifo.outb(MCR, 0x0B)
    fifo.outb(THR, 0x41)
    fifo.line.type(b"ab")
    fifo.line.send_break()
    fifo.clock.step(3 * CHAR_9600_NS)
    state = fifo.uart.save()
    assert state["timeout"] is not None

    other = Bench()
    other.clock.step(123_456_789)
    other.uart.load(state)
    other.uart.after_load()
    other.line.after_load()
    assert other.line.sent == b"A"  # this host takes it
    assert other.irq.level == 0
    other.clock.step(CHAR_9600_NS - 10)
    assert other.irq.level == 0
    other.clock.step(20)
    assert other.irq.level == 1 and other.inb(IIR) == 0xCC
    assert other.inb(LSR) == 0xE1
    assert other.drain() == b"ab\0"
    assert other.inb(MCR) == 0x0B
    other.line.type(bytes(13))
    assert other.irq.level == 0
    other.line.type(b"x")
    assert other.inb(IIR) == 0xC4


def test_load_lets_input_come_that_had_no_room(bench: Bench) -> None:
    empty = bench.uart.save()
    assert bench.line.type_politely(b"ab") == b"b"
    bench.uart.load(empty)
    bench.uart.after_load()
    assert bench.line.accepted == 0
    bench.line.after_load()
    assert bench.line.accepted == 1


def test_load_restores_the_interrupt_line(bench: Bench) -> None:
    bench.outb(IER, THRI)
    other = Bench()
    other.uart.load(bench.uart.save())
    other.uart.after_load()
    assert other.irq.level == 1 and other.inb(IIR) == 0x02


# -- against a model ----------------------------------------------------------------------------------------

OPERATIONS = st.one_of(
    st.tuples(st.just("type"), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("read"), st.integers(1, 20)),
    st.tuples(st.just("lsr"), st.none()),
    st.tuples(st.just("trigger"), st.sampled_from([0, 1, 2, 3])),
    st.tuples(st.just("clear"), st.none()),
    st.tuples(st.just("step"), st.integers(0, 6 * CHAR_9600_NS)),
)


@settings(max_examples=200)
@given(st.lists(OPERATIONS, max_size=40))
def test_receiver_fifo_against_a_model(operations: list[tuple[str, Any]]) -> None:
    bench = Bench()
    bench.outb(LCR, 0x03)
    bench.outb(FCR, 0x01)
    bench.outb(IER, RDI)
    model: list[int] = []
    trigger, overrun, quiet_ns, timed_out = 1, False, 0, False
    for name, argument in operations:
        if name == "type":
            bench.line.type(argument)
            overrun |= len(model) + len(argument) > 16
            model = (model + list(argument))[:16]
            quiet_ns = 0
        elif name == "read":
            for _ in range(argument):
                assert bench.inb(RBR) == (model.pop(0) if model else 0)
                timed_out = False
                quiet_ns = 0
        elif name == "lsr":
            assert bench.inb(LSR) == 0x60 | (0x02 if overrun else 0) | (0x01 if model else 0)
            overrun = False
        elif name == "trigger":
            bench.outb(FCR, argument << 6 | 0x01)
            trigger = (1, 4, 8, 14)[argument]
        elif name == "clear":
            bench.outb(FCR, 0x03)
            model, timed_out, trigger = [], False, 1
        else:
            bench.clock.step(argument)
            quiet_ns += argument
            if model and quiet_ns >= int(4 * CHAR_9600_NS) + 4:
                timed_out = True
            elif model and quiet_ns >= 4 * CHAR_9600_NS - 4:
                timed_out = bench.inb(IIR) == 0xCC  # within the rounding of a bit's time
        expected = 0xCC if timed_out else 0xC4 if len(model) >= trigger else 0xC1
        assert bench.inb(IIR) == expected
        assert bench.irq.level == (expected != 0xC1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 255)), max_size=60), st.booleans())
def test_nothing_sent_is_lost_or_reordered_while_the_guest_waits_for_thre(
    steps: list[tuple[bool, int]], interrupts: bool
) -> None:
    """The host stalls and recovers as it likes; a driver that looks at THRE first gets every byte out."""
    bench = Bench()
    bench.outb(FCR, 0x01)
    if interrupts:
        bench.outb(IER, THRI)
    expected = bytearray()
    for stall, byte in steps:
        bench.line.on_write = (lambda: setattr(bench.line, "can_write", False)) if stall else (lambda: None)
        if not bench.inb(LSR) & 0x20:
            bench.line.drained()
        assert bench.inb(LSR) & 0x20
        bench.outb(THR, byte)
        expected.append(byte)
    bench.line.on_write = lambda: None
    bench.line.drained()
    assert bench.line.sent == bytes(expected)
    assert bench.inb(LSR) == 0x60


# -- the region: what it answers by itself, and gathered output -----------------------------------------------

GATHER_NS = 10_000_000


class Gathering(Bench):
    """The same UART behind its region, with output gathered; ``writes`` has what went out in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.uart = Serial(self.irq, self.line, self.clock, gather_ns=GATHER_NS)
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.add(0x3F8, self.uart.region)
        self.clock.step(1_000_000_000)
        self.writes: list[bytes] = []
        self.line.listen(self.writes.append)

    def inb(self, offset: int) -> int:
        return self.pio.read(0x3F8 + offset, 1)

    def outb(self, offset: int, value: int) -> None:
        self.pio.write(0x3F8 + offset, 1, value)

    def say(self, text: bytes) -> None:
        """As a console driver does: a microsecond a byte."""
        for byte in text:
            assert self.inb(LSR) == 0x60
            self.outb(THR, byte)
            self.clock.step(1000)


@pytest.fixture
def gathering() -> Gathering:
    return Gathering()


def test_a_byte_after_a_silence_goes_out_at_once(gathering: Gathering) -> None:
    for byte in (b"a", b"b", b"c"):
        gathering.say(byte)
        assert gathering.writes[-1] == byte
        gathering.clock.step(GATHER_NS)


def test_a_line_goes_out_whole_behind_its_first_two_bytes(gathering: Gathering) -> None:
    gathering.say(b"one line\nanother\nand ")
    assert gathering.writes == [b"o", b"n", b"e line\n", b"another\n"]
    gathering.clock.step(GATHER_NS)
    assert gathering.writes[4:] == [b"and "]
    gathering.say(b"on")
    assert gathering.line.sent.endswith(b"and ")
    gathering.clock.step(GATHER_NS)
    assert gathering.line.sent == b"one line\nanother\nand on"
    # Nothing more came: the next byte is one after a silence again, and no timer runs.
    gathering.clock.step(2 * GATHER_NS)
    gathering.say(b"x")
    assert gathering.writes[-1] == b"x"
    assert not gathering.uart.region.gathering


def test_more_than_there_is_room_for(gathering: Gathering) -> None:
    text = bytes(i % 251 + 11 & 0xFF for i in range(3000)).replace(b"\n", b"-")
    for byte in text:
        gathering.outb(THR, byte)
        gathering.clock.step(1)
    gathering.uart.flush()
    assert gathering.line.sent == text
    assert max(map(len, gathering.writes)) > 1000


def test_while_time_stands_still_nothing_waits(gathering: Gathering) -> None:
    for byte in b"paused":
        gathering.outb(THR, byte)
    assert gathering.line.sent == b"paused"


@pytest.mark.parametrize(("offset", "value"), [(IER, THRI), (LCR, 0x83), (MCR, LOOP)])
def test_what_ends_polled_output_lets_it_out_first(gathering: Gathering, offset: int, value: int) -> None:
    gathering.say(b"abcdef")
    assert gathering.line.sent == b"ab"
    gathering.outb(offset, value)
    assert gathering.line.sent == b"abcdef"


def test_what_is_gathered_is_state(gathering: Gathering) -> None:
    gathering.say(b"abcdef")
    state = gathering.uart.save()
    assert gathering.line.sent == b"ab"
    assert gathering.uart.save() == state
    other = Gathering()
    other.uart.load(state)
    assert other.line.sent == b""
    other.uart.after_load()
    other.outb(THR, 0x0A)
    assert other.line.sent == b"cdef\n"


@pytest.mark.parametrize("act", [Serial.flush, Serial.reset])
def test_nothing_is_left_behind_by(gathering: Gathering, act: Callable[[Serial], object]) -> None:
    gathering.say(b"abcdef")
    act(gathering.uart)
    assert gathering.line.sent == b"abcdef"
    gathering.clock.step(2 * GATHER_NS)
    assert gathering.line.sent == b"abcdef"


def test_a_host_that_does_not_keep_up_ends_the_gathering(gathering: Gathering) -> None:
    gathering.say(b"abc")
    gathering.line.on_write = lambda: setattr(gathering.line, "can_write", False)
    gathering.outb(THR, 10)
    gathering.outb(THR, ord("d"))  # kept in the UART
    assert gathering.inb(LSR) & 0x20 == 0
    assert gathering.line.sent == b"abc\n"
    gathering.line.on_write = lambda: None
    gathering.line.drained()
    assert gathering.line.sent == b"abc\nd"
    assert gathering.inb(LSR) == 0x60


ACCESSES = st.one_of(
    st.tuples(st.just("read"), st.sampled_from([RBR, IER, IIR, LCR, MCR, LSR, LSR, LSR, MSR, SCR])),
    st.tuples(st.just("say"), st.binary(max_size=12)),
    st.tuples(st.just("write"), st.tuples(st.integers(1, 7), st.integers(0, 255))),
    st.tuples(st.just("type"), st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("break"), st.none()),
    st.tuples(st.just("step"), st.integers(0, 2 * GATHER_NS)),
    st.tuples(st.just("stall"), st.none()),
    st.tuples(st.just("drain"), st.none()),
)


@settings(max_examples=300)
@given(st.lists(ACCESSES, max_size=50))
def test_the_region_makes_no_difference_but_when_output_goes_out(accesses: list[tuple[str, Any]]) -> None:
    plain, gathering = Bench(), Gathering()
    plain.clock.step(1_000_000_000)
    # Between its writes a guest does not notice when the host's side fills up: it does here, after each.
    for name, argument in accesses:
        for bench in (plain, gathering):
            if name == "say":
                for byte in argument:
                    bench.outb(THR, byte)
                    bench.clock.step(1000)
            elif name == "write":
                bench.outb(*argument)
            elif name == "type":
                bench.line.type(argument)
            elif name == "break":
                bench.line.send_break()
            elif name == "step":
                bench.clock.step(argument)
            elif name == "stall":
                bench.uart.flush()
                bench.line.can_write = False
                bench.uart._find_thr_open()
            elif name == "drain":
                bench.line.drained()
        if name == "read":
            assert plain.inb(argument) == gathering.inb(argument)
        assert plain.irq.level == gathering.irq.level
        assert plain.line.sent.startswith(gathering.line.sent)
    gathering.uart.flush()
    of_gathering = ("gathering", "gathered", "gather_timer", "last_put_ns")
    states = [{k: v for k, v in b.uart.save().items() if k not in of_gathering} for b in (plain, gathering)]
    assert states[0] == states[1]
    assert plain.line.sent == gathering.line.sent


# -- whole: guest, bus, chardev, event loop, host ------------------------------------------------------------


def read_as_a_guest(pio: AddressSpace, count: int) -> bytes:
    """Poll LSR and read RBR until ``count`` bytes are there."""
    got = bytearray()
    deadline = time.monotonic() + 60
    while len(got) < count:
        assert time.monotonic() < deadline, f"{len(got)} of {count}"
        if pio.read(0x3FD, 1) & 1:
            got.append(pio.read(0x3F8, 1))
        else:
            os.sched_yield()
    return bytes(got)


@pytest.mark.parametrize("fcr", [0x00, 0x01, 0x81])
def test_input_through_a_pipe_arrives_whole_and_in_order(fcr: int) -> None:
    errors: list[BaseException] = []
    loop = EventLoop(errors.append)
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    terminal = Terminal(loop, escape=False, in_fd=in_read, out_fd=out_write)
    pio = AddressSpace("pio", 0x10000)
    pio.map(0x3F8, 8, Serial(IrqLine(), terminal.console("serial"), loop.clock))
    terminal.start()
    pio.write(0x3FA, 1, fcr)
    data = bytes(i * i % 251 for i in range(1000))
    os.write(in_write, data)
    assert read_as_a_guest(pio, len(data)) == data
    assert pio.read(0x3FD, 1) == 0x60  # no overrun
    for byte in data:
        pio.write(0x3F8, 1, byte)
    assert os.read(out_read, 5000) == data
    terminal.close()
    loop.close()
    for fd in (in_read, in_write, out_read, out_write):
        os.close(fd)
    assert errors == []


def test_input_from_another_thread_crosses_with_the_guests_reads() -> None:
    chardev = CallableChardev(lambda data: None)
    pio = AddressSpace("pio", 0x10000)
    pio.map(0x3F8, 8, Serial(IrqLine(), chardev, VirtualClock()))
    pio.write(0x3FA, 1, 0xC1)
    data = bytes(i * 7 % 256 for i in range(5000))

    def feed() -> None:
        for i in range(0, len(data), 3):
            chardev.feed(data[i : i + 3])

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert read_as_a_guest(pio, len(data)) == data
    feeder.join()


def test_echo_from_inside_the_callable() -> None:
    """What the callable feeds while the guest's write is under way comes back in order."""
    sent: list[bytes] = []

    def echo(data: bytes) -> None:
        sent.append(data)
        chardev.feed(data)

    chardev = CallableChardev(echo)
    pio = AddressSpace("pio", 0x10000)
    pio.map(0x3F8, 8, Serial(IrqLine(), chardev, VirtualClock()))
    for byte in b"hello":
        pio.write(0x3F8, 1, byte)
    assert read_as_a_guest(pio, 5) == b"hello"
    assert b"".join(sent) == b"hello"
