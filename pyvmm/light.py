"""The few things of ``threading`` and ``collections`` that pyvmm needs on its way to the first guest instruction.

Importing those two (and functools, which they bring) takes a third of the time from the shell to that instruction. What
is here is built directly on ``_thread``, and behaves as what has the same name in the standard library.
"""

from __future__ import annotations

import _thread
from posix import getpid
from sys import modules, setprofile, settrace
from time import monotonic

from pyvmm.errors import ThreadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from typing import Any
else:
    from _collections import deque

__all__ = ["Condition", "Lock", "RLock", "Thread", "deque", "get_ident"]

Lock = _thread.allocate_lock
RLock = _thread.RLock
get_ident = _thread.get_ident

SIGNAL_CHECK_S = 0.25
BEGIN_LIMIT_S = 5.0


def on_main_thread() -> bool:
    """Whether this is the thread that runs Python's signal handlers."""
    return _thread.get_native_id() == getpid()


def patient_acquire(waiter: _thread.LockType, timeout_s: float | None) -> bool:
    """``waiter.acquire(timeout_s)`` for the main thread.

    A signal that comes after the interpreter's last look and before the thread sleeps does not wake it, and with a
    vCPU's thread at the other end of the GIL that is no rare moment: so look again now and then.
    """
    left_s = timeout_s
    while left_s is None or left_s > SIGNAL_CHECK_S:
        if waiter.acquire(timeout=SIGNAL_CHECK_S):
            return True
        left_s = None if left_s is None else left_s - SIGNAL_CHECK_S
    return waiter.acquire(timeout=max(0.0, left_s))


class Condition:
    """threading.Condition on ``lock`` (an RLock or a Lock), to be held by ``with lock:``.

    It has no ``with`` of its own: written in Python, that could be left by a signal's exception between taking the lock
    and entering the block, with the lock held for ever.
    """

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._recursive = hasattr(lock, "_release_save")
        self._waiters: deque[_thread.LockType] = deque()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Give the lock away, wait for a notify, take the lock again. False where the time ran out first."""
        waiter = Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        held: Any = (1, get_ident())
        notified = False
        try:
            if self._recursive:
                held = self._lock._release_save()
            else:
                self._lock.release()
            if on_main_thread():
                notified = patient_acquire(waiter, timeout_s)
            else:
                notified = waiter.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
            return notified
        finally:
            if not self._recursive:
                self._lock.acquire()
            elif not self._lock._is_owned():
                self._lock._acquire_restore(held)
            # Where the time ran out; or where whoever notified was interrupted (notify_all).
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until ``predicate()`` holds, looking at it after each notify: its last value."""
        end = None if timeout_s is None else monotonic() + timeout_s
        while not (result := predicate()):
            left = None if end is None else end - monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
        return result

    def notify_all(self) -> None:
        """Wake every waiter; the lock is held.

        A signal's exception may come after any call here. So a waiter leaves the list only once it is awake, and one
        that was woken twice is no error: one in neither place would sleep for ever.
        """
        while self._waiters:
            waiter = self._waiters[0]
            if waiter.locked():
                waiter.release()
            try:
                self._waiters.remove(waiter)
            except ValueError:
                pass  # a signal handler has come between, and notified too


_taken = _thread._local()  # ``hooks``: what this thread has of threading's


def why_no_thread() -> str:
    """What to do about a thread that the host refused: its stack is address space, which may be what is short."""
    import mmap
    import resource

    stack_bytes = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if not 0 < stack_bytes < 1 << 30:
        stack_bytes = 8 << 20
    try:
        mmap.mmap(-1, stack_bytes).close()
    except (OSError, MemoryError):
        return "raise `ulimit -v`, or ask for less memory"
    return "raise `ulimit -u` (in a container its pids.max), or close machines"


class Thread:
    """A daemon thread. ``start`` does not wait for it to run, as threading's does: three switches less."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._target = target
        self._started = False
        self._claimed = Lock()  # taken by the thread that runs the target
        self._ended = Lock()
        self._ended.acquire()
        self.ident = 0
        self.native_id = 0  # the kernel's number of it, once it has begun

    def start(self) -> None:
        """Start it, once. ThreadError where the host has no room for one more."""
        if not self._started:
            # Where a signal raises between these two lines, it is open whether there is a thread. The next call then
            # starts another, and of the two one finds the target claimed and ends.
            try:
                _thread.start_new_thread(self._run, ())
            except (RuntimeError, MemoryError) as error:
                raise ThreadError(f"{error or 'no memory for a thread'}: {why_no_thread()}") from None
            self._started = True

    def _run(self) -> None:
        if not self._claimed.acquire(False):
            return
        try:
            self.ident = get_ident()
            self.native_id = _thread.get_native_id()
            self.follow_threading()
            self._target()
        finally:
            self.ident = 0
            self._ended.release()

    @staticmethod
    def follow_threading() -> None:
        """Have the calling thread traced and profiled as ``threading`` has its own: by coverage, debuggers, profilers.

        Where nobody has loaded ``threading``, nobody can have asked for it. To be called again where a thread that
        lives long begins something new: somebody may have asked meanwhile.
        """
        threading = modules.get("threading")
        if threading is None or not hasattr(threading, "getprofile"):
            return  # not loaded, or being loaded
        hooks = threading.gettrace(), threading.getprofile()
        if hooks != getattr(_taken, "hooks", (None, None)):
            _taken.hooks = hooks
            # The profiler first: it need not see settrace().
            setprofile(hooks[1])
            settrace(hooks[0])

    @property
    def is_current(self) -> bool:
        return self.ident == get_ident()

    def join(self) -> None:
        """Wait for its end; at once from the thread itself, and where it was never started."""
        if (self._started or self._claimed.locked()) and not self.is_current:
            while not self._ended.acquire(timeout=BEGIN_LIMIT_S):
                # A thread that its host gave no memory for can die before it begins. It is not waited for, and if it is
                # only late it finds its target taken.
                if self._claimed.acquire(False):
                    break
            self._ended.release()
