"""ACPI fixed hardware: events and SCI, sleep control, the PM timer, the power button."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.acpi_pm import EVENTS, GBL, PM_TIMER_HZ, PWRBTN, RTC, SLPBTN, TMR, WAK, AcpiPm
from pyvmm.irq import IrqLine

SECOND = 1_000_000_000
BASE = 0x600
STS, EN, CNT, TIMER = BASE, BASE + 2, BASE + 4, BASE + 8
SLP_EN = 0x2000


def ticks_to_ns(ticks: int) -> int:
    return -(-ticks * SECOND // PM_TIMER_HZ)


class Bench:
    def __init__(self, s5_type: int = 5, timer_bits: int = 32) -> None:
        self.clock = VirtualClock()
        self.sci: list[int] = []
        self.shutdowns = 0
        self.pm = AcpiPm(
            self.clock, IrqLine(self.sci.append), self.shut_down, s5_type=s5_type, timer_bits=timer_bits
        )
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(BASE, 12, self.pm)

    def shut_down(self) -> None:
        self.shutdowns += 1

    def inb(self, port: int) -> int:
        return self.pio.read(port, 1)

    def inw(self, port: int) -> int:
        return self.pio.read(port, 2)

    def inl(self, port: int) -> int:
        return self.pio.read(port, 4)

    def outw(self, port: int, value: int) -> None:
        self.pio.write(port, 2, value)

    def to_tick(self, tick: int) -> None:
        self.clock.step(ticks_to_ns(tick) - self.clock.now_ns())


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_power_on(bench: Bench) -> None:
    assert (bench.inl(BASE), bench.inl(CNT), bench.inl(TIMER)) == (0, 1, 0)
    assert bench.sci == []


# Events and the SCI


def test_power_button_sets_its_status_and_interrupts_once_enabled(bench: Bench) -> None:
    bench.pm.press()
    assert bench.inw(STS) == PWRBTN
    assert bench.sci == []
    bench.outw(EN, PWRBTN)
    assert bench.sci == [1]
    bench.outw(STS, PWRBTN)
    assert bench.inw(STS) == 0
    assert bench.sci == [1, 0]
    bench.pm.press()
    assert bench.sci == [1, 0, 1]


def test_status_is_cleared_only_where_ones_are_written(bench: Bench) -> None:
    bench.pm.press()
    bench.outw(STS, 0xFFFF & ~PWRBTN)
    bench.pio.write(STS, 1, 0xFF)
    assert bench.inw(STS) == PWRBTN
    bench.pio.write(STS + 1, 1, 0x01)
    assert bench.inw(STS) == 0


def test_enable_keeps_the_bits_of_real_events(bench: Bench) -> None:
    bench.outw(EN, 0xFFFF)
    assert bench.inw(EN) == EVENTS == TMR | GBL | PWRBTN | SLPBTN | RTC
    bench.pio.write(EN, 1, 0)
    assert bench.inw(EN) == EVENTS & 0xFF00
    bench.outw(EN, 0)
    assert bench.inw(EN) == 0


def test_a_dword_covers_status_and_enable(bench: Bench) -> None:
    bench.pm.press()
    bench.pio.write(STS, 4, PWRBTN << 16)
    assert bench.inl(STS) == PWRBTN << 16 | PWRBTN
    bench.pio.write(STS, 4, PWRBTN)
    assert bench.inl(STS) == 0
    assert bench.sci == [1, 0]


# Sleep control


def test_control_keeps_the_sleep_type_but_not_the_command(bench: Bench) -> None:
    bench.outw(CNT, 0xDFFE)
    assert bench.inw(CNT) == 0x1C03
    bench.outw(CNT, 0)
    assert bench.inw(CNT) == 1, "SCI_EN cannot be cleared: there is no other mode"


@pytest.mark.parametrize("s5_type", [0, 5])
def test_sleep_enable_with_the_type_of_s5_shuts_down(s5_type: int) -> None:
    bench = Bench(s5_type=s5_type)
    for kind in range(8):
        bench.outw(CNT, kind << 10)
        assert bench.shutdowns == 0
        if kind != s5_type:
            bench.outw(CNT, kind << 10 | SLP_EN)
    assert bench.shutdowns == 0, "no other state is offered"
    bench.outw(CNT, s5_type << 10 | SLP_EN)
    assert bench.shutdowns == 1


def test_sleep_by_bytes(bench: Bench) -> None:
    bench.pio.write(CNT, 1, 0xFF)
    assert bench.shutdowns == 0
    bench.pio.write(CNT + 1, 1, (5 << 10 | SLP_EN) >> 8)
    assert bench.shutdowns == 1


def test_writes_around_the_control_register_do_not_shut_down() -> None:
    bench = Bench(s5_type=0)
    for port in (STS, EN, BASE + 6, TIMER, TIMER + 2):
        bench.outw(port, 0xFFFF)
    assert bench.shutdowns == 0
    assert bench.inw(BASE + 6) == 0


# The PM timer


def test_timer_runs_at_its_frequency_and_is_read_only(bench: Bench) -> None:
    bench.clock.step(SECOND)
    assert bench.inl(TIMER) == PM_TIMER_HZ
    bench.pio.write(TIMER, 4, 0)
    assert bench.inl(TIMER) == PM_TIMER_HZ
    assert [bench.inb(TIMER + n) for n in range(4)] == list(PM_TIMER_HZ.to_bytes(4, "little"))
    assert bench.inw(TIMER + 2) == PM_TIMER_HZ >> 16


@settings(deadline=None)
@given(st.integers(0, 10**13), st.sampled_from([24, 32]))
def test_timer_value_at_any_time(now_ns: int, bits: int) -> None:
    bench = Bench(timer_bits=bits)
    bench.clock.step(now_ns)
    assert bench.inl(TIMER) == now_ns * PM_TIMER_HZ // SECOND % (1 << bits)


@pytest.mark.parametrize("bits", [24, 32])
def test_status_is_set_when_the_highest_bit_changes_either_way(bits: int) -> None:
    bench = Bench(timer_bits=bits)
    half = 1 << (bits - 1)
    for n in range(1, 4):
        bench.to_tick(n * half - 1)
        assert bench.inw(STS) == 0
        bench.to_tick(n * half)
        assert bench.inw(STS) == TMR
        bench.outw(STS, TMR)
        assert bench.inw(STS) == 0
    assert bench.sci == []


def test_overflow_interrupts_at_its_tick_and_again_after_each_clear() -> None:
    bench = Bench(timer_bits=24)
    bench.outw(EN, TMR)
    half = 1 << 23
    for n in range(1, 4):
        bench.to_tick(n * half - 1)
        assert bench.sci == [1, 0] * (n - 1)
        bench.to_tick(n * half)
        assert bench.sci == [1, 0] * (n - 1) + [1]
        bench.outw(STS, TMR)
    assert bench.sci == [1, 0] * 3
    bench.outw(EN, 0)
    assert bench.clock.next_deadline_ns is None


def test_enabling_after_the_overflow_interrupts_at_once() -> None:
    bench = Bench(timer_bits=24)
    bench.to_tick(1 << 23)
    bench.outw(EN, TMR)
    assert bench.sci == [1]
    assert bench.clock.next_deadline_ns is None, "nothing more to tell until it is cleared"


# State


def test_reset(bench: Bench) -> None:
    bench.outw(EN, PWRBTN | TMR)
    bench.outw(CNT, 3 << 10)
    bench.pm.press()
    bench.pm.reset()
    assert (bench.inl(BASE), bench.inl(CNT)) == (0, 1)
    assert bench.sci == [1, 0]
    assert bench.clock.next_deadline_ns is None


def test_save_and_load_go_on_at_another_time() -> None:
    bench = Bench(timer_bits=24)
    bench.outw(EN, TMR | PWRBTN)
    bench.outw(CNT, 2 << 10)
    bench.to_tick((1 << 23) - 1000)
    other = Bench(timer_bits=24)
    other.clock.step(123 * SECOND)
    other.pm.load(bench.pm.save())
    other.pm.after_load()
    assert (other.inl(BASE), other.inl(CNT), other.inl(TIMER)) == (
        (TMR | PWRBTN) << 16,
        1 | 2 << 10,
        (1 << 23) - 1000,
    )
    other.clock.step(ticks_to_ns(998))
    assert other.sci == []
    other.clock.step(ticks_to_ns(3))
    assert other.sci == [1]
    again = Bench(timer_bits=24)
    again.pm.load(other.pm.save())
    again.pm.after_load()
    assert again.sci == [1]


def test_a_chipset_that_starts_outside_of_acpi_mode(bench: Bench) -> None:
    sci: list[int] = []
    pm = AcpiPm(bench.clock, IrqLine(sci.append), bench.shut_down, s5_type=5, acpi_mode=False)
    pm.write(2, 2, PWRBTN)
    pm.press()
    assert (pm.read(4, 2), sci) == (0, [])
    pm.set_acpi_mode(True)
    assert (pm.read(4, 2), sci) == (1, [1])
    pm.write(4, 2, 0)  # SCI_EN is not the guest's to write
    assert pm.read(4, 2) == 1
    state = pm.save()
    pm.reset()
    assert (pm.read(4, 2), sci) == (0, [1, 0])
    pm.load(state)
    pm.after_load()
    assert (pm.read(4, 2), sci) == (1, [1, 0, 1])
    pm.set_acpi_mode(False)
    assert sci == [1, 0, 1, 0]


# Suspend to RAM


class Sleeper(Bench):
    """A bench whose DSDT has S3 as type 1; what it was told is in ``heard``."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[object] = []
        self.pio.unmap(self.pio.regions[0])
        self.pm = AcpiPm(
            self.clock,
            IrqLine(self.sci.append),
            self.shut_down,
            s5_type=5,
            s3_type=1,
            on_suspend=lambda: self.heard.append("suspend"),
            on_wake=self.heard.append,
        )
        self.pio.map(BASE, 12, self.pm)

    def sleep(self, slp_typ: int = 1) -> None:
        self.outw(CNT, SLP_EN | slp_typ << 10)


