"""Guest time and timers: the contract a device sees, the queue of armed timers, and a clock moved by hand.

Guest time is in nanoseconds from the machine's start and stands still while the machine is paused. The clock
of a running machine is in event_loop.py.
"""

from __future__ import annotations

import time
from _heapq import heapify, heappop, heappush

from pyvmm.errors import KindError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable


class Clock:
    """What a device may ask of time."""

    __slots__ = ("__weakref__",)

    def now_ns(self) -> int:
        """Guest time, in nanoseconds. It never goes back and stops while the machine is paused."""
        raise NotImplementedError

    def wall_ns(self) -> int:
        """The host's wall clock, in nanoseconds since the UNIX epoch (UTC)."""
        return time.time_ns()

    def in_the_past(self, now_ns: int, work: Callable[[], object]) -> None:
        """``work()``, for which it is ``now_ns``, and for nobody else."""
        raise NotImplementedError

    def set_time(self, now_ns: int) -> None:
        """Guest time, which stands, is ``now_ns`` from now on: for a machine that goes on from a saved state.

        Armed timers keep the time they had left.
        """
        raise NotImplementedError

    STATE_VERSION = 1

    def save(self) -> dict[str, int]:
        """Guest time, and what the wall clock said then (state.pyx has the contract)."""
        return {"now_ns": self.now_ns(), "wall_ns": self.wall_ns()}

    def load(self, state: dict[str, int]) -> None:
        """Guest time goes on from there: all other times of a state count from it. The wall clock is the host's."""
        now_ns, _wall_ns = checked_times(state)
        self.set_time(now_ns)

    def after_load(self) -> None:
        """Nothing is left to do."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A disarmed timer. Each time it expires ``callback`` is called: no arguments, no lock held."""
        raise NotImplementedError


class Timer:
    """A one-shot alarm on a clock; arm it again for the next time. Any thread may arm and disarm.

    ``disarm`` does not wait for a callback that has begun: a callback takes its device's lock and then looks
    whether there is still something to do.
    """

    __slots__ = ("_callback", "_entry", "_noted_ns", "_queue", "deadline_ns")

    def __init__(self, queue: TimerQueue, callback: Callable[[], None]) -> None:
        if not callable(callback):
            raise KindError(f"a timer with {callback!r}: give a function without arguments")
        self._queue = queue
        self._callback = callback
        self._entry = 0  # number of its valid entry in the queue's heap, 0 while disarmed
        self._noted_ns: int | None = None
        self.deadline_ns = 0
        """Guest time it was last armed for; it keeps the value after the timer expired."""

    @property
    def armed(self) -> bool:
        """True from ``arm`` until the callback is about to run."""
        return self._entry != 0

    def arm(self, deadline_ns: int) -> None:
        """Expire at ``deadline_ns`` of guest time, at once where that is past. A former deadline is void."""
        if not isinstance(deadline_ns, int):
            raise KindError(f"a timer armed for {deadline_ns!r}: give guest time in whole nanoseconds")
        self._queue.arm(self, deadline_ns)

    def disarm(self) -> None:
        self._queue.disarm(self)

    def note(self, deadline_ns: int | None) -> None:
        """What a saved state says of it, None for disarmed; ``go_on`` makes it so."""
        self._noted_ns = deadline_ns

    def go_on(self) -> None:
        """Be armed or disarmed as noted."""
        if self._noted_ns is None:
            self._queue.disarm(self)
        else:
            self._queue.arm(self, self._noted_ns)

    def __repr__(self) -> str:
        return f"<Timer {f'due at {self.deadline_ns} ns' if self._entry else 'disarmed'}>"


