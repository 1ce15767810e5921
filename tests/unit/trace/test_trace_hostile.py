"""A trace file that somebody has made to keep its reader busy: time and memory follow its size, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trace_files import chunk, record, trace

from pyvmm.trace import format as trace_format
from pyvmm.trace import requests as trace_requests
from pyvmm.trace import summary as trace_summary
from pyvmm.trace.format import CALL, EXIT, MSI, PUSH, SHOW, SUBMIT, TAKE, Record, TraceFile
from pyvmm.trace.requests import Requests, requests_of
from pyvmm.trace.summary import OTHERS, Summary

MANY = 40_000
# Of the processor: what is linear takes half a second of it, what is quadratic minutes.
LIMIT_S = 10.0
OUT_80 = 2 << 57 | 1 << 55 | 1 << 16 | 0x80
UNKNOWN = 1 << 20
BYTES = 512 << 32


def opened(tmp_path: Path, data: bytes) -> TraceFile:
    path = tmp_path / "trace"
    path.write_bytes(data)
    return TraceFile(str(path))


def records_of(make: Callable[[int], bytes], many: int = MANY) -> bytes:
    return b"".join(make(n) for n in range(many))


def read(file: TraceFile) -> object:
    return sum(1 for _ in file.records())


def find(file: TraceFile) -> object:
    return {file.names.region("IO", each.a & 0xFFFF) for each in file.records()}


FILES: dict[str, tuple[Callable[[], bytes], Callable[[TraceFile], object]]] = {
    "a round for each record, and all of them in the future": (
        lambda: trace(*(chunk(0, record(PUSH, 1 << 30), at=n) for n in range(MANY))),
        read,
    ),
    "regions that all lie over each other": (
        lambda: trace(
            chunk(0, records_of(lambda n: record(EXIT, n, a=OUT_80)), at=1),
            names={"regions": [["IO", 0x1000, 1, ""]] * 60_000},
        ),
        find,
    ),
    "system calls of nobody's": (
        lambda: trace(
            chunk(0, records_of(lambda n: record(SUBMIT, n, b=n | BYTES)), at=1),
            chunk(0, records_of(lambda n: record(CALL, n, a=UNKNOWN, b=77)), at=2),
        ),
        lambda file: list(requests_of(file)),
    ),
    "chains that are shown one by one": (
        lambda: trace(
            chunk(0, records_of(lambda n: record(TAKE, n, a=n)), at=1),
            chunk(0, records_of(lambda n: record(PUSH, n, a=MANY - n)), at=2),
            chunk(0, records_of(lambda n: record(SHOW, n, a=1)), at=3),
        ),
        lambda file: list(requests_of(file)),
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_it_takes_no_longer_than_its_size(tmp_path: Path, what: str) -> None:
    make, look = FILES[what]
    file = opened(tmp_path, make())
    begin = time.process_time()
    look(file)
    assert time.process_time() - begin < LIMIT_S


def test_who_waits_for_its_turn_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too young for every round comes all the same, and is not kept until the end."""
    monkeypatch.setattr(trace_format, "MOST_WAITING", 10)
    given = 0

    class Counted(Record):
        def __init__(self, *args: Any) -> None:
            nonlocal given
            given += 1
            super().__init__(*args)

    monkeypatch.setattr(trace_format, "Record", Counted)
    file = opened(tmp_path, trace(chunk(0, records_of(lambda n: record(PUSH, 1000 - n), 100), at=1)))
    come = 0
    for _ in file.records():
        come += 1
        assert given <= come + 10
    assert come == 100


def test_names_are_not_longer_than_a_machine_has_them(tmp_path: Path) -> None:
    file = opened(tmp_path, trace(names={"queues": {}, "x": [0] * (3 << 20)}))
    assert "is damaged" in file.damage and file.names.cpus == 0


def test_regions_of_a_page_are_found_by_address(tmp_path: Path) -> None:
    rows = [["MMIO", 0x2000 + 8 * n, 8, f"r{n}"] for n in reversed(range(4))]
    names = opened(tmp_path, trace(names={"regions": [*rows, ["MMIO", 0x2004, 4, "over"], ["MMIO", 0, 1, "x"]]})).names
    assert names.region("MMIO", 0x2000, 4096) == "r0, r1, r2, r3"
    assert [names.region("MMIO", address) for address in (0, 1, 0x1FFF, 0x200F, 0x201F, 0x2020)] == [
        *("x", "", "", "r1", "r3", "")
    ]


def test_requests_on_all_queues_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_requests, "MOST_PENDING", 8)
    file = opened(tmp_path, trace(chunk(0, records_of(lambda n: record(TAKE, n, source=n, a=n), 100), at=1)))
    requests = Requests(file.names)
    for each in file.records():
        requests.feed(each)
        assert requests.left <= 8


def test_rows_are_bounded_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_summary, "MOST_ROWS", 8)
    exits = records_of(lambda n: record(EXIT, n, 5, a=6 << 57 | n << 12), 100)
    messages = records_of(lambda n: record(MSI, n, a=n), 100)
    summary = Summary(opened(tmp_path, trace(chunk(0, exits + messages, at=1))))
    assert len(summary.exits) == len(summary.interrupts) == 9
    assert (summary.exits[OTHERS, None, ""].count, summary.interrupts[OTHERS]) == (92, 92)
    assert sum(times.count for times in summary.exits.values()) == 100
    assert "others" in summary.text()
