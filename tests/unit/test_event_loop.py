"""The loop's thread: descriptors, timers in guest time, calls, errors, and what is left when it is closed.

Nothing here sleeps: a test waits for an event with a generous limit, or proves an order.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import StateError
from pyvmm.event_loop import EventLoop

LIMIT_S = 20.0
MS = 1_000_000


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    """The kernel's: the loop's thread is none of those that threading knows."""
    return set(os.listdir("/proc/self/task"))


def nothing_is_left_of(before: set[str], fds: set[str]) -> bool:
    """No thread that was not there before, and the same descriptors. A joined thread has yet to leave the kernel."""
    deadline_s = time.monotonic() + LIMIT_S
    while not threads() <= before and time.monotonic() < deadline_s:
        os.sched_yield()
    return threads() <= before and open_fds() == fds


class Recorder:
    """Collects values from the loop's thread; wait(n) until there are n."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self._changed = threading.Condition()

    def __call__(self, value: object = None) -> None:
        with self._changed:
            self.values.append(value)
            self._changed.notify_all()

    def wait(self, count: int) -> list[object]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.values) >= count, LIMIT_S), self.values
            return list(self.values)


@pytest.fixture
def errors() -> Recorder:
    return Recorder()


@pytest.fixture
def loop(errors: Recorder) -> Iterator[EventLoop]:
    loop = EventLoop(errors)
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


def settle(loop: EventLoop) -> None:
    """Return when everything handed to the loop before has been done, and one full turn after it."""
    for _ in range(2):
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(LIMIT_S)


