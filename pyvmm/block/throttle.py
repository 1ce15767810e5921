"""Bytes and operations a second: leaky buckets, as in QEMU.

A bucket fills by what is transferred and leaks at the rate allowed. A request goes through while no bucket it
concerns is over its brim; then it is counted, whole. So a large one is never cut: those after it wait longer. The
brim is what may come at once: a tenth of a second's worth, or, where a burst rate is given, a whole second of that.
Reads and writes wait in a queue each, in order, on a timer of guest time.
"""

from __future__ import annotations

from errno import ECANCELED

from pyvmm.block.coroutine import Waiter
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.coroutine import AioContext
    from pyvmm.block.options import DriveOptions
    from pyvmm.clock import Clock

NS_PER_S = 1_000_000_000
BRIM_PER_RATE = 10  # 1/10 s


class Bucket:
    """``rate`` a second lasting, ``brim`` at once. The level is in units times nanoseconds: whole numbers."""

    __slots__ = ("_brim", "_level", "_rate")

    def __init__(self, rate: int, maximum: int) -> None:
        self._rate = rate
        self._brim = maximum * NS_PER_S if maximum else rate * NS_PER_S // BRIM_PER_RATE
        self._level = 0

    def leak(self, ns: int) -> None:
        self._level = max(0, self._level - ns * self._rate)

    def wait_ns(self) -> int:
        """How long until there is room."""
        return -(-max(0, self._level - self._brim) // self._rate)

    def add(self, units: int) -> None:
        self._level += units * NS_PER_S


class ThrottledWaiter(Waiter):
    """A request that waits for the throttle."""

    __slots__ = ("_throttle", "length", "write")

    def __init__(self, throttle: Throttle, write: bool, length: int) -> None:
        super().__init__()
        self._throttle = throttle
        self.write = write
        self.length = length

    def cancel(self) -> None:
        self._throttle.cancel(self)


class Throttle:
    """The limits of one drive. Its state is under the context's lock."""

    def __init__(self, options: DriveOptions, clock: Clock, context: AioContext) -> None:
        self._clock = clock
        self._context = context
        self._lock = context.lock
        # For reads and for writes: (bucket, whether it counts bytes) of each limit that concerns them.
        self._buckets: tuple[list[tuple[Bucket, bool]], list[tuple[Bucket, bool]]] = ([], [])
        self._all: list[Bucket] = []
        for unit in ("bps", "iops"):
            for what, directions in (("", (0, 1)), ("_read", (0,)), ("_write", (1,))):
                rate = getattr(options, f"throttle_{unit}{what}")
                if rate:
                    bucket = Bucket(rate, getattr(options, f"throttle_{unit}{what}_max"))
                    self._all.append(bucket)
                    for direction in directions:
                        self._buckets[direction].append((bucket, unit == "bps"))
        self._queues: tuple[deque[ThrottledWaiter], deque[ThrottledWaiter]] = (deque(), deque())
        self._last_ns = clock.now_ns()
        self._open = 0
        self._timers = tuple(
            clock.timer(lambda direction=direction: self._on_timer(direction))  # type: ignore[misc]
            for direction in (0, 1)
        )

    def admit(self, write: bool, length: int) -> ThrottledWaiter | None:
        """None: go on. Else await what this returns: 0, or -ECANCELED."""
        with self._lock:
            if self._open or not self._buckets[write]:
                return None
            wait_ns = self._wait_ns_locked(write)
            if not self._queues[write] and not wait_ns:
                self._count_locked(write, length)
                return None
            waiter = ThrottledWaiter(self, write, length)
            self._queues[write].append(waiter)
            if len(self._queues[write]) == 1:
                self._timers[write].arm(self._clock.now_ns() + wait_ns)
        return waiter

    def _wait_ns_locked(self, direction: int) -> int:
        now_ns = self._clock.now_ns()
        for bucket in self._all:
            bucket.leak(now_ns - self._last_ns)
        self._last_ns = now_ns
        return max(bucket.wait_ns() for bucket, _ in self._buckets[direction])

    def _count_locked(self, direction: int, length: int) -> None:
        for bucket, bytewise in self._buckets[direction]:
            bucket.add(length if bytewise else 1)

    def _on_timer(self, direction: int) -> None:
        queue = self._queues[direction]
        admitted = []
        with self._lock:
            while queue:
                wait_ns = self._wait_ns_locked(direction)
                if wait_ns:
                    self._timers[direction].arm(self._clock.now_ns() + wait_ns)
                    break
                waiter = queue.popleft()
                self._count_locked(direction, waiter.length)
                admitted.append(waiter)
        while admitted:
            try:
                admitted.pop(0).set()
            except BaseException:  # a mistake of ours: the others must not hang for it
                for waiter in admitted:
                    self._context.complete(waiter, 0)
                raise

    def cancel(self, waiter: ThrottledWaiter) -> None:
        with self._lock:
            try:
                self._queues[waiter.write].remove(waiter)
            except ValueError:
                return
        self._context.complete(waiter, -ECANCELED)

    def open(self) -> None:
        """Let everything through until ``shut``: a drain must not wait for guest time, which may stand still."""
        waiting: list[ThrottledWaiter] = []
        with self._lock:
            self._open += 1
            for queue, timer in zip(self._queues, self._timers, strict=True):
                waiting += queue
                queue.clear()
                timer.disarm()
        for waiter in waiting:
            self._context.complete(waiter, 0)

    def restart(self) -> None:
        """Guest time has been set: what leaks, leaks from now on."""
        with self._lock:
            self._last_ns = self._clock.now_ns()

    def shut(self) -> None:
        with self._lock:
            self._open -= 1
