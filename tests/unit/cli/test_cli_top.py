"""What `pyvmm top` makes of two looks at a machine's counters."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.cli.top import Look, Sample, lines_of, plain, size, split_names

STATS = ("rd_operations", "wr_operations", "rd_bytes", "wr_bytes", "rd_total_time_ns", "wr_total_time_ns", "in_flight")


def sample(at_s: float, scale: int) -> Sample:
    """Counters that are ``scale`` times something."""
    thread = {"name": "CPU 0/KVM", "thread-id": 7, "vcpu": 0, "guest-ns": 5 * 10**8 * scale, "user-ns": 10**8 * scale}
    thread |= {"system-ns": 2 * 10**8 * scale, "wait-ns": 10**8 * scale}
    idle: dict[str, Any] = {**dict.fromkeys(thread, 0), "name": "idle", "thread-id": 8}
    del idle["vcpu"]
    card = {"name": "net0", "rx-packets": 10 * scale, "rx-bytes": 1 << 20, "rx-dropped": 0}
    card |= {"tx-packets": 20 * scale, "tx-bytes": scale << 20, "tx-dropped": scale}
    exits = [
        {"reason": "IO", "address": 0x3F8, "region": "serial", "direction": "out", "count": 300 * scale,
         "time-ns": 300_000 * scale},
        {"reason": "IO", "address": 0x80, "direction": "out", "count": 100 * scale, "time-ns": 10_000 * scale},
        {"reason": "HLT", "direction": "", "count": 5, "time-ns": 5},
    ]  # fmt: skip
    stats = dict(zip(STATS, (50 * scale, 50 * scale, scale << 20, scale << 10, 10**6 * scale, 0, 3), strict=True))
    return Sample(at_s, [{"status": "running"}, exits, [thread, idle], [{"device": "v", "stats": stats}], [card]])


def test_rates_are_of_the_time_between() -> None:
    look = Look(sample(10.0, 1), sample(12.0, 3))
    assert [(key[1], rate) for key, rate, _, _ in look.exits] == [(0x3F8, 300.0), (0x80, 100.0)]
    assert look.exits[0][2:] == (300_000.0, 1000.0)  # ns a second, and each
    assert look.threads[0] == ("CPU 0/KVM", 7, 0, pytest.approx([0.5, 0.1, 0.2, 0.1]))
    assert (look.drives["v"]["rd_bytes"], look.in_flight["v"]) == (1 << 20, 3)
    assert (look.cards["net0"]["rx-packets"], look.cards["net0"]["rx-bytes"]) == (10, 0)


def test_the_lines() -> None:
    lines = list(lines_of("web", 61, Look(sample(0.0, 0), sample(1.0, 1)), 1))
    assert lines[0] == "web: running, up 1m01s, 400 exits/s, 0.0% of a processor in them"
    assert lines[1] == "  IO 400/s"
    assert lines[3].split() == ["IO", "0x3f8", "out", "300", "1.00", "0.0%", "serial"]
    assert lines[4] == "  and 1 more kinds"
    assert lines[6].split() == ["vCPU", "0", "50.0%", "10.0%", "20.0%", "10.0%"]
    assert lines[7] == "  and 1 more that do nothing"
    assert lines[9].split() == ["v", "50", "50", "1.0", "MiB/s", "1.0", "KiB/s", "10.0", "3"]
    assert lines[11].split() == ["net0", "10", "20", "0", "B/s", "1.0", "MiB/s", "1"]


def test_a_machine_that_was_restored_counts_from_nothing() -> None:
    look = Look(sample(0.0, 5), sample(1.0, 1))
    assert [rate for _, rate, _, _ in look.exits] == [300.0, 100.0]
    assert look.threads[0][3] == [0.0] * 4
    assert look.drives["v"]["rd_bytes"] == 0


def test_names_stand_anywhere() -> None:
    args = ["a", "--interval", "0.5", "b", "--once", "c", "--batch=3"]
    assert split_names(args) == (["a", "b", "c"], ["--interval", "0.5", "--once", "--batch=3"])


def test_what_a_terminal_could_take_for_a_command_is_none() -> None:
    assert plain("a\x1b[2Jb\nc") == "a?[2Jb?c"
    assert [size(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == [
        "0 B/s", "1023 B/s", "1.5 KiB/s", "3.0 MiB/s", "5.0 GiB/s",
    ]  # fmt: skip
