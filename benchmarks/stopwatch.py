"""One launch of a program, timed from outside: to its first byte of output, to texts in it, to its end.

The clock starts just before the program is, as a shell would start it, and reads what it says as it comes. After the
first byte the reader naps a little between looks, 1/200 of the time that has passed: a reader that is woken for every
character of a console would be a load of its own on a small machine, and one that wakes half a percent late is none.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NAP_PART = 1 / 200
LONGEST_NAP_S = 0.05
READ_BYTES = 1 << 16
# For ``until``: whatever it says first.
FIRST_BYTE = "first byte"
# Of what a program said, when it did not do what it should.
WORDS = 300


class Failed(Exception):
    """A launch that did not come to what was waited for; the message says why, for the report."""


class Launch(NamedTuple):
    """Nanoseconds from the start. ``first_ns`` None: it said nothing. ``marks`` has the texts that came."""

    first_ns: int | None
    marks: dict[str, int]
    end_ns: int
    cpu_ns: int
    status: int
    said: bytes


class Running:
    """A program under way, what it said so far and when."""

    def __init__(
        self, command: Sequence[str], marks: Mapping[str, bytes], env: Mapping[str, str] | None, pass_fds: Sequence[int]
    ) -> None:
        self.waited_for = dict(marks)
        self.marks: dict[str, int] = {}
        self.said = bytearray()
        self.first_ns: int | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by end()
        pipe, self._output = os.pipe()[::-1]
        self.start_ns = time.perf_counter_ns()
        try:
            # No preexec_fn: with one, the parent would be copied instead of shared until the program runs.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=self._errors, env=env, pass_fds=pass_fds
            )
        except OSError:
            self._errors.close()
            os.close(self._output)
            raise
        finally:
            os.close(pipe)

    def fileno(self) -> int:
        return self._output

    def take(self) -> bool:
        """Read what is there: False at the end of its output."""
        data = os.read(self._output, READ_BYTES)
        now_ns = time.perf_counter_ns() - self.start_ns
        if not data:
            return False
        if self.first_ns is None:
            self.first_ns = now_ns
        # A text may come in two pieces.
        longest = max(map(len, self.waited_for.values()), default=0)
        fresh = bytes(self.said[max(0, len(self.said) - longest) :]) + data
        self.said += data
        for name, text in list(self.waited_for.items()):
            if text in fresh:
                self.marks[name] = now_ns
                del self.waited_for[name]
        return True

    def nap(self) -> None:
        time.sleep(min(LONGEST_NAP_S, (time.perf_counter_ns() - self.start_ns) * 1e-9 * NAP_PART))

    def kill(self) -> None:
        if self.process.returncode is None:
            # Not Popen's: that would reap it, and its account with it.
            os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> Launch:
        """Wait for its end and take its account."""
        try:
            _, status, usage = os.wait4(self.process.pid, 0)
            end_ns = time.perf_counter_ns() - self.start_ns
            self.process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            self._close_output()
        cpu_ns = round((usage.ru_utime + usage.ru_stime) * 1e9)
        return Launch(self.first_ns, self.marks, end_ns, cpu_ns, self.process.returncode, bytes(self.said))

    def words(self) -> str:
        """The last that it said, on standard error before all, in one line."""
        self._errors.seek(0)
        text = self._errors.read() or bytes(self.said)
        lines = text.decode("utf-8", "replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-3:])[-WORDS:]

    def close(self) -> None:
        """Give everything back; a program that still runs is killed. Idempotent."""
        if self.process.returncode is None:
            self.kill()
            self.end()
        self._close_output()
        self._errors.close()

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


def launch(
    command: Sequence[str],
    marks: Mapping[str, bytes] | None = None,
    *,
    limit_s: float,
    until: str = "",
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Launch:
    """Start the program and see it through, or up to the mark ``until``, where it is killed.

    Failed where it is not over after ``limit_s`` seconds, or ends without having said all of ``marks``.
    """
    running = Running(command, marks or {}, env, pass_fds)
    try:
        watch(running, limit_s, until)
        launched = running.end()
        if running.waited_for:
            missing = " and ".join(running.waited_for)
            raise Failed(f"ended with status {launched.status} before {missing}: {running.words()}")
        return launched
    finally:
        running.close()


def watch(running: Running, limit_s: float, until: str) -> None:
    """Take its output until it ends; or until the mark has come, when it is killed, or FIRST_BYTE, when it is not.

    Failed after the limit.
    """
    poll = select.poll()
    poll.register(running, select.POLLIN)
    deadline = time.monotonic() + limit_s
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            running.kill()
            said = running.words()
            raise Failed(f"not over after {limit_s:g} s" + (f"; it said: {said}" if said else ""))
        if not running.take():
            return
        if until == FIRST_BYTE:
            return
        if until in running.marks:
            running.kill()
            return
        running.nap()


class AtOnce(NamedTuple):
    """Of many launches: nanoseconds from the first's start until all had said something, and until all had gone."""

    first_ns: int
    end_ns: int


def at_once(commands: Sequence[Sequence[str]], *, limit_s: float, env: Mapping[str, str] | None = None) -> AtOnce:
    """All of them, started one after the other without waiting. Failed where one is late or said nothing."""
    runnings: list[Running] = []
    start_ns = time.perf_counter_ns()
    try:
        for command in commands:
            runnings.append(Running(command, {}, env, ()))
        first_ns = take_all(runnings, limit_s)
        for running in runnings:
            running.end()
            if running.first_ns is None:
                raise Failed(f"one of {len(runnings)} ended with status {running.process.returncode} and said nothing: "
                             f"{running.words()}")  # fmt: skip
        return AtOnce(first_ns - start_ns, time.perf_counter_ns() - start_ns)
    finally:
        for running in runnings:
            running.close()


def take_all(runnings: Sequence[Running], limit_s: float) -> int:
    """Until the last of them has closed its output: when the last first byte came."""
    poll = select.poll()
    by_fd = {running.fileno(): running for running in runnings}
    for running in runnings:
        poll.register(running, select.POLLIN)
    deadline = time.monotonic() + limit_s
    last_ns = 0
    while by_fd:
        left_s = deadline - time.monotonic()
        ready = poll.poll(left_s * 1000) if left_s > 0 else []
        if not ready:
            raise Failed(f"{len(by_fd)} of {len(runnings)} not over after {limit_s:g} s")
        for fd, _ in ready:
            running = by_fd[fd]
            silent = running.first_ns is None
            if not running.take():
                poll.unregister(fd)
                del by_fd[fd]
            elif silent:
                last_ns = time.perf_counter_ns()
    return last_ns
