"""Power: what a guest asks of its machine by its devices: power-off, reset, suspend to RAM, and to be woken."""

from __future__ import annotations

from pyvmm.reset_count import ResetCount
from pyvmm.run_control import STATUS_PANIC, STATUS_POWER_OFF, STATUS_RESET, ExitStatus
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.run_control import RunControl

STATUS_READER_GONE = 141  # what a shell says of a process that SIGPIPE has ended
POWER_BUTTON = 0x100  # of PM1's status (ACPI 6.5, 4.8.3.1.1)


class Power:
    """Devices are given its methods. All may be called from handlers: what they ask for is done once every vCPU has
    parked. ``attach`` brings how a reset and a wake-up are done (restart.py).
    """

    def __init__(self, control: RunControl, *, no_reboot: bool) -> None:
        self._control = control
        self._no_reboot = no_reboot
        self.resets = ResetCount()
        self.let_go()

    def let_go(self) -> None:
        """There is nothing to restart: not yet, or no more."""
        self._restart: Callable[[], None] = no_restart
        self._wake: Callable[[int], None] = no_wake

    def attach(self, restart: Callable[[], None], wake: Callable[[int], None]) -> None:
        """``restart()`` brings everything back to power-on, ``wake(events)`` a guest out of suspend to RAM."""
        self._restart, self._wake = restart, wake

    def off(self) -> None:
        """The guest powered itself off."""
        self.stop(STATUS_POWER_OFF, "shutdown")

    def stop(self, status: int, reason: str, about: dict[str, Any] | None = None) -> None:
        """End the run; ``about`` is what the event says of it besides."""
        self._control.end(RunState.SHUTDOWN, ExitStatus(status, reason), about=about)

    def reset(self, why: str = "reset", by: str = "", about: dict[str, Any] | None = None) -> None:
        """The guest asked for a reset, or fell into a triple fault; ``by`` what, where ``why`` does not tell."""
        if self._no_reboot:
            self.stop(STATUS_RESET, why, about)
            return
        self.resets.note(by or why)
        self._control.request("reset", self._restart, lambda: self._control.restarted(guest=True, by=by or why))

    def reset_now(self) -> None:
        """The embedder's: it returns when the reset is done, but for a caller who would wait for itself."""
        self._control.request("reset", self._restart, self._control.restarted, wait=True)

    def suspend(self) -> None:
        """The guest suspends to RAM (ACPI S3)."""
        self._control.request("suspend", then=self._control.suspend)

    def wake(self, events: int, *, wait: bool = False) -> None:
        """An event that the guest has enabled ends its sleep; ``events``: bits of PM1's status."""
        control = self._control
        control.request("wakeup", lambda: self._wake(events), lambda: control.woken(events), wait=wait)

    def press_if_suspended(self) -> None:
        """The power button, for a guest that sleeps; from anywhere, and without waiting for it."""
        if self._control.suspended:
            self.wake(POWER_BUTTON)

    def wake_now(self) -> None:
        """The embedder's, by the power button: it returns when that is done."""
        self.wake(POWER_BUTTON, wait=True)

    def debug_exit(self, value: int) -> None:
        """isa-debug-exit was written."""
        self.stop((value << 1) | 1, "debug-exit")

    def panic(self) -> None:
        """The guest's kernel has panicked, and said so."""
        self.stop(STATUS_PANIC, "guest-panic")

    def reader_gone(self) -> None:
        """Nobody reads the terminal, or the pipe in its place, any more: the guest would run on unseen."""
        self.stop(STATUS_READER_GONE, "reader-gone")


def no_restart() -> None:
    """In place of a machine's."""


def no_wake(events: int) -> None:
    """In place of a machine's."""
