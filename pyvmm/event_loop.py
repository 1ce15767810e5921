"""The main loop of one machine: readiness of descriptors, timers in guest time, calls from other threads.

One daemon thread runs all callbacks, one after the other, with no lock held. It is started by the first descriptor,
timer or call: a machine whose devices need none of them has no thread and no descriptor here.

Each turn goes: sleep in epoll_wait until something is ready or the next timer is due, run the callbacks of ready
descriptors, then the calls, then the due timers. Other threads end the sleep through an eventfd, and only if the loop
sleeps too long for what they bring.
"""

from __future__ import annotations

import posix
import select
import time
from _weakref import ref
from time import monotonic_ns

from pyvmm.clock import Clock, Timer, TimerQueue
from pyvmm.errors import HOST_LIMITS, HostError, StateError, remedy
from pyvmm.light import Condition, Lock, Thread, deque, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable

NS_PER_MS = 1_000_000
CLOSED = -1  # instead of a time to sleep
LONGEST_SLEEP_MS = 86_400_000  # epoll_wait takes an int of milliseconds
READ_EVENTS = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
WRITE_EVENTS = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
HANG_UP_EVENTS = select.EPOLLHUP | select.EPOLLERR


class LoopClock(Clock):
    """Guest time of a machine, from 0: the host's monotonic clock less the time the machine was paused."""

    __slots__ = ("_loop", "_offset_ns", "_past", "_stopped_at_ns", "_timers")

    def __init__(self, loop: EventLoop, *, stands: bool) -> None:
        self._loop = ref(loop)  # which refers to this; where it is gone the machine is, and time stands
        self._timers = loop._timers
        self._past: tuple[int, int] | None = None  # a thread, and what time it is for that
        self._offset_ns = monotonic_ns()
        self._stopped_at_ns: int | None = 0 if stands else None

    def now_ns(self) -> int:
        past = self._past
        if past is not None and past[0] == get_ident():
            return past[1]
        stopped_at_ns = self._stopped_at_ns
        return monotonic_ns() - self._offset_ns if stopped_at_ns is None else stopped_at_ns

    def in_the_past(self, now_ns: int, work: Callable[[], object]) -> None:
        """``work()``, for which it is ``now_ns``; for other threads it is as ever. One at a time: for devices that are
        made later than they were to be (Board.install_late).
        """
        self._past = get_ident(), now_ns
        try:
            work()
        finally:
            self._past = None

    def timer(self, callback: Callable[[], None]) -> Timer:
        return Timer(self._timers, callback)

    @property
    def running(self) -> bool:
        return self._stopped_at_ns is None

    def stop(self) -> None:
        """Stop guest time. No timer callback runs after the return, until ``resume``; armed timers stay armed.

        It waits for a timer callback that is under way (unless called from the loop's own thread), so the caller must
        not hold a device's lock.
        """
        if (loop := self._loop()) is None:
            return
        with loop._lock:
            if self._stopped_at_ns is None:
                self._stopped_at_ns = self.now_ns()
            while loop._in_timer and not loop.on_loop_thread():
                loop._timer_done.wait()

    def in_callback(self) -> bool:
        """Whether the caller is the callback of a timer."""
        loop = self._loop()
        return loop is not None and loop._in_timer and loop.on_loop_thread()

    def set_time(self, now_ns: int) -> None:
        """StateError while guest time runs."""
        if (loop := self._loop()) is None:
            return
        with loop._lock:
            if self._stopped_at_ns is None:
                raise StateError("guest time runs: pause() the machine first")
            loop._timers.shift(now_ns - self._stopped_at_ns)
            self._stopped_at_ns = now_ns

    def resume(self) -> None:
        """Let guest time go on from where it stopped: armed timers keep the time they had left."""
        if (loop := self._loop()) is None:
            return
        with loop._lock:
            if self._stopped_at_ns is not None:
                # The offset first: a reader without the lock sees the stopped time until both are right.
                self._offset_ns = monotonic_ns() - self._stopped_at_ns
                self._stopped_at_ns = None
                loop._wake_locked()


class Ends:
    """A loop's own descriptors. The thread has them too, and closes them as it ends, under the loop's lock."""

    __slots__ = ("epoll", "wake_fd")

    def __init__(self) -> None:
        self.epoll: select.epoll | None = None
        self.wake_fd = -1

    def close(self) -> None:
        if self.epoll is not None:
            self.epoll.close()
            posix.close(self.wake_fd)
            self.epoll, self.wake_fd = None, -1