def test_slp_typ_of_s3_suspends_and_no_other() -> None:
    sleeper = Sleeper()
    for slp_typ in (0, 2, 3, 4, 6, 7):
        sleeper.sleep(slp_typ)
    assert sleeper.heard == []
    sleeper.outw(CNT, 1 << 10)  # without SLP_EN nothing happens
    assert sleeper.heard == []
    sleeper.sleep()
    assert sleeper.heard == ["suspend"]
    assert sleeper.inw(CNT) == 1 | 1 << 10  # SLP_EN reads as zero
    assert sleeper.shutdowns == 0


@pytest.mark.parametrize(("event", "raise_it"), [(PWRBTN, AcpiPm.press), (RTC, AcpiPm.rtc_alarm)])
def test_only_an_enabled_event_wakes(event: int, raise_it: Callable[[AcpiPm], None]) -> None:
    """4.8.3.1: status and enable together make the wake event."""
    sleeper = Sleeper()
    sleeper.sleep()
    raise_it(sleeper.pm)
    assert sleeper.heard == ["suspend"]
    assert sleeper.inw(STS) == event
    sleeper = Sleeper()
    sleeper.outw(EN, event)
    raise_it(sleeper.pm)
    sleeper.outw(STS, event)
    assert sleeper.heard == []  # not while it is awake
    sleeper.sleep()
    raise_it(sleeper.pm)
    raise_it(sleeper.pm)
    assert sleeper.heard == ["suspend", event]


