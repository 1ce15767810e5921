"""RunControl and Cpu: starting, parking and requests, on real threads with a loop that waits to be kicked."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.cpu import Cpu
from pyvmm.cpu_exec import StopReason
from pyvmm.device import Device
from pyvmm.errors import StateError
from pyvmm.event_loop import EventLoop
from pyvmm.run_control import ENDED, RESUMABLE, ExitStatus, Request, RunControl
from pyvmm.run_state import RunState

DEADLINE_S = 10


class FakeExec:
    """Stands for CpuExec: ``run`` is in the guest until it is kicked, or has something to do or to report."""

    def __init__(self, on_enter: Callable[[], None]) -> None:
        self.cond = threading.Condition()
        self.kicked = False
        self.stays = 0
        self.todo: list[Callable[[], Any]] = []
        self.on_enter = on_enter

    def kick(self) -> None:
        with self.cond:
            self.kicked = True
            self.cond.notify_all()

    def cancel_kick(self) -> None:
        with self.cond:
            self.kicked = False

    def do(self, handler: Callable[[], Any]) -> None:
        """Have the vCPU's thread run ``handler``, as a device's; a StopReason it returns ends the stay."""
        with self.cond:
            self.todo.append(handler)
            self.cond.notify_all()

    def run(self) -> StopReason:
        with self.cond:
            self.stays += 1
        self.on_enter()
        while True:
            with self.cond:
                assert self.cond.wait_for(lambda: self.kicked or self.todo, DEADLINE_S)
                if self.kicked:  # as KVM_RUN: looked at before the guest goes on
                    self.kicked = False
                    return StopReason.KICKED
                handler = self.todo.pop(0)
            result = handler()
            if isinstance(result, StopReason):
                return result


class FakeVcpu:
    def __init__(self) -> None:
        self.regs = {"rip": 0xFFF0}
        self.sregs = {"cr0": 0x10}


class Board:
    """A RunControl, its vCPUs, and a note of everything that happens."""

    def __init__(self, cpus: int, loop: EventLoop | None = None) -> None:
        self.loop = loop
        self.cond = threading.Condition()
        self.times: list[bool] = []
        self.stops: list[tuple[int, StopReason, BaseException | None]] = []
        self.control = RunControl(self.on_time, loop.clock.in_callback) if loop else RunControl(self.on_time)
        self.execs = [FakeExec(self.note) for _ in range(cpus)]
        self.cpus = [
            Cpu(n, FakeVcpu(), exec_, self.control, self.stopped, [])  # type: ignore[arg-type]
            for n, exec_ in enumerate(self.execs)
        ]
        self.control.cpus = self.cpus

    def on_time(self, runs: bool) -> None:
        self.times.append(runs)
        if self.loop is not None:
            (self.loop.clock.resume if runs else self.loop.clock.stop)()

    def note(self) -> None:
        with self.cond:
            self.cond.notify_all()

    def stopped(self, cpu: Cpu, reason: StopReason, error: BaseException | None) -> None:
        self.stops.append((cpu.index, reason, error))
        failure = error or RuntimeError(reason.name)
        self.control.end(RunState.INTERNAL_ERROR, error=failure)

    def start(self) -> Board:
        for cpu in self.cpus:
            cpu.start()
        self.control.resume()
        self.all_inside()
        return self

    def stays(self) -> int:
        return sum(exec_.stays for exec_ in self.execs)

    def all_inside(self) -> None:
        """Wait until every vCPU has entered."""
        with self.cond:
            assert self.cond.wait_for(lambda: not any(cpu.parked for cpu in self.cpus), DEADLINE_S)

    def all_parked(self) -> bool:
        return all(cpu.parked for cpu in self.cpus)


@pytest.fixture(params=[1, 4])
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    made = Board(request.param)
    yield made
    closer = run_thread(made.control.close)
    assert ended(closer)
    assert not any(alive(cpu) for cpu in made.cpus)


@pytest.fixture(params=[1, 4])
def timed(request: pytest.FixtureRequest) -> Iterator[Board]:
    """A board with guest time of its own, as a machine has it."""
    errors: list[BaseException] = []
    loop = EventLoop(errors.append)
    loop.clock.stop()
    made = Board(request.param, loop)
    yield made
    assert ended(run_thread(made.control.close))
    loop.close()
    assert errors == []


def alive(cpu: Cpu) -> bool:
    return cpu._thread is not None and cpu._thread.ident != 0


def run_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(DEADLINE_S)
    return not thread.is_alive()


# -- pause and resume ----------------------------------------------------------------------------------------


def test_a_new_machine_is_dark(board: Board) -> None:
    assert board.control.state is RunState.PRELAUNCH
    assert board.times == []
    assert board.control.settle(0)
    assert board.control.wait(0)


def test_resume_and_pause(board: Board) -> None:
    board.start()
    assert board.control.state is RunState.RUNNING
    assert not board.control.wait(0)
    assert not board.control.settle(0)
    board.control.pause()
    assert board.control.state is RunState.PAUSED
    assert board.all_parked()
    assert board.control.wait(0)
    assert board.times == [True, False]


def test_resuming_or_pausing_twice_is_no_harm(board: Board) -> None:
    board.control.pause()
    assert board.control.state is RunState.PRELAUNCH
    board.start()
    board.control.resume()
    board.control.pause()
    board.control.pause()
    assert board.control.state is RunState.PAUSED
    assert board.times == [True, False]


def test_no_wake_up_is_lost_between_pause_and_resume(board: Board) -> None:
    board.start()
    for _ in range(300):
        board.control.pause()
        assert board.all_parked()
        board.control.resume()
        board.all_inside()
    assert board.times == [True] + [False, True] * 300


def test_a_pause_right_after_resume_waits_for_those_who_came_in(board: Board) -> None:
    board.start()
    for _ in range(300):
        board.control.pause()
        assert board.all_parked()
        board.control.resume()
    board.all_inside()


def test_a_kick_for_the_last_stay_does_not_end_this_one(board: Board) -> None:
    board.start()
    board.control.pause()
    stays = board.stays()
    for exec_ in board.execs:
        exec_.kick()
    board.control.resume()
    board.all_inside()
    for exec_ in board.execs:  # each is still there to do something
        done = threading.Event()
        exec_.do(done.set)
        assert done.wait(DEADLINE_S)
    assert board.stays() == stays + len(board.cpus)


def test_a_kick_that_nobody_asked_for_only_costs_a_round(board: Board) -> None:
    board.start()
    stays = board.stays()
    board.execs[0].kick()
    with board.cond:
        assert board.cond.wait_for(lambda: board.stays() == stays + 1, DEADLINE_S)
    assert board.control.state is RunState.RUNNING


def test_pause_on_a_vcpus_own_thread_takes_effect_after_the_handler(board: Board) -> None:
    board.start()
    returned = threading.Event()

    def handler() -> None:
        board.control.pause()
        assert not board.cpus[0].parked
        assert not board.control.settle()
        returned.set()

    board.execs[0].do(handler)
    assert returned.wait(DEADLINE_S)
    assert board.control.wait(DEADLINE_S)
    assert board.control.state is RunState.PAUSED
    assert board.all_parked()


@pytest.mark.parametrize("paused_before", [False, True])
def test_pause_returns_once_what_the_guest_had_asked_for_is_done(board: Board, paused_before: bool) -> None:
    """A guest that resets itself in the moment of a pause has done so for whoever looks at it then."""
    board.start()
    inside, returned = threading.Event(), threading.Event()
    order: list[str] = []

    def reset() -> None:
        if paused_before:
            threading.Thread(target=pause).start()
        returned.wait(0.1)  # a pause that does not wait for this one returns now
        order.append("reset")

    def handler() -> None:
        inside.set()
        with board.execs[0].cond:  # the pause is asked for, and waits for this vCPU to park
            assert board.execs[0].cond.wait_for(lambda: board.execs[0].kicked, DEADLINE_S)
        board.control.request("reset", reset, board.control.restarted)

    def pause() -> None:
        board.control.pause()
        order.append("paused")
        returned.set()

    board.execs[0].do(handler)
    assert inside.wait(DEADLINE_S)
    if paused_before:
        board.control.pause(wait=False)
    else:
        threading.Thread(target=pause).start()
    assert returned.wait(DEADLINE_S)
    assert order == ["reset", "paused"]
    assert board.control.state is RunState.PAUSED


def test_state_of_a_running_vcpu_is_refused(board: Board) -> None:
    cpu = board.cpus[0]
    assert cpu.regs == {"rip": 0xFFF0}
    board.start()
    for use in (
        lambda: cpu.regs,
        lambda: cpu.sregs,
        lambda: setattr(cpu, "regs", {}),
        lambda: setattr(cpu, "sregs", {}),
    ):
        with pytest.raises(StateError, match="vCPU 0 is running: pause"):
            use()
    seen: list[Any] = []
    done = threading.Event()
    board.execs[0].do(lambda: (seen.append(cpu.regs), done.set()))  # its own thread may: a handler, a dump
    assert done.wait(DEADLINE_S)
    board.control.pause()
    cpu.sregs = {"cr0": 1}
    assert (seen, cpu.sregs) == ([{"rip": 0xFFF0}], {"cr0": 1})


# -- requests ------------------------------------------------------------------------------------------------


def test_a_request_runs_with_every_vcpu_parked_and_stays_dark_without_go(board: Board) -> None:
    board.start()
    seen: list[bool] = []
    board.control.request("test", lambda: seen.append(board.all_parked()))
    assert board.control.settle(DEADLINE_S)
    assert seen == [True]
    assert board.times == [True, False]
    board.control.go()
    board.all_inside()


def test_a_request_on_a_parked_machine_runs_at_once_on_the_callers_thread(board: Board) -> None:
    threads: list[int] = []
    board.control.request("test", lambda: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


def test_requests_run_in_the_order_they_came(board: Board) -> None:
    board.start()
    order: list[int] = []
    for n in range(50):
        board.control.request("test", lambda n=n: (order.append(n), board.control.go()))  # type: ignore[misc]
    assert wait_for_count(board, order, 50)
    assert order == list(range(50))
    board.all_inside()


def wait_for_count(board: Board, items: list[Any], count: int) -> bool:
    """Every request notifies; each leaves at least one trace."""
    with board.control._lock:
        return board.control._cond.wait_for(lambda: len(items) >= count, DEADLINE_S)


def test_requests_from_many_threads_are_all_carried_out_one_at_a_time(board: Board) -> None:
    board.start()
    acting, overlaps, carried = [0], [0], []

    def action() -> None:
        acting[0] += 1
        overlaps[0] += acting[0] != 1 or not board.all_parked()
        carried.append(1)
        acting[0] -= 1
        board.control.go()

    def ask() -> None:
        for _ in range(100):
            board.control.request("test", action)

    threads = [run_thread(ask) for _ in range(3)]
    for _ in range(100):
        board.execs[-1].do(lambda: board.control.request("test", action))
    assert all(ended(t) for t in threads)
    assert wait_for_count(board, carried, 400)
    assert overlaps == [0]
    board.all_inside()
    assert len(carried) == 400


def test_a_request_made_while_another_is_carried_out_comes_next(board: Board) -> None:
    board.start()
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        inside.set()
        assert go_on.wait(DEADLINE_S)
        order.append("first")
        board.control.request("test", lambda: order.append("third"))
        board.control.go()

    board.control.request("test", first)
    assert inside.wait(DEADLINE_S)
    board.control.request("test", lambda: order.append("second"))  # does not wait
    assert order == []
    assert board.all_parked()
    go_on.set()
    assert board.control.settle(DEADLINE_S)
    assert order == ["first", "second", "third"]
    assert board.all_parked()  # none may enter, although the first request had let them


def test_no_vcpu_enters_while_a_request_is_carried_out(board: Board) -> None:
    board.start()
    entered: list[bool] = []

    def action() -> None:
        board.control.go()
        for cpu in board.cpus:
            entered.append(not cpu.parked)

    for _ in range(50):
        board.control.request("test", action)
        board.all_inside()
    assert not any(entered)


def test_settle_and_pause_inside_a_request_do_not_wait_for_themselves(board: Board) -> None:
    results: list[bool] = []

    def action() -> None:
        results.append(board.control.settle())
        board.control.go()
        board.control.pause()

    thread = run_thread(lambda: board.control.request("test", action))
    assert ended(thread)
    assert results == [False]
    assert board.control.state is RunState.PAUSED


def test_a_request_can_be_waited_for(board: Board) -> None:
    board.start()
    done: list[int] = []
    for n in range(50):

        def action(n: int = n) -> None:
            done.append(n)
            board.control.go()

        board.control.request("test", action, wait=True)
        assert done[-1] == n
    board.all_inside()


def test_a_request_waited_for_inside_a_request_or_on_a_vcpus_thread_returns_at_once(board: Board) -> None:
    order: list[str] = []

    def outer() -> None:
        board.control.request("test", lambda: order.append("inner"), wait=True)
        order.append("outer")

    assert ended(run_thread(lambda: board.control.request("test", outer, wait=True)))
    assert order == ["outer", "inner"]
    board.start()
    returned = threading.Event()

    def handler() -> None:
        board.control.request("test", lambda: order.append("last"), wait=True)
        assert order[-1] == "inner"
        returned.set()

    board.execs[0].do(handler)
    assert returned.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert order == ["outer", "inner", "last"]


# -- guest time ----------------------------------------------------------------------------------------------


def stop_while_a_timer_wants_our_lock(board: Board, returned: threading.Event) -> None:
    """Ask for the end as the holder of a device's lock, while a timer's callback waits for that lock."""
    assert board.loop is not None
    clock, device, about = board.loop.clock, Device(), threading.Event()

    def tick() -> None:
        about.set()
        with device.lock:
            pass

    with device.lock:
        clock.timer(tick).arm(clock.now_ns())
        assert about.wait(DEADLINE_S)
        board.control.end(RunState.SHUTDOWN, ExitStatus(0, "stopped"))
    returned.set()


def has_shut_down(board: Board) -> bool:
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert board.all_parked()
    assert board.times == [True, False]
    return board.control.state is RunState.SHUTDOWN


def test_a_handler_asks_for_a_stop_while_a_timer_wants_its_devices_lock(timed: Board) -> None:
    timed.start()
    returned = threading.Event()
    timed.execs[0].do(lambda: stop_while_a_timer_wants_our_lock(timed, returned))
    assert returned.wait(DEADLINE_S)
    assert has_shut_down(timed)


def test_a_thread_asks_for_a_stop_while_a_timer_wants_the_lock_it_holds(timed: Board) -> None:
    timed.start()
    returned = threading.Event()
    assert ended(run_thread(lambda: stop_while_a_timer_wants_our_lock(timed, returned)))
    assert returned.is_set()
    assert has_shut_down(timed)


def test_the_same_when_no_vcpu_is_in_yet(timed: Board) -> None:
    # The vCPUs may enter and are still on their way in: none that parks could carry the request out.
    timed.control.resume()
    returned = threading.Event()
    assert ended(run_thread(lambda: stop_while_a_timer_wants_our_lock(timed, returned)))
    assert returned.is_set()
    for cpu in timed.cpus:
        cpu.start()
    assert has_shut_down(timed)
    assert timed.stays() == 0


def test_a_timers_callback_that_pauses_does_not_wait_for_its_own_end(timed: Board) -> None:
    assert timed.loop is not None
    timed.start()
    returned = threading.Event()
    settled: list[bool] = []

    def tick() -> None:
        timed.control.pause()
        settled.append(timed.control.settle())
        returned.set()

    clock = timed.loop.clock
    clock.timer(tick).arm(clock.now_ns())
    assert returned.wait(DEADLINE_S)
    assert timed.control.wait(DEADLINE_S)
    assert timed.control.settle(DEADLINE_S)
    assert (timed.control.state, settled, clock.running) == (RunState.PAUSED, [False], False)
    assert timed.all_parked()


def test_a_descriptors_callback_that_pauses_waits(timed: Board) -> None:
    assert timed.loop is not None
    timed.start()
    returned = threading.Event()
    parked: list[bool] = []

    def ready() -> None:
        timed.control.pause()
        parked.append(timed.all_parked())
        returned.set()

    timed.loop.call_soon(ready)
    assert returned.wait(DEADLINE_S)
    assert (timed.control.state, parked) == (RunState.PAUSED, [True])


def test_guest_time_stops_outside_of_every_lock_with_all_parked(board: Board) -> None:
    seen: list[tuple[bool, bool]] = []

    def on_time(runs: bool) -> None:
        if not runs:
            free = ended(run_thread(lambda: board.control.settle(0)))  # takes the control's lock
            seen.append((board.all_parked(), free))

    board.control._on_time = on_time
    board.start()
    board.control.pause()
    assert seen == [(True, True)]


# -- ends ----------------------------------------------------------------------------------------------------


def test_the_end_of_a_run(board: Board) -> None:
    board.start()
    status = ExitStatus(33, "debug-exit")
    board.execs[0].do(lambda: board.control.end(RunState.SHUTDOWN, status))
    assert board.control.wait(DEADLINE_S)
    assert (board.control.state, board.control.status, board.control.error) == (
        RunState.SHUTDOWN,
        status,
        None,
    )
    assert board.all_parked()
    with pytest.raises(StateError, match="in state shutdown: reset"):
        board.control.resume()


def test_the_first_end_counts(board: Board) -> None:
    board.start()
    first, second = ExitStatus(0, "shutdown"), ExitStatus(6, "reset")
    board.control.end(RunState.SHUTDOWN, first)
    board.control.end(RunState.SHUTDOWN, second)
    board.control.end(RunState.INTERNAL_ERROR, error=ValueError())
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.status, board.control.error) == (first, None)


def test_an_end_takes_the_place_of_a_pause_that_came_a_moment_earlier(board: Board) -> None:
    board.start()
    status = ExitStatus(0, "shutdown")

    def handler() -> None:
        board.control.pause()
        board.control.end(RunState.SHUTDOWN, status)

    board.execs[0].do(handler)
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.state, board.control.status) == (RunState.SHUTDOWN, status)


def test_a_pause_after_the_end_changes_nothing(board: Board) -> None:
    board.start()
    board.control.end(RunState.SHUTDOWN, None)
    board.control.pause()
    assert board.control.settle(DEADLINE_S)
    assert board.control.state is RunState.SHUTDOWN


def test_what_a_run_raises_reaches_the_owner_and_the_thread_lives(board: Board) -> None:
    board.start()
    error = KeyError("device")

    def handler() -> None:
        raise error

    board.execs[-1].do(handler)
    assert board.control.wait(DEADLINE_S)
    assert board.stops == [(len(board.cpus) - 1, StopReason.DEVICE_RAISED, error)]
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)
    board.control.go()  # what a reset does
    board.all_inside()


def test_a_stop_reaches_the_owner_and_a_kick_does_not(board: Board) -> None:
    board.start()
    board.control.pause()
    assert board.stops == []
    board.control.resume()
    board.all_inside()
    board.execs[0].do(lambda: StopReason.FAIL_ENTRY)
    assert board.control.wait(DEADLINE_S)
    assert [(index, reason) for index, reason, _ in board.stops] == [(0, StopReason.FAIL_ENTRY)]


def test_a_request_that_raises_ends_the_run_with_its_error(board: Board) -> None:
    board.start()
    error = OSError("reset refused")
    done: list[int] = []

    def action() -> None:
        raise error

    board.control.request("test", action)
    board.control.request("test", lambda: done.append(1))  # the next one still gets its turn
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.state, board.control.error, done) == (RunState.INTERNAL_ERROR, error, [1])
    board.control.go()
    board.all_inside()  # the threads live


def test_a_request_that_raises_after_letting_vcpus_enter_leaves_all_parked(board: Board) -> None:
    board.start()
    error = OSError("half a reset")

    def action() -> None:
        board.control.go()
        raise error

    stays = board.stays()
    board.control.request("test", action)
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)
    assert board.all_parked()
    assert board.stays() == stays


def test_an_owner_that_raises_ends_the_run_and_the_threads_live(board: Board) -> None:
    error = OSError("no dump either")

    def stopped(cpu: Cpu, reason: StopReason, _: BaseException | None) -> None:
        board.stops.append((cpu.index, reason, None))
        raise error

    board.cpus[0]._on_stop = stopped
    board.start()
    board.execs[0].do(lambda: StopReason.FAIL_ENTRY)
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)
    assert board.stops == [(0, StopReason.FAIL_ENTRY, None), (0, StopReason.DEVICE_RAISED, None)]
    assert all(alive(cpu) for cpu in board.cpus)
    board.control.go()
    board.all_inside()


def test_guest_time_that_can_not_be_stopped_ends_the_run_and_the_threads_live(board: Board) -> None:
    error = OSError("no clock")

    failed: list[BaseException] = []

    def on_time(runs: bool) -> None:
        if not runs and not failed:
            failed.append(error)
            raise error

    board.control._on_time = on_time
    board.start()
    board.execs[0].do(board.control.pause)  # carried out by the last vCPU to leave
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)
    assert board.all_parked()
    board.control.go()
    board.all_inside()


def test_whatever_goes_wrong_as_the_last_vcpu_leaves_ends_the_run(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, carry_out = MemoryError("not even that"), RunControl._carry_out
    failed: list[BaseException] = []
    board.start()

    def refuse_once(control: RunControl) -> None:
        if not failed:
            failed.append(error)
            raise error
        carry_out(control)

    monkeypatch.setattr(RunControl, "_carry_out", refuse_once)
    board.execs[0].do(lambda: board.control.request("test", lambda: None))
    assert board.control.wait(DEADLINE_S)
    assert board.control.settle(DEADLINE_S)
    assert (failed, board.control.state, board.control.error) == ([error], RunState.INTERNAL_ERROR, error)
    assert board.all_parked()
    assert all(alive(cpu) for cpu in board.cpus)
    board.control.go()
    board.all_inside()


def test_a_vcpu_thread_that_fails_before_its_first_stay_ends_the_run_and_can_be_started_again(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError("no signal left")

    class Broken:
        @staticmethod
        def prepare_thread(index: int) -> None:
            raise error

    thread = board.cpus[-1]
    with monkeypatch.context() as patch:
        patch.setattr("pyvmm.cpu.CpuExec", Broken)
        board.control.resume()
        thread.start()
        assert board.control.wait(DEADLINE_S)
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)
    assert board.control.settle(DEADLINE_S)
    assert board.times == [True, False]
    board.control.restarted()
    board.start()


@pytest.mark.parametrize("state", [RunState.SHUTDOWN, RunState.PAUSED])
def test_a_request_that_raises_when_nothing_runs_does_not_vanish(board: Board, state: RunState) -> None:
    board.start()
    board.control.end(state, ExitStatus(0, "first"))
    assert board.control.settle(DEADLINE_S)
    error = OSError("reset refused")

    def action() -> None:
        raise error

    board.control.request("test", action)
    assert (board.control.state, board.control.error) == (RunState.INTERNAL_ERROR, error)


@pytest.mark.parametrize("state", list(RunState))
def test_only_some_states_can_be_resumed(board: Board, state: RunState) -> None:
    board.control._state = state
    board.control.status, board.control.error = ExitStatus(1, "old"), ValueError()
    if state in (RunState.RUNNING, RunState.SUSPENDED):
        board.control.resume()
        assert board.times == []
    elif state in RESUMABLE:
        board.control.resume()
        assert (board.control.state, board.control.status, board.control.error) == (
            RunState.RUNNING,
            None,
            None,
        )
    else:
        with pytest.raises(StateError, match=f"in state {state.value}"):
            board.control.resume()
        assert board.control.state is state


def test_the_states_by_name_and_value() -> None:
    assert [state.name for state in RunState] == [name for name in vars(RunState) if name.isupper()]
    for state in RunState:
        assert getattr(RunState, state.name) is state is RunState(state.value) is copy.deepcopy(state)
        assert pickle.loads(pickle.dumps(state)) is state
    assert RunState.IO_ERROR == RunState.IO_ERROR.value == f"{RunState.IO_ERROR}" == "io-error"
    assert repr(RunState.PAUSED) == "<RunState.PAUSED: 'paused'>"
    assert set(ENDED) == {RunState.SHUTDOWN, RunState.INTERNAL_ERROR, RunState.CLOSED}
    assert set(RESUMABLE) == {RunState.PRELAUNCH, RunState.PAUSED, RunState.DEBUG, RunState.IO_ERROR}
    with pytest.raises(ValueError, match="'asleep' is no state of a machine: there are prelaunch, "):
        RunState("asleep")


def test_requests_have_names() -> None:
    request = Request("reset")
    assert (repr(request), request.done) == ("<Request reset>", False)
    request.done = True
    assert repr(request) == "<Request reset, done>"


def test_the_state_can_only_be_read(board: Board) -> None:
    with pytest.raises(AttributeError):
        board.control.state = RunState.PAUSED  # type: ignore[misc]


# -- close ---------------------------------------------------------------------------------------------------


def test_close_ends_the_threads(board: Board) -> None:
    board.start()
    assert all(alive(cpu) for cpu in board.cpus)
    board.control.close()
    assert board.control.state is RunState.CLOSED
    assert not any(alive(cpu) for cpu in board.cpus)
    for cpu in board.cpus:
        cpu.join()
    assert board.times == [True, False]
    board.control.close()


def test_close_wakes_whoever_waits_for_the_end(board: Board) -> None:
    for _ in range(20):
        one = Board(len(board.cpus)).start()
        results: list[bool] = []
        about = threading.Event()

        def waiter(one: Board = one, results: list[bool] = results, about: threading.Event = about) -> None:
            about.set()
            results.append(one.control.wait())

        thread = run_thread(waiter)
        assert about.wait(DEADLINE_S)
        one.control.close()
        assert ended(thread)
        assert results == [True]


def test_after_close_nothing_happens_any_more(board: Board) -> None:
    board.start()
    board.control.close()
    done: list[int] = []
    board.control.request("test", lambda: done.append(1))
    board.control.go()
    board.control.pause()
    with pytest.raises(StateError, match="closed"):
        board.control.resume()
    assert done == []
    assert board.control.state is RunState.CLOSED
    assert board.all_parked()


@pytest.mark.parametrize("running", [True, False])
def test_close_waits_for_a_request_under_way(board: Board, running: bool) -> None:
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []
    if running:
        board.start()

    def action() -> None:
        inside.set()
        assert go_on.wait(DEADLINE_S)
        order.append("action")

    def close() -> None:
        board.control.close()
        order.append("closed")

    asker = run_thread(lambda: board.control.request("test", action))
    assert inside.wait(DEADLINE_S)
    closer = run_thread(close)
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    assert ended(closer)
    assert ended(asker)
    assert order == ["action", "closed"]


def test_close_on_a_vcpus_own_thread_is_refused(board: Board) -> None:
    # The loop it would go back to would stand on memory that is gone.
    board.start()
    refused: list[BaseException] = []
    done = threading.Event()

    def handler() -> None:
        try:
            board.control.close()
        except StateError as error:
            refused.append(error)
        done.set()

    board.execs[0].do(handler)
    assert done.wait(DEADLINE_S)
    assert "stop" in str(refused[0])
    assert board.control.state is RunState.RUNNING
    board.control.pause()
    board.control.resume()
    board.all_inside()


def test_a_machine_that_was_never_started_closes(board: Board) -> None:
    board.control.close()
    assert board.control.state is RunState.CLOSED


# -- all at once ---------------------------------------------------------------------------------------------


def test_pauses_resumes_and_requests_from_everywhere() -> None:
    board = Board(3).start()
    carried: list[int] = []

    def restart() -> None:
        carried.append(1)
        assert board.all_parked()
        if board.control.state is RunState.RUNNING:
            board.control.go()

    def pauser() -> None:
        for _ in range(100):
            board.control.pause()
            board.control.resume()

    def asker() -> None:
        for _ in range(100):
            board.control.request("test", restart)

    def handlers() -> None:
        for n in range(100):
            pauses = n % 7 == 0
            board.execs[n % 3].do(board.control.pause if pauses else lambda: board.control.request("test", restart))

    threads = [run_thread(target) for target in (pauser, asker, handlers, pauser)]
    assert all(ended(t) for t in threads)
    while any(exec_.todo for exec_ in board.execs):
        board.control.resume()
    board.control.pause()
    assert board.control.settle(DEADLINE_S)
    assert board.all_parked()
    board.control.resume()
    board.all_inside()
    assert board.control.error is None
    assert len(carried) >= 100
    assert all(first is not second for first, second in zip(board.times, board.times[1:], strict=False))
    board.control.close()


def test_exit_status() -> None:
    status = ExitStatus(33, "debug-exit")
    assert (status, int(status), status.reason) == (33, 33, "debug-exit")
    assert f"{status} {status!r}" == "33 <ExitStatus 33: debug-exit>"
    assert not ExitStatus(0, "shutdown")


def test_a_thread_that_can_not_be_started_is_said_and_close_does_not_wait_for_it(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", refuse)
        with pytest.raises(StateError, match="vCPU 0: can't start new thread"):
            board.cpus[0].start()
    board.start()


def test_some_vcpus_go_on_alone() -> None:
    board = Board(3)
    control = board.control
    for cpu in board.cpus:
        cpu.start()
    control.resume([board.cpus[0], board.cpus[2]])  # type: ignore[list-item]  # what of a Cpu it needs
    with board.cond:
        assert board.cond.wait_for(lambda: not board.cpus[0].parked and not board.cpus[2].parked, DEADLINE_S)
    assert board.execs[1].stays == 0
    control.pause()
    control.resume()
    board.all_inside()
    assert board.execs[1].stays == 1
    control.close()


def test_a_debugger_holds_it() -> None:
    """Whoever waits goes on waiting while it stands for a debugger, and hears of the rest."""
    board = Board(1).start()
    control = board.control
    control.hold((RunState.PAUSED, RunState.DEBUG))
    assert control.held
    control.pause()
    assert not control.wait(0.05)
    ended: list[bool] = []
    waiter = threading.Thread(target=lambda: ended.append(control.wait(DEADLINE_S)))
    waiter.start()
    control.resume()
    board.all_inside()
    control.pause()
    assert ended == []
    control.hold(())
    waiter.join(DEADLINE_S)
    assert ended == [True]
    assert not control.held
    control.hold((RunState.PAUSED,))
    control.end(RunState.SHUTDOWN, ExitStatus(0, "shutdown"))
    assert control.wait(DEADLINE_S)
    control.close()
