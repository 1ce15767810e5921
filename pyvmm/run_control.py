"""RunControl: what starts, parks and releases all vCPUs of a machine together, and knows its run state.

A vCPU thread is either inside its loop or parked in ``RunControl.admit``. Whatever needs every vCPU out of the guest
(pause, reset, power-off, an error) is a Request: from then on no vCPU may enter, those inside are kicked, and the last
one to park carries it out. No thread of its own is needed for that, and a device may ask from inside a handler.

Lock order: a device's lock may be held when RunControl's is taken, never the other way round; requests are carried out
with neither.
"""

from __future__ import annotations

from pyvmm.errors import Brief, ConfigError, StateError, describe
from pyvmm.light import Condition, RLock, get_ident
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    Then = Callable[[], object]

    class Loop(Protocol):
        """CpuExec, as far as it concerns who may enter."""

        def kick(self) -> None: ...
        def cancel_kick(self) -> None: ...

    class Cpu(Protocol):
        """What is started and parked: a vCPU (cpu.py)."""

        index: int
        parked: bool
        retired: bool

        @property
        def exec(self) -> Loop: ...
        @property
        def on_own_thread(self) -> bool: ...
        def join(self) -> None: ...

FROM_INSIDE = (
    "from a device's handler or a callback would wait for itself: call stop() or pause() there, "
    "and the rest where run() has returned"
)
ALIVE = (RunState.RUNNING, RunState.SUSPENDED)
ENDED = (RunState.SHUTDOWN, RunState.INTERNAL_ERROR, RunState.CLOSED)
RESUMABLE = (RunState.PRELAUNCH, RunState.PAUSED, RunState.DEBUG, RunState.IO_ERROR)


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
STATUS_PANIC = 18


class ExitStatus(int, metaclass=Brief):
    """How a run ended, as the number ``pyvmm run`` exits with; ``reason`` says it in a word or two, and ``cpu`` is the
    index of the vCPU that it stopped at, None where it was none of them.

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
    18    its kernel has panicked, and said so by ``pvpanic``
    ====  =====================================================================================
    """

    reason: str
    cpu: int | None

    def __new__(cls, status: int, reason: str = "", cpu: int | None = None) -> ExitStatus:
        self = super().__new__(cls, status)
        self.reason = reason
        self.cpu = cpu
        return self

    def __getnewargs__(self) -> tuple[int, str, int | None]:  # type: ignore[override]  # int's own has only the number
        return int(self), self.reason, self.cpu

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


PAUSED = ExitStatus(STATUS_PAUSED, RunState.PAUSED)


class Request:
    """Something to be done while every vCPU is parked; ``name`` says what, for whoever looks at the queue.

    ``action()`` runs with no lock held. Then ``then()``, one of RunControl's transitions, says how the run goes on;
    without one the vCPUs stay parked. ``done`` is set when that is over, also by an error.
    """

    __slots__ = ("action", "done", "name", "then")

    def __init__(self, name: str, action: Callable[[], object] | None = None, then: Then | None = None) -> None:
        self.name = name
        self.action = action
        self.then = then
        self.done = False

    def __repr__(self) -> str:
        return f"<Request {self.name}{', done' if self.done else ''}>"


def tell_nobody(name: str, **data: object) -> None:
    """In place of Events.tell."""


def no_time(runs: bool) -> None:
    """In place of on_time, when there is no more guest time."""


def outside() -> bool:
    """In place of in_timer, where there is no timer."""
    return False