class Watches:
    """Which descriptors are watched, and who is called for each: what EventLoop and IoThread (io_thread.py) both are.
    Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._readers: dict[int, Callable[[], object]] = {}
        self._writers: dict[int, Callable[[], object]] = {}
        self._edge: set[int] = set()  # descriptors watched edge-triggered

    def add_reader(self, fd: int, callback: Callable[[], object], *, edge: bool = False) -> None:
        """Call ``callback`` while ``fd`` is readable, at its end or in error; it takes the place of a former one.

        ``edge``: only when readiness changes (EPOLLET), and once after each call of ``add_reader``. A callback may find
        nothing to read: the readiness it was called for may be gone. OSError where the descriptor is no good.
        """
        with self._lock:
            self._start_locked()
            (self._edge.add if edge else self._edge.discard)(fd)
            self._readers[fd] = callback
            self._watch_locked(fd)

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` while ``fd`` takes output or is in error; it takes the place of a former one."""
        with self._lock:
            self._start_locked()
            self._writers[fd] = callback
            self._watch_locked(fd)

    def remove_reader(self, fd: int) -> bool:
        """Whether there was one. A callback that began before may still be running on return."""
        with self._lock:
            self._edge.discard(fd)
            return self._remove_locked(self._readers, fd)

    def remove_writer(self, fd: int) -> bool:
        """As ``remove_reader``."""
        with self._lock:
            return self._remove_locked(self._writers, fd)

    def _remove_locked(self, table: dict[int, Callable[[], object]], fd: int) -> bool:
        if table.pop(fd, None) is None:
            return False
        self._watch_locked(fd)
        return True

    def _start_locked(self) -> None:
        """Something is about to be watched."""

    def _watch_locked(self, fd: int) -> None:
        """Tell epoll what the tables now say about ``fd``; nothing where there is none any more."""
        raise NotImplementedError


class Forked(BaseException):
    """A callback has forked, and this is the child: it has this thread only, and the loop is its parent's."""

    def tell(self) -> None:
        """Print what the callback has raised, if it has. No lock is taken, and nothing is closed: the process ends with
        this, its only thread.
        """
        if self.__cause__ is not None:
            import traceback

            traceback.print_exception(self.__cause__)


