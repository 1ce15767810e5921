"""IoThread: a thread that serves queues: doorbells, and what the host's ends of devices have to say.

    thread = IoThread(on_error)
    thread.add_reader(queue.kick_fd, serve, edge=True)
    thread.resume()

It is an event loop that can be paused, and does nothing else: no timers, no hang-ups, and so little between epoll and a
handler. Handlers run one after the other. ``pause`` returns when none runs, and none will until ``resume``; what
becomes ready meanwhile is found then. The thread is started by the first ``resume``: a machine that never runs has
none.

An eventfd is best watched with ``edge`` (EPOLLET): each write to it is an event, and nobody has to read it.
"""

from __future__ import annotations

import posix
import select
from _weakref import ref

from pyvmm.address_space import Held
from pyvmm.errors import HOST_LIMITS, HostError, StateError, remedy
from pyvmm.event_loop import READ_EVENTS, WRITE_EVENTS, Forked, Watches, nobody
from pyvmm.light import Lock, Thread, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable

    Callback = Callable[[], object]
    Ready = list[tuple[int, int]]

CANT_WAIT = "a queue's thread can't wait for itself: ask for the pause by Machine.pause()"


class Ends:
    """A thread's own descriptors. The thread has them too, and closes them where nobody else is there to do so."""

    __slots__ = ("dropped", "epoll", "lock", "wake_fd")

    def __init__(self) -> None:
        self.lock = Lock()  # the thread may close them while whoever drops it wakes it
        self.dropped = False  # nobody refers to the IoThread any more
        self.wake_fd = -1
        try:
            self.wake_fd = posix.eventfd(0, posix.EFD_CLOEXEC | posix.EFD_NONBLOCK)
            self.epoll = select.epoll()
            self.epoll.register(self.wake_fd, select.EPOLLIN | select.EPOLLET)
        except OSError as error:
            if self.wake_fd >= 0:
                posix.close(self.wake_fd)
            if error.errno in HOST_LIMITS:
                raise HostError(remedy(error, "")) from None
            raise

    def wake(self) -> None:
        """End the thread's sleep; nothing where they are closed."""
        with self.lock:
            if self.wake_fd >= 0:
                posix.eventfd_write(self.wake_fd, 1)

    def close(self) -> None:
        with self.lock:
            self.abandon()

    def abandon(self) -> None:
        """In a child of fork: the same, without the lock."""
        fd, self.wake_fd = self.wake_fd, -1
        if fd >= 0:
            self.epoll.close()
            posix.close(fd)


class IoThread(Watches):
    """Every method may be called from any thread. A callback may be called once too often, with nothing to do.

    ``on_error(exc)`` is called on the thread with whatever a callback raised; the descriptor it was called for is no
    longer watched then. A new one is paused.
    """

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        super().__init__()
        self._on_error = on_error
        self._watched: set[int] = set()  # what epoll knows
        self._calls: deque[Callback] = deque()
        self._pausing = Lock()  # one pause or resume at a time
        self._pauses = 1
        # Held by the thread while it calls, and by whoever has paused it.
        self._gate = Lock()
        self._gate.acquire()
        self._closed = False
        self._thread: Thread | None = None
        self._ends = Ends()

    def call_soon(self, callback: Callback) -> None:
        """Call ``callback`` once on the thread, in the order of asking; dropped after ``close``."""
        with self._lock:
            if not self._closed:
                self._calls.append(callback)
                self._ends.wake()

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller is one of its callbacks."""
        return self._thread is not None and self._thread.is_current

    # -- pause -------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Return when no callback runs; none will before as many calls of ``resume``. StateError in a callback.

        The caller holds no lock that a callback may want.
        """
        if self.on_own_thread:
            raise StateError(CANT_WAIT)
        with self._pausing:
            if not self._pauses:
                self._gate.acquire()
            self._pauses += 1

    def resume(self) -> None:
        """Go on, after as many calls as there were of ``pause``."""
        with self._pausing:
            if self._closed:
                return
            if self._pauses == 1:
                self._start()
                self._gate.release()
            self._pauses -= 1

    def _start(self) -> None:
        """The thread, the first time: it waits at the gate."""
        if self._thread is None:
            me, ends, gate = ref(self), self._ends, self._gate
            thread = Thread(lambda: main(me, ends, gate))
            thread.start()
            self._thread = thread

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """No callback starts after the return, the thread has ended. What was watched stays open. Idempotent."""
        with self._pausing:
            if self._closed:
                return
            with self._lock:
                self._closed = True
                self._calls.clear()
                self._ends.wake()
            if self._pauses:
                self._gate.release()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._ends.close()
        self._readers.clear()  # and with them whom they call
        self._writers.clear()
        self._on_error = nobody

    def abandon(self) -> None:
        """In a child of fork, which has no such thread: close the descriptors. Takes no lock."""
        self._closed = True
        self._ends.abandon()

    def __del__(self) -> None:
        # The thread is to end, and to close its descriptors. A weak reference still gives the object while this runs:
        # so there is a word for it.
        if self._closed:
            return
        self._ends.dropped = True
        if self._thread is None:
            self._ends.close()
            return
        if self._pauses:
            self._gate.release()
        self._ends.wake()

    # -- the thread --------------------------------------------------------------------------------------------

    def _watch_locked(self, fd: int) -> None:
        """Tell epoll what the tables say about ``fd``."""
        events = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        if self._closed:
            return
        try:
            if not events:
                self._watched.discard(fd)
                self._ends.epoll.unregister(fd)
                return
            if fd in self._edge:
                events |= select.EPOLLET
            if fd in self._watched:
                try:
                    self._ends.epoll.modify(fd, events)
                    return
                except FileNotFoundError:  # closed without a word, and its number used again
                    pass
            self._ends.epoll.register(fd, events)
            self._watched.add(fd)
        except OSError:
            self._watched.discard(fd)
            if events:
                self._edge.discard(fd)
                self._readers.pop(fd, None)
                self._writers.pop(fd, None)
                raise
            # One that was closed already: the kernel has forgotten it by itself.

    def turn(self, ready: Ready) -> bool:
        """On the thread, which holds the gate: call for what is ready. False: it is closed."""
        Thread.follow_threading()
        for fd, mask in ready:
            reader = self._readers.get(fd) if mask & READ_EVENTS else None
            if reader is not None:
                self._call(reader, self._readers, fd)
            if self._writers and mask & WRITE_EVENTS:
                writer = self._writers.get(fd)
                if writer is not None:
                    self._call(writer, self._writers, fd)
        # As many as there are now: one that calls itself again must not starve the descriptors.
        for _ in range(len(self._calls)):
            try:
                callback = self._calls.popleft()
            except IndexError:  # closed meanwhile
                break
            self._call(callback, None, -1)
        return not self._closed

    def _call(self, callback: Callback, table: dict[int, Callback] | None, fd: int) -> None:
        if self._closed:
            return
        pid = posix.getpid()
        try:
            callback()
        except BaseException as error:
            if posix.getpid() != pid:
                raise Forked from error
            if table is not None:
                with self._lock:
                    if table.get(fd) is callback:
                        self._remove_locked(table, fd)
            self._on_error(error)
        else:
            if posix.getpid() != pid:
                raise Forked


