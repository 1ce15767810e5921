"""Events: what happens to a machine, told by name and with data to whoever listens.

=============  =============================================================================================
resume         the guest goes on: ``state`` it leaves
stop           it stands: ``state``, ``status`` (ExitStatus) or ``error``, and where a vCPU was the reason
               ``cpu``, its index, and ``detail``, CpuExec.detail
shutdown       it has ended (before the stop): ``status``
reset          it has been reset: ``guest``, whether by itself, and ``by`` what
suspend        it has suspended itself to RAM
wakeup         it is awake again: ``events``, bits of PM1's status
io-error       a drive's request failed: ``drive``, ``operation``, ``errno``, ``action`` (stop, report, ignore)
console-port   a program of the guest's has opened a port of its virtio console, or closed it: ``console``, its
               name, and ``open``
balloon        the guest has given memory to its balloon or taken some back: ``actual_bytes`` are in it now
device-broken  a driver has broken a virtio device, which waits to be reset: ``device``, and ``why``
powerdown      its power button has been pressed, by the host
tray           the tray of a CD drive has opened or closed: ``drive``, ``open``
panic          the guest's kernel says that it has panicked (devices/pvpanic.py): ``goes_on``, into a kernel that saves
               what is left
rx-filter      the guest has changed what its network card lets through: ``device``
saved          a snapshot has been made: ``path``
loaded         it has gone back to a snapshot: ``path``
migration      it moves to another process: ``state`` started, completed or failed, ``address``, ``why``
console-lost   output of a console is lost for want of a reader: ``console``, and ``bytes`` in all by then. Told of the
               first, and at the end
client         a client has come or gone: ``protocol``, and ``did``: came, left, was cut off
trace          a trace begins, or ends: ``path``, ``on``, ``dropped`` records, ``error`` where it ends early
=============  =============================================================================================

Listeners are called on the event loop's thread, one event after the other, in the order in which they happened and with
no lock held: they may call whatever a callback of the machine may (`pause`, `stop`, `reset`, `resume`), which holds up
nobody but the next event. `close` waits until all have been told.
"""

from __future__ import annotations

from sys import modules
from time import time_ns

from pyvmm.errors import ConfigError, HostError, KindError
from pyvmm.light import BEGIN_LIMIT_S, Condition, Lock, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Listener = Callable[["Event"], object]

# The events there are, and how much each matters, by logging's numbers (log.py).
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {
    **dict.fromkeys(("resume", "stop", "shutdown", "reset", "suspend", "wakeup", "powerdown"), INFO),
    **dict.fromkeys(("saved", "loaded", "migration", "trace", "balloon", "tray"), INFO),
    **dict.fromkeys(("console-port", "rx-filter", "client"), DEBUG),
    **dict.fromkeys(("io-error", "device-broken", "console-lost"), WARNING),
    "panic": ERROR,
}
NAMES = tuple(LEVELS)
# A guest can reset itself faster than a slow listener listens: what is not told is counted.
WAITING_MAX = 1000


def logged(level: int) -> bool:
    """Whether somebody wants to have events of that level in the log. Nobody who has not imported ``logging``.

    What Logger.isEnabledFor says, without the locks of logging: a signal's exception between two of its lines leaves
    them locked for ever, and this is asked wherever something happens.
    """
    logging = modules.get("logging")
    root = getattr(logging, "root", None)  # there is none while it is being imported
    if logging is None or root is None:
        return False
    ours = root.manager.loggerDict.get("pyvmm")
    if not isinstance(ours, logging.Logger):
        ours = root  # nobody has asked for ours yet: it would have root's level
    return not ours.disabled and root.manager.disable < level >= ours.getEffectiveLevel()


class Event:
    """``name`` is one of NAMES, ``data`` what belongs to it, ``time_ns`` when it happened, by the host's clock."""

    __slots__ = ("data", "name", "time_ns")

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data
        self.time_ns = time_ns()

    def __repr__(self) -> str:
        return f"<Event {self.name} {self.data}>"


