"""A request is a native coroutine. This is all that is needed to run one: no asyncio, no task, no queue of its own.

``start(coroutine, owner)`` runs it on the caller's thread until it ends or awaits a Waiter whose result is not there. A
request that need not wait has run from end to end when ``start`` returns. One that waits is continued by whoever
brings the result: a worker goes on with it there and then; what comes otherwise is handed to the AioContext, and the
event loop's thread (or one that drains) goes on.

So a coroutine may be on another thread after every ``await``. From that follow three rules (docs/design.md, "Which
thread a coroutine goes on"): it holds no lock of threads while it awaits; a thread that calls ``start`` or
``Waiter.set`` holds no lock of the block layer; and two coroutines of one drive may run at the same time, so what they
share is under ``AioContext.lock``, or under a CoMutex (co_lock.py) where it must not change during an ``await``.
"""

from __future__ import annotations

import os
import select

from pyvmm.light import Lock, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from typing import Any, Protocol

    class Loop(Protocol):
        """What the block layer needs of the event loop."""

        def call_soon(self, callback: Callable[[], None], /) -> None: ...

    class ReaderLoop(Loop, Protocol):
        """What the io_uring engine needs."""

        def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...
        def remove_reader(self, fd: int, /) -> bool: ...

    class Owner(Protocol):
        """Whoever wants to know what its coroutine waits for, to cancel that."""

        waiter: Waiter | None


class Waiter:
    """One result, brought once, for one coroutine that awaits it.

    The coroutine may be on its way to sleep on one thread while the result arrives on another. Both take ``_turn``;
    whoever comes second goes on with the coroutine.
    """

    __slots__ = ("_coroutine", "_owner", "_turn", "error", "result")

    def __init__(self) -> None:
        self._turn = Lock()
        self._coroutine: Coroutine[Waiter, None, None] | None = None
        self._owner: Owner | None = None
        self.result = 0
        self.error: BaseException | None = None

    @property
    def asked_by(self) -> int:
        """The number of the request that waits for it; 0 where that is not asleep yet, or it is none."""
        return getattr(self._owner, "number", 0)

    def __await__(self) -> Generator[Waiter, None, int]:
        yield self
        if self.error is not None:
            raise self.error
        return self.result

    def sleep(self, coroutine: Coroutine[Waiter, None, None], owner: Owner) -> bool:
        """The coroutine has yielded this waiter. False where the result is there already: the caller goes on with it.
        """
        self._coroutine = coroutine
        self._owner = owner
        owner.waiter = self
        return self._turn.acquire(False)

    def set(self) -> None:
        """``result`` or ``error`` is there: go on with the coroutine here. Where it is still on its way to sleep, it
        finds them by itself.
        """
        if not self._turn.acquire(False):
            coroutine, owner = self._coroutine, self._owner
            assert coroutine is not None
            assert owner is not None
            self._coroutine = self._owner = None
            start(coroutine, owner)

    def cancel(self) -> None:
        """Ask that the wait end with -ECANCELED. What has begun already ends with a result of its own. Any thread may
        call it; the result comes in the usual way.
        """


