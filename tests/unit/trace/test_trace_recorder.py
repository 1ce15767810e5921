"""The rings of a trace: whose they are, what they drop, what of them comes into the file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.trace import format as layout
from pyvmm.trace.format import Record, TraceFile, header_bytes
from pyvmm.trace.recorder import CHUNK_BYTES, CHUNK_MAGIC, RECORD_BYTES, Recorder, clock_pair


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty trace."""
    path = tmp_path / "trace"
    tsc, ns = clock_pair()
    path.write_bytes(header_bytes(1_000_000, tsc, ns, 0))
    return path


def drain(recorder: Recorder, path: Path) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        return recorder.drain(fd)
    finally:
        os.close(fd)


def records(path: Path) -> list[Record]:
    return list(TraceFile(str(path)).records())


def on_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_the_layout_is_the_one_that_is_read() -> None:
    assert (layout.CHUNK.size, layout.RECORD.size) == (CHUNK_BYTES, RECORD_BYTES)
    assert CHUNK_MAGIC == layout.CHUNK_MAGIC


def test_what_is_marked_is_read(path: Path) -> None:
    recorder = Recorder(1)
    tap = recorder.tap(7)
    recorder.start()
    since = tap.now()
    tap.mark(layout.CALL, -1, (1 << 64) - 2, since)
    tap.mark(layout.MSI, 5)
    assert drain(recorder, path) == CHUNK_BYTES + 3 * RECORD_BYTES  # and that the thread is there
    call, msi = records(path)
    assert (call.kind, call.source, call.a, call.b) == (layout.CALL, 7, (1 << 64) - 1, (1 << 64) - 2)
    assert call.since == since and call.ticks > 0
    assert (msi.kind, msi.a, msi.b, msi.ticks) == (layout.MSI, 5, 0, 0)
    assert call.thread.number == threading.get_native_id()
    assert drain(recorder, path) == 0


def test_a_full_ring_drops_and_counts(path: Path) -> None:
    recorder = Recorder(1, 8)
    tap = recorder.tap(0)
    recorder.start()
    for n in range(10):
        tap.mark(layout.PUSH, n)
    assert recorder.dropped == 3  # one place had the thread
    drain(recorder, path)
    tap.mark(layout.PUSH, 10)  # round the end of the ring
    drain(recorder, path)
    assert [record.a for record in records(path)] == [*range(7), 10]
    assert TraceFile(str(path)).dropped == recorder.dropped == 3


def test_each_thread_has_its_own(path: Path) -> None:
    recorder = Recorder(4)
    tap = recorder.tap(0)
    recorder.start()
    tap.mark(layout.PUSH, 1)
    ready, go = threading.Event(), threading.Event()

    def other() -> None:
        tap.mark(layout.PUSH, 2)
        ready.set()
        go.wait()
        tap.mark(layout.PUSH, 4)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    tap.mark(layout.PUSH, 3)
    go.set()
    thread.join()
    drain(recorder, path)
    found = records(path)
    assert [record.a for record in found] == [1, 2, 3, 4]
    assert found[0].thread is found[2].thread is not found[1].thread is found[3].thread
    assert recorder.rings == 2


def test_a_ring_whose_thread_has_ended_is_another_ones(path: Path) -> None:
    recorder = Recorder(1)
    tap = recorder.tap(0)
    recorder.start()
    numbers = []

    def work() -> None:
        numbers.append(threading.get_native_id())
        tap.mark(layout.PUSH, len(numbers))

    for _ in range(3):
        on_a_thread(work)
        while os.path.exists(f"/proc/self/task/{numbers[-1]}"):  # joined is not gone
            os.sched_yield()
    drain(recorder, path)
    assert [(record.thread.number, record.a) for record in records(path)] == list(zip(numbers, (1, 2, 3), strict=True))
    assert (recorder.rings, recorder.dropped) == (1, 0)


def test_a_thread_too_many_is_dropped_and_counted(path: Path) -> None:
    recorder = Recorder(1)
    tap = recorder.tap(0)
    recorder.start()
    tap.mark(layout.PUSH, 1)
    on_a_thread(lambda: tap.mark(layout.PUSH, 2))
    drain(recorder, path)
    assert [record.a for record in records(path)] == [1]
    assert recorder.dropped == 1


def test_two_machines_on_one_thread(tmp_path: Path, path: Path) -> None:
    first, second = Recorder(2), Recorder(2)
    taps = first.tap(1), second.tap(2)
    first.start()
    second.start()
    for n in range(4):
        taps[n % 2].mark(layout.PUSH, n)
    drain(first, path)
    assert [(record.source, record.a) for record in records(path)] == [(1, 0), (1, 2)]
    assert first.rings == second.rings == 1


def test_a_stop_and_another_start(path: Path) -> None:
    recorder = Recorder(1, 8)
    tap = recorder.tap(0)
    tap.mark(layout.PUSH, 1)  # not begun
    recorder.start()
    for _ in range(20):
        tap.mark(layout.PUSH, 2)
    recorder.stop()
    tap.mark(layout.PUSH, 3)
    recorder.start()
    assert recorder.dropped == 0
    tap.mark(layout.PUSH, 4)
    drain(recorder, path)
    assert [record.a for record in records(path)] == [4]
    assert recorder.recorded == 2


def test_a_thread_that_comes_when_it_has_been_stopped_has_lost_nothing() -> None:
    recorder = Recorder(1)
    tap = recorder.tap(0)
    recorder.start()
    recorder.stop()
    on_a_thread(lambda: tap.mark(layout.KICK))
    assert recorder.dropped == 0


def test_a_duration_is_cut_off_at_its_largest(path: Path) -> None:
    recorder = Recorder(1)
    recorder.start()
    recorder.tap(1 << 20).mark(layout.CALL, 0, 0, 1)
    drain(recorder, path)
    (record,) = records(path)
    assert record.ticks == min((1 << 40) - 1, record.ticks) and record.source == 0xFFFF


@pytest.mark.parametrize(("threads", "size"), [(0, 8), (1, 0), (1, 3)])
def test_a_recorder_that_there_can_be_none_of(threads: int, size: int) -> None:
    with pytest.raises(ValueError, match="no thread, or with rings"):
        Recorder(threads, size)
