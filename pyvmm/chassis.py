"""Chassis: what every machine has, whatever its board and its platform: the parts that know nothing of either."""

from __future__ import annotations

from pyvmm.address_space import AddressSpace
from pyvmm.consoles import Consoles
from pyvmm.drives import Drives
from pyvmm.event_loop import EventLoop
from pyvmm.events import Events
from pyvmm.io_thread import IoThreads
from pyvmm.light import Lock, Thread
from pyvmm.outcomes import Outcomes, callback_failure
from pyvmm.power import Power
from pyvmm.run_control import RunControl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.breakpoints import Breakpoints
    from pyvmm.clock import Clock
    from pyvmm.closers import Closers
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.kvm_clock import KvmClock
    from pyvmm.origin import Origin
    from pyvmm.spec import Spec

    class BackEnd(Protocol):
        """A device whose queues another process serves (devices/virtio/vhost_user.py)."""

        def hold(self) -> None: ...
        def go_on(self) -> None: ...
        def why_not_saved(self) -> str | None: ...

PORTS = 1 << 16
ADDRESS_BITS = 52


class Chassis:
    """Address spaces, run control, event loop, drives, consoles, power; and the list of what is to be closed.

    ``owner`` is the Machine: a guest that runs keeps it, since each of its threads reaches it here.
    """

    def __init__(
        self,
        config: Spec,
        memory: GuestMemory,
        closers: Closers,
        make_clock: Callable[[EventLoop], Clock],
        owner: object = None,
    ) -> None:
        self.owner = owner
        self.closers = closers
        self.memory = memory
        self.pio = AddressSpace("pio", PORTS)
        self.mmio = AddressSpace("mmio", 1 << ADDRESS_BITS)
        self.loop = EventLoop(self._callback_raised, stands=True)
        called = config.name or config.uuid or ""
        self.events = Events(self.loop.call_soon, self._callback_raised, self.loop.alive, called)
        self.io_threads = closers.add(IoThreads(self._callback_raised))
        """The threads that serve queues. They stand while guest time does."""
        self.control = RunControl(self._on_time, self._holds_up_time, self.events.tell)
        self.power = Power(self.control, no_reboot=config.no_reboot)
        self.outcomes = Outcomes(self.control, self.power, self)
        self.clock = make_clock(self.loop)
        self.origin: Origin | None = None
        """Where its memory came from, if it came from a snapshot."""
        self.breakpoints: Breakpoints | None = None
        """What a debugger has set, while there is one."""
        self.debugger: object = None
        """Who serves one."""
        self.saving = Lock()
        """Held by whoever makes a snapshot: one at a time, for it watches what is written to memory."""
        self.kvm_clock: KvmClock | None = None
        """What KVM keeps of guest time, where it does."""
        self.drives = Drives(self.control, self.events, closers)
        self.consoles = Consoles(
            self.loop,
            closers,
            command=config.raw_terminal,
            on_quit=lambda: self.power.stop(0, "quit"),
            on_gone=self.power.reader_gone,
            on_lost=lambda name, size: self.events.tell("console-lost", console=name, bytes=size),
            keys=(
                ("w", "wake a guest that has suspended itself", lambda show: self.power.press_if_suspended()),
                ("r", "registers of every vCPU", self.outcomes.dump),
            ),
        )
        self.back_ends: list[BackEnd] = []
        """Devices whose queues other processes serve."""
        self._when_it_runs: list[Callable[[], None]] = []
        self._background: list[Thread] = []
        self._ending = Lock()  # given back when no work is to begin any more
        self._ending.acquire()

    def read(self, gpa: int, size: int) -> bytes:
        """Of RAM, as the guest has it: without what a debugger has put there."""
        data = bytearray(self.memory.read(gpa, size))
        if self.breakpoints is not None:
            self.breakpoints.hide(gpa, data)
        return bytes(data)

    def _callback_raised(self, error: BaseException) -> None:
        self.outcomes.callback_raised(error)

    def _holds_up_time(self) -> bool:
        """Whether the caller is what guest time would wait for before it can stop."""
        return self.loop.clock.in_callback() or self.io_threads.inside

    def _on_time(self, runs: bool) -> None:
        """Guest time goes on, or stops: all vCPUs are parked then, and drives and consoles come to rest too."""
        if runs:
            if self.kvm_clock is not None:
                self.kvm_clock.start()
            self.loop.clock.resume()
            for back_end in self.back_ends:
                back_end.go_on()
            self.io_threads.resume()
            return
        if self.kvm_clock is not None:
            self.kvm_clock.stop()
        self.loop.clock.stop()
        self.io_threads.pause()  # before the drives: nobody gives them more
        for back_end in self.back_ends:
            back_end.hold()
        self.drives.drain()
        # What the guest has said is out before anybody hears that it stands.
        try:
            self.consoles.flush()
        except BaseException as error:
            raise callback_failure(error) from error

    def tell_last(self) -> None:
        """The machine ends: what is left to be told, and to be heard."""
        self.consoles.tell_losses()
        self.events.flush()

    def let_go(self) -> None:
        """All is closed. What the parts had of each other goes: then the machine does with the last who refers to it,
        and no garbage collector has to look for it among all that the process has.
        """
        self.owner = self.kvm_clock = None
        self._background.clear()
        self._when_it_runs.clear()
        self.loop.let_go()
        self.events.let_go()
        self.control.let_go()
        self.power.let_go()
        self.outcomes.let_go()
        self.consoles.let_go()

    # -- work beside the guest ---------------------------------------------------------------------------------

    def when_it_runs(self, work: Callable[[], None]) -> None:
        """``in_background`` once the guest runs, and not before its first vCPU is on its way."""
        self._when_it_runs.append(work)

    def runs(self) -> None:
        """The guest runs: what waited for that begins."""
        while self._when_it_runs:
            self.in_background(self._when_it_runs[0])
            del self._when_it_runs[0]

    def in_background(self, work: Callable[[], None], after_s: float = 0.0) -> None:
        """``work()`` on a thread of its own, begun after ``after_s`` seconds or, where the machine is closed first,
        not at all; over before the machine is closed. What it raises ends the run.
        """

        def body() -> None:
            if after_s and self._ending.acquire(timeout=after_s):
                self._ending.release()
                return
            try:
                work()
            except BaseException as error:
                self.outcomes.callback_raised(error)

        thread = Thread(body)
        thread.start()
        if not self._background:
            self.closers.call(self._end_background)
        self._background.append(thread)

    def _end_background(self) -> None:
        if self._ending.locked():
            self._ending.release()
        for thread in self._background:
            thread.join()

    def join_background(self) -> None:
        """Return when that work is done; what waits for the guest to run is done too."""
        self.runs()
        for thread in self._background:
            thread.join()

    @property
    def rests(self) -> bool:
        """Whether it has nothing to do but for its vCPUs, and whoever holds the machine: no timer, descriptor or thread
        of its own, no drive, and no console that could bring input by itself.
        """
        from pyvmm.chardev import CallableChardev, NullChardev

        busy = self.loop.used or self.io_threads.used or self._background or self._when_it_runs
        known = self.drives.backends or self.back_ends or self.breakpoints
        ends = self.consoles.made
        quiet = len(ends) == len(self.consoles.by_name) and all(type(e) in (NullChardev, CallableChardev) for e in ends)
        return quiet and not busy and not known

    def on_own_thread(self) -> bool:
        """Whether the caller is one of the machine's threads, or a request: none of them may wait for the machine."""
        if self._background and any(thread.is_current for thread in self._background):
            return True
        return self.loop.on_loop_thread() or self.io_threads.inside or self.control.inside()
