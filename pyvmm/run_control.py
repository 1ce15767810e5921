"""RunControl: what starts, parks and releases all vCPUs of a machine together, and knows its run state.

A vCPU thread is either inside its loop or parked in ``RunControl.enter``. Whatever needs every vCPU out of the guest
(pause, reset, power-off, an error) is a request: it takes the green light away, kicks the vCPUs, and the last one to
park carries the request out. No thread of its own is needed for it, and a device may ask from inside a handler.

Lock order: a device's lock may be held when RunControl's is taken, never the other way round; requests run with
neither.
"""

from __future__ import annotations

from pyvmm.errors import Brief, ConfigError, StateError, describe
from pyvmm.light import Condition, RLock, get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.cpu import Cpu
    from pyvmm.run_state import RunState


# RunState's values. Enum members are made for whoever looks at ``state``; importing enum takes a tenth of a start.
PRELAUNCH = "prelaunch"
RUNNING = "running"
SUSPENDED = "suspended"
PAUSED = "paused"
DEBUG = "debug"
IO_ERROR = "io-error"
SHUTDOWN = "shutdown"
INTERNAL_ERROR = "internal-error"
CLOSED = "closed"
FROM_INSIDE = (
    "from a device's handler or a callback would wait for itself: call stop() or pause() there, "
    "and the rest where run() has returned"
)
ALIVE = (RUNNING, SUSPENDED)
ENDED = (SHUTDOWN, INTERNAL_ERROR, CLOSED)
RESUMABLE = (PRELAUNCH, PAUSED, DEBUG, IO_ERROR)


# A wait for longer is one without a limit: locks take no more than this (threading.TIMEOUT_MAX, 292 years).
LONGEST_WAIT_S = 9e9
# What ExitStatus is, and `pyvmm run` exits with. Odd ones are isa-debug-exit's; 2 and 124 are the command's own.
STATUS_POWER_OFF = 0
STATUS_GUEST_ERROR = 4
STATUS_RESET = 6
STATUS_DEVICE_ERROR = 8
STATUS_IO_ERROR = 10
STATUS_PAUSED = 12
STATUS_DEBUG = 14
STATUS_STOPPED = 16


class ExitStatus(int, metaclass=Brief):
    """How a run ended, as the number ``pyvmm run`` exits with; ``reason`` says it in a word or two.

    ====  =====================================================================================
    0     the guest powered off
    odd   ``(value << 1) | 1``: it wrote ``value`` to isa-debug-exit
    4     it can't go on: GuestError, which ``run`` raises (``Machine.status`` gives the number)
    6     it reset itself, with ``no_reboot``
    8     a device raised: DeviceError, raised likewise
    10    a drive's request failed and its policy says stop; ``resume`` tries again
    12    somebody paused the machine; ``resume`` goes on
    14    a breakpoint or a single step; ``resume`` goes on
    16    ``Machine.stop()`` without a status of its own
    ====  =====================================================================================
    """

    reason: str

    def __new__(cls, status: int, reason: str = "") -> ExitStatus:
        self = super().__new__(cls, status)
        self.reason = reason
        return self

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]  # int's own has one: copies keep the reason
        return int(self), self.reason

    def __str__(self) -> str:
        return int.__repr__(self)

    def __repr__(self) -> str:
        return f"<ExitStatus {int(self)}: {self.reason}>"


