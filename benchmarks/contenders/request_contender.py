"""A contender whose guest does requests, so many a turn, as the mailbox says; and what they cost besides time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pyvmm_benchmarks.contenders.exit_contender import VCPU_NAME, Contender, read_line
from pyvmm_benchmarks.mailbox import Mailbox

ANSWER_S = 10.0


class Answer(Protocol):
    """What a turn gave. ``sum`` is the same for all who have moved the same; None where there is none."""

    @property
    def ticks(self) -> int: ...
    @property
    def sum(self) -> int | None: ...
    @property
    def kicks(self) -> int: ...
    @property
    def interrupts(self) -> int: ...


class RequestCase(Protocol):
    """``requests`` a turn; the rest is what exit_contender.py asks of a case."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def requests(self) -> int: ...
    def take(self, mailbox: Mailbox, count: int, limit_s: float, alive: Callable[[], bool]) -> Answer:
        """One turn. Hung where its end does not come within ``limit_s``, or the process is gone."""

    def _asdict(self) -> dict[str, Any]: ...


class RequestContender(Contender):
    """A running one."""

    def prepare(self, case: RequestCase, count: int) -> None:
        """What the host does before such a turn; the process is stopped."""

    def requests(self, case: RequestCase, count: int, limit_s: float) -> Answer:
        """A turn of so many requests; the process is stopped before and after it."""
        assert self.mailbox is not None
        self.prepare(case, count)
        self.go()
        try:
            answer = case.take(self.mailbox, count, limit_s, lambda: self.process.poll() is None)
        except BaseException:
            self.kill()
            raise
        self.stop()
        return answer

    def python_calls(self, on: bool) -> int | None:
        """Calls of Python since counting was turned on; None where there is no Python."""
        return None

    def switches(self) -> int:
        """How often one of its threads has gone to sleep, and so has been woken again (proc_pid_status(5))."""
        total = 0
        for status in Path(f"/proc/{self.process.pid}/task").glob("*/status"):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    total += int(line.split()[1])
        return total

    def own_ns(self) -> int:
        """Processor time of all its threads but those of vCPUs (Documentation/scheduler/sched-stats.rst)."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            if not VCPU_NAME.match((task / "comm").read_text()):
                total += int((task / "schedstat").read_text().split()[0])
        return total


class OwnRequests(RequestContender):
    """pyvmm's: request_child.py."""

    tells_memory = True

    def python_calls(self, on: bool) -> int | None:
        assert self.process.stdin is not None
        self.go()
        self.process.stdin.write(b"on\n" if on else b"off\n")
        self.process.stdin.flush()
        said = read_line(self.process.stdout, time.monotonic() + ANSWER_S)
        self.stop()
        return int(said)


class SystemCalls:
    """How many system calls a process makes meanwhile, by perf; ``count`` is None where perf does not count."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.count: int | None = None

    def __enter__(self) -> SystemCalls:
        control, self._control = os.pipe()
        self._acks, acks = os.pipe()
        command = ["perf", "stat", "-x", ",", "-D", "-1", "-e", "raw_syscalls:sys_enter", "-p", str(self.pid)]
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                [*command, "--control", f"fd:{control},{acks}"], pass_fds=(control, acks), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError:
            self._process = None
        os.close(control)
        os.close(acks)
        self._say(b"enable\n")
        return self

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._control, word)
            os.read(self._acks, 16)
        except OSError:
            pass  # it has given up

    def __exit__(self, *exc: object) -> None:
        import signal

        self._say(b"disable\n")
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            for line in self._process.communicate()[1].splitlines():
                fields = line.split(",")
                if len(fields) > 2 and fields[2].startswith("raw_syscalls") and fields[0].isdigit():
                    self.count = int(fields[0])
        os.close(self._control)
        os.close(self._acks)
