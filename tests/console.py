"""A terminal with `pyvmm run` in it, or the serial line of a Machine: type, and wait for what comes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType

from pyvmm.dialog import LIMIT_S, Dialog

LOOK_S = 1.0  # how often a limit is looked at while nothing comes
CTRL_A = "\x01"
DUMP_S = 20.0


class Console:
    """Starts a command on a pseudo-terminal of its own; ``output`` is all it has printed.

    Limits are in seconds of ``clock``: the lab's, where the command runs there.
    """

    def __init__(
        self, *args: str, separate_stderr: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            args,
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE if separate_stderr else slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""
        self._seen = 0

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str, timeout_s: float) -> str:
        """Wait until ``text`` comes after what was expected last: what stood between. AssertionError if it does not."""
        end = self.clock() + timeout_s
        while True:
            at = self.output.find(text, self._seen)
            if at >= 0:
                between = self.output[self._seen : at]
                self._seen = at + len(text)
                return between
            left = end - self.clock()
            assert left > 0, f"no {text!r} within {timeout_s} s; {self.last_words()}"
            assert self._read(min(left, LOOK_S)) or self.output.find(text, self._seen) >= 0, (
                f"the command ended ({self.process.wait(10)}) without {text!r}; its last output:\n{self.output[-3000:]}"
            )

    def send_until(self, keys: str, text: str, timeout_s: float) -> None:
        """Type ``keys`` again and again until ``text`` comes: nothing tells when they are of use."""
        end = self.clock() + timeout_s
        while self.output.find(text, self._seen) < 0:
            assert self.clock() < end, f"no {text!r} within {timeout_s} s; {self.last_words()}"
            self.send(keys)
            assert self._read(LOOK_S), f"the command ended without {text!r}"
        self.expect(text, LOOK_S)

    def wait(self, timeout_s: float) -> int:
        """The exit status, all output read."""
        end = self.clock() + timeout_s
        while self._read(LOOK_S):
            assert self.clock() < end, f"still running after {timeout_s} s; {self.last_words()}"
        return self.process.wait(timeout_s)

    def last_words(self) -> str:
        """What a failure shows of a command that still runs."""
        return f"the last of the output:\n{self.output[-9000:]}"

    def _read(self, timeout_s: float) -> bool:
        """Some more output, or nothing in that time: True; False at the end of it."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: the last one with the terminal open has closed it
            return False
        self.output += data.decode("utf-8", "replace")
        return bool(data)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs; again is no harm."""
        if self.master < 0:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        self.master = -1
        if self.process.stderr is not None:
            self.process.stderr.close()


class GuestConsole(Console):
    """The console of a `pyvmm run`: a guest that hangs is shown with the state of all its vCPUs."""

    def last_words(self) -> str:
        self.send(CTRL_A + "r")
        end = self.clock() + DUMP_S
        while self.clock() < end and self._read(LOOK_S):
            pass
        return super().last_words()


PYVMM_RUN = (sys.executable, "-m", "pyvmm", "run")


def pyvmm_run(*args: str) -> GuestConsole:
    return GuestConsole(*PYVMM_RUN, *args)


class SerialLine(Dialog):
    """The host's end of the serial port of a Machine in this process: ``Machine(serial=line.chardev)``. Here what is
    expected is text, as of a Console, and no pattern.
    """

    def expect(self, pattern: str | re.Pattern[str], timeout_s: float = LIMIT_S) -> str:
        return super().expect(re.escape(pattern) if isinstance(pattern, str) else pattern, timeout_s)
