"""Requests out of records: what belongs together, and which stage took how long."""

from __future__ import annotations

from pathlib import Path

from trace_files import START, Row, of_threads

from pyvmm.cli.trace import request_line
from pyvmm.trace.format import (
    BEGIN,
    CALL,
    DONE,
    EXIT,
    KICK,
    LINE,
    MOVE,
    PUSH,
    SHOW,
    SUBMIT,
    TAKE,
    TraceFile,
)
from pyvmm.trace.requests import Request, requests_of
from pyvmm.trace.summary import Summary, Times

VIRTIO, IDE = 0, 1
OUT_80 = 2 << 57 | 1 << 55 | 1 << 16 | 0x80
READ, WRITE, FLUSH = (kind << 48 for kind in range(3))


def long(number: int, size: int) -> int:
    return number | size << 32


def requests(tmp_path: Path, **threads: list[Row]) -> tuple[TraceFile, list[Request]]:
    path = tmp_path / "trace"
    path.write_bytes(of_threads({"CPU 0/KVM" if name == "cpu0" else name: rows for name, rows in threads.items()}))
    file = TraceFile(str(path))
    return file, list(requests_of(file))


def stages(request: Request) -> list[tuple[str, int, int]]:
    return [(name, begin - START, end - START) for name, begin, end in request.stages()]


def test_a_read_that_the_lane_has_done(tmp_path: Path) -> None:
    file, (first, second) = requests(tmp_path, queue=[
        (KICK, 10), (TAKE, 20, 0, 0, 0, long(16, 4097)), (TAKE, 21, 0, 0, 1, long(16, 513)),
        (MOVE, 30, 10, 0, READ | 8, long(0, 4096)), (PUSH, 42, 0, 0, 0, 4097),
        (MOVE, 50, 5, 0, READ | 99, long(1, 512)), (PUSH, 57, 0, 0, 1, 513), (SHOW, 60, 0, 0, 2, 1),
    ])  # fmt: skip
    assert stages(first) == [
        ("notice", 10, 20), ("device", 20, 30), ("call", 30, 40), ("completion", 40, 42), ("interrupt", 42, 60),
    ]  # fmt: skip
    assert (first.device, first.kind, first.sector, first.bytes, first.interrupted) == ("blk0.0", "read", 8, 4096, True)
    assert (second.sector, second.bytes) == (99, 512)
    line = request_line(file, first).partition("blk0.0 ")[2]
    assert line == "#0 read sector 8 4096 bytes  notice 10  device 10  call 10  completion 2  interrupt 18"


def test_a_write_that_a_worker_does(tmp_path: Path) -> None:
    _, (request,) = requests(
        tmp_path,
        queue=[(KICK, 1), (TAKE, 2), (BEGIN, 3), (SUBMIT, 4, 0, VIRTIO, WRITE | 7, long(55, 1024))],
        worker=[(CALL, 10, 20, VIRTIO, 55, 1024), (DONE, 31, 0, VIRTIO, 55), (PUSH, 33, 0, 0, 0, 1),
                (SHOW, 34, 0, 0, 1, 0)],
    )  # fmt: skip
    assert stages(request) == [
        ("notice", 1, 2), ("device", 2, 4), ("queue", 4, 10), ("call", 10, 30), ("completion", 30, 33),
        ("interrupt", 33, 34),
    ]  # fmt: skip
    assert (request.drive, request.kind, request.calls, request.interrupted) == ("virtio0", "write", 1, False)


def test_a_call_whose_coroutine_was_not_asleep_is_found_by_its_length(tmp_path: Path) -> None:
    _, found = requests(
        tmp_path,
        queue=[(TAKE, 1), (TAKE, 2, 0, 0, 1), (BEGIN, 3), (SUBMIT, 4, 0, VIRTIO, WRITE | 7, long(1, 1024)),
               (BEGIN, 5, 0, 0, 1), (SUBMIT, 6, 0, VIRTIO, WRITE | 70, long(2, 512)), (DONE, 40, 0, VIRTIO, 1),
               (DONE, 41, 0, VIRTIO, 2), (PUSH, 50), (PUSH, 51, 0, 0, 1), (SHOW, 60, 0, 0, 2)],
        worker=[(CALL, 10, 1, VIRTIO, 0, 512), (CALL, 20, 1, VIRTIO, 0, -5)],
    )  # fmt: skip
    assert [request.points["called"] - START for request in found] == [20, 10]


def test_what_the_page_cache_has_is_done_at_once(tmp_path: Path) -> None:
    _, (request,) = requests(tmp_path, queue=[
        (KICK, 1), (TAKE, 2), (BEGIN, 3), (SUBMIT, 4, 0, VIRTIO, READ, long(1, 512)), (DONE, 9, 0, VIRTIO, 1),
        (PUSH, 11), (SHOW, 12, 0, 0, 1, 1),
    ])  # fmt: skip
    assert [name for name, _, _ in stages(request)] == ["notice", "device", "at once", "interrupt"]