class Events:
    """``listen`` and ``forget`` are for everybody; ``tell`` is the machine's own.

    ``call_soon(callback)`` is the event loop's, ``alive()`` tells whether its thread is there. ``on_error(error)``
    hears what a listener raised, which keeps no other listener from hearing.
    ``machine`` is what the log calls it (log.py).
    """

    def __init__(
        self,
        call_soon: Callable[[Callable[[], None]], None],
        on_error: Callable[[BaseException], None],
        alive: Callable[[], bool] = lambda: True,
        machine: str = "",
    ) -> None:
        self.machine = machine
        self._call_soon = call_soon
        self._on_error = on_error
        self._alive = alive
        self._lock = Lock()
        self._told = Condition(self._lock)
        self._listeners: tuple[tuple[Listener, tuple[str, ...]], ...] = ()
        self._waiting: deque[Event] = deque()
        self._telling = False
        self.lost = 0
        """How many events nobody was told of, because listeners were too slow."""

    def listen(self, listener: Listener, *names: str) -> None:
        """Call ``listener(event)`` for each event of these names, or for every one where none is given, from now on.

        ConfigError for a name that there is not.
        """
        if not callable(listener):
            raise KindError(f"listen({listener!r}): give a function that takes an event")
        for name in names:
            if name not in NAMES:
                raise ConfigError(f"there is no event {name!r}: use {', '.join(NAMES)}")
        with self._lock:
            self._listeners = (*self._listeners, (listener, names or NAMES))

    def forget(self, listener: Listener) -> None:
        """Tell ``listener`` of nothing that happens from now on; one call may still be under way."""
        with self._lock:
            self._listeners = tuple(pair for pair in self._listeners if pair[0] != listener)

    def let_go(self) -> None:
        """All is closed, and told."""
        self._on_error = nobody

    def tell(self, name: str, **data: Any) -> None:
        """Queue an event that has happened. From any thread, and under any lock: nothing is called here."""
        if not self._listeners and not logged(LEVELS[name]):
            return
        with self._lock:
            if len(self._waiting) >= WAITING_MAX:
                self.lost += 1
                return
            self._waiting.append(Event(name, data))
            begin = not self._telling
        if begin:
            self._begin()

    def _begin(self) -> bool:
        """Have the event loop tell what waits. A call too many finds nothing to tell. False: no thread can be had."""
        try:
            self._call_soon(self._tell_all)
        except HostError:
            return False  # whatever happens next tries again, and brings what waits too
        return True

    def flush(self) -> None:
        """Return when every listener has been told of all that has happened. Not for a listener."""
        # A signal's exception may have come between an event and the call for it.
        can_tell = not self._waiting or self._begin()
        with self._lock:
            while can_tell and not self._told.wait_for(lambda: not self._waiting and not self._telling, BEGIN_LIMIT_S):
                # A thread that its host gave no memory for can die before it begins: nobody can be told.
                can_tell = self._alive()
            if not can_tell:
                self._telling = False

    def _tell_all(self) -> None:
        """On the event loop's thread."""
        self._telling = True
        try:
            while (event := self._next()) is not None:
                for listener, names in self._listeners:
                    if event.name in names:
                        try:
                            listener(event)
                        except BaseException as error:
                            self._on_error(error)
                try:
                    self._log(event)  # last: a command sets its log up with the first event that it hears
                except BaseException as error:
                    self._on_error(error)
        except BaseException:
            # Not even the error could be told. What still waits is told by another call.
            with self._lock:
                self._telling = False
                self._told.notify_all()
            if self._waiting:
                self._begin()
            raise

    def _log(self, event: Event) -> None:
        if logged(level := LEVELS[event.name]):
            from pyvmm.log import write

            write(level, self.machine, event.name, event.data, event.time_ns)

    def _next(self) -> Event | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._telling = False
            self._told.notify_all()
            return None


def nobody(error: BaseException) -> None:
    """In place of on_error, when all is over."""
