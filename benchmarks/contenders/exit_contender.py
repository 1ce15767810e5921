"""A contender of ``pyvmm bench exits``: a VMM in a process of its own, whose guest takes turns through the mailbox.

Between its turns a process is stopped by SIGSTOP: whoever waits takes nothing from whoever is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.mailbox import EXPECTED, WORD, Ended, Mailbox, Memory, Plan, Ticks

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0  # an emulated host takes its time
LOOK_S = 0.002
# Before we leave a CPU to those that are pinned to it.
ALLOWED = os.sched_getaffinity(0)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
# What VMMs call the threads of their vCPUs: QEMU and pyvmm and the loops here, kvmtool, Firecracker, cloud-hypervisor.
VCPU_NAME = re.compile(r"(?:CPU |kvm-vcpu-|fc_vcpu |vcpu)(\d+)")
# Of what it said, when it ended early.
WORDS = 300


class CantRun(Exception):
    """Why a contender can't take part, for the report."""


class Kind:
    """A contender in general: its name, whether it is there, what it can't do.

    ``ours``: a regression of it is one of pyvmm's.
    """

    name = ""
    ours = False

    def version(self) -> str | None:
        """What is measured: for the head of the report. None for what comes with pyvmm."""
        return None

    def why_not(self, case: ExitCase) -> str:
        """The reason why it can't run this case; empty where it can."""
        return ""

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        """The process. ``directory`` is for files; those of the guest are there: NAME.rom, NAME.bin."""
        raise NotImplementedError

    def start(self, case: ExitCase, directory: Path, pin: int | None) -> Contender:
        """Not yet running its guest: ``wait_until_ready`` it."""
        return Contender(self, case, self.command(case, directory), pin)


class Contender:
    """A running one."""

    # Whether its first line of output says where guest RAM is, and what the TSC counts.
    tells_memory = False

    def __init__(self, kind: Kind, case: ExitCase, command: list[str], pin: int | None) -> None:
        self.kind = kind
        self.case = case
        self.tsc_khz = 0
        self.mailbox: Mailbox | None = None
        self.said: dict[str, str] = {}
        self._heard = ""
        self._memory: Memory | None = None
        self._start = time.monotonic()
        affinity = ALLOWED if pin is None or case.threads else {pin}
        self._pin = pin
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self.process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self.tells_memory else self._errors,
            stderr=self._errors,
            preexec_fn=lambda: settle(affinity),
        )

    # -- set-up --------------------------------------------------------------------------------------------------

    def wait_until_ready(self) -> None:
        """Its guest waits for a turn, and is stopped. CantRun where that does not come about."""
        while not self.try_ready():
            time.sleep(LOOK_S)

    def try_ready(self) -> bool:
        """Look whether its guest waits for a turn; then it is stopped. CantRun where it will never do so."""
        ended = self.process.poll() is not None
        try:
            mailbox = self._find_mailbox()
            ready = mailbox is not None and mailbox.ready
        except Ended:
            mailbox, ended, ready = None, True, False
        except OSError as error:
            raise CantRun(f"/proc/PID/mem of another process: {error.strerror}: run it as root, or outside of the "
                          "container") from None  # fmt: skip
        if mailbox is not None and ready:
            self.mailbox = mailbox
            mailbox.put(EXPECTED, WORD.pack(self.case.cpus - 1))
            self.stop()
            if self._pin is not None and self.case.threads:
                place_threads(self.process.pid, self._pin)
            return True
        if ended:
            raise CantRun(f"ended at once: {self.words()}")
        if time.monotonic() > self._start + START_S:
            raise CantRun(f"was not ready after {START_S:g} s")
        return False

    def _find_mailbox(self) -> Mailbox | None:
        """None while its memory is not to be found. Ended, and OSError where /proc does not let us look."""
        if self._memory is None:
            self._memory = Memory(self.process.pid)
        base = self._told() if self.tells_memory else self._memory.find_guest()
        return None if base is None else Mailbox(self._memory, base)

    def _told(self) -> int | None:
        """Where guest RAM is: its first line, words in pairs of name and value. None while that is not there."""
        if not self.said:
            # Without buffers the line and its end are two writes, and only the first may be there by now.
            self._heard += read_line(self.process.stdout, time.monotonic())
            if not self._heard.endswith("\n"):
                return None
            words = self._heard.split()
            self.said = dict(zip(words[::2], words[1::2], strict=False))
            self.tsc_khz = int(self.said["tsc_khz"])
        return int(self.said["memory"], 0)

    def words(self) -> str:
        """The last that a dead process said, in one line."""
        status = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-3:])[-WORDS:] or f"status {status}"

    # -- turns ---------------------------------------------------------------------------------------------------

    def go(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """All its threads stand still when this returns."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def turn(self, plan: Plan, limit_s: float) -> Ticks:
        """Hung where the guest does not come back."""
        assert self.mailbox is not None
        self.go()
        try:
            ticks = self.mailbox.take(plan, limit_s, lambda: self.process.poll() is None)
        except BaseException:
            self.kill()  # a guest that hangs in the kernel could not even be stopped
            raise
        self.stop()
        return ticks

    def others(self) -> list[int]:
        """How many accesses each vCPU beside the first has made."""
        assert self.mailbox is not None
        return [self.mailbox.count_of_other(cpu) for cpu in range(1, self.case.cpus)]

    def own(self) -> dict[str, float] | None:
        """The VMM's own share of an access, ns: p50, p99, mean, min. None where it can't tell."""
        return None

    def kill(self) -> None:
        """At once, also where it is stopped or hangs. The process is reaped by ``close``."""
        if self.process.poll() is None:
            self.process.kill()

    def close(self) -> None:
        self.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                stream.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def settle(affinity: set[int]) -> None:
    """In the child, before its program: where it may run, and that it goes when we go."""
    os.sched_setaffinity(0, affinity)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def place_threads(pid: int, pin: int) -> None:
    """Where threads meet: vCPU 0, which is measured, on ``pin`` as everywhere else, the others on the CPUs beside it.

    CPUs of a shared host run at different speeds: left to the scheduler, which one it is would decide.
    """
    cpus = [pin, *sorted(ALLOWED - {pin}, reverse=True)]
    elsewhere = set(cpus[1:]) or {pin}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # one that has ended
            found = VCPU_NAME.match((task / "comm").read_text())
            os.sched_setaffinity(int(task.name), {cpus[int(found[1]) % len(cpus)]} if found else elsewhere)


def read_line(stream: IO[bytes] | None, end: float) -> str:
    """What comes until a line's end, or ``end`` (monotonic), or the stream's."""
    import select

    assert stream is not None
    said = b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        more = os.read(stream.fileno(), 1) if ready else b""
        if not more:
            break
        said += more
    return said.decode("utf-8", "replace")


def environment() -> dict[str, str]:
    """For children: pyvmm is found where it is built in place and not installed."""
    found: dict[str, str] = dict(os.environ)
    spec: Any = importlib.util.find_spec("pyvmm")
    if spec is not None and spec.origin is not None:
        top = str(Path(spec.origin).resolve().parents[1])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [top, found.get("PYTHONPATH")]))
    return found
