"""A request is a native coroutine. This is all that is needed to run one: no asyncio, no task, no queue of its own.

``start(coroutine)`` runs it on the caller's thread until it ends or awaits a Waiter whose result is not there. A request
that need not wait has run from end to end when ``start`` returns. One that waits is continued by whoever brings
the result: workers hand that to the AioContext, and the event loop's thread (or one that drains) goes on.
"""

from __future__ import annotations

from pyvmm.light import Condition, Lock, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from typing import Any, Protocol

    class Loop(Protocol):
        """What the block layer needs of the event loop."""

        def call_soon(self, callback: Callable[[], None], /) -> None: ...


class Waiter:
    """One result, brought once, for one coroutine that awaits it.

    The coroutine may be on its way to sleep on one thread while the result arrives on another. Both take ``_turn``;
    whoever comes second goes on with the coroutine.
    """

    __slots__ = ("_coroutine", "_turn", "error", "result")

    def __init__(self) -> None:
        self._turn = Lock()
        self._coroutine: Coroutine[Waiter, None, None] | None = None
        self.result = 0
        self.error: BaseException | None = None

    def __await__(self) -> Generator[Waiter, None, int]:
        yield self
        if self.error is not None:
            raise self.error
        return self.result

    def sleep(self, coroutine: Coroutine[Waiter, None, None]) -> bool:
        """The coroutine has yielded this. False where the result is there: go on at once."""
        self._coroutine = coroutine
        return self._turn.acquire(False)

    def set(self) -> None:
        """``result`` or ``error`` is there: go on with the coroutine, unless it is about to look by itself."""
        if not self._turn.acquire(False):
            assert self._coroutine is not None
            start(self._coroutine)

    def cancel(self) -> None:
        """Bring -ECANCELED where what it waits for has not begun. Any thread; the result comes the usual way."""


def start(coroutine: Coroutine[Waiter, None, None]) -> None:
    """Run ``coroutine`` until it ends, or waits for what somebody will bring. Raises what it raises."""
    send: Any = coroutine.send
    try:
        while True:
            waiter: Waiter = send(None)
            if waiter.sleep(coroutine):
                return
    except StopIteration:
        pass


class AioContext:
    """Where the completions of one backend wait for the event loop.

    ``lock`` is the backend's one lock (order: device, backend, event loop). No coroutine and no callback runs under it.
    """

    def __init__(self, loop: Loop) -> None:
        self.lock = Lock()
        self._changed = Condition(self.lock)
        self._watchers = 0
        self._loop = loop
        self._due: deque[Waiter] = deque()
        self._called = False  # the loop has been told, and has not looked yet

    def complete(self, waiter: Waiter, result: int) -> None:
        """Hand over a result, from any thread."""
        waiter.result = result
        self._hand_over(waiter)

    def fail(self, waiter: Waiter, error: BaseException) -> None:
        """As ``complete``: ``error`` is raised in the coroutine, and from there stops the machine."""
        waiter.error = error
        self._hand_over(waiter)

    def _hand_over(self, waiter: Waiter) -> None:
        with self.lock:
            self._due.append(waiter)
            if self._watchers:
                self._changed.notify_all()
            if self._called:
                return
            self._called = True
        self._loop.call_soon(self._on_loop)

    def _on_loop(self) -> None:
        with self.lock:
            self._called = False
        self.run_due()

    def run_due(self) -> bool:
        """Go on with every coroutine whose result is there. Whether there was one."""
        ran = False
        while True:
            with self.lock:
                if not self._due:
                    return ran
                waiter = self._due.popleft()
            ran = True
            waiter.set()

    def notify_locked(self) -> None:
        """Something that ``run_until`` may be waiting for has changed; the lock is held."""
        if self._watchers:
            self._changed.notify_all()

    def run_until(self, idle: Callable[[], bool]) -> None:
        """Run what is due, and wait for more, until ``idle()``, which is called under the lock."""
        while True:
            self.run_due()
            with self.lock:
                if self._due:
                    continue
                if idle():
                    return
                self._watchers += 1
                try:
                    self._changed.wait()
                finally:
                    self._watchers -= 1
