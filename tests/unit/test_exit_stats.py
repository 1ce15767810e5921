"""The exit profiler, fed through the run loop with synthetic exits."""

from __future__ import annotations

from collections import Counter

import kvm_page as k
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_page import Guest, Recorder

from pyvmm.exit_stats import DIRECTIONS, ExitStat, ExitStats, format_table, merge
from pyvmm.region import LatchRegion

TSC_KHZ = 1e6  # a tick is a nanosecond: bounds are powers of two
ENTRIES = 512  # one of them for what finds no room


def table(guest: Guest) -> dict[tuple[str, int | None, str], ExitStat]:
    rows = guest.cpu.stats.rows(TSC_KHZ)
    keyed = {(row.reason, row.address, row.direction): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def counts(guest: Guest) -> dict[tuple[str, int | None, str], int]:
    return {key: row.count for key, row in table(guest).items()}


def test_nothing_yet() -> None:
    assert ExitStats().rows(TSC_KHZ) == []


def test_exits_are_counted_by_reason_port_or_page_and_direction() -> None:
    guest = Guest()
    guest.pio.add(0x80, LatchRegion(4))
    for _ in range(3):
        guest.out(0x80, 1, 0)
    guest.out(0x82, 2, 1, 2, 3)  # a string is one exit
    guest.in_(0x80, 4)
    guest.mmio_read(0xFEC0_0010, 4)
    guest.mmio_read(0xFEC0_0FFF, 1)
    guest.mmio_write(0xFEC0_0000, b"\0")
    guest.mmio_write(0xFEC0_1000, b"\0")
    guest.exit(k.HLT)
    guest.exit(k.SHUTDOWN)
    guest.exit(0x4000)
    assert counts(guest) == {
        ("IO", 0x80, "out"): 3,
        ("IO", 0x82, "out"): 1,
        ("IO", 0x80, "in"): 1,
        ("MMIO", 0xFEC0_0000, "in"): 2,
        ("MMIO", 0xFEC0_0000, "out"): 1,
        ("MMIO", 0xFEC0_1000, "out"): 1,
        ("HLT", None, ""): 1,
        ("SHUTDOWN", None, ""): 1,
        ("exit 255", None, ""): 1,
    }


def test_an_exit_whose_device_raises_is_counted_too() -> None:
    guest = Guest()
    guest.pio.map(0x80, 1, Recorder(KeyError))
    for _ in range(2):
        with pytest.raises(KeyError):
            guest.io(k.IN, 1, 0x80)
    assert counts(guest) == {("IO", 0x80, "in"): 2}


def test_the_numbers_of_a_row_agree() -> None:
    guest = Guest()
    guest.pio.map(0x80, 1, Recorder())
    guest.pio.add(0x90, LatchRegion(1))
    for _ in range(500):
        guest.in_(0x80, 1)
        guest.in_(0x90, 1, 1 + _ % 100)
    rows = guest.cpu.stats.rows(TSC_KHZ)
    assert [row.sum_ns for row in rows] == sorted((row.sum_ns for row in rows), reverse=True)
    for row in rows:
        assert row.count == sum(count for _, count in row.histogram_ns) == 500
        assert 0 < row.min_ns <= row.mean_ns <= row.max_ns <= row.sum_ns
        assert row.mean_ns == row.sum_ns / 500
        bounds = [bound for bound, _ in row.histogram_ns]
        assert bounds == sorted(bounds)
        assert all(bound == 1 << int(bound).bit_length() - 1 for bound in bounds)
        assert bounds[0] / 2 <= row.min_ns < bounds[0]
        assert bounds[-1] / 2 <= row.max_ns < bounds[-1]
        assert row.min_ns < row.median_ns <= bounds[-1]
        least = sum(count * bound / 2 for bound, count in row.histogram_ns)
        assert least <= row.sum_ns < 2 * least


def test_ticks_become_nanoseconds() -> None:
    guest = Guest()
    guest.exit(k.HLT)
    (ticks,) = guest.cpu.stats.rows(1e6)
    (at_2_ghz,) = guest.cpu.stats.rows(2e6)
    assert at_2_ghz.sum_ns == ticks.sum_ns / 2
    assert at_2_ghz.histogram_ns == [(bound / 2, count) for bound, count in ticks.histogram_ns]


def test_more_ports_than_entries_go_to_one_row_and_nothing_is_lost() -> None:
    guest = Guest()
    ports = range(0x1000, 0x1000 + 700)
    for _ in range(2):
        for port in ports:
            guest.out(port, 1, 0)
    seen = counts(guest)
    assert sum(seen.values()) == 1400
    assert seen.pop(("other", None, "")) == 2 * (700 - (ENTRIES - 1))
    assert seen == {("IO", port, "out"): 2 for port in ports[: ENTRIES - 1]}
    guest.mmio_read(0x5000, 1)  # a reason of its own finds no room either
    assert counts(guest)["other", None, ""] == 2 * (700 - (ENTRIES - 1)) + 1
    guest.out(0x1000, 1, 0)
    assert counts(guest)["IO", 0x1000, "out"] == 3


def test_clear_starts_from_nothing() -> None:
    guest = Guest()
    for port in range(600):
        guest.out(port, 1, 0)
    guest.cpu.stats.clear()
    assert guest.cpu.stats.rows(TSC_KHZ) == []
    guest.out(599, 1, 0)
    guest.out(3, 1, 0)
    assert counts(guest) == {("IO", 599, "out"): 1, ("IO", 3, "out"): 1}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("IO"), st.integers(0, 0xFFFF), st.booleans()),
            st.tuples(st.just("MMIO"), st.integers(0, (1 << 52) - 8), st.booleans()),
        ),
        max_size=80,
    )
)
def test_counts_are_those_of_a_counter(exits: list[tuple[str, int, bool]]) -> None:
    guest = Guest()
    model: Counter[tuple[str, int | None, str]] = Counter()
    for reason, where, is_write in exits:
        direction = DIRECTIONS[is_write]
        if reason == "IO":
            guest.io(k.OUT if is_write else k.IN, 1, where)
            model[reason, where, direction] += 1
        else:
            guest.exit(k.MMIO, "Q8sIB", where, b"", 1, is_write)
            model[reason, where & ~0xFFF, direction] += 1
    assert counts(guest) == model