def test_ide_within_an_exit(tmp_path: Path) -> None:
    _, (request,) = requests(tmp_path, cpu0=[
        (SUBMIT, 15, 0, IDE, READ | 5, long(1, 512)), (DONE, 20, 0, IDE, 1), (LINE, 22, 0, 14, 1), (EXIT, 10, 20),
        (EXIT, 50, 5),
    ])  # fmt: skip
    assert stages(request) == [("device", 10, 15), ("at once", 15, 20), ("interrupt", 20, 22)]
    assert (request.device, request.interrupted) == ("ide0", True)


def test_ide_by_a_worker_which_may_be_faster_than_the_exit(tmp_path: Path) -> None:
    for exit_ticks in (10, 80):
        _, found = requests(
            tmp_path,
            cpu0=[(SUBMIT, 15, 0, IDE, WRITE, long(1, 512)), (EXIT, 10, exit_ticks)],
            worker=[(CALL, 30, 10, IDE, 1, 512), (DONE, 41, 0, IDE, 1), (LINE, 43, 0, 14, 1), (LINE, 44, 0, 14, 0)],
        )
        assert [stages(request) for request in found] == [[
            ("device", 10, 15), ("queue", 15, 30), ("call", 30, 40), ("completion", 40, 41), ("interrupt", 41, 43),
        ]]  # fmt: skip


def test_a_failure_and_what_is_under_way(tmp_path: Path) -> None:
    file, (request,) = requests(tmp_path, worker=[
        (SUBMIT, 1, 0, IDE, FLUSH, long(1, 0)), (DONE, 3, 0, IDE, 1, -28), (SUBMIT, 5, 0, IDE, READ, long(2, 512)),
        (TAKE, 6),
    ])  # fmt: skip
    assert (request.kind, request.result) == ("flush", -28)
    assert Summary(file).unfinished == 2


def test_a_queue_that_is_reset_begins_anew(tmp_path: Path) -> None:
    _, (request,) = requests(tmp_path, queue=[(TAKE, 1), (PUSH, 2), (TAKE, 10), (PUSH, 11), (SHOW, 12, 0, 0, 1, 1)])
    assert request.points["taken"] - START == 10


def test_in_order_the_oldest_are_shown(tmp_path: Path) -> None:
    _, found = requests(tmp_path, queue=[
        (TAKE, 1), (TAKE, 2, 0, 0, 1), (TAKE, 3, 0, 0, 2), (PUSH, 4, 0, 0, 1), (PUSH, 5), (SHOW, 6, 0, 0, 2, 0),
        (PUSH, 7, 0, 0, 2), (SHOW, 8, 0, 0, 1, 1),
    ])  # fmt: skip
    assert [(request.number, request.interrupted) for request in found] == [(0, False), (1, False), (2, True)]


def test_what_was_not_rung_for_has_no_doorbell(tmp_path: Path) -> None:
    _, found = requests(tmp_path, queue=[
        (KICK, 1), (TAKE, 2), (PUSH, 3), (SHOW, 4, 0, 0, 1, 1), (TAKE, 5, 0, 0, 1), (PUSH, 6, 0, 0, 1),
        (SHOW, 7, 0, 0, 1, 1),
    ])  # fmt: skip
    assert ["doorbell" in request.points for request in found] == [True, False]


def test_percentiles_are_right_within_a_step() -> None:
    times = Times()
    for ns in range(1, 100_001):
        times.add(ns)
    assert (times.count, times.mean, times.largest) == (100_000, 50_000, 100_000)
    for percent in (1, 10, 50, 90, 99, 99.9):
        exact = int(1000 * percent)
        assert exact <= times.percentile(percent) <= exact * 1.032 + 1
    assert times.percentile(100) == 100_000


def test_a_summary_says_where_the_time_went(tmp_path: Path) -> None:
    file, _ = requests(tmp_path, cpu0=[
        (EXIT, 10, 30, 0, OUT_80, 65), (EXIT, 50, 10, 0, OUT_80, 66),
        (EXIT, 70, 9, 0, 6 << 57 | 3 << 52 | 0xFE000004), (LINE, 80, 0, 14, 1), (LINE, 81, 0, 14, 0),
    ])  # fmt: skip
    summary = Summary(file)
    assert {row: (times.count, times.total) for row, times in summary.exits.items()} == {
        ("IO", 0x80, "out"): (2, 40), ("MMIO", 0xFE000000, "in"): (1, 9),
    }  # fmt: skip
    assert summary.interrupts == {"GSI 14 ide0": 1}
    assert "IO                     0x80 out" in summary.text() and "port80" in summary.text()
    assert Summary(file, lambda record: record.at > START + 60).exits.keys() == {("MMIO", 0xFE000000, "in")}