class RunControl:
    """The state machine of one machine. ``on_time(runs)`` starts and stops guest time, ``tell`` is Events.tell.

    ``in_timer()`` tells whether the caller is a timer's callback: guest time can't stop before that has returned, so it
    must not wait for what comes after.
    """

    def __init__(
        self,
        on_time: Callable[[bool], None],
        in_timer: Callable[[], bool] = outside,
        tell: Callable[..., None] = tell_nobody,
    ) -> None:
        self._state = RunState.PRELAUNCH
        self.cpus: Sequence[Cpu] = ()
        self.status: ExitStatus | None = None
        self.error: BaseException | None = None
        self.suspended = False
        """The guest has suspended itself, also while somebody has paused the machine."""
        self._lock = RLock()
        self._cond = Condition(self._lock)
        self._may_enter = False
        self._only: Sequence[Cpu] | None = None  # the vCPUs that may; None: all of them
        self._time_runs = False
        self._closing = False
        self._acting = 0  # the thread that carries out requests
        self._inside = 0
        self._requests: list[Request] = []
        self._under_way: Request | None = None
        self._held: Sequence[RunState] = ()
        self.debugged = False
        """A debugger is there: it says when the machine goes on."""
        self._on_time = on_time
        self._in_timer = in_timer
        self._tell = tell

    @property
    def state(self) -> RunState:
        """What the machine is doing."""
        return self._state

    @property
    def held(self) -> bool:
        """Whether somebody outside, a debugger, says when the machine goes on."""
        return bool(self._held)

    def hold(self, states: Sequence[RunState], *, there: bool = False) -> None:
        """In these a debugger has the machine: ``wait`` goes on waiting. None of them: it has let go. ``there``: it is
        not only that one may come.
        """
        with self._lock:
            self._held = states
            self.debugged = there
            self._cond.notify_all()

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
            # A request under way, or one that came after the last of them let vCPUs enter, goes first.
            meant = self._only is None or cpu in self._only
            if meant and self._may_enter and not self._acting and not self._requests:
                cpu.parked = False
                self._inside += 1
                # A kick meant for the last stay must not end this one.
                cpu.exec.cancel_kick()
                return True
            if self._state is RunState.SHUTDOWN and not self._held and not self._requests:
                # A guest that has ended needs no thread any more; what comes after a reset starts another one.
                cpu.retired = True
                return False
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
        """On a vCPU's thread, outside of every handler: end the run with an error that nobody above could catch."""
        with self._lock:
            self._requests.append(Request("fail", then=lambda: self._end(RunState.INTERNAL_ERROR, error=error)))
            self._stop_all()
            if not self._inside:
                self._carry_out()

    def _failed(self, error: BaseException) -> None:
        """All vCPUs are parked and the lock is held: an error is the last word, even after an end."""
        self._may_enter = False
        self._stand(RunState.INTERNAL_ERROR, None, error, {})

    def _carry_out(self) -> None:
        """All vCPUs are parked and the lock is held: carry the requests out, outside of the lock."""
        if self._acting:
            return
        self._acting = get_ident()
        try:
            while self._requests:
                # The request before may have let vCPUs enter. As long as this loop runs none can be inside.
                self._may_enter = False
                request = self._under_way = self._requests.pop(0)
                try:
                    self._lock.release()
                    try:
                        self._stop_time()
                        if request.action is not None:
                            request.action()
                    finally:
                        self._lock.acquire()
                    if request.then is not None:
                        request.then()
                except BaseException as error:
                    # What a request raises (a reset that KVM refuses, say) must not be lost.
                    self._failed(error)
                finally:
                    request.done = True
        finally:
            self._acting, self._under_way = 0, None
            self._cond.notify_all()

    def _stop_time(self) -> None:
        """Guest time stops once every vCPU is parked. It waits for a timer callback under way, which may want a
        device's lock or ours: so neither is held here.
        """
        if self._time_runs:
            self._time_runs = False
            self._on_time(False)

    def _start_time(self) -> None:
        if not self._time_runs:
            self._time_runs = True
            self._on_time(True)

    # -- requests ------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """No vCPU may enter, and those inside come out; the lock is held."""
        self._may_enter = False
        for cpu in self.cpus:
            if not cpu.parked:
                cpu.exec.kick()

    def request(
        self, name: str, action: Callable[[], object] | None = None, then: Then | None = None, *, wait: bool = False
    ) -> None:
        """Have this done (see Request) as soon as may be; callable from handlers.

        Returns at once, or with ``wait`` when it is done. On a vCPU's own thread it always returns at once, because
        that vCPU has to park first; and in another request or a timer's callback, because they have to return first.
        """
        request = Request(name, action, then)
        with self._lock:
            if self._closing:
                return
            self._requests.append(request)
            self._stop_all()
            if not self._inside and not self._time_runs:
                self._carry_out()
            elif not self._inside:
                # Guest time has to stop first, for which no device's lock may be held, and the caller may hold one: the
                # next vCPU that comes to admit() carries it out.
                self._cond.notify_all()
            if wait and not self._would_wait_for_itself():
                # It waits for this request, not for an empty queue: somebody else may ask for another one meanwhile.
                self._cond.wait_for(lambda: self._closing or request.done)

    def end(
        self,
        state: RunState,
        status: ExitStatus | None = None,
        error: BaseException | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        """Ask for an end of the run, or for what holds it up: ``state`` is what the machine is in then. From anywhere.

        It takes the place of a pause that came a moment earlier, or it would be lost. Among ends the first counts.
        ``about`` goes into the events.
        """
        self.request(state.value, then=lambda: self._end(state, status, error, about))

    def _end(
        self,
        state: RunState,
        status: ExitStatus | None = None,
        error: BaseException | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        if self._state not in ENDED:
            self._stand(state, status, error, about or {})

    def fail_late(self, error: BaseException, about: dict[str, Any] | None = None) -> None:
        """Ask for an end because a device has raised. It counts even where the run has ended meanwhile: a handler that
        asks for an end and raises then is wrong all the same.
        """

        def failed() -> None:
            if self._state not in ENDED or (self._state is RunState.SHUTDOWN and self.error is None):
                self._stand(RunState.INTERNAL_ERROR, None, error, about or {})

        self.request("fail", then=failed)

    def _stand(
        self, state: RunState, status: ExitStatus | None, error: BaseException | None, about: dict[str, Any]
    ) -> None:
        """The run is over, or held up. The lock is held."""
        self._state, self.error = state, error
        self.status = status if error is None else failure_status(error)
        if state is RunState.SHUTDOWN:
            self._tell("shutdown", status=self.status)
        self._tell("stop", state=state, status=self.status, error=error, **{"cpu": None, "detail": {}, **about})
        self._cond.notify_all()

    # -- transitions: how the run goes on after a request. The lock is held, or taken. ---------------------------

    def go(self) -> None:
        """Every vCPU may enter; part of resume() too."""
        with self._lock:
            if self._closing:
                return
            if self._state not in ALIVE:
                self._tell("resume", state=self._state)
            self._state = RunState.RUNNING
            self.status = self.error = None
            self._may_enter = True
            self._start_time()
            self._cond.notify_all()

    def carry_on(self) -> None:
        """Nothing has changed: a machine that runs goes on, one that is suspended stays so."""
        with self._lock:
            if self._state is RunState.RUNNING:
                self.go()
            elif self._state is RunState.SUSPENDED:
                self._sleep()

    def _sleep(self) -> None:
        """The vCPUs stay parked, and guest time goes on. The lock is held."""
        self._state = RunState.SUSPENDED
        self.status = self.error = None
        if not self._closing:
            self._start_time()
        self._cond.notify_all()

    def suspend(self) -> None:
        """The guest suspends to RAM. One that somebody paused meanwhile does so when it goes on."""
        with self._lock:
            if self._state not in ENDED:
                self.suspended = True
                self._tell("suspend")
                if self._state is RunState.RUNNING:
                    self._sleep()

    def woken(self, events: int = 0) -> None:
        """The guest was suspended and is awake, by these bits of PM1's status: it runs, but where somebody has paused
        the machine. One that was not suspended carries on.
        """
        with self._lock:
            if not self.suspended:
                self.carry_on()
                return
            self.suspended = False
            self._tell("wakeup", events=events)
            if self._state in ALIVE:
                self.go()

    def restarted(self, *, guest: bool = False, by: str = "") -> None:
        """All is at power-on: a machine that runs goes on; one that was paused, or had ended, is paused. ``guest``:
        it has reset itself; ``by`` what.
        """
        with self._lock:
            self.suspended = False
            self._tell("reset", guest=guest, by=by)
            if self._state in ALIVE:
                self.go()
            elif self._state is not RunState.CLOSED:
                self._state = RunState.PAUSED
                self.status, self.error = PAUSED, None

    def loaded(self) -> None:
        """The guest of a saved state stands here, paused."""
        with self._lock:
            if self._state is not RunState.CLOSED:
                self._state = RunState.PAUSED
                self.status, self.error = PAUSED, None

    def go_on_without_cpus(self) -> None:
        """What held up a machine that has no vCPU is over: it is driven from outside."""
        with self._lock:
            if self._state is not RunState.CLOSED:
                self._tell("resume", state=self._state)
                self._state = RunState.PAUSED
                self.status, self.error = PAUSED, None

    # -- the embedder --------------------------------------------------------------------------------------

    def resume(self, only: Sequence[Cpu] | None = None) -> None:
        """Run, or go on; ``only``: with these vCPUs, the others stay parked. StateError where the guest has ended."""
        with self._lock:
            if self._closing:
                raise StateError("the machine is closed: make another one")
            if self._state in ALIVE:
                if only is not None:
                    raise StateError(f"vCPU {only[0].index} can't step while the machine runs: pause() it first")
                return
            if self._state not in RESUMABLE:
                raise StateError(f"the machine is in state {self._state}: reset() it first")
            self._only = only
            # Under the same lock as the look at the state: an end that comes later must not be undone.
            if self.suspended:
                self._tell("resume", state=self._state)
                self._sleep()
            else:
                self.go()

    def pause(self, wait: bool = True) -> None:
        """Park every vCPU; what the guest had asked for before it stood, a reset say, is done then too. In a handler or
        a timer's callback it takes effect when that returns.
        """
        asked_before: list[Request] = []

        def paused() -> None:
            asked_before.extend(self._requests)
            if self._state in ALIVE:
                self._stand(RunState.PAUSED, PAUSED, None, {})

        with self._lock:
            alive = self._state in ALIVE
            if not alive:
                asked_before.extend(self._requests)
                if self._under_way is not None:
                    asked_before.append(self._under_way)
        if alive:
            self.request("pause", then=paused, wait=wait)
        if wait:
            with self._lock:
                if not self._would_wait_for_itself():
                    self._cond.wait_for(lambda: self._closing or all(request.done for request in asked_before))

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

    def wait(self, timeout_s: float | None = None, states: Sequence[RunState] = ALIVE) -> bool:
        """Wait until the machine neither runs nor is suspended (is in none of ``states``), and no debugger holds it
        where it stands: True; False where the time ran out first.

        StateError where the caller would wait for itself: on a vCPU's thread, in a request or in a timer's callback.
        """
        with self._lock:
            if self._would_wait_for_itself():
                raise StateError(f"wait() {FROM_INSIDE}")
            return self._cond.wait_for(
                lambda: self._state not in (*states, *self._held) and not self._acting and not self._inside,
                timeout_s,
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
                self._state = RunState.CLOSED
                self._cond.notify_all()

    def let_go(self) -> None:
        """All is closed: there is nobody to start, to park or to tell any more."""
        self.cpus = ()
        self._on_time, self._in_timer, self._tell = no_time, outside, tell_nobody

    def abandon(self) -> None:
        """In a child of fork: nothing can be done here any more. Takes no lock."""
        self._state = RunState.CLOSED

    def outcome(self) -> ExitStatus:
        """How the run that ``wait`` has seen the end of has ended. Raises the error that ended it."""
        with self._lock:
            if self.error is not None:
                raise self.error
            if self.status is not None:
                return self.status
            if self._state is RunState.CLOSED:
                raise StateError("the machine was closed while it ran")
            # It was paused, and has been resumed since by somebody else.
            return PAUSED

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
        for cpu in self.cpus:  # noqa: SIM110  asked at every turn: a generator would take as long as all of it
            if cpu.on_own_thread:
                return True
        return False