# -- tables --------------------------------------------------------------------------------------------------


def row(
    reason: str = "IO",
    address: int | None = 0x80,
    direction: str = "out",
    times: tuple[float, ...] = (100.0,),
    histogram: list[tuple[float, int]] | None = None,
) -> ExitStat:
    histogram = [(128.0, len(times))] if histogram is None else histogram
    return ExitStat(reason, address, direction, len(times), sum(times), min(times), max(times), histogram)


def test_merge_adds_the_rows_of_several_vcpus() -> None:
    first = [row(times=(100.0, 120.0)), row("HLT", None, "", (7.0,), [(8.0, 1)])]
    second = [
        row(times=(60.0, 5000.0, 90.0), histogram=[(64.0, 1), (128.0, 1), (8192.0, 1)]),
        row(direction="in"),
    ]
    merged = merge([first, second, []])
    assert [(r.reason, r.direction, r.count) for r in merged] == [
        ("IO", "out", 5),
        ("IO", "in", 1),
        ("HLT", "", 1),
    ]
    total = merged[0]
    assert (total.sum_ns, total.min_ns, total.max_ns) == (5370.0, 60.0, 5000.0)
    assert total.histogram_ns == [(64.0, 1), (128.0, 3), (8192.0, 1)]
    assert (total.mean_ns, total.median_ns) == (1074.0, 128.0)
    assert (first[0].count, second[0].count) == (2, 3)  # the parts are as they were
    assert merge([]) == []


def test_median_is_the_bound_of_the_middle_bucket() -> None:
    assert row(histogram=[(2.0, 1), (4.0, 1)], times=(1.0, 3.0)).median_ns == 2.0
    assert row(histogram=[(2.0, 1), (4.0, 2)], times=(1.0, 3.0, 3.0)).median_ns == 4.0
    assert ExitStat("IO", 1, "in", 0, 0.0, 0.0, 0.0, []).median_ns == 0.0
    assert ExitStat("IO", 1, "in", 0, 0.0, 0.0, 0.0, []).mean_ns == 0.0


def test_the_table() -> None:
    rows = [row(times=(100.0, 120.0)), row("MMIO", 0xFEC0_0000, "in"), row("HLT", None, "")]
    text = format_table(rows, {("IO", 0x80): "port80", ("MMIO", 0xFEC0_0000): "ioapic"})
    lines = text.splitlines()
    assert len(lines) == 5
    assert lines[0].split()[:4] == ["exit", "address", "count", "mean"]
    assert lines[1].split() == ["IO", "0x80", "out", "2", "110", "100", "128", "120", "0.00", "port80"]
    assert lines[2].split() == ["MMIO", "0xfec00000", "in", "1", "100", "100", "128", "100", "0.00", "ioapic"]
    assert lines[3].split() == ["HLT", "1", "100", "100", "128", "100", "0.00"]
    assert lines[4] == "4 exits, 0.0 ms in user space"
    assert all(line == line.rstrip() for line in lines)
    assert format_table([]).splitlines()[-1] == "0 exits, 0.0 ms in user space"


def test_repr() -> None:
    assert repr(row()) == "<ExitStat IO 0x80 out x1, 100 ns>"
