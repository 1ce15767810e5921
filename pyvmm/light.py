"""The few things of ``threading`` and ``collections`` that pyvmm needs on its way to the first guest instruction.

Importing those two (and functools, which they bring) takes a third of the time from the shell to that instruction, so
what is here stands directly on ``_thread`` and means the same as its namesakes in the standard library.
"""

from __future__ import annotations

import _thread
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from typing import Any
else:
    from _collections import deque

__all__ = ["Condition", "Lock", "Thread", "deque", "get_ident"]

Lock = _thread.allocate_lock
get_ident = _thread.get_ident


class Condition:
    """threading.Condition, on a recursive lock of its own or on the plain ``lock`` given."""

    def __init__(self, lock: _thread.LockType | None = None) -> None:
        self._lock: Any = _thread.RLock() if lock is None else lock
        self.acquire = self._lock.acquire
        self.release = self._lock.release
        self._recursive = lock is None
        self._waiters: deque[_thread.LockType] = deque()

    def __enter__(self) -> Condition:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Give the lock away, wait for a notify, take the lock again. False where the time ran out first."""
        waiter = Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        held = self._lock._release_save() if self._recursive else self.release()
        notified = False
        try:
            notified = waiter.acquire() if timeout_s is None else waiter.acquire(timeout=max(0.0, timeout_s))
            return notified
        finally:
            if self._recursive:
                self._lock._acquire_restore(held)
            else:
                self.acquire()
            if not notified and waiter in self._waiters:
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
        """Wake every waiter; the lock is held."""
        while self._waiters:
            self._waiters.popleft().release()


class Thread:
    """A daemon thread. ``start`` does not wait for it to run, as threading's does: three switches less."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._target = target
        self._ended = Lock()  # held while it lives
        self.ident = 0

    def start(self) -> None:
        """RuntimeError where the host has no room for one more."""
        self._ended.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except BaseException:
            self._ended.release()
            raise

    def _run(self) -> None:
        self.ident = get_ident()
        try:
            self._target()
        finally:
            self.ident = 0
            self._ended.release()

    @property
    def is_current(self) -> bool:
        return self.ident == get_ident()

    def join(self) -> None:
        """Wait for its end; at once from the thread itself."""
        if not self.is_current:
            with self._ended:
                pass
