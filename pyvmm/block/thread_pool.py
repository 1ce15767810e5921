"""A bounded pool of worker threads: started as there is work, ended when there has been none for a while.

A job goes straight to an idle worker, the one that was busy last (its stack and the caches are warm). Without an idle
one a thread is started, up to the limit; beyond that jobs wait in order.
"""

from __future__ import annotations

from _weakref import ref

from pyvmm.light import Lock, Thread, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_THREADS = 16
IDLE_S = 10.0


class Worker:
    """One thread of the pool, and the job it was given while it sleeps on ``wake``."""

    __slots__ = ("job", "pool", "thread", "wake")

    def __init__(self) -> None:
        self.wake = Lock()
        self.wake.acquire()
        self.job: object = None
        self.pool: ThreadPool | None = None  # whose job it is
        self.thread: Thread | None = None


class ThreadPool:
    """Calls ``work(job)`` for every job, on one of its threads. ``work`` may not raise."""

    def __init__(self, work: Callable[[object], None], limit: int = LIMIT_THREADS, idle_s: float = IDLE_S) -> None:
        self._work = work
        self._limit = limit
        self._idle_s = idle_s
        self._lock = Lock()
        self._queue: deque[object] = deque()
        self._idle: list[Worker] = []
        self._workers: dict[Worker, None] = {}
        self._closed = False

    @property
    def threads(self) -> int:
        return len(self._workers)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, job: object) -> None:
        """Have ``work(job)`` called; here and now where the host has no room for even one thread."""
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                worker.job, worker.pool = job, self
                worker.wake.release()
                return
            if len(self._workers) < self._limit and self._start_locked(job):
                return
            if self._workers:
                self._queue.append(job)
                return
        self._work(job)

    def _start_locked(self, job: object) -> bool:
        worker = Worker()
        worker.job, worker.pool = job, self
        me, idle_s = ref(self), self._idle_s
        worker.thread = Thread(lambda: main(me, worker, idle_s))
        self._workers[worker] = None
        try:
            worker.thread.start()
        except RuntimeError:
            del self._workers[worker]
            worker.thread = None
        return worker.thread is not None

    def remove(self, job: object) -> bool:
        """Take back a job that still waits. False: it has begun, or is done."""
        with self._lock:
            try:
                self._queue.remove(job)
            except ValueError:
                return False
            return True

    def take_if(self, wanted: Callable[[object], bool]) -> object | None:
        """For ``work``: the next waiting job where ``wanted(job)``, to be done along with the present one."""
        with self._lock:
            if self._queue and wanted(self._queue[0]):
                return self._queue.popleft()
            return None

    def _turn(self, worker: Worker) -> bool:
        """Do the jobs that there are, on a worker's thread. False where the pool is closed and the thread has to end.
        """
        while True:
            job = worker.job
            worker.job = None
            if job is not None:
                self._work(job)
                del job
            with self._lock:
                if self._queue:
                    worker.job = self._queue.popleft()
                    continue
                if self._closed:
                    self._workers.pop(worker, None)
                    worker.thread = None
                    return False
                self._idle.append(worker)
                return True

    def _retire(self, worker: Worker) -> bool:
        """Let a worker go that was idle for long. False where it has just been given a job."""
        with self._lock:
            if worker not in self._idle:
                return False
            self._idle.remove(worker)
            self._workers.pop(worker, None)
            worker.thread = None
            return True

    def close(self) -> None:
        """Do what is queued, end the threads and wait for them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            threads = [worker.thread for worker in self._workers]
        for worker in idle:
            worker.wake.release()
        for thread in threads:
            if thread is not None:
                thread.join()


def main(me: ref[ThreadPool], worker: Worker, idle_s: float) -> None:
    """A worker's thread. While it has nothing to do it holds on to nothing but its Worker: a pool that nobody else
    refers to can be freed.

    A pool that is being freed may still have jobs, the last flush of a drive: weak references to it are dead by then.
    So each job brings its pool along.
    """
    pool, worker.pool = worker.pool, None
    while pool is not None and pool._turn(worker):
        pool = None
        if not worker.wake.acquire(timeout=idle_s):
            pool = me()
            if pool is not None and pool._retire(worker):
                return
            # Either it has just been given a job, which is waited for; or the pool is gone, or about to be, and may
            # have left a last one.
            is_gone, pool = pool is None, None
            if not worker.wake.acquire(timeout=idle_s if is_gone else -1):
                return
        pool, worker.pool = worker.pool or me(), None
