"""The MC146818: time in its formats, update cycle, alarm, the three interrupts, and the bytes firmware reads.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.rtc import Rtc, days_since_1970
from pyvmm.irq import IrqLine

S = 1_000_000_000
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
START = datetime(2024, 2, 28, 23, 59, 50, tzinfo=UTC)  # a Wednesday, and tomorrow is a leap day


class Bench:
    def __init__(self, start: datetime = START, phase_ns: int = 0, **sizes: Any) -> None:
        self.clock = VirtualClock(wall_ns=int(start.timestamp()) * S + phase_ns)
        self.edges: list[int] = []
        self.irq = IrqLine(self.edges.append)
        self.rtc = Rtc(self.irq, self.clock, **sizes)

    def get(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def time(self) -> list[int]:
        """Century, year, month, day, weekday, hour, minute, second, as the registers show them."""
        return [self.get(n) for n in (0x32, 9, 8, 7, 6, 4, 2, 0)]

    def set_time(self, *values: int) -> None:
        for index, value in zip((0x32, 9, 8, 7, 4, 2, 0), values, strict=True):
            self.put(index, value)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- time ---------------------------------------------------------------------------------------------------


def test_power_on_shows_the_wall_clock_in_bcd(bench: Bench) -> None:
    assert bench.time() == [0x20, 0x24, 0x02, 0x28, 4, 0x23, 0x59, 0x50]
    assert [bench.get(n) for n in (10, 11, 13)] == [0x26, 0x02, 0x80]


def test_time_goes_on_over_midnight_and_leap_day(bench: Bench) -> None:
    bench.clock.step(10 * S)
    assert bench.time() == [0x20, 0x24, 0x02, 0x29, 5, 0, 0, 0]
    bench.clock.step(86_400 * S)
    assert bench.time() == [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]


def test_seconds_change_with_the_wall_clocks_own(bench: Bench) -> None:
    bench = Bench(phase_ns=700_000_000)
    bench.clock.step(299_999_999)
    assert bench.get(0) == 0x50
    bench.clock.step(1)
    assert bench.get(0) == 0x51


def test_century_turns() -> None:
    bench = Bench(datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC))
    assert bench.time()[:2] == [0x19, 0x99]
    bench.clock.step(S)
    assert bench.time() == [0x20, 0, 1, 1, 7, 0, 0, 0]


def test_century_is_also_where_the_ps2_has_it(bench: Bench) -> None:
    assert bench.get(0x37) == 0x20
    bench.put(0x37, 0x21)
    assert bench.get(0x32) == 0x21


def test_binary_mode(bench: Bench) -> None:
    bench.put(11, BINARY | H24)
    assert bench.time() == [20, 24, 2, 28, 4, 23, 59, 50]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    [(0, 0x12, 12), (1, 0x01, 1), (11, 0x11, 11), (12, 0x92, 0x8C), (13, 0x81, 0x81), (23, 0x91, 0x8B)],
)
def test_twelve_hour_mode(hour: int, bcd: int, binary: int) -> None:
    bench = Bench(datetime(2024, 1, 1, hour, 0, 0, tzinfo=UTC))
    bench.put(11, 0)
    assert bench.get(4) == bcd
    bench.put(11, BINARY)
    assert bench.get(4) == binary
    bench.put(4, binary)  # and back in again
    bench.put(11, H24 | BINARY)
    assert bench.get(4) == hour


def test_guest_sets_the_time_with_set_held(bench: Bench) -> None:
    bench.put(11, SET | H24)
    bench.set_time(0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58)
    bench.clock.step(5 * S)
    assert bench.time()[5:] == [0x23, 0x59, 0x58]  # it stands
    bench.put(11, H24)
    assert bench.time() == [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58]
    bench.clock.step(2 * S)
    assert bench.time() == [0x20, 0, 1, 1, 7, 0, 0, 0]


def test_setting_the_time_keeps_the_phase_of_the_second() -> None:
    bench = Bench(phase_ns=250_000_000)
    bench.put(11, SET | H24)
    bench.put(0, 0x10)
    bench.put(11, H24)
    bench.clock.step(749_999_999)
    assert bench.get(0) == 0x10
    bench.clock.step(1)
    assert bench.get(0) == 0x11


def test_single_register_can_be_set_while_it_runs(bench: Bench) -> None:
    bench.put(2, 0x30)
    bench.clock.step(10 * S)
    assert bench.time()[5:] == [0x23, 0x31, 0x00]


def test_divider_reset_holds_time_and_the_first_update_comes_half_a_second_later(bench: Bench) -> None:
    bench.put(10, 0x66)
    bench.clock.step(100 * S + 300_000_000)
    assert bench.get(0) == 0x50
    bench.put(10, 0x26)
    bench.clock.step(499_999_999)
    assert bench.get(0) == 0x50
    bench.clock.step(1)
    assert bench.get(0) == 0x51
    bench.clock.step(S)
    assert bench.get(0) == 0x52


@given(st.integers(-800_000, 800_000))
def test_days_agree_with_the_calendar(days: int) -> None:
    if not 1 <= days + 719_163 <= date.max.toordinal():
        return
    day = date(1970, 1, 1) + timedelta(days)
    assert days_since_1970(day.year, day.month, day.day) == days


def test_days_of_dates_that_are_none() -> None:
    assert days_since_1970(2023, 13, 1) == days_since_1970(2024, 1, 1)
    assert days_since_1970(2024, 0, 31) == days_since_1970(2023, 12, 31)
    assert days_since_1970(2024, 3, 0) == days_since_1970(2024, 2, 29)


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)),
    st.integers(0, 40 * 86_400),
    st.sampled_from([0, BINARY, H24, BINARY | H24]),
)
def test_any_time_set_in_any_format_runs_on(when: datetime, later_s: int, mode: int) -> None:
    bench = Bench()
    bench.put(11, SET | mode)

    def encode(value: int) -> int:
        return value if mode & BINARY else int(str(value), 16)

    hour = encode(when.hour)
    if not mode & H24:
        hour = encode(when.hour % 12 or 12) | (0x80 if when.hour >= 12 else 0)
    day = [encode(n) for n in (when.year // 100, when.year % 100, when.month, when.day)]
    bench.set_time(*day, hour, encode(when.minute), encode(when.second))
    bench.put(11, mode)
    bench.clock.step(later_s * S)
    bench.put(11, BINARY | H24)
    century, year, month, day_of_month, weekday, *time_of_day = bench.time()
    expected = when.replace(microsecond=0) + timedelta(seconds=later_s)
    assert (century * 100 + year, month, day_of_month) == (expected.year, expected.month, expected.day)
    assert time_of_day == [expected.hour, expected.minute, expected.second]
    assert weekday == expected.isoweekday() % 7 + 1


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, 3 * S)), max_size=40))
def test_no_guest_can_upset_it(writes: list[tuple[int, int, int]]) -> None:
    bench = Bench()
    for index, value, step_ns in writes:
        bench.put(index, value)
        for n in range(14):
            assert 0 <= bench.get(n) <= 0xFF
        bench.clock.step(step_ns)
        assert bench.irq.level == (1 if bench.rtc.cmos[12] & bench.rtc.cmos[11] & 0x70 else 0)


# -- update in progress -------------------------------------------------------------------------------------


def test_uip_is_up_for_the_last_244_us_of_a_second(bench: Bench) -> None:
    bench.clock.step(S - 244_141)
    assert bench.get(10) == 0x26
    bench.clock.step(1)
    assert bench.get(10) == 0xA6
    bench.clock.step(244_139)
    assert bench.get(10) == 0xA6 and bench.get(0) == 0x50
    bench.clock.step(1)
    assert bench.get(10) == 0x26 and bench.get(0) == 0x51


def test_uip_stays_down_while_set_is_held_and_is_read_only(bench: Bench) -> None:
    bench.put(10, 0xA6)
    assert bench.get(10) == 0x26
    bench.put(11, SET | H24)
    bench.clock.step(S - 1000)
    assert bench.get(10) == 0x26


# -- interrupts ---------------------------------------------------------------------------------------------


def test_update_ended_interrupt(bench: Bench) -> None:
    bench.get(12)
    bench.put(11, UIE | H24)
    bench.clock.step(S - 1)
    assert bench.irq.level == 0
    bench.clock.step(1)
    assert bench.irq.level == 1
    assert bench.get(12) & ~PF == IRQF | UF
    assert bench.irq.level == 0
    assert bench.get(12) & ~PF == 0
    bench.clock.step(S)
    assert bench.edges == [1, 0, 1]


def test_flags_come_up_without_their_interrupts_and_cost_no_timer(bench: Bench) -> None:
    bench.clock.step(S)
    assert bench.clock.next_deadline_ns is None
    assert bench.get(12) == UF | PF
    assert bench.get(12) == 0


def test_pending_interrupt_needs_no_timer_until_it_is_read(bench: Bench) -> None:
    bench.put(11, UIE | H24)
    bench.clock.step(3 * S)
    assert bench.irq.level == 1 and bench.clock.next_deadline_ns is None
    bench.get(12)
    assert bench.clock.next_deadline_ns == 4 * S


@pytest.mark.parametrize(
    ("rate", "period_ns"),
    [(1, 3_906_250), (2, 7_812_500), (3, 122_071), (6, 976_563), (15, 500_000_000)],
)
def test_periodic_interrupt_rates(bench: Bench, rate: int, period_ns: int) -> None:
    bench.put(10, 0x20 | rate)
    bench.get(12)
    bench.put(11, PIE | H24)
    for n in range(1, 5):
        bench.clock.step(n * period_ns - bench.clock.now_ns() - n)  # edges are rounded up to whole ns
        assert bench.irq.level == 0
        bench.clock.step(n)
        assert bench.irq.level == 1
        assert bench.get(12) & ~UF == IRQF | PF


def test_periodic_interrupts_keep_their_average(bench: Bench) -> None:
    bench.get(12)
    bench.put(11, PIE | H24)
    count = 0
    while (due := bench.clock.next_deadline_ns) is not None and due <= S:
        bench.clock.step(due - bench.clock.now_ns())
        count += bench.get(12) & PF != 0
    assert count == 1024


def test_rate_zero_is_no_periodic_interrupt(bench: Bench) -> None:
    bench.put(10, 0x20)
    bench.get(12)
    bench.put(11, PIE | H24)
    assert bench.clock.next_deadline_ns is None
    bench.clock.step(5 * S)
    assert bench.get(12) == UF


def test_enabling_an_interrupt_whose_flag_is_up_raises_it_at_once(bench: Bench) -> None:
    bench.clock.step(S)
    bench.put(11, UIE | H24)
    assert bench.irq.level == 1
    bench.put(11, H24)
    assert bench.irq.level == 0
    assert bench.get(12) & UF


def test_interrupt_that_is_disabled_again_costs_no_timer(bench: Bench) -> None:
    bench.put(11, UIE | H24)
    assert bench.clock.next_deadline_ns == S
    bench.put(11, H24)
    assert bench.clock.next_deadline_ns is None


def test_one_interrupt_up_does_not_hide_the_next_one(bench: Bench) -> None:
    bench.get(12)
    bench.put(11, PIE | UIE | H24)
    bench.clock.step(2 * S)  # nobody read register C meanwhile
    assert bench.get(12) == IRQF | PF | UF
    bench.put(11, UIE | H24)
    assert bench.irq.level == 0 and bench.clock.next_deadline_ns == 3 * S


def test_set_clears_uie(bench: Bench) -> None:
    bench.put(11, SET | UIE | H24)
    assert bench.get(11) == SET | H24


def test_divider_reset_stops_interrupts(bench: Bench) -> None:
    bench.get(12)
    bench.put(11, UIE | PIE | H24)
    bench.put(10, 0x66)
    assert bench.clock.next_deadline_ns is None
    bench.clock.step(10 * S)
    assert bench.get(12) == 0


def test_alarm_at_a_time_of_day(bench: Bench) -> None:
    for index, value in ((1, 0x05), (3, 0x00), (5, 0x00)):
        bench.put(index, value)
    bench.get(12)
    bench.put(11, AIE | H24)
    assert bench.clock.next_deadline_ns == 15 * S  # 00:00:05 tomorrow
    bench.clock.step(15 * S - 1)
    assert bench.irq.level == 0
    bench.clock.step(1)
    assert bench.irq.level == 1
    assert bench.get(12) & (IRQF | AF) == IRQF | AF
    assert bench.clock.next_deadline_ns == (15 + 86_400) * S


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0xFF, 0xFF, 0xFF), 1),  # every second
        ((0x52, 0xFF, 0xFF), 2),  # every minute at :52
        ((0x50, 0xC0, 0xFF), 60),
        ((0x00, 0x30, 0xFF), 1810),  # every hour at :30
        ((0x50, 0x59, 0x23), 86_400),  # now: not before tomorrow
    ],
)
def test_alarm_with_bytes_that_match_everything(
    bench: Bench, alarm: tuple[int, int, int], seconds: int
) -> None:
    for index, value in zip((1, 3, 5), alarm, strict=True):
        bench.put(index, value)
    bench.put(11, AIE | H24)
    assert bench.clock.next_deadline_ns == seconds * S


def test_alarm_in_twelve_hour_mode(bench: Bench) -> None:
    bench.put(11, 0)
    for index, value in ((1, 0x00), (3, 0x00), (5, 0x81)):  # 1 pm
        bench.put(index, value)
    bench.put(11, AIE)
    assert bench.clock.next_deadline_ns == (10 + 13 * 3600) * S


def every_second(bench: Bench, enable: int) -> None:
    for index in (1, 3, 5):
        bench.put(index, 0xC0)
    bench.put(11, H24 | enable)


def test_the_board_hears_of_an_alarm_that_interrupts() -> None:
    """ACPI 6.5, 4.8.2.4: RTC_STS is set when the alarm asserts the interrupt."""
    alarms: list[int] = []
    bench = Bench(on_alarm=lambda: alarms.append(bench.clock.now_ns()))
    every_second(bench, 0)
    bench.clock.step(3 * S)
    bench.get(12)
    assert alarms == []
    every_second(bench, AIE)
    bench.clock.step(S)
    assert alarms == [4 * S]
    bench.clock.step(5 * S)  # the flag is up, and nobody reads it
    assert alarms == [4 * S]
    bench.get(12)
    bench.clock.step(S)
    assert alarms == [4 * S, 10 * S]


def test_the_board_hears_of_an_alarm_behind_an_interrupt_that_nobody_takes() -> None:
    alarms: list[int] = []
    bench = Bench(on_alarm=lambda: alarms.append(bench.clock.now_ns()))
    bench.put(1, 0x55)
    bench.put(3, 0xC0)
    bench.put(5, 0xC0)
    bench.put(11, H24 | AIE | UIE)
    bench.clock.step(10 * S)
    assert alarms == [5 * S]


def test_alarm_that_never_matches(bench: Bench) -> None:
    bench.put(1, 0x77)
    bench.put(11, AIE | H24)
    assert bench.clock.next_deadline_ns is None
    bench.clock.step(200_000 * S)
    assert not bench.get(12) & AF


def test_alarm_flag_comes_up_when_nobody_looked(bench: Bench) -> None:
    bench.put(5, 0x04)
    bench.get(12)
    bench.clock.step(4 * 3600 * S)
    assert not bench.get(12) & AF
    bench.clock.step(3600 * S)
    assert bench.get(12) & AF


@given(
    st.tuples(*[st.one_of(st.just(0xFF), st.integers(0, limit)) for limit in (59, 59, 23)]),
    st.integers(0, 86_399),
)
def test_next_alarm_is_the_first_second_that_matches(alarm: tuple[int, int, int], start_s: int) -> None:
    bench = Bench(datetime(2024, 5, 5, tzinfo=UTC) + timedelta(seconds=start_s))
    for index, value in zip((1, 3, 5), alarm, strict=True):
        bench.put(index, value)
    bench.put(11, AIE | H24 | BINARY)
    want_s, want_m, want_h = alarm

    def matches(second: int) -> bool:
        h, m, s = second % 86_400 // 3600, second % 3600 // 60, second % 60
        return want_h in (255, h) and want_m in (255, m) and want_s in (255, s)

    first = next(n for n in range(start_s + 1, start_s + 86_401) if matches(n))
    assert bench.clock.next_deadline_ns == (first - start_s) * S


# -- CMOS RAM -----------------------------------------------------------------------------------------------


def test_cmos_ram_keeps_what_is_written(bench: Bench) -> None:
    for index in [*range(14, 0x32), *range(0x38, 0x80)]:
        bench.put(index, index ^ 0x5A)
    for index in [*range(14, 0x32), *range(0x38, 0x80)]:
        assert bench.get(index) == index ^ 0x5A


def test_registers_c_and_d_are_read_only(bench: Bench) -> None:
    bench.put(12, 0xFF)
    bench.put(13, 0x00)
    assert (bench.get(12), bench.get(13)) == (0, 0x80)


def test_index_port_is_write_only_and_its_top_bit_masks_nmi(bench: Bench) -> None:
    bench.rtc.write(0, 1, 0x8D)
    assert bench.rtc.read(0, 1) == 0xFF
    assert bench.rtc.nmi_masked
    assert bench.rtc.read(1, 1) == 0x80
    bench.rtc.write(0, 1, 0x0D)
    assert not bench.rtc.nmi_masked


def test_one_word_write_sets_index_and_data(bench: Bench) -> None:
    pio = AddressSpace("pio", 0x10000)
    pio.map(0x70, 2, bench.rtc)
    pio.write(0x70, 2, 0x5A40)
    assert pio.read(0x71, 1) == 0x5A
    assert pio.read(0x70, 2) == 0x5AFF


@pytest.mark.parametrize(
    ("below", "above", "base_kib", "extended_kib", "above_16m", "above_4g"),
    [
        (256 << 10, 0, 256, 0, 0, 0),
        (8 << 20, 0, 640, 7 << 10, 0, 0),
        (128 << 20, 0, 640, 0xFFFF, 112 << 4, 0),
        (3 << 30, 5 << 30, 640, 0xFFFF, (3 << 14) - 256, 5 << 14),
    ],
)
def test_memory_sizes(
    below: int, above: int, base_kib: int, extended_kib: int, above_16m: int, above_4g: int
) -> None:
    bench = Bench(ram_below_4g_bytes=below, ram_above_4g_bytes=above, cpus=3)

    def number(index: int, size: int) -> int:
        return int.from_bytes(bytes(bench.get(index + n) for n in range(size)), "little")

    assert number(0x15, 2) == base_kib
    assert number(0x17, 2) == number(0x30, 2) == extended_kib
    assert number(0x34, 2) == above_16m
    assert number(0x5B, 3) == above_4g
    assert bench.get(0x5F) == 2


def test_reset_keeps_time_and_ram_and_stops_interrupts(bench: Bench) -> None:
    bench.put(0x0F, 0x0A)
    bench.put(1, 0x33)
    bench.put(11, PIE | AIE | UIE | BINARY | H24)
    bench.clock.step(S)
    assert bench.irq.level == 1
    bench.rtc.reset()
    assert bench.irq.level == 0
    assert bench.get(11) == BINARY | H24
    assert bench.get(12) == 0
    assert (bench.get(0x0F), bench.get(1)) == (0x0A, 0x33)
    assert bench.get(0) == 51
    assert bench.clock.next_deadline_ns is None


def test_saved_clock_goes_on_exactly() -> None:
    bench = Bench(phase_ns=123_456_789)
    bench.put(0x40, 0x99)
    bench.put(11, PIE | UIE | BINARY | H24)
    bench.clock.step(2 * S + 77)
    bench.get(12)
    bench.clock.step(1000)
    state = bench.rtc.save()

    other = Bench(datetime(1980, 1, 1, tzinfo=UTC))
    other.clock.step(987_654_321)
    other.rtc.load(state)
    other.rtc.after_load()
    assert other.get(0x40) == 0x99
    for n in range(2000):
        for one in (bench, other):
            one.clock.step(333_333)
        assert (bench.irq.level, bench.get(12)) == (other.irq.level, other.get(12)), n
        assert bench.time() == other.time()


def test_load_restores_the_interrupt_line(bench: Bench) -> None:
    bench.put(11, UIE | H24)
    bench.clock.step(S)
    bench.rtc.write(0, 1, 0x80)
    other = Bench()
    other.rtc.load(bench.rtc.save())
    other.rtc.after_load()
    assert other.irq.level == 1
    assert other.rtc.nmi_masked
