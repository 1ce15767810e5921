"""Timers and the clock moved by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.clock import Timer, TimerQueue, VirtualClock


def test_time_stands_still_until_stepped() -> None:
    clock = VirtualClock(now_ns=5, wall_ns=1_000)
    assert clock.now_ns() == 5
    assert clock.wall_ns() == 1_000
    clock.step(7)
    assert clock.now_ns() == 12
    assert clock.wall_ns() == 1_007


def test_timer_expires_once_at_its_own_time() -> None:
    clock = VirtualClock()
    seen: list[int] = []
    timer = clock.timer(lambda: seen.append(clock.now_ns()))
    assert not timer.armed
    timer.arm(100)
    assert timer.armed and timer.deadline_ns == 100
    clock.step(99)
    assert seen == []
    clock.step(50)
    assert seen == [100]
    assert not timer.armed
    assert clock.now_ns() == 149
    clock.step(1_000)
    assert seen == [100]


def test_arming_again_moves_the_deadline_both_ways() -> None:
    clock = VirtualClock()
    seen: list[int] = []
    timer = clock.timer(lambda: seen.append(clock.now_ns()))
    timer.arm(100)
    timer.arm(200)
    clock.step(150)
    assert seen == []
    timer.arm(160)
    clock.step(100)
    assert seen == [160]


def test_disarmed_timer_stays_silent() -> None:
    clock = VirtualClock()
    timer = clock.timer(lambda: pytest.fail("it was disarmed"))
    timer.disarm()
    timer.arm(10)
    timer.disarm()
    timer.disarm()
    assert not timer.armed
    clock.step(100)


def test_past_deadline_expires_without_turning_time_back() -> None:
    clock = VirtualClock(now_ns=1_000)
    seen: list[int] = []
    clock.timer(lambda: seen.append(clock.now_ns())).arm(10)
    assert seen == []
    clock.step(0)
    assert seen == [1_000]


def test_equal_deadlines_run_in_the_order_of_arming() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    first, second = clock.timer(lambda: seen.append("first")), clock.timer(lambda: seen.append("second"))
    second.arm(10)
    first.arm(10)
    clock.step(10)
    assert seen == ["second", "first"]


def test_callback_arms_itself_and_others_on_the_way() -> None:
    clock = VirtualClock()
    seen: list[int] = []

    def tick() -> None:
        seen.append(clock.now_ns())
        timer.arm(clock.now_ns() + 10)

    timer = clock.timer(tick)
    timer.arm(10)
    clock.step(35)
    assert seen == [10, 20, 30]
    assert timer.deadline_ns == 40
    assert clock.next_deadline_ns == 40


def test_callback_can_disarm_one_due_at_the_same_time() -> None:
    clock = VirtualClock()
    other = clock.timer(lambda: pytest.fail("it was disarmed"))
    clock.timer(other.disarm).arm(10)
    other.arm(10)
    clock.step(20)


def test_what_a_callback_raises_comes_out_and_the_rest_runs_later() -> None:
    clock = VirtualClock()
    seen: list[int] = []

    def fail() -> None:
        raise ValueError("told you")

    clock.timer(fail).arm(10)
    clock.timer(lambda: seen.append(clock.now_ns())).arm(20)
    with pytest.raises(ValueError, match="told you"):
        clock.step(100)
    assert clock.now_ns() == 10
    clock.step(90)
    assert seen == [20]
    assert clock.now_ns() == 100


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="back"):
        VirtualClock().step(-1)


def test_next_deadline_skips_forgotten_entries() -> None:
    clock = VirtualClock()
    early, late = clock.timer(lambda: None), clock.timer(lambda: None)
    early.arm(10)
    late.arm(30)
    early.disarm()
    assert clock.next_deadline_ns == 30
    late.disarm()
    assert clock.next_deadline_ns is None


def test_heap_stays_small_however_often_a_timer_is_armed_again() -> None:
    queue = TimerQueue()
    timers = [Timer(queue, lambda: None) for _ in range(10)]
    for i in range(10_000):
        timers[i % 10].arm(i)
    assert len(queue) == 10
    assert len(queue._heap) <= 2 * 10 + 17


def test_order_holds_while_leftovers_are_swept_out() -> None:
    queue = TimerQueue()
    fired: list[int] = []
    timers = [Timer(queue, lambda n=n: fired.append(n)) for n in range(60)]  # type: ignore[misc]
    for i in range(5_000):
        timers[i * 31 % 60].arm(i * 7919 % 10_007)
        if i % 400 == 399:
            by_deadline = sorted((t for t in timers if t.armed), key=lambda t: t.deadline_ns)
            fired.clear()
            while (callback := queue.pop_due(1 << 60)) is not None:
                callback()
            assert fired == [timers.index(t) for t in by_deadline]


def test_queue_counts_armed_timers() -> None:
    queue = TimerQueue()
    first, second = Timer(queue, lambda: None), Timer(queue, lambda: None)
    for timer in (first, first, second):
        timer.arm(10)
    assert len(queue) == 2
    first.disarm()
    assert len(queue) == 1
    assert queue.pop_due(9) is None
    assert queue.pop_due(10) is not None
    assert len(queue) == 0


def test_queue_tells_when_the_earliest_deadline_changed() -> None:
    calls: list[int] = []
    queue = TimerQueue(on_earliest=lambda: calls.append(1))
    first, second = Timer(queue, lambda: None), Timer(queue, lambda: None)
    first.arm(100)
    second.arm(200)
    assert len(calls) == 1
    second.arm(50)
    assert len(calls) == 2


COMMANDS = st.one_of(
    st.tuples(st.just("arm"), st.integers(0, 4), st.integers(0, 300)),
    st.tuples(st.just("disarm"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.integers(0, 100)),
)


@given(st.lists(COMMANDS, max_size=60))
def test_timers_agree_with_a_plain_list_of_deadlines(commands: list[tuple[str, int, int]]) -> None:
    clock = VirtualClock()
    fired: list[tuple[int, int]] = []
    timers = [clock.timer(lambda n=n: fired.append((clock.now_ns(), n))) for n in range(5)]  # type: ignore[misc]
    model: dict[int, tuple[int, int]] = {}  # timer number -> (deadline, order of arming)
    expected: list[tuple[int, int]] = []
    for order, (command, n, value) in enumerate(commands):
        if command == "arm":
            timers[n].arm(value)
            model[n] = (value, order)
        elif command == "disarm":
            timers[n].disarm()
            model.pop(n, None)
        else:
            start, end = clock.now_ns(), clock.now_ns() + value
            for due in sorted((m for m in model if model[m][0] <= end), key=lambda m: model[m]):
                expected.append((max(start, model.pop(due)[0]), due))
            clock.step(value)
        assert [t.armed for t in timers] == [i in model for i in range(5)]
        assert fired == expected