def main(me: ref[IoThread], ends: Ends, gate: LockType) -> None:
    """While it sleeps, and while it is paused, it holds on to its descriptors and its gate alone: whoever is dropped
    without close() is freed, and ends it so.
    """
    ready: Ready = []
    epoll = ends.epoll
    try:
        while True:
            with gate:
                thread = None if ends.dropped else me()
                if thread is None:
                    ends.close()
                    return
                if not thread.turn(ready):
                    return
                thread = None
            ready = epoll.poll()
    except Forked as forked:
        forked.tell()  # and end, with the process: what is ready is its parent's to find


class IoThreads:
    """Those of one machine: one that all devices share, and one for each that wants its own. They stand together.

    ``pause`` and ``resume`` are counted; as a new IoThread, a new one of these is paused.
    """

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error
        self._lock = Lock()
        self._threads: list[IoThread] = []
        self._shared: IoThread | None = None
        self._pauses = 1

    @property
    def shared(self) -> IoThread:
        """Whoever has no thread of its own is served by this one."""
        if self._shared is None:
            self._shared = self.make()
        return self._shared

    def make(self) -> IoThread:
        """One more."""
        thread = IoThread(self._on_error)
        with self._lock:
            self._threads.append(thread)
            if not self._pauses:
                thread.resume()
        return thread

    @property
    def used(self) -> bool:
        """Whether anybody wanted one."""
        return bool(self._threads)

    @property
    def inside(self) -> bool:
        """Whether the caller is a callback of one of them."""
        return bool(self._threads) and any(thread.on_own_thread for thread in self._threads)

    def pause(self) -> None:
        """As IoThread.pause, of all: StateError in a callback of any."""
        if self.inside:  # before the lock: whoever has it may wait for this very callback
            raise StateError(CANT_WAIT)
        with self._lock:
            for thread in self._threads if not self._pauses else ():
                thread.pause()
            self._pauses += 1

    def resume(self) -> None:
        """As IoThread.resume. ThreadError where the host has no room for one of them; all are paused then."""
        with self._lock:
            resumed: list[IoThread] = []
            try:
                for thread in self._threads if self._pauses == 1 else ():
                    thread.resume()
                    resumed.append(thread)
            except BaseException:
                for thread in resumed:
                    thread.pause()
                raise
            self._pauses -= 1

    @property
    def paused(self) -> Held:
        """``with threads.paused:`` nothing is served."""
        return Held(self.pause, self.resume)

    def close(self) -> None:
        """No callback starts after the return, and the threads have ended."""
        for thread in self._threads:
            thread.close()
        self._on_error = nobody

    def abandon(self) -> None:
        """In a child of fork."""
        for thread in self._threads:
            thread.abandon()