def test_an_event_that_is_up_already_wakes_at_once() -> None:
    sleeper = Sleeper()
    sleeper.outw(EN, PWRBTN)
    sleeper.pm.press()
    sleeper.sleep()
    assert sleeper.heard == ["suspend", PWRBTN]


def test_the_timer_does_not_wake() -> None:
    sleeper = Sleeper()
    sleeper.outw(EN, TMR)
    sleeper.sleep()
    sleeper.clock.step(1 << 43)
    assert sleeper.inw(STS) & TMR
    assert sleeper.heard == ["suspend"]


def test_after_the_reset_of_a_wake_up_its_cause_is_told() -> None:
    """4.8.3.1.1: WAK_STS, cleared by writing a one; it has no enable bit and makes no SCI."""
    sleeper = Sleeper()
    sleeper.outw(EN, RTC)
    sleeper.sleep()
    sleeper.pm.rtc_alarm()
    sleeper.pm.wake()
    sleeper.pm.woken(RTC)
    assert (sleeper.inw(STS), sleeper.inw(EN), sleeper.inw(CNT)) == (WAK | RTC, 0, 1)
    sleeper.outw(EN, 0xFFFF & ~RTC)
    assert sleeper.sci[-1] == 0
    assert sleeper.inw(EN) & WAK == 0
    sleeper.outw(STS, WAK)
    assert sleeper.inw(STS) == RTC
    sleeper.pm.rtc_alarm()
    assert sleeper.heard == ["suspend", RTC]  # awake


def test_a_sleep_is_part_of_the_saved_state() -> None:
    sleeper, other = Sleeper(), Sleeper()
    sleeper.outw(EN, RTC)
    sleeper.sleep()
    other.pm.load(sleeper.pm.save())
    other.pm.after_load()
    other.pm.rtc_alarm()
    assert other.heard == [RTC]
