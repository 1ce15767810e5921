"""CoMutex: a lock for coroutines.

A format driver that changes a table in several steps, with requests to the file between them, must keep others from the
table until it is done. A lock of threads can't do that: a coroutine goes on on whatever thread brings what it waited
for, so the thread that took the lock is not the one that gives it back, and one that waits would keep a vCPU or the
event loop standing. A coroutine that waits for a CoMutex sleeps as it does for a request.

    ret = await self._table.acquire()
    if ret < 0:
        return ret
    try:
        ...
    finally:
        self._table.release()
"""

from __future__ import annotations

from errno import ECANCELED

from pyvmm.block.coroutine import Waiter
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.coroutine import AioContext


class Place(Waiter):
    """One coroutine's place in the queue for a CoMutex."""

    __slots__ = ("_mutex",)

    def __init__(self, mutex: CoMutex) -> None:
        super().__init__()
        self._mutex = mutex

    def cancel(self) -> None:
        self._mutex.cancel(self)


class CoMutex:
    """Held by one coroutine at a time, given to those that wait in the order in which they came.

    Not recursive. Its state is under the context's lock. Who releases it goes on; the next one goes on on the event
    loop's thread, or on one that drains (``AioContext.complete``).
    """

    __slots__ = ("_context", "_held", "_queue")

    def __init__(self, context: AioContext) -> None:
        self._context = context
        self._held = False
        self._queue: deque[Place] = deque()

    @property
    def held(self) -> bool:
        return self._held

    async def acquire(self) -> int:
        """0: the caller holds it, and releases it. -ECANCELED: its request was cancelled before its turn came."""
        with self._context.lock:
            if not self._held:
                self._held = True
                return 0
            place = Place(self)
            self._queue.append(place)
        try:
            return await place
        except GeneratorExit:
            self._give_up(place)
            raise

    def release(self) -> None:
        """Give it to the next in the queue. RuntimeError where nobody holds it.

        In a child of fork it does nothing: a coroutine that is freed there comes by here, and must not meet a lock that
        a thread of the parent's held at the moment of the fork.
        """
        context = self._context
        if context.abandoned:
            return
        with context.lock:
            if not self._held:
                raise RuntimeError("release of a CoMutex that nobody holds")
            if not self._queue:
                self._held = False
                return
            place = self._queue.popleft()
        context.complete(place, 0)

    def cancel(self, place: Place) -> None:
        """Take it out of the queue; where its turn has come already, it holds the mutex and nothing happens here."""
        if self._leave(place):
            self._context.complete(place, -ECANCELED)

    def _give_up(self, place: Place) -> None:
        """The coroutine ends while it waits. Where its turn has come already, the turn is the next one's."""
        if not self._context.abandoned and not self._leave(place):
            self.release()

    def _leave(self, place: Place) -> bool:
        """Whether it was in the queue."""
        with self._context.lock:
            try:
                self._queue.remove(place)
            except ValueError:
                return False
        return True