class TimerQueue:
    """The armed timers of one clock, earliest first, those with equal deadlines in the order of arming.

    The heap holds (deadline, entry number, timer). Arming a timer again leaves its old entry in the heap,
    told by its number; when most of the heap is such leftovers it is built anew.
    """

    __slots__ = ("_count", "_heap", "_last_entry", "_on_earliest", "lock")

    def __init__(self, lock: LockType | None = None, on_earliest: Callable[[], None] | None = None) -> None:
        """``on_earliest`` is called, under ``lock``, when a timer became the earliest one."""
        self.lock = lock or Lock()
        self._heap: list[tuple[int, int, Timer]] = []
        self._last_entry = 0
        self._count = 0
        self._on_earliest = on_earliest

    def let_go(self) -> None:
        """They expire no more, and nobody is told of the earliest."""
        self._on_earliest = None
        self._heap.clear()

    def __len__(self) -> int:
        """How many timers are armed."""
        return self._count

    def arm(self, timer: Timer, deadline_ns: int) -> None:
        with self.lock:
            if not timer._entry:
                self._count += 1
            self._last_entry += 1
            timer._entry = self._last_entry
            timer.deadline_ns = deadline_ns
            heap = self._heap
            if len(heap) > 2 * self._count + 16:
                self._heap = heap = [entry for entry in heap if entry[2]._entry == entry[1]]
                heapify(heap)
            heappush(heap, (deadline_ns, timer._entry, timer))
            if heap[0][2] is timer and self._on_earliest is not None:
                self._on_earliest()

    def disarm(self, timer: Timer) -> None:
        with self.lock:
            if timer._entry:
                timer._entry = 0
                self._count -= 1

    def shift(self, ns: int) -> None:
        """Every armed timer is due ``ns`` later. The caller holds ``lock``."""
        for _deadline_ns, number, timer in self._heap:
            if timer._entry == number:
                timer.deadline_ns += ns
        # All by the same: the heap's order stays.
        self._heap = [(deadline_ns + ns, number, timer) for deadline_ns, number, timer in self._heap]

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline, None without an armed timer. The caller holds ``lock``."""
        heap = self._heap
        while heap and heap[0][2]._entry != heap[0][1]:
            heappop(heap)
        return heap[0][0] if heap else None

    def pop_due(self, now_ns: int) -> Callable[[], None] | None:
        """Disarm the earliest timer that is due and give its callback. The caller holds ``lock``."""
        deadline_ns = self.next_deadline_ns()
        if deadline_ns is None or deadline_ns > now_ns:
            return None
        timer = heappop(self._heap)[2]
        timer._entry = 0
        self._count -= 1
        return timer._callback


class VirtualClock(Clock):
    """A clock that stands still until ``step`` moves it: for tests and for machines driven from outside."""

    __slots__ = ("_now_ns", "_queue", "_wall_at_zero_ns")

    def __init__(self, now_ns: int = 0, wall_ns: int = 0) -> None:
        """``wall_ns`` is what the wall clock says now; it moves with the clock."""
        self._now_ns = now_ns
        self._wall_at_zero_ns = wall_ns - now_ns
        self._queue = TimerQueue()

    def now_ns(self) -> int:
        return self._now_ns

    def wall_ns(self) -> int:
        return self._wall_at_zero_ns + self._now_ns

    def set_time(self, now_ns: int, wall_ns: int | None = None) -> None:
        """``wall_ns``: what the wall clock says then; it stays as it is without."""
        wall_ns = self.wall_ns() if wall_ns is None else wall_ns
        with self._queue.lock:
            self._queue.shift(now_ns - self._now_ns)
            self._now_ns = now_ns
            self._wall_at_zero_ns = wall_ns - now_ns

    def timer(self, callback: Callable[[], None]) -> Timer:
        return Timer(self._queue, callback)

    @property
    def next_deadline_ns(self) -> int | None:
        """Guest time of the next timer to expire, None without one."""
        with self._queue.lock:
            return self._queue.next_deadline_ns()

    def step(self, ns: int) -> None:
        """Move on by ``ns`` nanoseconds. Timers due on the way run in order, each at its own deadline's time, on this
        thread, and may arm further ones. What a callback raises comes out here, with the clock at that callback's time.
        """
        if ns < 0:
            raise ValueError("time does not go back")
        target_ns = self._now_ns + ns
        while True:
            with self._queue.lock:
                deadline_ns = self._queue.next_deadline_ns()
                callback = self._queue.pop_due(target_ns)
                if callback is None or deadline_ns is None:
                    break
                self._now_ns = max(self._now_ns, deadline_ns)
            callback()
        self._now_ns = target_ns

    def load(self, state: dict[str, int]) -> None:
        """The wall clock goes on from there too: it moves with this clock only."""
        now_ns, wall_ns = checked_times(state)
        self.set_time(now_ns, wall_ns)


def checked_times(state: dict[str, int]) -> tuple[int, int]:
    """Guest time and wall clock of a saved state. StateError where it is none."""
    from pyvmm.state import once

    times: tuple[int, int] = once(state, None, lambda: look_at_times(state))
    return times


def look_at_times(state: dict[str, int]) -> tuple[int, int]:
    from pyvmm.state import TIMES_NS, check_names, checked_number

    check_names(state, ("now_ns", "wall_ns"))
    # Guest time begins at 0, and has to leave room for timers.
    now_ns = checked_number(state["now_ns"], range(TIMES_NS.stop), "now_ns")
    return now_ns, checked_number(state["wall_ns"], TIMES_NS, "wall_ns")
