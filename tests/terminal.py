"""A program on a pseudo-terminal, driven as a person would: type, wait for words, see how it ends.

    with Terminal(["pyvmm", "run", "--kernel", kernel, ...]) as terminal:
        terminal.expect("# ", timeout_s=60)
        terminal.type("poweroff -f\\n")
        assert terminal.wait(timeout_s=60) == 0
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self


class Terminal:
    """The person's side. Every wait has a limit, and fails with all that the program printed so far."""

    def __init__(
        self, command: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None
    ) -> None:
        self.transcript = b""
        self._seen = 0  # what expect() has already matched
        self._master, self._slave = os.openpty()
        self.settings_before = termios.tcgetattr(self._slave)
        # setsid makes it the controlling terminal, or ctrl-C would be no more than a byte that is lost.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**os.environ, **(env or {})},
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._master, selectors.EVENT_READ)
        # Tells of the program's end: the terminal itself stays open here, for its settings to be looked at.
        self._pidfd = os.pidfd_open(self.process.pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its group is there once setsid has run
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self._selector.close()
        for fd in (self._pidfd, self._master, self._slave):
            os.close(fd)

    @property
    def settings(self) -> list[object]:
        """The terminal's present settings: equal to `settings_before` where a program has restored them."""
        return termios.tcgetattr(self._slave)

    def type(self, text: str) -> None:
        """What a person types; "\\n" is the return key."""
        data = text.replace("\n", "\r").encode()
        while data:
            data = data[os.write(self._master, data) :]

    def expect(self, words: str, timeout_s: float = 30.0) -> str:
        """Waits for these words in what came since the last match; returns that text up to their end."""
        wanted, deadline = words.encode(), time.monotonic() + timeout_s
        while (at := self.transcript.find(wanted, self._seen)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"{words!r} did not come within {timeout_s} s; printed: {self.text}")
        start, self._seen = self._seen, at + len(wanted)
        return self.transcript[start : self._seen].decode(errors="replace")

    def wait(self, timeout_s: float = 30.0) -> int:
        """Waits for the program's end, collecting what it prints; its exit status, or minus the signal."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if not self._read(deadline) and self.process.poll() is None:
                raise AssertionError(f"the program did not end within {timeout_s} s; printed: {self.text}")
        self._drain()
        return self.process.returncode

    @property
    def text(self) -> str:
        """All that was printed."""
        return self.transcript.decode(errors="replace")

    def _read(self, deadline: float) -> bool:
        """Waits for output; false if the program has ended or the deadline has come and there is none."""
        events = self._selector.select(max(0.0, deadline - time.monotonic()))
        if any(key.fd == self._master for key, _ in events):
            self.transcript += os.read(self._master, 1 << 16)
            return True
        return False

    def _drain(self) -> None:
        os.set_blocking(self._master, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._master, 1 << 16):
                self.transcript += data