def turns_of(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the loop wakes up in 20 ms in which nothing happens."""
    turns = 0
    turn = EventLoop._turn

    def count(self: EventLoop, epoll: select.epoll) -> bool:
        nonlocal turns
        turns += 1
        return turn(self, epoll)

    settle(loop)
    over = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(EventLoop, "_turn", count)
        loop.clock.timer(over.set).arm(loop.clock.now_ns() + 20_000_000)
        assert over.wait(LIMIT_S)
    return turns


def test_nothing_exists_before_the_first_use(errors: Recorder) -> None:
    before, fds = threads(), open_fds()
    loop = EventLoop(errors)
    loop.clock.timer(lambda: None)
    assert loop.clock.now_ns() >= 0
    loop.clock.stop()
    loop.clock.resume()
    assert not loop.remove_reader(0)
    assert not loop.on_loop_thread()
    assert (threads() - before, open_fds()) == (set(), fds)
    loop.close()
    assert nothing_is_left_of(before, fds)


@pytest.mark.parametrize("use", ["reader", "timer", "call"])
def test_each_first_use_starts_it_and_close_ends_it(
    errors: Recorder, pipe: tuple[int, int], use: str
) -> None:
    before, fds = threads(), open_fds()
    loop = EventLoop(errors)
    if use == "reader":
        loop.add_reader(pipe[0], lambda: None)
    elif use == "timer":
        loop.clock.timer(lambda: None).arm(1 << 60)
    else:
        loop.call_soon(lambda: None)
    assert len(threads() - before) == 1
    assert len(open_fds()) == len(fds) + 2
    loop.close()
    assert nothing_is_left_of(before, fds)


@pytest.mark.parametrize("broken", ["select.epoll", "_thread.start_new_thread"])
def test_failure_to_start_leaves_nothing_and_can_be_tried_again(
    errors: Recorder, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before, fds = threads(), open_fds()
    loop = EventLoop(errors)

    def fail(*args: object) -> None:
        raise OSError("too many of them")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="too many"):
            loop.call_soon(lambda: None)
    assert nothing_is_left_of(before, fds)
    settle(loop)
    loop.close()
    assert nothing_is_left_of(before, fds)


def test_a_thousand_loops_one_after_the_other_leave_nothing(errors: Recorder) -> None:
    before, fds = threads(), open_fds()
    for _ in range(1000):
        loop = EventLoop(errors)
        loop.clock.timer(lambda: None).arm(1 << 60)
        loop.close()
    assert nothing_is_left_of(before, fds)


def test_reader_is_called_while_there_is_something(loop: EventLoop, pipe: tuple[int, int]) -> None:
    got = Recorder()
    loop.add_reader(pipe[0], lambda: got(os.read(pipe[0], 1)))
    os.write(pipe[1], b"abc")
    assert got.wait(3) == [b"a", b"b", b"c"]
    os.write(pipe[1], b"d")
    assert got.wait(4)[3] == b"d"


def test_reader_is_told_of_the_end(loop: EventLoop, pipe: tuple[int, int]) -> None:
    got = Recorder()

    def on_readable() -> None:
        got(os.read(pipe[0], 10))
        loop.remove_reader(pipe[0])

    loop.add_reader(pipe[0], on_readable)
    os.close(pipe[1])
    assert got.wait(1) == [b""]


def test_removed_reader_is_not_called(loop: EventLoop, pipe: tuple[int, int]) -> None:
    loop.add_reader(pipe[0], lambda: pytest.fail("removed"))
    assert loop.remove_reader(pipe[0])
    assert not loop.remove_reader(pipe[0])
    os.write(pipe[1], b"x")
    settle(loop)


def test_second_reader_takes_the_place_of_the_first(loop: EventLoop, pipe: tuple[int, int]) -> None:
    got = Recorder()
    loop.add_reader(pipe[0], lambda: pytest.fail("replaced"))
    loop.add_reader(pipe[0], lambda: got(os.read(pipe[0], 10)))
    os.write(pipe[1], b"x")
    assert got.wait(1) == [b"x"]


def test_writer_is_called_when_there_is_room_again(loop: EventLoop, pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    room = Recorder()
    try:
        while True:
            os.write(pipe[1], bytes(4096))
    except BlockingIOError:
        pass

    def on_writable() -> None:
        room()
        loop.remove_writer(pipe[1])

    loop.add_writer(pipe[1], on_writable)
    settle(loop)
    assert room.values == []
    os.read(pipe[0], 65536)
    room.wait(1)


def test_one_descriptor_both_ways(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        got, room = Recorder(), Recorder()

        def on_writable() -> None:
            room()
            loop.remove_writer(ours.fileno())

        loop.add_reader(ours.fileno(), lambda: got(ours.recv(10)))
        loop.add_writer(ours.fileno(), on_writable)
        room.wait(1)
        theirs.send(b"still reading")
        assert b"".join(v for v in got.wait(2) if isinstance(v, bytes)) == b"still reading"
        loop.remove_reader(ours.fileno())


def test_edge_triggered_reader_is_called_once_for_each_change(loop: EventLoop, pipe: tuple[int, int]) -> None:
    calls = Recorder()
    loop.add_reader(pipe[0], calls, edge=True)
    os.write(pipe[1], b"a")
    calls.wait(1)
    settle(loop)
    assert len(calls.values) == 1  # still readable, but that is old news
    os.write(pipe[1], b"b")
    calls.wait(2)
    loop.add_reader(pipe[0], calls, edge=True)
    calls.wait(3)
    settle(loop)
    assert len(calls.values) == 3


def test_regular_file_is_always_ready(
    loop: EventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(loop)  # it sleeps, and must be woken
    path = tmp_path / "input"
    path.write_bytes(b"ab")
    with path.open("rb", buffering=0) as file:
        got = Recorder()

        def on_readable() -> None:
            data = file.read(1)
            got(data)
            if not data:
                loop.remove_reader(file.fileno())

        loop.add_reader(file.fileno(), on_readable)
        assert got.wait(3) == [b"a", b"b", b""]
        assert turns_of(loop, monkeypatch) <= 10
        assert len(got.values) == 3


def test_bad_descriptor_is_refused_and_forgotten(loop: EventLoop, pipe: tuple[int, int]) -> None:
    settle(loop)  # its own descriptors must not get the number
    os.close(pipe[0])
    with pytest.raises(OSError):
        loop.add_reader(pipe[0], lambda: None)
    assert not loop.remove_reader(pipe[0])


def test_number_of_a_closed_descriptor_can_be_watched_again(loop: EventLoop, pipe: tuple[int, int]) -> None:
    loop.add_reader(pipe[0], lambda: pytest.fail("closed"))
    os.close(pipe[0])
    other = os.pipe()
    assert other[0] == pipe[0]
    got = Recorder()
    loop.add_reader(other[0], lambda: got(os.read(other[0], 10)))
    os.write(other[1], b"x")
    assert got.wait(1) == [b"x"]
    loop.remove_reader(other[0])
    os.close(other[1])


def test_removal_of_a_closed_descriptor_is_no_error(loop: EventLoop, pipe: tuple[int, int]) -> None:
    loop.add_reader(pipe[0], lambda: None)
    os.close(pipe[0])
    assert loop.remove_reader(pipe[0])


def test_event_of_a_former_descriptor_does_not_reach_its_successor(loop: EventLoop) -> None:
    """In one batch: the first callback takes the second descriptor away and puts another under its number."""
    first, second, third = os.pipe(), os.pipe(), os.pipe()
    order: list[str] = []
    got = Recorder()
    swapped = False

    def swap(mine: int, other: int) -> None:
        nonlocal swapped
        os.read(mine, 1)
        order.append("swap")
        if not swapped:
            swapped = True
            loop.remove_reader(other)
            os.dup2(third[0], other)
            loop.add_reader(other, lambda: got(os.read(other, 10)))

    def both() -> None:  # on the loop's thread, so that one epoll_wait reports both
        os.write(first[1], b"1")
        os.write(second[1], b"2")

    loop.add_reader(first[0], lambda: swap(first[0], second[0]))
    loop.add_reader(second[0], lambda: swap(second[0], first[0]))
    loop.call_soon(both)
    settle(loop)
    assert order == ["swap"] and got.values == []
    os.write(third[1], b"3")
    assert got.wait(1) == [b"3"]
    loop.close()
    for fd in {*first, *second, *third}:
        os.close(fd)


def test_calls_run_in_order_on_the_loop_thread(loop: EventLoop) -> None:
    got = Recorder()
    for i in range(100):
        loop.call_soon(lambda i=i: got((i, loop.on_loop_thread())))  # type: ignore[misc]
    assert got.wait(100) == [(i, True) for i in range(100)]
    assert not loop.on_loop_thread()


def test_call_from_a_call_runs_in_the_next_turn(loop: EventLoop) -> None:
    got = Recorder()

    def outer() -> None:
        got("outer")
        loop.call_soon(lambda: got("inner"))

    loop.call_soon(outer)
    assert got.wait(2) == ["outer", "inner"]


def test_timer_expires_not_before_its_time(loop: EventLoop) -> None:
    got = Recorder()
    deadline_ns = loop.clock.now_ns() + 3 * MS + 300_000
    loop.clock.timer(lambda: got(loop.clock.now_ns())).arm(deadline_ns)
    when = got.wait(1)[0]
    assert isinstance(when, int) and when >= deadline_ns


def test_earlier_timer_ends_the_sleep_for_a_later_one(loop: EventLoop) -> None:
    got = Recorder()
    loop.clock.timer(lambda: got("late")).arm(1 << 60)
    settle(loop)
    loop.clock.timer(lambda: got("early")).arm(loop.clock.now_ns() + MS)
    assert got.wait(1) == ["early"]


def test_timers_run_in_order_of_deadline(loop: EventLoop) -> None:
    got = Recorder()
    now = loop.clock.now_ns()
    timers = [loop.clock.timer(lambda n=n: got(n)) for n in range(5)]  # type: ignore[misc]
    for n in (3, 0, 4, 1, 2):
        timers[n].arm(now + (n + 1) * MS)
    assert got.wait(5) == [0, 1, 2, 3, 4]


def test_periodic_timer_does_not_starve_descriptors(loop: EventLoop, pipe: tuple[int, int]) -> None:
    got = Recorder()

    def again() -> None:
        timer.arm(0)

    timer = loop.clock.timer(again)
    timer.arm(0)
    loop.add_reader(pipe[0], lambda: got(os.read(pipe[0], 10)))
    os.write(pipe[1], b"x")
    assert got.wait(1) == [b"x"]
    loop.close()


def test_stopped_clock_holds_time_and_timers(loop: EventLoop) -> None:
    got = Recorder()
    deadline_ns = loop.clock.now_ns() + 5 * MS
    timer = loop.clock.timer(lambda: got(loop.clock.now_ns()))
    timer.arm(deadline_ns)
    loop.clock.stop()
    assert not loop.clock.running
    stopped_ns = loop.clock.now_ns()
    loop.clock.stop()
    host_ns = time.monotonic_ns()
    while time.monotonic_ns() < host_ns + 20 * MS:  # the deadline passes on the host
        settle(loop)
    if timer.armed:  # it may have expired before the stop, on a busy machine
        assert got.values == []
    assert loop.clock.now_ns() == stopped_ns
    loop.clock.resume()
    loop.clock.resume()
    when = got.wait(1)[0]
    assert isinstance(when, int) and when >= deadline_ns
    assert loop.clock.now_ns() < stopped_ns + (time.monotonic_ns() - host_ns)


def test_timer_armed_while_stopped_runs_after_resume(loop: EventLoop) -> None:
    got = Recorder()
    loop.clock.stop()
    loop.clock.timer(got).arm(0)
    settle(loop)
    assert got.values == []
    loop.clock.resume()
    got.wait(1)


def test_stop_waits_for_the_timer_callback_under_way(loop: EventLoop) -> None:
    began, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def callback() -> None:
        began.set()
        assert may_end.wait(LIMIT_S)
        order.append("callback")

    def stop() -> None:
        loop.clock.stop()
        order.append("stopped")

    loop.clock.timer(callback).arm(0)
    assert began.wait(LIMIT_S)
    stopper = threading.Thread(target=stop)
    stopper.start()
    may_end.set()
    stopper.join(LIMIT_S)
    assert order == ["callback", "stopped"]


def test_timer_callback_may_stop_the_clock(loop: EventLoop) -> None:
    got = Recorder()

    def stop() -> None:
        loop.clock.stop()
        got()

    loop.clock.timer(stop).arm(0)
    got.wait(1)
    assert not loop.clock.running


def test_wall_clock_is_the_hosts(loop: EventLoop) -> None:
    before = time.time_ns()
    assert before <= loop.clock.wall_ns() <= time.time_ns()


@pytest.mark.parametrize("kind", ["call", "timer", "reader"])
def test_what_a_callback_raises_is_handed_over_and_the_loop_goes_on(
    loop: EventLoop, errors: Recorder, pipe: tuple[int, int], kind: str
) -> None:
    def fail() -> None:
        raise ValueError(kind)

    if kind == "call":
        loop.call_soon(fail)
    elif kind == "timer":
        loop.clock.timer(fail).arm(0)
    else:
        os.write(pipe[1], b"x")
        loop.add_reader(pipe[0], fail)
    (error,) = errors.wait(1)
    assert isinstance(error, ValueError) and error.args == (kind,)
    settle(loop)
    assert len(errors.values) == 1  # a reader that raised is not called again, though its descriptor is ready


def test_error_in_the_error_handler_reaches_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Recorder()
    monkeypatch.setattr(threading, "excepthook", lambda args: seen(args.exc_value))

    def on_error(exc: BaseException) -> None:
        raise RuntimeError("and again") from exc

    loop = EventLoop(on_error)
    loop.call_soon(lambda: [].clear() if 1 // 0 else None)
    (worse,) = seen.wait(1)
    assert isinstance(worse, RuntimeError) and isinstance(worse.__cause__, ZeroDivisionError)
    settle(loop)
    loop.close()


def test_close_is_idempotent_and_refuses_new_descriptors(loop: EventLoop, pipe: tuple[int, int]) -> None:
    settle(loop)
    loop.close()
    loop.close()
    with pytest.raises(StateError):
        loop.add_reader(pipe[0], lambda: None)
    loop.call_soon(lambda: pytest.fail("closed"))
    timer = loop.clock.timer(lambda: pytest.fail("closed"))
    timer.arm(0)
    timer.disarm()
    assert not loop.remove_reader(pipe[0])


def test_close_from_a_callback_does_not_wait_for_itself(errors: Recorder) -> None:
    before, fds = threads(), open_fds()
    loop = EventLoop(errors)
    closed = threading.Event()

    def callback() -> None:
        loop.close()
        closed.set()

    loop.call_soon(callback)
    loop.call_soon(lambda: pytest.fail("closed"))
    assert closed.wait(LIMIT_S)
    loop.close()  # from here it waits for the end
    assert nothing_is_left_of(before, fds)
    assert errors.values == []


def test_many_threads_may_close_at_once(errors: Recorder) -> None:
    fds = open_fds()
    loop = EventLoop(errors)
    settle(loop)
    closers = [threading.Thread(target=loop.close) for _ in range(8)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(LIMIT_S)
        assert not closer.is_alive()
    assert open_fds() == fds


def test_timers_from_many_threads_are_all_run(loop: EventLoop) -> None:
    got = Recorder()

    def arm_some(base: int) -> None:
        for i in range(50):
            loop.clock.timer(lambda n=base + i: got(n)).arm(loop.clock.now_ns() + (i % 7) * 100_000)  # type: ignore[misc]

    threads = [threading.Thread(target=arm_some, args=(1000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = got.wait(200)
    assert sorted(v for v in values if isinstance(v, int)) == sorted(
        1000 * n + i for n in range(4) for i in range(50)
    )


@pytest.mark.parametrize("with_a_writer", [False, True])
def test_a_hang_up_is_told_once(loop: EventLoop, with_a_writer: bool) -> None:
    read_end, write_end = os.pipe()
    told: list[str] = []
    hung_up = threading.Event()

    def on_hang_up() -> None:
        told.append("gone")
        hung_up.set()

    def on_writable() -> None:
        loop.remove_writer(write_end)

    try:
        loop.add_hang_up(write_end, on_hang_up)
        if with_a_writer:
            loop.add_writer(write_end, on_writable)
        settled = threading.Event()
        loop.call_soon(settled.set)
        assert settled.wait(LIMIT_S)
        assert told == []
        os.close(read_end)
        assert hung_up.wait(LIMIT_S)
        settled.clear()
        loop.call_soon(settled.set)
        assert settled.wait(LIMIT_S)
        assert told == ["gone"]
        assert not loop.remove_hang_up(write_end)
    finally:
        os.close(write_end)


def test_a_file_never_hangs_up(loop: EventLoop, tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        loop.add_hang_up(file.fileno(), lambda: pytest.fail("it has no other end"))
        settled = threading.Event()
        loop.call_soon(settled.set)
        assert settled.wait(LIMIT_S)
        assert loop.remove_hang_up(file.fileno())
