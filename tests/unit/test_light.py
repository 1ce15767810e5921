"""pyvmm.light means the same as its namesakes: what can be asked of both is asked of threading's, too."""

from __future__ import annotations

import _thread
import collections
import errno
import itertools
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from pyvmm import light
from pyvmm.errors import ThreadError
from pyvmm.light import Condition, Lock, RLock, Thread

DEADLINE_S = 10
SHORT_S = 0.02


def run_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(DEADLINE_S)
    return not thread.is_alive()


class Case:
    """A condition and the lock under it, which is what a user holds."""

    def __init__(self, kind: Any, lock: Any) -> None:
        self.lock = lock
        self.of = kind(lock)
        self.wait, self.wait_for, self.notify_all = self.of.wait, self.of.wait_for, self.of.notify_all

    def waiting(self) -> int:
        return len(self.of._waiters)


@pytest.fixture(params=[Condition, threading.Condition], ids=["light", "threading"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[RLock, Lock], ids=["recursive", "plain"])
def cond(request: pytest.FixtureRequest, kind: Any) -> Case:
    """Each test runs on ours and on threading's, with either lock."""
    return Case(kind, request.param())


def is_free(cond: Case) -> bool:
    """Whether another thread gets the lock at once."""
    got: list[bool] = []

    def attempt() -> None:
        got.append(cond.lock.acquire(blocking=False))
        if got[0]:
            cond.lock.release()

    assert ended(run_thread(attempt))
    return got[0]


class Waiters:
    """Threads in wait(), and what it told each. Made with the lock free; they wait when this returns."""

    def __init__(self, cond: Case, count: int, timeout_s: float | None = None) -> None:
        self.results: list[bool] = []
        inside = [0]

        def wait() -> None:
            with cond.lock:
                inside[0] += 1
                self.results.append(cond.wait(timeout_s))

        self.threads = [run_thread(wait) for _ in range(count)]
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            with cond.lock:  # free only when those inside have given it away by waiting
                if inside[0] == count:
                    break
            assert time.monotonic() < deadline_s
            os.sched_yield()

    def ended(self) -> bool:
        return all(ended(thread) for thread in self.threads)


# -- waiting -----------------------------------------------------------------------------------------------


def test_wait_gives_a_recursive_lock_away_as_often_as_it_was_taken(kind: Any) -> None:
    cond = Case(kind, RLock())
    result: list[bool] = []
    about = threading.Event()

    def wait() -> None:
        with cond.lock, cond.lock, cond.lock:
            about.set()
            result.append(cond.wait(DEADLINE_S))
            result.append(is_free(cond))
        with cond.lock:  # three times taken again, three times given back
            pass

    thread = run_thread(wait)
    assert about.wait(DEADLINE_S)
    with cond.lock:
        cond.notify_all()
    assert ended(thread)
    assert result == [True, False]
    assert is_free(cond)


def test_notify_all_wakes_every_waiter(cond: Case) -> None:
    waiters = Waiters(cond, 5)
    with cond.lock:
        cond.notify_all()
        assert waiters.results == []  # they need the lock first
    assert waiters.ended()
    assert waiters.results == [True] * 5


def test_notify_all_is_not_kept_for_those_who_come_later(cond: Case) -> None:
    with cond.lock:
        cond.notify_all()
        cond.notify_all()
        assert cond.wait(SHORT_S) is False


def test_each_wait_needs_a_notify_of_its_own(cond: Case) -> None:
    for _ in range(100):
        waiters = Waiters(cond, 2)
        with cond.lock:
            cond.notify_all()
        assert waiters.ended()
        assert waiters.results == [True, True]


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, SHORT_S])
def test_wait_tells_that_the_time_ran_out_and_has_the_lock_again(cond: Case, timeout_s: float) -> None:
    with cond.lock:
        start_s = time.monotonic()
        assert cond.wait(timeout_s) is False
        assert time.monotonic() - start_s >= timeout_s
        assert not is_free(cond)
    assert is_free(cond)


