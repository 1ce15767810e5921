"""The file of a trace, whole, cut off and damaged: what can be read is, and nothing else happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz.trace import one_input
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_files import KHZ, START, chunk, named, of_threads, record, trace

from pyvmm.errors import ConfigError
from pyvmm.trace.format import CHUNK, END, EXIT, HEADER, KICK, PUSH, TraceFile, chunk_bytes, header_bytes


def opened(tmp_path: Path, data: bytes) -> TraceFile:
    path = tmp_path / "trace"
    path.write_bytes(data)
    return TraceFile(str(path))


def pushed(file: TraceFile) -> list[int]:
    return [each.a for each in file.records() if each.kind == PUSH]


def push(at: int, number: int) -> bytes:
    return record(PUSH, at, a=number)


def test_records_come_in_the_order_of_time(tmp_path: Path) -> None:
    # What a later round brings may be older than what an earlier one has of another ring.
    data = trace(
        chunk(0, named(7, "CPU 0/KVM") + push(10, 1) + push(90, 3), at=100),
        chunk(1, named(8, "worker") + push(50, 2) + push(120, 5), at=130),
        chunk(0, push(110, 4) + push(190, 7), at=200),
        chunk(1, push(140, 6), at=230),
    )
    file = opened(tmp_path, data)
    assert pushed(file) == [1, 2, 3, 4, 5, 6, 7]
    assert [str(each.thread) for each in file.records()][:2] == ["CPU 0/KVM", "worker 8"]
    assert file.damage == "" and not file.ended


def test_what_takes_time_is_there_at_its_end(tmp_path: Path) -> None:
    file = opened(tmp_path, of_threads({"CPU 0/KVM": [(EXIT, 10, 50)], "worker": [(PUSH, 20, 0, 0, 1)]}))
    assert [each.kind for each in file.records()] == [PUSH, EXIT]


def test_it_may_end_anywhere(tmp_path: Path) -> None:
    first, second = chunk(0, named(7, "a") + push(1, 1), at=5), chunk(0, push(6, 2) + push(7, 3), at=9)
    data = trace(first, second)
    whole = len(data) - len(second)
    for size in range(len(data) + 1):
        if size < HEADER.size:
            with pytest.raises(ConfigError, match="no trace"):
                opened(tmp_path, data[:size])
            continue
        file = opened(tmp_path, data[:size])
        ends = whole, whole + CHUNK.size + 32, len(data)  # of the three records
        assert pushed(file) == [1, 2, 3][: sum(size >= end for end in ends)], size
        at_an_end = size in (HEADER.size, whole - len(first), whole, len(data))
        assert (file.damage == "") == at_an_end, size


def test_damage_is_told_and_ends_it(tmp_path: Path) -> None:
    good = chunk(0, push(1, 1), at=5)
    at = len(trace(good))
    bad = bytearray(chunk(0, push(6, 2), at=9))
    bad[0] ^= 1
    file = opened(tmp_path, trace(good) + bytes(bad))
    assert pushed(file) == [1]
    assert file.damage == f"it is damaged at byte {at}, and what comes after that is missing"


@pytest.mark.parametrize("size", [31, (64 << 20) + 32, (1 << 32) - 1])
def test_a_chunk_of_a_size_that_there_is_none_of(tmp_path: Path, size: int) -> None:
    head = CHUNK.pack(int.from_bytes(b"CHNK", "little"), 1, 0, size, 0, START, 0)
    file = opened(tmp_path, trace() + head + bytes(64))
    assert "is damaged" in file.damage
    assert list(file.records()) == []


@pytest.mark.parametrize(
    "names",
    [[], 5, {"cpus": "x", "queues": [1], "drives": {"x": 1, "5": 5}, "regions": [[1], ["IO", -1, 1, "x"], 3]}, {}],
)
def test_names_that_are_none(tmp_path: Path, names: object) -> None:
    file = opened(tmp_path, trace(names=names))
    assert (file.names.cpus, file.names.queues, file.names.drives) == (0, {}, {})
    assert file.names.region("IO", 0x80) == ""


def test_a_name_moves_no_cursor(tmp_path: Path) -> None:
    records = chunk(0, named(7, "\x1b[2J") + push(1, 1), at=5)
    file = opened(tmp_path, trace(records, names={"queues": {"0": "a\x1b]0;b\n"}}))
    assert file.names.queues == {0: "a?]0;b?"}
    assert [str(each.thread) for each in file.records()] == ["?[2J 7"]


def test_json_that_is_none_or_too_deep(tmp_path: Path) -> None:
    for data in (b"\xff", b"[" * 100_000, b"{"):
        assert opened(tmp_path, header_bytes(KHZ, START, 0, 0) + chunk_bytes(2, data, START, 0)).names.queues == {}


def test_what_was_dropped_is_counted(tmp_path: Path) -> None:
    data = trace(chunk(0, push(1, 1), at=5, dropped=4), chunk(0, b"", at=9, dropped=2))
    assert opened(tmp_path, data).dropped == 6
    ended = opened(tmp_path, data + chunk_bytes(END, b'{"dropped":9}', START + 20, 20))  # 3 found no ring
    assert (ended.dropped, ended.ended) == (9, True)


def test_a_tsc_of_unknown_speed_is_measured(tmp_path: Path) -> None:
    later = CHUNK.pack(int.from_bytes(b"CHNK", "little"), 1, 0, 0, 0, START + 3000, 1500)
    assert opened(tmp_path, header_bytes(0, START, 500, 0) + later).tsc_khz == 3_000_000


def test_it_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the FILE of a --trace"):
        TraceFile(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="give the FILE of a --trace"):
        TraceFile(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no regular file"):
        TraceFile(str(tmp_path / "fifo"))
    with pytest.raises(ConfigError, match="it is of version 2"):
        opened(tmp_path, HEADER.pack(b"PYVMMTRC", 2, HEADER.size, 0, 0, 0, 0))


GOOD = of_threads({
    "CPU 0/KVM": [(EXIT, 10 * n, 5, 0, 2 << 57 | 1 << 55 | 1 << 16 | 0x80, 65) for n in range(3)],
    "worker": [(kind, 7 * kind, 3, 0, kind, kind << 32 | 1) for kind in range(KICK, 20)],
})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8), st.integers(0, 2000))
def test_any_bytes_are_read_or_refused(changes: list[tuple[int, int]], size: int) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    one_input(bytes(data[:size]))


@settings(max_examples=20, deadline=None)
@given(st.binary(max_size=400))
def test_any_chunk_after_a_header(data: bytes) -> None:
    one_input(trace() + chunk(0, data[: len(data) // 32 * 32], at=5) + data)