class EventLoop(Watches):
    """Runs callbacks for one machine on one thread. Every method may be called from any thread.

    ``on_error(exc)`` is called on the loop's thread with whatever a callback raised. A descriptor whose callback raised
    is no longer watched: it would be ready, and its callback raise, for ever.
    """

    def __init__(self, on_error: Callable[[BaseException], None], *, stands: bool = False) -> None:
        """``stands``: its time has not begun, and does with ``clock.resume``."""
        super().__init__()
        self._on_error = on_error
        self._timer_done = Condition(self._lock)
        self._in_timer = False
        self._timers = TimerQueue(self._lock, self._on_earliest_timer)
        self._calls: deque[Callable[[], None]] = deque()
        self._hang_ups: dict[int, Callable[[], object]] = {}
        self._watched: dict[int, int] = {}  # what epoll was told: descriptor -> events
        self._always_ready: set[int] = set()  # descriptors epoll refuses: regular files
        self._gone: set[int] = set()  # no longer watched, but perhaps in the batch under way
        self._ends = Ends()
        self._events: list[tuple[int, int]] = []  # what the last sleep has brought: descriptor, events
        self._thread: Thread | None = None
        self._asleep = False  # the thread sleeps, and nobody has woken it yet
        self._sleeps_until_ns: int | None = None  # guest time; None: no timer ends this sleep
        self._closed = False
        self.clock = LoopClock(self, stands=stands)

    # -- registration ---------------------------------------------------------------------------------------

    def add_hang_up(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, when nobody is at the other end of ``fd`` any more: a pipe without its reader, a
        terminal that was closed. Never for what has no other end: files.
        """
        with self._lock:
            self._start_locked()
            self._hang_ups[fd] = callback
            self._watch_locked(fd)

    def remove_hang_up(self, fd: int) -> bool:
        """As ``remove_reader``."""
        with self._lock:
            return self._remove_locked(self._hang_ups, fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once on the loop's thread, in the order of asking; dropped after ``close``."""
        with self._lock:
            if not self._closed:
                self._start_locked()
                self._calls.append(callback)
                self._wake_locked()

    def alive(self) -> bool:
        """Whether its thread has begun, and not ended."""
        return self._thread is not None and self._thread.ident != 0

    @property
    def used(self) -> bool:
        """Whether anything was ever to be done here: a timer, a descriptor, a call."""
        return self._thread is not None

    def on_loop_thread(self) -> bool:
        """Whether the caller is one of the loop's callbacks."""
        return self._thread is not None and self._thread.is_current

    def close(self) -> None:
        """Stop: no callback starts after the return, the thread has ended, its descriptors are closed.

        From inside a callback it does not wait: all that holds once that callback has returned. Calling it
        again is fine. Descriptors that were registered stay open: they belong to whoever registered them.
        """
        with self._lock:
            self._closed = True
            self._calls.clear()
            self._wake_locked()
            thread = self._thread
        if thread is not None:
            thread.join()

    def let_go(self) -> None:
        """It is closed, and calls nobody: nor does it hold on to anybody."""
        self._timers.let_go()
        self._on_error = nobody

    def abandon(self) -> None:
        """In a child of fork, which has no such thread: close the descriptors. Takes no lock."""
        self._closed = True
        self._ends.close()

    def __del__(self) -> None:
        # The thread finds nothing but its descriptors, and closes them.
        with self._lock:
            if self._ends.epoll is not None:
                posix.eventfd_write(self._ends.wake_fd, 1)

    # -- under the lock -------------------------------------------------------------------------------------

    def _start_locked(self) -> None:
        """Make the thread and its two descriptors, unless they are there."""
        if self._closed:
            raise StateError("the event loop is closed")
        if self._thread is None:
            me, lock, ends = ref(self), self._lock, self._ends
            wake_fd = -1
            try:
                wake_fd = posix.eventfd(0, posix.EFD_CLOEXEC | posix.EFD_NONBLOCK)
                epoll = select.epoll()
            except OSError as error:
                if wake_fd >= 0:
                    posix.close(wake_fd)
                if error.errno in HOST_LIMITS:
                    raise HostError(remedy(error, "")) from None
                raise
            ends.epoll, ends.wake_fd = epoll, wake_fd
            try:
                epoll.register(wake_fd, select.EPOLLIN)
                self._thread = Thread(lambda: main(me, lock, ends, epoll))
                self._thread.start()
            except BaseException:
                self._thread = None
                ends.close()
                raise

    def _wake_locked(self) -> None:
        if self._asleep and self._ends.epoll is not None:
            self._asleep = False
            posix.eventfd_write(self._ends.wake_fd, 1)

    def _on_earliest_timer(self) -> None:
        if self._closed:
            return  # a vCPU on its way out may still arm timers: they never expire
        self._start_locked()
        deadline_ns = self._timers.next_deadline_ns()
        until_ns = self._sleeps_until_ns
        if until_ns is None or (deadline_ns is not None and deadline_ns < until_ns):
            self._wake_locked()

    def _watch_locked(self, fd: int) -> None:
        """Tell epoll what the tables now say about ``fd``."""
        epoll = self._ends.epoll
        if epoll is None:
            return
        events = select.EPOLLIN if fd in self._readers else 0
        events |= select.EPOLLOUT if fd in self._writers else 0
        if events and fd in self._edge:
            events |= select.EPOLLET
        wanted = events or fd in self._hang_ups  # epoll reports those without being asked
        try:
            if fd in self._always_ready:
                if not events:
                    self._always_ready.discard(fd)
            elif not wanted:
                if self._watched.pop(fd, None) is not None:
                    self._gone.add(fd)
                    epoll.unregister(fd)
            elif fd in self._watched:
                try:
                    epoll.modify(fd, events)
                except FileNotFoundError:  # closed without a word, and its number used again
                    epoll.register(fd, events)
                self._watched[fd] = events
            else:
                epoll.register(fd, events)
                self._watched[fd] = events
        except PermissionError:  # a regular file: always ready
            if events:
                self._always_ready.add(fd)
                self._wake_locked()
        except OSError:
            self._watched.pop(fd, None)
            if wanted:
                self._hang_ups.pop(fd, None)
                self._readers.pop(fd, None)
                self._writers.pop(fd, None)
                self._edge.discard(fd)
                raise
            # Taking out one that was closed already is no error: the kernel has forgotten it by itself.

    # -- the thread -----------------------------------------------------------------------------------------

    def _turn(self, epoll: select.epoll) -> int | None:
        """Run the callbacks for what the last sleep has brought. How long to sleep next, in nanoseconds; None: until
        woken; or CLOSED.
        """
        Thread.follow_threading()
        events, self._events = self._events, []
        with self._lock:
            self._asleep = False
            self._sleeps_until_ns = None
            events += [(fd, select.EPOLLIN | select.EPOLLOUT) for fd in self._always_ready]
        for fd, mask in events:
            self._on_ready(epoll, fd, mask)
        for _ in range(len(self._calls)):
            try:
                callback = self._calls.popleft()
            except IndexError:  # closed meanwhile
                break
            self._call(callback)
            del callback
        # As many as there are now: one that arms itself for the past must not starve the descriptors.
        for _ in range(len(self._timers)):
            if not self._run_due_timer():
                break
        with self._lock:
            if self._closed:
                return CLOSED
            self._gone.clear()
            sleep_ns = self._sleep_ns_locked()
            self._asleep = True
            return sleep_ns

    def _over(self) -> None:
        """The thread ends."""
        with self._lock:
            self._closed = True
            self._asleep = False
            for table in (self._readers, self._writers, self._hang_ups, self._watched):
                table.clear()
            self._always_ready.clear()
            self._ends.close()

    def _sleep_ns_locked(self) -> int | None:
        """How long there is nothing to do, in nanoseconds; None: until woken."""
        if self._calls or self._always_ready:
            return 0
        deadline_ns = self._timers.next_deadline_ns() if self.clock.running else None
        self._sleeps_until_ns = deadline_ns
        return None if deadline_ns is None else max(0, deadline_ns - self.clock.now_ns())

    def _on_ready(self, epoll: select.epoll, fd: int, mask: int) -> None:
        if fd == self._ends.wake_fd:
            posix.eventfd_read(fd)
            return
        with self._lock:
            if self._closed:
                return
            if fd in self._gone:
                # The event may be of the descriptor that had this number before. Ask again for the present one.
                if fd in self._watched:
                    epoll.modify(fd, self._watched[fd])
                return
            reader = self._readers.get(fd) if mask & READ_EVENTS else None
            writer = self._writers.get(fd) if mask & WRITE_EVENTS else None
            hang_up = self._hang_ups.get(fd) if mask & HANG_UP_EVENTS else None
            if hang_up is not None:
                self._remove_locked(self._hang_ups, fd)
        if hang_up is not None:
            self._call(hang_up)
        for table, callback in ((self._readers, reader), (self._writers, writer)):
            if callback is not None and not self._call(callback):
                with self._lock:
                    if table.get(fd) is callback:
                        self._remove_locked(table, fd)

    def _run_due_timer(self) -> bool:
        with self._lock:
            if self._closed or not self.clock.running:
                return False
            callback = self._timers.pop_due(self.clock.now_ns())
            if callback is None:
                return False
            self._in_timer = True
        self._call(callback)
        with self._lock:
            self._in_timer = False
            self._timer_done.notify_all()
        return True

    def _call(self, callback: Callable[[], object]) -> bool:
        """Whether it returned. What it raised goes to on_error; what that raises, to threading.excepthook."""
        if self._closed:
            return True
        pid = posix.getpid()
        try:
            callback()
            if posix.getpid() != pid:
                raise Forked
            return True
        except BaseException as exc:
            if posix.getpid() != pid:
                raise Forked from (None if isinstance(exc, Forked) else exc)
            try:
                self._on_error(exc)
            except BaseException as worse:
                try:
                    import threading
                except (OSError, ImportError, MemoryError):  # no descriptor is left, say: the loop must go on
                    return False
                current = threading.current_thread()
                threading.excepthook(threading.ExceptHookArgs((type(worse), worse, worse.__traceback__, current)))
            return False


def main(me: ref[EventLoop], lock: LockType, ends: Ends, epoll: select.epoll) -> None:
    """The loop's thread. While it sleeps it holds on to nothing but its two descriptors: a loop that nobody else refers
    to can then be freed, and wakes the thread as it goes.
    """
    events: list[tuple[int, int]] = []
    try:
        while (loop := me()) is not None:
            loop._events, events = events, []
            sleep_ns = loop._turn(epoll)
            loop = None
            if sleep_ns == CLOSED:
                break
            events = wait(epoll, sleep_ns)
    except Forked as forked:
        forked.tell()
        return
    except BaseException:
        over(me, lock, ends)
        raise
    over(me, lock, ends)


def nobody(error: BaseException) -> None:
    """In place of on_error, when all is over."""


def over(me: ref[EventLoop], lock: LockType, ends: Ends) -> None:
    """The thread ends."""
    if (loop := me()) is not None:
        loop._over()
    else:
        with lock:
            ends.close()


def wait(epoll: select.epoll, sleep_ns: int | None) -> list[tuple[int, int]]:
    """epoll_wait for at most ``sleep_ns`` (None: for ever), perhaps less.

    epoll_wait counts milliseconds, too coarse for a serial line or a 1024 Hz clock: whole ones are slept
    there, and in a next call the rest outside, where a descriptor has to wait for less than a millisecond.
    """
    if sleep_ns is None:
        return epoll.poll()
    sleep_ms = min(sleep_ns // NS_PER_MS, LONGEST_SLEEP_MS)
    if sleep_ms:
        return epoll.poll((sleep_ms - 0.5) / 1000)  # it rounds up
    if sleep_ns:
        time.sleep(sleep_ns / 1e9)
    return epoll.poll(0)
