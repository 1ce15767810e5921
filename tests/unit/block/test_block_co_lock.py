"""CoMutex: one at a time and in order, on whatever threads its coroutines go on; cancelled, given up, forked."""

from __future__ import annotations

import threading
from errno import ECANCELED

import pytest
from block_drives import LIMIT_S, ManualLoop, NoOwner, TestLoop

from pyvmm.block.co_lock import CoMutex
from pyvmm.block.coroutine import AioContext, Waiter, start
from pyvmm.block.thread_pool import ThreadPool


class HeldForEver:
    def __enter__(self) -> None:
        raise AssertionError("it would never come back")

    def __exit__(self, *exc: object) -> None:
        pass


class Bench:
    """Coroutines that take the mutex, say so, and give it back when told to."""

    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.context = AioContext(self.loop)
        self.mutex = CoMutex(self.context)
        self.log: list[str] = []
        self.inside: dict[str, Waiter] = {}

    async def _hold(self, name: str) -> None:
        ret = await self.mutex.acquire()
        if ret < 0:
            self.log.append(f"{name}: {ret}")
            return
        try:
            self.log.append(name)
            self.inside[name] = Waiter()
            await self.inside[name]
        finally:
            self.mutex.release()

    def begin(self, name: str) -> NoOwner:
        owner = NoOwner()
        self.coroutine = self._hold(name)
        start(self.coroutine, owner)
        return owner

    def end(self, name: str) -> None:
        self.inside[name].set()
        self.loop.run()


def test_it_is_given_in_the_order_of_asking() -> None:
    bench = Bench()
    for name in "abc":
        bench.begin(name)
    assert bench.log == ["a"]
    for name in "abc":
        bench.begin(name.upper())
        bench.end(name)
    for name in "ABC":
        bench.end(name)
    assert bench.log == ["a", "b", "c", "A", "B", "C"]
    assert not bench.mutex.held


def test_nobody_overtakes_one_whose_turn_has_come() -> None:
    bench = Bench()
    bench.begin("a")
    bench.begin("b")
    bench.inside["a"].set()  # b's turn, but the loop has not run yet
    bench.begin("c")
    assert bench.log == ["a"]
    bench.loop.run()
    assert bench.log == ["a", "b"]
    bench.end("b")
    bench.end("c")
    assert bench.log == ["a", "b", "c"]


def test_one_that_is_cancelled_leaves_the_queue() -> None:
    bench = Bench()
    bench.begin("a")
    b = bench.begin("b")
    bench.begin("c")
    assert b.waiter is not None
    b.waiter.cancel()
    bench.loop.run()
    b.waiter.cancel()  # too late, and nothing happens
    bench.loop.run()
    assert bench.log == ["a", f"b: {-ECANCELED}"]
    bench.end("a")
    bench.end("c")
    assert bench.log[2:] == ["c"]
    assert not bench.mutex.held


def test_one_whose_turn_has_come_is_not_cancelled_any_more() -> None:
    bench = Bench()
    bench.begin("a")
    b = bench.begin("b")
    bench.begin("c")
    bench.inside["a"].set()
    assert b.waiter is not None
    b.waiter.cancel()
    bench.loop.run()
    assert bench.log == ["a", "b"]
    bench.end("b")
    bench.end("c")
    assert bench.log == ["a", "b", "c"]
    assert not bench.mutex.held


def test_one_that_ends_while_it_waits_leaves_the_queue() -> None:
    bench = Bench()
    bench.begin("a")
    bench.begin("b")
    waiting = bench.coroutine
    bench.begin("c")
    waiting.close()
    bench.end("a")
    bench.end("c")
    assert bench.log == ["a", "c"]
    assert not bench.mutex.held


def test_one_that_ends_with_the_mutex_gives_it_back() -> None:
    bench = Bench()
    bench.begin("a")
    holder = bench.coroutine
    bench.begin("b")
    holder.close()
    bench.loop.run()
    assert bench.log == ["a", "b"]


def test_what_nobody_holds_is_not_released() -> None:
    with pytest.raises(RuntimeError, match="nobody holds"):
        CoMutex(AioContext(ManualLoop())).release()


def test_a_child_of_fork_frees_its_coroutines_and_meets_no_lock() -> None:
    bench = Bench()
    bench.begin("a")
    holder = bench.coroutine
    bench.begin("b")
    waiting = bench.coroutine
    bench.context.abandon()
    bench.context.lock = HeldForEver()  # type: ignore[assignment]  # by a thread that only the parent has
    waiting.close()
    holder.close()
    assert not bench.loop.calls


def test_on_many_threads_one_at_a_time_and_in_order(loop: TestLoop) -> None:
    """Each goes on on a worker's thread in the middle of what the mutex protects, and on the loop's at its turn."""
    count = 400
    context = AioContext(loop)
    mutex = CoMutex(context)
    pool = ThreadPool(lambda waiter: context.complete_here(waiter, 0), limit=4)  # type: ignore[arg-type]
    inside: list[int] = []
    order: list[int] = []
    threads: set[int] = set()
    done = threading.Semaphore(0)

    async def work(number: int) -> None:
        assert await mutex.acquire() == 0
        try:
            inside.append(number)
            for _ in range(3):
                waiter = Waiter()
                pool.submit(waiter)
                await waiter
                assert inside == [number]
                threads.add(threading.get_ident())
            order.append(inside.pop())
        finally:
            mutex.release()
        done.release()

    for number in range(count):
        start(work(number), NoOwner())
    for _ in range(count):
        assert done.acquire(timeout=LIMIT_S)
    pool.close()
    assert order == list(range(count))
    assert len(threads) > 1
    assert not mutex.held


def test_submitted_from_many_threads_nothing_is_lost(loop: TestLoop) -> None:
    context = AioContext(loop)
    mutex = CoMutex(context)
    total = [0]
    done = threading.Semaphore(0)

    async def add() -> None:
        assert await mutex.acquire() == 0
        try:
            seen = total[0]
            waiter = Waiter()
            context.complete(waiter, 0)
            await waiter
            total[0] = seen + 1
        finally:
            mutex.release()
        done.release()

    def submit() -> None:
        for _ in range(100):
            start(add(), NoOwner())

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(400):
        assert done.acquire(timeout=LIMIT_S)
    assert total == [400]
