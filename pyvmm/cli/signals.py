"""The signals of a command that runs a guest: whichever ends or stops the process, its terminal is given back first."""

from __future__ import annotations

import posix

from pyvmm.light import on_main_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any, Protocol

    class Terminal(Protocol):
        """pyvmm.terminal's, or another (cli/top.py). None of it takes a lock."""

        def enter_raw(self) -> None: ...
        def leave_raw(self) -> None: ...
        def resized(self) -> None: ...
else:
    import _signal as signal  # signal itself is this one with enums, which take a tenth of a start

# What ends a process by default and comes from outside (signal(7)). SIGINT is Python's KeyboardInterrupt; SIGPIPE and
# SIGXFSZ Python ignores, and the write fails. Faults (SEGV, BUS, FPE, ILL) can't be put off until Python has its turn,
# and real-time signals kick vCPUs.
ENDING = tuple(
    getattr(signal, f"SIG{name}")
    for name in (
        *("HUP", "QUIT", "TRAP", "ABRT", "USR1", "USR2", "ALRM", "TERM", "STKFLT"),
        *("XCPU", "VTALRM", "PROF", "IO", "PWR", "SYS"),
    )
    if hasattr(signal, f"SIG{name}")
)


class Signals:
    """A context: a signal that would end the process raises SystemExit(128 + number) in the main thread, and a stop
    from the keyboard's side (SIGTSTP) gives ``terminal`` back until SIGCONT; SIGWINCH has it look at its size. What was
    ignored before stays ignored.
    """

    def __init__(self) -> None:
        self.terminal: Terminal | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if not on_main_thread():
            return self  # Python handles signals there only
        for number in ENDING:
            self._take(number, self._end)
        self._take(signal.SIGTSTP, self._stop)
        self._take(signal.SIGCONT, self._continue)
        self._take(signal.SIGWINCH, self._resized)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, handler: Any) -> None:
        # Not in place of an embedder's handler, and nohup(1) means what it says.
        if signal.getsignal(number) == signal.SIG_DFL:
            self._before[number] = signal.SIG_DFL
            signal.signal(number, handler)

    def _end(self, number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    def _stop(self, _number: int, _frame: object) -> None:
        if self.terminal is not None:
            self.terminal.leave_raw()
        # Not SIGTSTP once more: the kernel does not stop a process by that where no shell could continue it.
        posix.kill(posix.getpid(), signal.SIGSTOP)

    def _continue(self, _number: int, _frame: object) -> None:
        """After SIGTSTP, after a SIGSTOP that nobody heard of, and where a shell brings us into the foreground."""
        if self.terminal is not None:
            self.terminal.enter_raw()
            self.terminal.resized()  # of that, too, only a shell has heard meanwhile

    def _resized(self, _number: int, _frame: object) -> None:
        if self.terminal is not None:
            self.terminal.resized()