class Nobody:
    """The owner of a coroutine that is not cancelled."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: Waiter | None = None


def start(coroutine: Coroutine[Waiter, None, None], owner: Owner) -> None:
    """Run ``coroutine`` until it ends, or waits for what somebody will bring. Raises what it raises."""
    send: Any = coroutine.send
    try:
        while True:
            waiter: Waiter = send(None)
            if waiter.sleep(coroutine, owner):
                return
    except StopIteration:
        pass


class AioContext:
    """Where the completions of one backend wait for the event loop.

    ``lock`` is the backend's one lock (order: device, backend, event loop). No coroutine and no callback runs under it.
    """

    def __init__(self, loop: Loop) -> None:
        self.lock = Lock()
        self.loop = loop
        self.abandoned = False
        """In a child of fork: no result comes, no coroutine goes on, and ``lock`` may be held for ever."""
        self._due: deque[Waiter] = deque()
        self._called = False  # the loop has been told, and has not looked yet
        self._watchers: list[int] = []  # eventfds of threads in run_until
        self._sources: list[tuple[int, Callable[[], None]]] = []

    def add_source(self, fd: int, collect: Callable[[], None]) -> None:
        """For completions that do not come by ``complete``: ``run_until`` waits for ``fd`` too, and calls ``collect``.
        """
        self._sources.append((fd, collect))

    def remove_source(self, fd: int) -> None:
        self._sources = [source for source in self._sources if source[0] != fd]

    def complete(self, waiter: Waiter, result: int) -> None:
        """Hand over a result, from any thread."""
        waiter.result = result
        self._hand_over(waiter)

    def fail(self, waiter: Waiter, error: BaseException) -> None:
        """As ``complete``: ``error`` is raised in the coroutine, and from there stops the machine."""
        waiter.error = error
        self._hand_over(waiter)

    def complete_here(self, waiter: Waiter, result: int) -> None:
        """As ``complete``, but the coroutine goes on on this thread: a worker's, which holds no lock and has nothing
        else to do. That spares the loop's thread its wake-up, which takes longer than all of the rest.
        """
        waiter.result = result
        try:
            waiter.set()
        except BaseException as error:
            self.raise_on_loop(error)

    def raise_on_loop(self, error: BaseException) -> None:
        """What was raised on a thread of ours stops the machine, as what a callback of the loop's raises."""

        def tell() -> None:
            raise error

        self.loop.call_soon(tell)

    def run(self, coroutine: Coroutine[Waiter, None, int]) -> int:
        """Start it, and wait for its end: its result. The caller holds no lock and is in no coroutine and no callback.
        """
        ended: list[int | BaseException] = []

        async def outer() -> None:
            try:
                ended.append(await coroutine)
            except BaseException as error:
                ended.append(error)
            with self.lock:
                self.notify_locked()

        start(outer(), Nobody())
        self.run_until(lambda: bool(ended))
        (result,) = ended
        if isinstance(result, BaseException):
            raise result
        return result

    def abandon(self) -> None:
        """In a child of fork."""
        self.abandoned = True

    def _hand_over(self, waiter: Waiter) -> None:
        with self.lock:
            self._due.append(waiter)
            self.notify_locked()
            if self._called:
                return
            self._called = True
        self.loop.call_soon(self._on_loop)

    def _on_loop(self) -> None:
        with self.lock:
            self._called = False
        self.run_due()

    def run_due(self) -> None:
        """Go on with every coroutine whose result is there. Where one raises, the event loop goes on with the others.
        """
        while True:
            with self.lock:
                if not self._due:
                    return
                waiter = self._due.popleft()
            try:
                waiter.set()
            except BaseException:
                with self.lock:
                    call = bool(self._due) and not self._called
                    self._called |= call
                if call:
                    self.loop.call_soon(self._on_loop)
                raise

    def notify_locked(self) -> None:
        """Something that ``run_until`` may be waiting for has changed; the lock is held."""
        for fd in self._watchers:
            os.eventfd_write(fd, 1)

    def run_until(self, idle: Callable[[], bool]) -> None:
        """Run what is due, and wait for more, until ``idle()``, which is called under the lock."""
        self.run_due()
        with self.lock:
            if not self._due and idle():
                return
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        poll = select.poll()
        poll.register(wake_fd, select.POLLIN)
        for fd, _ in self._sources:
            poll.register(fd, select.POLLIN)
        try:
            with self.lock:
                self._watchers.append(wake_fd)
            while True:
                for _, collect in self._sources:
                    collect()
                self.run_due()
                with self.lock:
                    if not self._due and idle():
                        return
                poll.poll()
                try:
                    os.eventfd_read(wake_fd)
                except BlockingIOError:
                    pass
        finally:
            with self.lock:
                if wake_fd in self._watchers:
                    self._watchers.remove(wake_fd)
            os.close(wake_fd)
