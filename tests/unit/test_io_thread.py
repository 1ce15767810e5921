"""IoThread: callbacks for what is ready, and none while it is paused."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from pyvmm.errors import StateError, ThreadError
from pyvmm.io_thread import IoThread, IoThreads
from pyvmm.light import Thread

LIMIT_S = 20


class Bench:
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.thread = IoThread(self.errors.append)
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.called = threading.Semaphore(0)

    def wait(self) -> None:
        assert self.called.acquire(timeout=LIMIT_S)

    def settle(self) -> None:
        """Until the thread has looked at all there is."""
        done = threading.Event()
        self.thread.call_soon(done.set)
        assert done.wait(LIMIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.thread.close()
    os.close(made.fd)


def test_an_edge_each_write(bench: Bench) -> None:
    bench.thread.add_reader(bench.fd, bench.called.release, edge=True)
    bench.thread.resume()
    for _ in range(3):
        os.eventfd_write(bench.fd, 1)
        bench.wait()
    bench.settle()
    assert not bench.called.acquire(blocking=False)
    assert os.eventfd_read(bench.fd) == 3


def test_a_level_until_it_is_read(bench: Bench) -> None:
    reads: list[int] = []

    def read() -> None:
        reads.append(os.eventfd_read(bench.fd))
        bench.called.release()

    bench.thread.add_reader(bench.fd, read)
    bench.thread.resume()
    os.eventfd_write(bench.fd, 2)
    bench.wait()
    bench.settle()
    assert reads == [2]
    assert bench.thread.remove_reader(bench.fd)
    assert not bench.thread.remove_reader(bench.fd)
    os.eventfd_write(bench.fd, 1)
    bench.settle()
    assert reads == [2]


def test_writers(bench: Bench) -> None:
    def written() -> None:
        bench.thread.remove_writer(bench.fd)
        bench.called.release()

    bench.thread.add_writer(bench.fd, written)
    bench.thread.resume()
    bench.wait()
    bench.settle()
    assert not bench.called.acquire(blocking=False)


def test_a_new_one_is_paused_and_what_came_meanwhile_is_found(bench: Bench) -> None:
    bench.thread.add_reader(bench.fd, bench.called.release, edge=True)
    os.eventfd_write(bench.fd, 1)
    assert not bench.called.acquire(timeout=0.05)
    bench.thread.resume()
    bench.wait()
    bench.thread.pause()
    bench.thread.pause()
    os.eventfd_write(bench.fd, 1)
    bench.thread.call_soon(bench.called.release)
    bench.thread.resume()
    assert not bench.called.acquire(timeout=0.05)
    bench.thread.resume()
    bench.wait()
    bench.wait()


def test_pause_waits_for_a_callback_under_way(bench: Bench) -> None:
    go_on = threading.Event()
    over: list[str] = []

    def slow() -> None:
        bench.called.release()
        assert go_on.wait(LIMIT_S)
        over.append("callback")

    bench.thread.resume()
    bench.thread.call_soon(slow)
    bench.wait()

    def pause() -> None:
        bench.thread.pause()
        over.append("paused")

    pausing = threading.Thread(target=pause)
    pausing.start()
    go_on.set()
    pausing.join(LIMIT_S)
    assert over == ["callback", "paused"]


def test_a_callback_cant_pause_the_threads_of_its_machine() -> None:
    """And nothing has been paused by trying: the other threads go on."""
    errors: list[BaseException] = []
    threads = IoThreads(errors.append)
    other, own = threads.make(), threads.make()
    threads.resume()
    try:
        for thread, call in ((own, threads.pause), (other, lambda: None)):
            done = threading.Event()
            thread.call_soon(call)
            thread.call_soon(done.set)
            assert done.wait(LIMIT_S)
        assert [type(error) for error in errors] == [StateError]
    finally:
        threads.close()


def test_where_a_thread_can_not_be_started_all_stay_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = IoThreads(lambda error: None)
    first, second = threads.make(), threads.make()
    really = Thread.start

    def start(thread: Thread) -> None:
        if first._thread is not None:
            raise ThreadError("no room")
        really(thread)

    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", start)
        with pytest.raises(ThreadError):
            threads.resume()
    done = threading.Event()
    first.call_soon(done.set)
    assert not done.wait(0.05)
    with threads.paused:
        pass
    threads.resume()
    assert done.wait(LIMIT_S)
    done.clear()
    second.call_soon(done.set)
    assert done.wait(LIMIT_S)
    threads.close()


def test_after_the_end_nothing_is_kept(bench: Bench) -> None:
    bench.thread.resume()
    bench.thread.close()
    callback = bench.called.release
    before = sys.getrefcount(callback)
    bench.thread.call_soon(callback)
    assert sys.getrefcount(callback) == before


def test_a_callback_cant_pause_its_own_thread(bench: Bench) -> None:
    bench.thread.resume()
    bench.thread.call_soon(bench.thread.pause)
    bench.settle()
    assert [type(error) for error in bench.errors] == [StateError]


def test_a_descriptor_whose_callback_raised_is_no_longer_watched(bench: Bench) -> None:
    def bad() -> None:
        raise ValueError("no good")

    bench.thread.add_reader(bench.fd, bad)
    bench.thread.resume()
    os.eventfd_write(bench.fd, 1)
    bench.settle()
    bench.settle()
    assert [str(error) for error in bench.errors] == ["no good"]


@pytest.mark.parametrize("raises", [False, True])
def test_a_child_of_a_callback_serves_nothing(bench: Bench, raises: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """It has the epoll of its parent, which would miss what it finds."""
    children: list[int] = []

    def fork() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            children.append(child)
        elif raises:
            raise ValueError("of the child")

    def ring() -> None:
        os.write(1, b"rung by %d\n" % os.getpid())
        bench.called.release()

    bench.thread.add_reader(bench.fd, ring, edge=True)
    bench.thread.resume()
    bench.thread.call_soon(fork)
    bench.settle()
    for _ in range(3):
        os.eventfd_write(bench.fd, 1)
        bench.wait()
    assert os.waitpid(children[0], 0)[0] == children[0]
    out, err = capfd.readouterr()
    assert out == f"rung by {os.getpid()}\n" * 3
    assert ("ValueError: of the child" in err) == raises
    assert bench.errors == []


def test_close_ends_one_that_is_paused_or_never_ran() -> None:
    for resumes in (0, 1, 2):
        bench = Bench()
        before = threading.active_count()
        if resumes:
            bench.thread.resume()
        if resumes == 2:
            bench.thread.pause()
        bench.thread.add_reader(bench.fd, bench.called.release)
        os.eventfd_write(bench.fd, 1)
        bench.thread.close()
        bench.thread.close()
        assert threading.active_count() <= before
        os.close(bench.fd)


@pytest.mark.filterwarnings("error")  # what __del__ raises is a warning
@pytest.mark.parametrize("paused", [False, True])
def test_one_that_is_dropped_ends_its_thread(paused: bool) -> None:
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    thread = IoThread(lambda error: None)
    thread.resume()
    inner = thread._thread
    assert inner is not None
    if paused:
        thread.pause()
        thread.call_soon(lambda: None)
    del thread
    gc.collect()
    inner.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_of_a_machine_together() -> None:
    threads = IoThreads(lambda error: None)
    assert threads.shared is threads.shared
    threads.resume()
    late = threads.make()
    done = threading.Event()
    late.call_soon(done.set)
    assert done.wait(LIMIT_S)
    assert not threads.inside
    with threads.paused, threads.paused:
        done.clear()
        threads.shared.call_soon(done.set)
        assert not done.wait(0.05)
    assert done.wait(LIMIT_S)
    threads.close()