def test_who_has_given_up_is_not_counted_any_more(cond: Case) -> None:
    waiters = Waiters(cond, 3, SHORT_S)
    assert waiters.ended()
    assert waiters.results == [False] * 3
    assert cond.waiting() == 0
    waiters = Waiters(cond, 1)
    with cond.lock:
        cond.notify_all()
    assert waiters.ended()
    assert waiters.results == [True]


def test_a_timeout_that_meets_a_notify_loses_neither(cond: Case) -> None:
    for n in range(100):
        waiters = Waiters(cond, 2, n * 20e-6)
        with cond.lock:
            left = cond.waiting()
            cond.notify_all()
            assert cond.waiting() == 0
        assert waiters.ended()
        assert waiters.results.count(True) <= left
        assert len(waiters.results) == 2


# -- wait_for ------------------------------------------------------------------------------------------------


def test_wait_for_does_not_wait_for_what_is_so(cond: Case) -> None:
    with cond.lock:
        assert cond.wait_for(lambda: True)
        assert cond.wait_for(lambda: "a value", 0) == "a value"
        assert cond.wait_for(lambda: True, -1)
        assert cond.waiting() == 0


def test_wait_for_looks_after_each_notify_with_the_lock_held(cond: Case) -> None:
    state, looks = [0], [0]
    result: list[object] = []
    looked = threading.Semaphore(0)

    def predicate() -> int:
        assert not is_free(cond)
        looks[0] += 1
        looked.release()
        return state[0] if state[0] >= 3 else 0

    def wait() -> None:
        with cond.lock:
            result.append(cond.wait_for(predicate, DEADLINE_S))

    thread = run_thread(wait)
    for n in range(1, 4):
        assert looked.acquire(timeout=DEADLINE_S)
        with cond.lock:
            state[0] = n
            cond.notify_all()
    assert ended(thread)
    assert (result, looks) == ([3], [4])


def test_wait_for_ends_with_the_time_although_it_is_woken_all_the_time(cond: Case) -> None:
    over = threading.Event()

    def notify() -> None:
        while not over.is_set():
            with cond.lock:
                cond.notify_all()

    thread = run_thread(notify)
    with cond.lock:
        start_s = time.monotonic()
        assert cond.wait_for(lambda: False, SHORT_S) is False
        took_s = time.monotonic() - start_s
    over.set()
    assert ended(thread)
    assert SHORT_S <= took_s < DEADLINE_S


def test_wait_for_looks_once_more_when_the_time_has_run_out(cond: Case) -> None:
    looks: list[int] = []
    with cond.lock:
        assert cond.wait_for(lambda: looks.append(1) or len(looks) == 2, SHORT_S) is True


def test_what_the_predicate_raises_comes_through_with_the_lock_held(cond: Case) -> None:
    with cond.lock:
        with pytest.raises(ZeroDivisionError):
            cond.wait_for(lambda: 1 // 0)
        assert not is_free(cond)
    assert is_free(cond)


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [None, DEADLINE_S])
@pytest.mark.parametrize("use", ["wait", "wait_for"])
@pytest.mark.parametrize("lock", [RLock, Lock], ids=["recursive", "plain"])
def test_ctrl_c_wakes_the_main_thread(lock: Callable[[], Any], use: str, timeout_s: float | None) -> None:
    # Not on threading's: that one can miss the signal and sleep on.
    cond = Case(Condition, lock())
    assert threading.current_thread() is threading.main_thread()

    def interrupt() -> None:
        with cond.lock:  # free as soon as the main thread waits
            pass
        os.kill(os.getpid(), signal.SIGINT)

    with cond.lock:
        thread = run_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            cond.wait(timeout_s) if use == "wait" else cond.wait_for(lambda: False, timeout_s)
        assert not is_free(cond)  # taken again before the exception goes on
        assert cond.waiting() == 0
    assert ended(thread)
    assert is_free(cond)
    waiters = Waiters(cond, 2)
    with cond.lock:
        cond.notify_all()
    assert waiters.ended()


