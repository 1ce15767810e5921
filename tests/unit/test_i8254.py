"""The 8254: each mode's diagram, the ways of reading, interrupts by the clock, calibrations of kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.i8254 import FREQUENCY_HZ, I8254, MIN_INTERVAL_NS, Counter, from_bcd, to_bcd
from pyvmm.irq import IrqLine

SECOND = 1_000_000_000
LATCH_0, LATCH_2 = 0x00, 0x80


def pulses_to_ns(pulses: int) -> int:
    """The first nanosecond at which that many pulses have gone by."""
    return -(-pulses * SECOND // FREQUENCY_HZ)


class Bench:
    """The timer on a port bus, with a clock moved by hand in pulses, and the edges of IRQ 0."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.levels: list[tuple[int, int]] = []
        self.irq0 = IrqLine(lambda level: self.levels.append((self.clock.now_ns(), level)))
        self.pit = I8254(self.clock, self.irq0)
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(0x40, 4, self.pit)
        self.pio.map(0x61, 1, self.pit.speaker)

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.pio.write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.pio.read(port, 1)

    def word(self, port: int) -> int:
        return self.inb(port) | self.inb(port) << 8

    def program(self, counter: int, mode: int, count: int, bcd: int = 0) -> None:
        self.out(0x43, counter << 6 | 0x30 | mode << 1 | bcd)
        self.out(0x40 + counter, count & 0xFF, count >> 8)

    def to_pulse(self, pulse: int) -> None:
        self.clock.step(pulses_to_ns(pulse) - self.clock.now_ns())

    def pulses(self, n: int) -> None:
        self.to_pulse(self.pit.pulse() + n)

    def rises(self) -> list[int]:
        """The pulses at which IRQ 0 rose."""
        return [at * FREQUENCY_HZ // SECOND for at, level in self.levels if level]

    def gate2(self, level: int) -> None:
        self.out(0x61, level)

    def out2(self) -> int:
        return self.inb(0x61) >> 5 & 1

    def trace(self, n: int) -> list[tuple[int, int]]:
        """(count, OUT) of counter 2 after each of the next ``n`` pulses."""
        seen = []
        for _ in range(n):
            self.pulses(1)
            seen.append((self.word(0x42), self.out2()))
        return seen


@pytest.fixture
def bench() -> Bench:
    return Bench()


# The data sheet's timing diagrams, on counter 2


def test_mode_0_rises_n_plus_one_pulses_after_the_count_and_stays(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 4)
    assert bench.out2() == 0
    trace = bench.trace(8)
    assert [count for count, _ in trace] == [4, 3, 2, 1, 0, 0xFFFF, 0xFFFE, 0xFFFD]
    assert [out for _, out in trace] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_mode_0_gate_holds_the_count(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 3)
    bench.pulses(2)
    bench.gate2(0)
    assert bench.trace(3) == [(2, 0)] * 3
    bench.gate2(1)
    assert bench.trace(3) == [(1, 0), (0, 1), (0xFFFF, 1)]


def test_mode_0_first_byte_stops_the_count_and_lowers_out(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 2)
    bench.pulses(5)
    assert bench.out2() == 1
    bench.out(0x42, 3)
    assert bench.out2() == 0
    assert len(set(bench.trace(4))) == 1
    bench.out(0x42, 0)
    assert bench.trace(5) == [(3, 0), (2, 0), (1, 0), (0, 1), (0xFFFF, 1)]


def test_mode_1_one_shot_is_started_and_restarted_by_the_gate(bench: Bench) -> None:
    bench.program(2, 1, 3)
    assert bench.out2() == 1
    bench.pulses(4)
    assert bench.out2() == 1, "it waits for a trigger"
    bench.gate2(1)
    assert bench.trace(2) == [(3, 0), (2, 0)]
    bench.gate2(0)
    assert bench.trace(1) == [(1, 0)], "the gate's level does not matter"
    bench.gate2(1)
    assert bench.trace(5) == [(3, 0), (2, 0), (1, 0), (0, 1), (0xFFFF, 1)]
    # A new count is for the next trigger.
    bench.gate2(0)
    bench.gate2(1)
    bench.pulses(1)
    bench.out(0x42, 5, 0)
    assert bench.trace(3) == [(2, 0), (1, 0), (0, 1)]


def test_mode_2_is_low_for_one_pulse_in_n(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 3)
    assert bench.trace(8) == [(3, 1), (2, 1), (1, 0), (3, 1), (2, 1), (1, 0), (3, 1), (2, 1)]


def test_mode_2_gate_low_holds_high_and_its_rise_starts_anew(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 3)
    bench.pulses(3)
    assert bench.out2() == 0
    bench.gate2(0)
    assert bench.out2() == 1
    assert bench.trace(2) == [(1, 1)] * 2
    bench.gate2(1)
    assert bench.trace(4) == [(3, 1), (2, 1), (1, 0), (3, 1)]


def test_mode_2_new_count_waits_for_the_period_to_end(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 4)
    bench.pulses(2)
    bench.out(0x42, 5, 0)
    assert [count for count, _ in bench.trace(8)] == [2, 1, 5, 4, 3, 2, 1, 5]


@pytest.mark.parametrize("mode", [3, 7])
def test_mode_3_even_count(bench: Bench, mode: int) -> None:
    bench.gate2(1)
    bench.program(2, mode, 4)
    assert bench.trace(6) == [(4, 1), (2, 1), (4, 0), (2, 0), (4, 1), (2, 1)]


def test_mode_3_odd_count_is_high_for_one_pulse_more(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 3, 5)
    trace = bench.trace(10)
    assert [count for count, _ in trace] == [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]
    assert [out for _, out in trace] == [1, 1, 1, 0, 0] * 2


def test_mode_3_new_count_waits_for_the_half_to_end(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 3, 4)
    bench.pulses(1)
    bench.out(0x42, 8, 0)
    assert [out for _, out in bench.trace(9)] == [1, 0, 0, 0, 0, 1, 1, 1, 1]


def test_mode_4_strobes_once_for_one_pulse(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 4, 3)
    assert bench.trace(6) == [(3, 1), (2, 1), (1, 1), (0, 0), (0xFFFF, 1), (0xFFFE, 1)]
    bench.pulses(0x20000)
    assert all(out == 1 for _, out in bench.trace(3)), "not again when the count comes round"


def test_mode_4_new_count_is_loaded_at_the_next_pulse(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 4, 9)
    bench.pulses(3)
    bench.out(0x42, 2, 0)
    assert bench.trace(4) == [(2, 1), (1, 1), (0, 0), (0xFFFF, 1)]


def test_mode_5_strobes_after_each_trigger(bench: Bench) -> None:
    bench.program(2, 5, 2)
    bench.pulses(3)
    for _ in range(2):
        bench.gate2(1)
        bench.gate2(0)
        assert bench.trace(4) == [(2, 1), (1, 1), (0, 0), (0xFFFF, 1)]


# Counts and the ways of reading them


def test_a_count_of_zero_is_the_greatest(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 0)
    bench.pulses(1)
    assert bench.word(0x42) == 0
    bench.pulses(0xFFFF)
    assert (bench.word(0x42), bench.out2()) == (1, 0)
    bench.pulses(1)
    assert bench.out2() == 1


def test_bcd_counts_in_decimal(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 0x1000, bcd=1)
    assert [count for count, _ in bench.trace(3)] == [0x1000, 0x0999, 0x0998]
    bench.program(2, 2, 0, bcd=1)
    assert [count for count, _ in bench.trace(2)] == [0, 0x9999]
    bench.pulses(9998)
    assert bench.word(0x42) == 1


@given(st.integers(0, 9999))
def test_bcd_conversion_goes_both_ways(n: int) -> None:
    assert to_bcd(n) == int(str(n), 16)
    assert from_bcd(to_bcd(n)) == n


def test_a_latched_count_stands_until_it_is_read_out(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 1000)
    bench.pulses(11)
    bench.out(0x43, LATCH_2)
    bench.pulses(100)
    bench.out(0x43, LATCH_2)  # ignored: the first is unread
    assert bench.word(0x42) == 990
    assert bench.word(0x42) == 890


def test_one_byte_access_modes(bench: Bench) -> None:
    bench.gate2(1)
    bench.out(0x43, 0x94)  # counter 2, low byte only, mode 2
    bench.out(0x42, 200)
    bench.pulses(2)
    assert [bench.inb(0x42), bench.inb(0x42)] == [199, 199]
    bench.out(0x43, 0xA4)  # high byte only
    bench.out(0x42, 2)
    bench.pulses(2)
    assert bench.inb(0x42) == 0x01
    bench.out(0x43, LATCH_2)
    assert [bench.inb(0x42), bench.inb(0x42)] == [0x01, 0x01]


def test_a_two_byte_write_can_be_interleaved_with_a_read(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 0x1234)
    bench.pulses(1)
    bench.out(0x42, 0x78)
    assert bench.inb(0x42) == 0x34
    bench.out(0x42, 0x56)
    assert bench.inb(0x42) == 0x12
    bench.pulses(0x1234)
    assert bench.word(0x42) == 0x5678


def test_read_back_latches_status_before_count_for_all_named(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(0, 2, 100)
    bench.program(2, 3, 50)
    bench.out(0x43, 0xCA)  # status and count of 0 and 2
    bench.pulses(40)
    assert bench.inb(0x40) == 0xF4, "OUT high, null count, two bytes, mode 2"
    assert bench.inb(0x42) == 0xF6
    assert bench.word(0x40) == 0
    bench.out(0x43, 0xE2)  # status of 0 only
    assert bench.inb(0x40) == 0xB4, "the count is in by now"
    bench.out(0x43, 0xD8)  # count of 2 only
    bench.pulses(1)
    # 40 pulses and the load: one half of 25 pulses is over, 14 into the next.
    assert bench.inb(0x42) | bench.inb(0x42) << 8 == 0
    assert bench.word(0x42) == 50 - 2 * 15


def test_null_count_shows_a_count_not_yet_taken(bench: Bench) -> None:
    def null() -> int:
        bench.out(0x43, 0xE8)
        return bench.inb(0x42) >> 6 & 1

    bench.gate2(1)
    bench.out(0x43, 0xB4)
    assert null() == 1
    bench.out(0x42, 10, 0)
    assert null() == 1
    bench.pulses(1)
    assert null() == 0
    bench.out(0x42, 20)
    assert null() == 0, "not before the second byte"
    bench.out(0x42, 0)
    assert null() == 1
    bench.pulses(10)
    assert null() == 0


def test_a_control_word_drops_what_is_latched(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 1000)
    bench.pulses(5)
    bench.out(0x43, 0xC8)
    bench.program(2, 2, 500)
    bench.pulses(1)
    assert bench.word(0x42) == 500


def test_the_control_port_reads_zero(bench: Bench) -> None:
    assert bench.inb(0x43) == 0


# Port 0x61


def test_port_b_keeps_its_low_four_bits(bench: Bench) -> None:
    bench.out(0x61, 0xFF)
    assert bench.inb(0x61) & 0x0F == 0x0F
    bench.out(0x61, 0)
    assert bench.inb(0x61) & 0x0F == 0


def test_refresh_bit_changes_every_eighteen_pulses(bench: Bench) -> None:
    bits = []
    for pulse in range(1, 73):
        bench.to_pulse(pulse)
        bits.append(bench.inb(0x61) >> 4 & 1)
    assert bits == [pulse // 18 & 1 for pulse in range(1, 73)]


# IRQ 0


def test_silent_until_programmed(bench: Bench) -> None:
    bench.clock.step(SECOND)
    assert bench.levels == []
    assert bench.clock.next_deadline_ns is None


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_interrupts_come_at_the_right_pulses(bench: Bench, mode: int) -> None:
    bench.program(0, mode, 1193)
    bench.levels.clear()
    bench.clock.step(SECOND // 10)
    # The count is loaded at pulse 1; each period of 1193 ends with a rise.
    assert bench.rises() == [1 + 1193 * n for n in range(1, 101) if 1 + 1193 * n <= FREQUENCY_HZ // 10]
    assert len(bench.rises()) == 100


def test_a_thousand_ticks_a_second_over_a_minute_drift_by_nothing(bench: Bench) -> None:
    bench.program(0, 2, 1193)
    bench.levels.clear()
    bench.clock.step(60 * SECOND)
    assert len(bench.rises()) == (60 * FREQUENCY_HZ - 1) // 1193


def test_one_shot_interrupt_modes(bench: Bench) -> None:
    bench.program(0, 0, 1000)
    assert bench.irq0.level == 0
    bench.to_pulse(5000)
    assert bench.rises() == [1001]
    assert bench.irq0.level == 1
    # Mode 4 is Linux's one-shot: high all along but for the strobe, whose end is the edge.
    bench.program(0, 4, 100)
    bench.levels.clear()
    start = bench.pit.pulse()
    bench.pulses(5000)
    assert bench.rises() == [start + 1 + 100 + 1]
    assert [level for _, level in bench.levels] == [0, 1]
    bench.pulses(0x30000)
    assert len(bench.rises()) == 1


def test_a_control_word_alone_stops_the_interrupts(bench: Bench) -> None:
    bench.program(0, 2, 1193)
    bench.out(0x43, 0x30)
    assert bench.irq0.level == 0
    bench.levels.clear()
    bench.clock.step(SECOND)
    assert bench.levels == []


class LateClock(VirtualClock):
    """A clock whose timers may be served late: by a host that did not get round to them."""

    __slots__ = ()

    def skip(self, ns: int) -> None:
        """Time goes by and no timer runs; the next step finds those that are due."""
        self._now_ns += ns


def late_bench() -> tuple[Bench, LateClock]:
    """1,000 interrupts a second, a late clock."""
    bench, clock = Bench(), LateClock()
    bench.clock = clock
    bench.pit = I8254(clock, bench.irq0)
    for offset, value in ((3, 0x34), (0, 1193 & 0xFF), (0, 1193 >> 8)):
        bench.pit.write(offset, 1, value)
    bench.levels.clear()
    return bench, clock


def test_lost_ticks_are_one_edge_and_the_rhythm_stays() -> None:
    bench, clock = late_bench()
    clock.skip(pulses_to_ns(50 * 1193 + 600))
    clock.step(0)
    assert bench.rises() == [50 * 1193 + 600]
    clock.step(pulses_to_ns(2 * 1193))
    assert bench.rises()[1:] == [1 + 51 * 1193, 1 + 52 * 1193]


def test_a_read_that_is_first_to_see_a_tick_delivers_it_and_the_timer_not_again() -> None:
    bench, clock = late_bench()
    clock.skip(pulses_to_ns(1300))
    bench.pit.read(0, 1)
    assert [level for _, level in bench.levels] == [0, 1]
    clock.step(0)
    assert len(bench.levels) == 2
    clock.step(pulses_to_ns(1193))
    assert bench.rises()[1:] == [1 + 2 * 1193]


def test_a_guest_cannot_flood_the_host_with_timers(bench: Bench) -> None:
    bench.program(0, 2, 2)
    bench.levels.clear()
    bench.clock.step(SECOND // 100)
    assert SECOND // 100 // MIN_INTERVAL_NS - 2 <= len(bench.rises()) <= SECOND // 100 // MIN_INTERVAL_NS + 1


@pytest.mark.parametrize("mode", [2, 3])
def test_an_illegal_count_of_one_arms_no_timer(bench: Bench, mode: int) -> None:
    bench.program(0, mode, 1)
    bench.pulses(10)
    assert bench.clock.next_deadline_ns is None
    # And a legal one gets it going again, from the end of the period.
    bench.out(0x40, 200, 0)
    bench.levels.clear()
    bench.pulses(2000)
    rises = bench.rises()
    assert len(rises) >= 9
    assert {b - a for a, b in pairwise(rises)} == {200}


# Calibrations


def test_linux_quick_calibration_finds_the_clock(bench: Bench) -> None:
    """arch/x86/kernel/tsc.c: mode 0 on counter 2 from 0xffff, both bytes polled, MSB changes timed."""
    bench.out(0x61, bench.inb(0x61) & ~0x02 | 0x01)
    bench.out(0x43, 0xB0)
    bench.out(0x42, 0xFF, 0xFF)
    bench.clock.step(3_000)
    stamps = []
    for msb in range(0xFF, 0xFF - 60, -1):
        reads = 0
        while bench.word(0x42) >> 8 == msb:
            bench.clock.step(3_000)
            reads += 1
        assert reads > 5
        stamps.append(bench.clock.now_ns())
    measured_ns = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    assert measured_ns == pytest.approx(256 * SECOND / FREQUENCY_HZ, rel=5e-4)


@pytest.mark.parametrize("step_ns", [500, 7_000, 40_000])
def test_calibration_by_polling_out2(bench: Bench, step_ns: int) -> None:
    """Linux's pit_calibrate_tsc and SeaBIOS's timer set-up: mode 0 on counter 2, port 0x61 bit 5 polled."""
    latch = FREQUENCY_HZ // 20  # 50 ms
    bench.out(0x61, bench.inb(0x61) & ~0x02 | 0x01)
    bench.out(0x43, 0xB0)
    bench.out(0x42, latch & 0xFF, latch >> 8)
    start = bench.clock.now_ns()
    while not bench.inb(0x61) & 0x20:
        bench.clock.step(step_ns)
    assert 0 <= bench.clock.now_ns() - start - pulses_to_ns(latch + 1) <= step_ns


def test_delay_by_reading_counter_0(bench: Bench) -> None:
    """Mode 2 on counter 0 with latched reads: what is seen of time adds up over many wraps."""
    bench.program(0, 2, 0x8000)
    bench.pulses(1)
    start, seen, last = bench.pit.pulse(), 0, 0x8000
    for n in range(2_000):
        bench.clock.step(20_000 + 740 * n % 180_000)
        bench.out(0x43, LATCH_0)
        count = bench.word(0x40)
        seen += (last - count) % 0x8000
        last = count
    assert seen == bench.pit.pulse() - start
    assert seen > 4 * 0x8000


# State


def test_save_and_load_go_on_exactly(bench: Bench) -> None:
    bench.out(0x61, 0x0F)
    bench.program(0, 3, 2001)
    bench.program(2, 1, 700)
    bench.gate2(0)
    bench.gate2(1)
    bench.pulses(1234)
    bench.out(0x42, 0x55)  # half a count
    bench.out(0x43, 0xC2)  # latched status and count of counter 0
    bench.inb(0x40)
    bench.inb(0x40)

    other = Bench()
    other.clock.step(777 * SECOND)  # it need not be the same time there
    other.pit.load(bench.pit.save())
    other.pit.after_load()
    assert other.irq0.level == bench.irq0.level
    for b in (bench, other):
        b.levels.clear()

    def observe(b: Bench) -> list[Any]:
        seen: list[Any] = [b.inb(0x40), b.inb(0x61) & 0x2F]
        b.out(0x42, 0x01)
        for _ in range(50):
            b.pulses(97)
            seen += [b.word(0x40), b.word(0x42), b.inb(0x61) & 0x2F]
        return [*seen, [level for _, level in b.levels]]

    assert observe(other) == observe(bench)


def test_reset_stops_everything(bench: Bench) -> None:
    bench.program(0, 2, 1193)
    bench.out(0x61, 3)
    bench.pit.reset()
    assert bench.irq0.level == 0
    assert bench.inb(0x61) & 0x2F == 0
    bench.levels.clear()
    bench.clock.step(SECOND)
    assert bench.levels == []


# Against a chip that is ticked


class TickedCounter:
    """The data sheet's rules written down for one pulse at a time."""

    def __init__(self, mode: int, bcd: bool, gate: int) -> None:
        self.mode = mode
        self.modulus = 10_000 if bcd else 0x10000
        self.gate = gate
        self.out = 0 if mode == 0 else 1
        self.cr = 0
        self.ce = 0
        self.load_next = self.loaded = self.expired = self.odd_half = False

    def write(self, count: int) -> None:
        self.cr = count
        if self.mode == 0:
            self.out = 0
        if self.mode in (0, 4) or (self.mode in (2, 3) and not self.loaded):
            self.load_next = True

    def set_gate(self, gate: int) -> None:
        if gate and not self.gate and self.cr and self.mode in (1, 2, 3, 5):
            self.load_next = True
        if not gate and self.mode in (2, 3):
            self.out = 1
        self.gate = gate

    def _reload(self) -> None:
        self.ce = self.cr
        if self.mode == 3:
            self.odd_half = bool(self.cr & 1)
            self.ce &= ~1

    def tick(self) -> None:
        if self.mode in (4, 5):
            self.out = 1  # a strobe lasts one pulse
        if self.load_next:
            self.load_next = False
            self.loaded = True
            self.expired = False
            self._reload()
            if self.mode in (1, 2, 3):
                self.out = 0 if self.mode == 1 else 1
            return
        if not self.loaded or (not self.gate and self.mode in (0, 2, 3, 4)):
            return
        if self.mode == 2:
            self.ce -= 1
            if self.ce == 0:
                self._reload()
            self.out = 0 if self.ce == 1 else 1
        elif self.mode == 3:
            # The high half of an odd count waits one pulse at zero.
            if self.ce == 0 or (self.ce == 2 and not (self.odd_half and self.out)):
                self.out ^= 1
                self._reload()
            else:
                self.ce -= 2
        else:
            self.ce = (self.ce - 1) % self.modulus
            if self.ce == 0 and not self.expired:
                self.expired = True
                self.out = 0 if self.mode in (4, 5) else 1


COUNTS = st.one_of(st.integers(2, 12), st.integers(2, 3000))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.one_of(st.integers(0, 9), st.integers(0, 4000))),
        st.tuples(st.just("write"), COUNTS),
        st.tuples(st.just("gate"), st.integers(0, 1)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(mode=st.integers(0, 5), bcd=st.booleans(), gate=st.integers(0, 1), first=COUNTS, steps=STEPS)
def test_closed_form_equals_a_chip_ticked_pulse_by_pulse(
    mode: int, bcd: bool, gate: int, first: int, steps: list[tuple[str, int]]
) -> None:
    counter = Counter(gate)
    counter.write_control(0x30 | mode << 1 | bcd)
    model = TickedCounter(mode, bcd, gate)
    pulse = 0
    for what, value in [("write", first), *steps]:
        if what == "write":
            model.write(value)
            digits = to_bcd(value) if bcd else value
            counter.write_count(digits & 0xFF)
            counter.write_count(digits >> 8)
        elif what == "gate":
            model.set_gate(value)
            counter.set_gate(value)
        else:
            foretold = counter.next_change()
            rises, changed_at, before = 0, -1, model.out
            for at in range(pulse + 1, pulse + value + 1):
                model.tick()
                if model.out > before:
                    rises += 1
                # Lows of one pulse are told with their end, and a one-shot's own fall with its trigger.
                told = model.out > before or mode == 3
                if model.out != before and told and changed_at < 0:
                    changed_at = at
                before = model.out
            pulse += value
            assert counter.advance(pulse) == (rises > 0)
            if changed_at > 0:
                assert foretold == changed_at
            else:
                assert foretold < 0 or foretold > pulse
        assert counter.out == model.out
        if model.loaded:
            assert counter.digits() == (to_bcd(model.ce % 10_000) if bcd else model.ce & 0xFFFF)
