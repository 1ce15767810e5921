"""Workers: as many as there is work for, never more than the limit, gone when there is none."""

from __future__ import annotations

import threading

import pytest
from block_drives import LIMIT_S
from waiting import wait_for

from pyvmm.block.thread_pool import ThreadPool
from pyvmm.light import Thread


class Jobs:
    """Work that each job waits in until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.gates: dict[object, threading.Event] = {}
        self.done: list[object] = []
        self.threads: set[int] = set()
        self._changed = threading.Condition()

    def add(self, *names: object) -> tuple[object, ...]:
        for name in names:
            self.gates[name] = threading.Event()
        return names

    def work(self, job: object) -> None:
        self.begun.release()
        assert self.gates[job].wait(LIMIT_S)
        with self._changed:
            self.done.append(job)
            self.threads.add(threading.get_ident())
            self._changed.notify_all()

    def wait_begun(self, count: int) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=LIMIT_S)

    def wait_done(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.done) == count, LIMIT_S), self.done


def test_never_more_threads_than_the_limit_and_the_rest_in_order() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, limit=3)
    names = jobs.add(*range(10))
    for name in names:
        pool.submit(name)
    jobs.wait_begun(3)
    assert (pool.threads, pool.queued) == (3, 7)
    assert not jobs.begun.acquire(blocking=False)
    jobs.gates[0].set()
    jobs.wait_begun(1)  # 3, on the thread of 0
    jobs.wait_done(1)
    for gate in jobs.gates.values():
        gate.set()
    jobs.wait_done(10)
    pool.close()
    assert pool.threads == 0
    assert len(jobs.threads) == 3
    assert sorted(jobs.done, key=str) == list(range(10))


def test_one_job_after_the_other_needs_one_thread() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work)
    for name in jobs.add(*range(20)):
        jobs.gates[name].set()
        pool.submit(name)
        jobs.wait_done(int(str(name)) + 1)
        wait_for(lambda: bool(pool._idle))
    assert len(jobs.threads) == 1
    pool.close()


def test_idle_threads_end_and_come_again() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, idle_s=0.001)
    for name in jobs.add("a", "b"):
        jobs.gates[name].set()
        pool.submit(name)
        wait_for(lambda: pool.threads == 0)
    assert jobs.done == ["a", "b"]
    pool.close()


def test_a_job_that_comes_while_its_worker_gives_up_waiting_is_done() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, limit=2, idle_s=0.0)
    names = jobs.add(*range(500))
    for name in names:
        jobs.gates[name].set()
        pool.submit(name)
    jobs.wait_done(500)
    pool.close()
    assert pool.threads == 0


def test_a_waiting_job_can_be_taken_back() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, limit=1)
    jobs.add("running", "waiting", "last")
    for name in ("running", "waiting", "last"):
        pool.submit(name)
    jobs.wait_begun(1)
    assert not pool.remove("running")
    assert pool.remove("waiting")
    assert not pool.remove("waiting")
    for gate in jobs.gates.values():
        gate.set()
    pool.close()
    assert jobs.done == ["running", "last"]


def test_close_does_what_is_queued() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, limit=1)
    for name in jobs.add("a", "b", "c"):
        pool.submit(name)
    for gate in jobs.gates.values():
        gate.set()
    pool.close()
    assert jobs.done == ["a", "b", "c"]


def test_without_room_for_a_thread_the_submitter_works(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work)
    jobs.add("a", "b", "c")
    for gate in jobs.gates.values():
        gate.set()

    def no_room(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", no_room)
        pool.submit("a")
    assert jobs.threads == {threading.get_ident()}
    pool.submit("b")
    jobs.wait_done(2)
    assert len(jobs.threads) == 2
    pool.close()


def test_without_room_for_another_thread_a_job_waits_for_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work)
    jobs.add("a", "b")
    pool.submit("a")
    jobs.wait_begun(1)

    def no_room(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", no_room)
        pool.submit("b")
    assert (pool.threads, pool.queued) == (1, 1)
    for gate in jobs.gates.values():
        gate.set()
    pool.close()
    assert jobs.done == ["a", "b"]


def test_take_if_takes_the_next_one_only() -> None:
    jobs = Jobs()
    pool = ThreadPool(jobs.work, limit=1)
    for name in jobs.add("running", "b", "c"):
        pool.submit(name)
    jobs.wait_begun(1)
    assert pool.take_if(lambda job: job == "c") is None
    assert pool.take_if(lambda job: job == "b") == "b"
    for gate in jobs.gates.values():
        gate.set()
    pool.close()
    assert jobs.done == ["running", "c"]