class Interruption(Exception):
    """As a signal's handler raises it: at any instruction."""


def interrupted(action: Callable[[], object], function: Callable[..., object], at: int) -> bool:
    """Run ``action``; at the ``at``-th instruction of ``function`` an exception comes: whether there were so many."""
    left = at

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code is not function.__code__:  # type: ignore[attr-defined]
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_notify_that_is_interrupted_anywhere_loses_no_waiter(kind: Any) -> None:
    """The next one wakes them all the same."""
    for at in itertools.count():
        cond = Case(kind, RLock())
        waiters = Waiters(cond, 2)
        with cond.lock:
            came = interrupted(cond.notify_all, kind.notify_all, at)
        with cond.lock:
            cond.notify_all()
        assert waiters.ended(), f"at instruction {at}"
        assert cond.waiting() == 0
        if not came:
            break
    assert at > 5  # some were, of each: threading's has nine in Python 3.13


@pytest.mark.parametrize("lock", [RLock, Lock], ids=["recursive", "plain"])
def test_a_signal_whose_handler_returns_does_not_end_the_wait(lock: Callable[[], Any]) -> None:
    # Nor this on threading's: its handler may be called only when the wait is over.
    cond = Case(Condition, lock())
    heard: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))

    def disturb() -> None:
        with cond.lock:
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline_s = time.monotonic() + DEADLINE_S
        while not heard and time.monotonic() < deadline_s:
            os.sched_yield()
        with cond.lock:
            cond.notify_all()

    try:
        with cond.lock:
            thread = run_thread(disturb)
            assert cond.wait(DEADLINE_S) is True
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert ended(thread)
    assert heard == [signal.SIGUSR1]


def test_a_signal_that_does_not_wake_the_main_thread_is_seen_all_the_same() -> None:
    # As one that comes between the interpreter's last look and the sleep: interrupt_main only leaves the note.
    cond = Case(Condition, RLock())

    def interrupt() -> None:
        with cond.lock:
            pass
        _thread.interrupt_main()

    with cond.lock:
        thread = run_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            cond.wait()
        assert (is_free(cond), cond.waiting()) == (False, 0)
    assert ended(thread)
    assert is_free(cond)


