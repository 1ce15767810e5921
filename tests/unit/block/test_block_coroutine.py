"""Waiters, and the context that brings their results to the loop or to whoever drains."""

from __future__ import annotations

import threading

import pytest
from block_drives import LIMIT_S, ManualDrive, ManualLoop, NoOwner, TestLoop

from pyvmm.block.coroutine import AioContext, Waiter, start


def test_a_coroutine_that_need_not_wait_has_ended_when_start_returns() -> None:
    seen = []

    async def inner() -> int:
        return 7

    async def outer() -> None:
        seen.append(await inner())

    start(outer(), NoOwner())
    assert seen == [7]


def test_a_result_that_is_there_before_the_await_does_not_suspend() -> None:
    waiter = Waiter()
    waiter.result = 5
    waiter.set()
    seen = []

    async def ask() -> None:
        seen.append(await waiter)

    start(ask(), NoOwner())
    assert seen == [5]


def test_what_it_waits_for_is_known_to_its_owner() -> None:
    owner, waiter, seen = NoOwner(), Waiter(), []

    async def ask() -> None:
        seen.append(await waiter)

    start(ask(), owner)
    assert owner.waiter is waiter
    assert seen == []
    waiter.result = 3
    waiter.set()
    assert seen == [3]


def test_results_come_in_order_on_the_loop(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    waiters = [Waiter() for _ in range(3)]
    seen: list[int] = []

    async def ask(waiter: Waiter) -> None:
        seen.append(await waiter)

    for waiter in waiters:
        start(ask(waiter), NoOwner())
    for number, waiter in enumerate(waiters):
        context.complete(waiter, number)
    assert seen == []
    assert len(manual_loop.calls) == 1  # told once
    manual_loop.run()
    assert seen == [0, 1, 2]


def test_a_worker_goes_on_by_itself_and_what_that_raises_goes_to_the_loop(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    first, second = Waiter(), Waiter()
    seen: list[object] = []

    async def ask(waiter: Waiter) -> None:
        seen.append((await waiter, threading.get_ident()))
        raise ZeroDivisionError

    start(ask(first), NoOwner())
    context.complete_here(first, 4)
    assert seen == [(4, threading.get_ident())]
    with pytest.raises(ZeroDivisionError):
        manual_loop.run()
    # One that has not gone to sleep yet goes on where it is.
    second.result = 0
    context.complete_here(second, 5)
    with pytest.raises(ZeroDivisionError):
        start(ask(second), NoOwner())
    assert seen[1:] == [(5, threading.get_ident())]


def test_an_error_is_raised_in_the_coroutine_and_the_others_still_come(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    first, second = Waiter(), Waiter()
    seen: list[int] = []

    async def ask(waiter: Waiter) -> None:
        seen.append(await waiter)

    start(ask(first), NoOwner())
    start(ask(second), NoOwner())
    context.fail(first, ZeroDivisionError())
    context.complete(second, 2)
    with pytest.raises(ZeroDivisionError):
        manual_loop.run()
    manual_loop.run()
    assert seen == [2]


def test_who_drains_runs_what_is_due_and_the_loop_finds_nothing(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    waiter, seen = Waiter(), []

    async def ask() -> None:
        seen.append((await waiter, threading.get_ident()))

    start(ask(), NoOwner())
    thread = threading.Thread(target=lambda: context.complete(waiter, 1))
    thread.start()
    context.run_until(lambda: bool(seen))
    thread.join()
    assert seen == [(1, threading.get_ident())]
    manual_loop.run()
    assert len(seen) == 1


def test_who_drains_is_told_by_notify(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    done = []

    def finish() -> None:
        with context.lock:
            done.append(1)
            context.notify_locked()

    thread = threading.Thread(target=finish)
    thread.start()
    context.run_until(lambda: bool(done))
    thread.join()


def test_results_race_with_the_way_to_sleep(loop: TestLoop) -> None:
    # Completed from another thread at no particular moment: before, while and after the coroutine goes to sleep.
    context = AioContext(loop)
    count = 3000
    waiters = [Waiter() for _ in range(count)]
    total = [0]
    done = threading.Event()
    lock = threading.Lock()

    async def ask(waiter: Waiter) -> None:
        value = await waiter
        with lock:
            total[0] += value
            if total[0] == count:
                done.set()

    def complete_all() -> None:
        for waiter in waiters:
            context.complete(waiter, 1)

    thread = threading.Thread(target=complete_all)
    thread.start()
    for waiter in waiters:
        start(ask(waiter), NoOwner())
    thread.join()
    assert done.wait(LIMIT_S)
    assert total[0] == count


def test_the_watch_over_locks_would_notice(manual_loop: ManualLoop) -> None:
    context = AioContext(manual_loop)
    waiter = Waiter()

    async def ask() -> None:
        await waiter

    start(ask(), NoOwner())
    with context.lock, pytest.raises(AssertionError, match="holds a lock"):
        waiter.set()


def test_in_a_child_of_fork_a_request_that_is_freed_meets_no_lock() -> None:
    drive = ManualDrive()
    drive.read(0)
    drive.backend.abandon()
    step = drive.driver.steps.pop()
    with drive.driver.context.lock:
        step._coroutine.close()  # type: ignore[union-attr]  # as its last reference goes
    assert drive.backend.stats.in_flight == 1