def timeout_or_none(timeout_s: object) -> float | None:
    """A time to wait, None where that is for ever. ConfigError for what is no time."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s >= 0:
        raise ConfigError(f"timeout_s={timeout_s!r}: give seconds, 0 or more, or None for no limit")
    return float(timeout_s) if timeout_s < LONGEST_WAIT_S else None


def failure_status(error: BaseException) -> ExitStatus:
    """The status that stands for an error; its own where it is a GuestError."""
    number = getattr(error, "status", STATUS_GUEST_ERROR)
    return ExitStatus(number if isinstance(number, int) else STATUS_GUEST_ERROR, describe(error))


class RunControl:
    """The state machine of one machine. ``on_light(bool)`` hears when guest time starts and stops.

    ``in_timer()`` tells whether the caller is a timer's callback: guest time can't stop before that has returned, so it
    must not wait for what comes after.
    """

    def __init__(self, on_light: Callable[[bool], None], in_timer: Callable[[], bool] = lambda: False) -> None:
        self.state_name = PRELAUNCH
        self.cpus: Sequence[Cpu] = ()
        self.status: ExitStatus | None = None
        self.error: BaseException | None = None
        self.suspended = False  # the guest is, also while somebody has paused the machine
        self._lock = RLock()
        self._cond = Condition(self._lock)
        self._go = False
        self._only: Cpu | None = None  # the one vCPU that the green light is for; None: all of them
        self._lit = False  # guest time runs
        self._closing = False
        self._acting = 0  # the thread that carries out requests
        self._inside = 0
        self._requests: list[Callable[[], None]] = []
        self._under_way: Callable[[], None] | None = None  # the request under way
        self._on_light = on_light
        self._in_timer = in_timer

    @property
    def state(self) -> RunState:
        """What the machine is doing."""
        from pyvmm.run_state import RunState

        return RunState(self.state_name)

    # -- the vCPU threads ----------------------------------------------------------------------------------

    @property
    def parking(self) -> tuple[Any, Condition]:
        """The lock and the condition that a parked vCPU waits at. They refer to nothing of the machine."""
        return self._lock, self._cond

    def admit(self, cpu: Cpu) -> bool | None:
        """The lock is held. True: run the guest; False: end the thread; None: stay parked until the next notify."""
        while not self._closing:
            if self._requests and not self._acting and not self._inside:
                self._carry_out()
                continue
            # A request under way, or one that came after the light turned green, goes first.
            if self._go and not self._acting and not self._requests and self._only in (None, cpu):
                cpu.parked = False
                self._inside += 1
                # A kick meant for the last stay must not end this one.
                cpu.exec.cancel_kick()
                return True
            return None
        return False

    def leave(self, cpu: Cpu) -> None:
        """The vCPU is out of its loop; the last one out carries out what was requested."""
        with self._lock:
            cpu.parked = True
            self._inside -= 1
            try:
                if self._inside == 0:
                    self._carry_out()
            except BaseException as error:
                # A vCPU's thread has nobody above it to hear this; whoever waits for the run does.
                self._failed(error)
            self._cond.notify_all()

    def fail(self, error: BaseException) -> None:
        """On a vCPU's thread, out of every handler: end the run with an error that nobody above it can hear."""
        with self._lock:
            self._requests.append(lambda: self.end(None, error, INTERNAL_ERROR))
            self._stop_all()
            if not self._inside:
                self._carry_out()

    def _failed(self, error: BaseException) -> None:
        """All vCPUs are parked and the lock is held: an error is the last word, even after an end."""
        self._go = False
        self.state_name, self.status, self.error = INTERNAL_ERROR, failure_status(error), error

    def _carry_out(self) -> None:
        """All vCPUs are parked and the lock is held: run the requests, outside of the lock."""
        if self._acting:
            return
        self._acting = get_ident()
        try:
            while self._requests:
                # The one before may have turned the light green; nobody has entered: that takes our end.
                self._go = False
                request = self._under_way = self._requests.pop(0)
                try:
                    self._lock.release()
                    try:
                        self._stop_time()
                        request()
                    finally:
                        self._lock.acquire()
                        self._under_way = None
                except BaseException as error:
                    # What a request raises (a reset that KVM refuses, say) must not vanish.
                    self._failed(error)
        finally:
            self._acting = 0
            self._cond.notify_all()

    def _stop_time(self) -> None:
        """Guest time stops once every vCPU is parked. It waits for a timer callback under way, which may want a
        device's lock or ours: so neither is held here.
        """
        if self._lit:
            self._lit = False
            self._on_light(False)

    # -- requests ------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """Red light for everybody; the lock is held."""
        self._go = False
        for cpu in self.cpus:
            if not cpu.parked:
                cpu.exec.kick()

    def request(self, action: Callable[[], None], wait: bool = False) -> None:
        """Have ``action()`` run with every vCPU parked, as soon as may be; callable from handlers.

        Returns at once, or with ``wait`` when it has run; on a vCPU's own thread always at once: it must park first,
        and so in another request or a timer's callback, which must return first.
        The vCPUs stay parked after it unless it calls ``go`` or ``carry_on``.
        """
        with self._lock:
            if self._closing:
                return
            self._requests.append(action)
            self._stop_all()
            if not self._inside and not self._lit:
                self._carry_out()
            elif not self._inside:
                # Time is to be stopped, and the caller may hold a device's lock: one for a vCPU on its way in.
                self._cond.notify_all()
            if wait and not self._would_wait_for_itself():
                self._cond.wait_for(lambda: self._closing or not self._is_due(action))

    def _is_due(self, action: Callable[[], None]) -> bool:
        return self._under_way is action or any(request is action for request in self._requests)

    def go(self) -> None:
        """Green light; part of a request, or of resume()."""
        with self._lock:
            if self._closing:
                return
            self.state_name = RUNNING
            self.status = self.error = None
            self._go = True
            if not self._lit:
                self._lit = True
                self._on_light(True)
            self._cond.notify_all()

    def carry_on(self) -> None:
        """The last act of a request that changes nothing: a machine that runs goes on, one that is suspended stays so.
        """
        with self._lock:
            if self.state_name == RUNNING:
                self.go()
            elif self.state_name == SUSPENDED:
                self._sleep()

    def _sleep(self) -> None:
        """The vCPUs stay parked, and guest time goes on. The lock is held."""
        self.state_name = SUSPENDED
        self.status = self.error = None
        if not self._lit and not self._closing:
            self._lit = True
            self._on_light(True)
        self._cond.notify_all()

    def suspend(self) -> None:
        """Part of a request: the guest suspends to RAM. One that somebody paused meanwhile does so when it goes on."""
        with self._lock:
            if self.state_name not in ENDED:
                self.suspended = True
                if self.state_name == RUNNING:
                    self._sleep()

    def woken(self) -> None:
        """The last act of a wake-up: a machine that was suspended runs; one that somebody has paused stays so."""
        with self._lock:
            self.suspended = False
            if self.state_name in ALIVE:
                self.go()

    def restarted(self) -> None:
        """The last act of a reset: a machine that runs goes on; one that was paused, or had ended, is paused."""
        with self._lock:
            self.suspended = False
            if self.state_name in ALIVE:
                self.go()
            elif self.state_name != CLOSED:
                self.state_name = PAUSED
                self.status, self.error = ExitStatus(STATUS_PAUSED, PAUSED), None

    def end(self, status: ExitStatus | None, error: BaseException | None, state: str) -> None:
        """The run is over, or held up; part of a request.

        An end takes the place of a pause that came a moment earlier, or it would be lost. Among ends the first counts.
        """
        with self._lock:
            if self.state_name not in ENDED:
                self._end(status, error, state)

    def fail_late(self, error: BaseException) -> None:
        """What a device raised; part of a request. It is told even where the run has ended meanwhile: a handler that
        asks for an end and raises then is wrong all the same.
        """
        with self._lock:
            if self.state_name not in ENDED or (self.state_name == SHUTDOWN and self.error is None):
                self._end(None, error, INTERNAL_ERROR)

    def _end(self, status: ExitStatus | None, error: BaseException | None, state: str) -> None:
        self.state_name, self.error = state, error
        self.status = status if error is None else failure_status(error)
        self._cond.notify_all()

    # -- the embedder --------------------------------------------------------------------------------------

    def resume(self, only: Cpu | None = None) -> None:
        """Run, or go on; ``only``: with one vCPU, the others stay parked. StateError where the guest has ended."""
        with self._lock:
            if self._closing:
                raise StateError("the machine is closed: make another one")
            if self.state_name in ALIVE:
                if only is not None:
                    raise StateError(f"vCPU {only.index} can't step while the machine runs: pause() it first")
                return
            if self.state_name not in RESUMABLE:
                raise StateError(f"the machine is in state {self.state_name}: reset() it first")
            self._only = only
            # In the same breath: an end that comes after the look at the state must stay the last word.
            if self.suspended:
                self._sleep()
            else:
                self.go()

    def pause(self, wait: bool = True) -> None:
        """Park every vCPU. In a handler or a timer's callback it takes effect when that returns."""

        def paused() -> None:
            if self.state_name in ALIVE:
                self.end(ExitStatus(STATUS_PAUSED, PAUSED), None, PAUSED)

        with self._lock:
            if self.state_name not in ALIVE:
                return
        # Waits for this very request: by the time a waiter wakes, somebody else may have resumed the machine.
        self.request(paused, wait)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait until no vCPU is inside and no request is left.

        False where the time ran out, and at once on a vCPU's thread, in a request or in a timer's callback, which would
        wait for itself.
        """
        with self._lock:
            if self._would_wait_for_itself():
                return False
            return self._cond.wait_for(
                lambda: not self._inside and not self._requests and not self._acting, timeout_s
            )

    def wait(self, timeout_s: float | None = None, states: Sequence[str] = ALIVE) -> bool:
        """Wait until the machine neither runs nor is suspended (is in none of ``states``): True; False where the time
        ran out first.

        StateError where the caller would wait for itself: on a vCPU's thread, in a request or in a timer's callback.
        """
        with self._lock:
            if self._would_wait_for_itself():
                raise StateError(f"wait() {FROM_INSIDE}")
            return self._cond.wait_for(
                lambda: self.state_name not in states and not self._acting and not self._inside, timeout_s
            )

    def close(self) -> None:
        """Park all vCPUs for good and end their threads. Once more, where the first time was interrupted, is fine.

        StateError on one of those threads, in a request or in a timer's callback: they could not go back.
        """
        with self._lock:
            if self._would_wait_for_itself():
                raise StateError(f"close() {FROM_INSIDE}")
            self._closing = True
            self._requests.clear()
            self._stop_all()
            self._cond.notify_all()
            # A request under way on another thread still uses the machine.
            self._cond.wait_for(lambda: not self._acting)
        for cpu in self.cpus:
            cpu.join()
        try:
            self._stop_time()
        finally:
            with self._lock:
                self.state_name = CLOSED
                self._cond.notify_all()

    def outcome(self) -> ExitStatus:
        """How the run that ``wait`` has seen the end of has ended. Raises the error that ended it."""
        with self._lock:
            if self.error is not None:
                raise self.error
            if self.status is not None:
                return self.status
            if self.state_name == CLOSED:
                raise StateError("the machine was closed while it ran")
            # Somebody has paused it, and somebody else has set it going again since.
            return ExitStatus(STATUS_PAUSED, PAUSED)

    def not_from_inside(self, call: str) -> None:
        """StateError where the caller would wait for itself."""
        if self._would_wait_for_itself():
            raise StateError(f"{call}() {FROM_INSIDE}")

    def inside(self) -> bool:
        """Whether the caller is a vCPU's thread, a request, or a timer's callback: none may wait for the machine."""
        return self._would_wait_for_itself()

    def _would_wait_for_itself(self) -> bool:
        return self._on_cpu_thread() or self._acting == get_ident() or self._in_timer()

    def _on_cpu_thread(self) -> bool:
        return any(cpu.on_own_thread for cpu in self.cpus)