@pytest.mark.parametrize("lock", [RLock, Lock])
def test_the_main_thread_looks_for_signals_as_often_as_it_takes(
    lock: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(light, "SIGNAL_CHECK_S", SHORT_S / 10)
    cond = Case(Condition, lock())
    over = threading.Event()

    def notify() -> None:
        over.wait(SHORT_S)  # never set: some looks' time
        with cond.lock:
            cond.notify_all()

    with cond.lock:
        thread = run_thread(notify)
        assert cond.wait() is True
        assert not is_free(cond)
    assert ended(thread)


def test_only_the_main_thread_is_the_main_thread() -> None:
    seen: list[bool] = []
    assert ended(run_thread(lambda: seen.append(light.on_main_thread())))
    assert (light.on_main_thread(), seen) == (True, [False])


# -- Thread --------------------------------------------------------------------------------------------------


def test_a_thread_runs_its_target_and_join_waits_for_the_end() -> None:
    inside, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def target() -> None:
        inside.set()
        assert go_on.wait(DEADLINE_S)
        done.append(_thread.get_ident())

    thread = Thread(target)
    thread.start()
    assert inside.wait(DEADLINE_S)
    ident = thread.ident
    joiner = run_thread(thread.join)
    joiner.join(SHORT_S)
    assert joiner.is_alive()
    go_on.set()
    assert ended(joiner)
    assert done == [ident] != [light.get_ident()]
    assert thread.ident == 0
    thread.join()  # again, and from many
    assert all(ended(t) for t in [run_thread(thread.join) for _ in range(4)])


def test_join_before_the_start_returns_at_once() -> None:
    assert ended(run_thread(Thread(lambda: None).join))


def test_join_right_after_start_waits_although_the_thread_has_not_run_yet() -> None:
    for _ in range(200):
        done: list[int] = []
        thread = Thread(lambda done=done: done.append(1))  # type: ignore[misc]
        thread.start()
        thread.join()
        assert done == [1]


def test_a_thread_knows_itself_and_joining_itself_returns() -> None:
    seen: list[bool] = []

    def target() -> None:
        thread.join()
        other.append(Thread(lambda: None).is_current)
        seen.append(thread.is_current)

    other: list[bool] = []
    thread = Thread(target)
    assert not thread.is_current
    thread.start()
    assert not thread.is_current
    thread.join()
    assert (seen, other) == ([True], [False])
    assert not thread.is_current


def test_the_next_thread_is_not_taken_for_one_that_has_ended() -> None:
    # The system gives identifiers out again, and soon.
    first = Thread(lambda: None)
    first.start()
    first.join()
    seen: list[bool] = []
    for _ in range(50):
        thread = Thread(lambda: seen.append(first.is_current))
        thread.start()
        thread.join()
    assert seen == [False] * 50


def test_a_start_that_fails_says_so_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    thread = Thread(lambda: done.append(1))
    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            thread.start()
    assert not thread.is_current
    assert ended(run_thread(thread.join))  # there is nothing to wait for
    assert done == []
    thread.start()
    thread.join()
    assert done == [1]


def test_what_a_target_raises_is_told_and_the_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    heard = threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", lambda args: (told.append(args.exc_value), heard.set()))
    error = ValueError("target")

    def target() -> None:
        raise error

    thread = Thread(target)
    thread.start()
    assert ended(run_thread(thread.join))
    assert heard.wait(DEADLINE_S)
    assert told == [error]
    assert thread.ident == 0


def test_a_thread_does_not_keep_the_process() -> None:
    script = (
        "import _thread, sys\n"
        "from pyvmm.light import Condition, Lock, Thread\n"
        "lock = Lock(); cond = Condition(lock)\n"
        "inside = _thread.allocate_lock(); inside.acquire()\n"
        "def target():\n"
        "    with lock:\n"
        "        inside.release()\n"
        "        cond.wait()\n"
        "Thread(target).start()\n"
        "inside.acquire()\n"
        "print('the end')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


# -- names ---------------------------------------------------------------------------------------------------


def test_the_rest_is_the_standard_librarys_own() -> None:
    assert light.deque is collections.deque
    assert light.get_ident is threading.get_ident
    assert type(Lock()) is type(threading.Lock())
    assert type(RLock()) is type(threading.RLock())
    assert sorted(light.__all__) == light.__all__


@pytest.mark.parametrize(("room", "limit"), [(True, "ulimit -u"), (False, "ulimit -v")])
def test_a_thread_that_cannot_be_had_says_which_limit_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch, room: bool, limit: str
) -> None:
    """A stack is address space: where that is left, it is the number of threads that is not."""

    def refuse(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    def no_room(*args: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    if not room:
        monkeypatch.setattr(mmap, "mmap", no_room)
    with pytest.raises(ThreadError, match=f"can't start new thread: raise `{limit}`"):
        Thread(lambda: None).start()


def test_a_thread_that_never_begins_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host gave it no memory: the interpreter says so and ends it before its first line."""
    begun: list[Callable[..., object]] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda function, args: begun.append(function))
    monkeypatch.setattr(light, "BEGIN_LIMIT_S", SHORT_S)
    ran: list[int] = []
    thread = Thread(lambda: ran.append(1))
    thread.start()
    thread.join()
    thread.join()
    begun[0]()  # only late, after all
    assert ran == []
