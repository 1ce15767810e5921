"""Guests that do what they are told over their serial port, under pyvmm and under QEMU: what benchmarks of a disk and
of the network share.

Every guest has a process of its own (``measure.Contender``) that builds the machine and then works through requests:
a line of JSON in, bytes for the guest; the guest answers with a line of text; a line of JSON out, with that text and
what the turn cost in exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import measure

READY = "READY"  # what a guest says when it can be told something
READY_S = 300.0  # Linux in an emulated lab on a busy host takes its time
TURN_S = 60.0

# Exits by reason, port and direction: their count, and the ns outside of KVM_RUN.
Rows = dict[str, tuple[float, float]]


# -- in the child ------------------------------------------------------------------------------------------------


class Line:
    """The host's end of the guest's serial port: whole lines of what it says."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._lines: list[str] = []
        self._heard: list[str] = []
        self._changed = threading.Condition()

    def hear(self, data: bytes) -> None:
        """Bytes from the guest."""
        self._said += data
        if b"\n" in data:
            *lines, rest = bytes(self._said).split(b"\n")
            self._said = bytearray(rest)
            with self._changed:
                self._lines += [line.decode("ascii", "replace").strip() for line in lines]
                self._changed.notify_all()

    def until(self, wanted: Callable[[str], bool], timeout_s: float) -> str:
        """The next line that is wanted."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._lines, timeout_s):
                    heard = "\n".join([*self._heard[-30:], bytes(self._said).decode("ascii", "replace")])
                    raise SystemExit(f"the guest said nothing for {timeout_s} s; the last was\n{heard}")
                line = self._lines.pop(0)
            self._heard.append(line)
            if wanted(line):
                return line


EXITS = "kvm:kvm_userspace_exit"


class Counted:
    """How often the kernel comes by these places (tracepoints) for one process, by perf; ``counts`` has those that it
    does count.
    """

    def __init__(self, pid: int, places: Sequence[str] = (EXITS,)) -> None:
        events = [word for place in places for word in ("-e", place)]
        self.command = ["perf", "stat", "-x", ",", "-D", "-1", *events, "-p", str(pid)]
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Counted:
        control, self._control = os.pipe()
        self._acks, acks = os.pipe()
        self._process: subprocess.Popen[str] | None = None
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [*self.command, "--control", f"fd:{control},{acks}"],
                pass_fds=(control, acks),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        os.close(control)
        os.close(acks)
        self._say("enable")
        return self

    def _say(self, word: str) -> None:
        with contextlib.suppress(OSError):  # perf has given up
            os.write(self._control, word.encode() + b"\n")
            os.read(self._acks, 16)

    def __exit__(self, *exc: object) -> None:
        self._say("disable")
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            for row in self._process.communicate()[1].splitlines():
                fields = row.split(",")
                if len(fields) > 2 and ":" in fields[2] and fields[0].isdigit():
                    self.counts[fields[2]] = int(fields[0])
        os.close(self._control)
        os.close(self._acks)


class Monitor:
    """QEMU's human monitor, at a socket."""

    PROMPT = b"(qemu) "

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TURN_S)
        self._socket.connect(path)
        self._answer()

    def say(self, command: str) -> None:
        """Returns when it is carried out."""
        self._socket.sendall(command.encode() + b"\n")
        self._answer()

    def _answer(self) -> None:
        heard = b""
        while not heard.endswith(self.PROMPT):
            more = self._socket.recv(4096)
            if not more:
                raise SystemExit("QEMU's monitor is gone")
            heard += more

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()


def child(work: dict[str, Any]) -> None:
    """Build the machine, say hello when the guest is ready, then serve requests until there are no more.

    ``work``: "contender", "memory_mib" and what is booted; an IDE disk's "image"; beside or instead of it "options" of
    the Machine's, "words" of QEMU's, and a "place", which a socket is made beside.
    """
    (qemu if work["contender"] == "qemu" else pyvmm)(work)


def is_answer(line: str) -> bool:
    """Kernel messages may stand between: an answer begins with T (times) or E (error)."""
    return line[:2] in ("T ", "E ") or line.startswith("failed")


def serve(
    line: Line,
    send: Callable[[bytes], object],
    pid: int,
    rows: Callable[[], Rows],
    stand: Callable[[], object],
    go: Callable[[], object],
) -> None:
    """``stand`` and ``go``: between its turns the guest stands still, and so does its time."""
    stand()
    for text in sys.stdin:
        request = json.loads(text)
        before = rows()
        go()
        with Counted(pid) if request["perf"] else contextlib.nullcontext() as counted:
            send(bytes(request["bytes"]))
            said = line.until(is_answer, TURN_S)
        stand()
        used = {}
        for key, new in rows().items():
            old = before.get(key, (0, 0))
            used[key] = (new[0] - old[0], new[1] - old[1])
        exits = None if counted is None else counted.counts.get(EXITS)
        print(json.dumps({"said": said, "exits": exits, "rows": used}), flush=True)


def pyvmm(work: dict[str, Any]) -> None:
    import pyvmm
    from pyvmm.block.options import DriveOptions
    from pyvmm.chardev import CallableChardev

    line = Line()
    serial = CallableChardev(line.hear)
    if work["contender"] == "window":
        from pyvmm.boards.pc import Pc

        Pc.gathered = lambda board: []  # type: ignore[method-assign]

    def rows() -> Rows:
        return {
            f"{row.reason} {'' if row.address is None else hex(row.address)} {row.direction}": (row.count, row.sum_ns)
            for row in m.exit_stats()
        }

    options = {name: work[name] for name in ("kernel", "initrd", "append", "memory_mib") if name in work}
    options |= work.get("options", {})
    if "image" in work:
        options["drives"] = [DriveOptions(work["image"])]
    with pyvmm.Machine(machine="pc", serial=serial, **options) as m:
        # Of a vCPU that halts in KVM nothing can be asked before it is back: so ask first.
        tsc_khz = m.cpus[0].vcpu.tsc_khz
        m.resume()
        line.until(lambda said: said == READY, READY_S)
        print(json.dumps({"tsc_khz": tsc_khz}), flush=True)
        serve(line, serial.feed, os.getpid(), rows, m.pause, m.resume)


def qemu(work: dict[str, Any]) -> None:
    command = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-m", str(work["memory_mib"])]
    command += ["-no-user-config", "-nodefaults", "-display", "none", "-vga", "none", "-serial", "stdio"]
    # Made up for lost ticks, a PIT would keep software KVM from ever taking another interrupt.
    command += ["-global", "kvm-pit.lost_tick_policy=discard"]
    command += work.get("words", [])
    if "image" in work:
        command += ["-drive", f"file={work['image']},if=ide,format=raw,cache=writeback,aio=threads"]
    if "PYVMM_LAB" in os.environ:
        command += ["-cpu", "host"]
    for name in ("kernel", "initrd", "append"):
        if name in work:
            command += [f"-{name}", work[name]]
    monitor = f"{work.get('image') or work['place']}.monitor"
    command += ["-monitor", f"unix:{monitor},server=on,wait=off"]
    line = Line()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def listen() -> None:
            with contextlib.suppress(OSError):  # closed in the end
                while data := stdout.read(4096):
                    line.hear(data)

        threading.Thread(target=listen, daemon=True).start()
        try:
            line.until(lambda said: said == READY, READY_S)
            print(json.dumps({"pid": process.pid}), flush=True)
            with Monitor(monitor) as told:
                serve(line, stdin.write, process.pid, dict, lambda: told.say("stop"), lambda: told.say("cont"))
        finally:
            process.terminate()  # it flushes and closes the image


# -- in the benchmark --------------------------------------------------------------------------------------------


class Ended(SystemExit):
    """A contender's process is gone, or its guest said nothing for too long."""


class Guest(measure.Contender):
    """A child with its guest; ``hello`` is what it said when that was ready."""

    def __init__(self, script: str, work: dict[str, Any]) -> None:
        super().__init__(measure.child_command(script, work))
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"{self.process.args!r} ended early, with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, request: bytes, *, perf: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"bytes": list(request), "perf": perf}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(READY_S)
        return ""


class Used:
    """What the timed turns of one contender took: time a turn, and pyvmm's exits with its own time in them."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []  # a list a set of processes, a value a round
        self.units = 0
        self.exits: float | None = None  # a unit, by perf
        self.rows: dict[str, list[float]] = {}

    def take(self, answer: dict[str, Any], units: int) -> None:
        self.units += units
        for key, (count, ns) in answer["rows"].items():
            total = self.rows.setdefault(key, [0, 0])
            total[0] += count
            total[1] += ns

    def add(self, other: Used) -> None:
        """What another set of processes gave."""
        self.times += other.times
        self.units += other.units
        self.exits = self.exits if other.exits is None else other.exits
        for key, numbers in other.rows.items():
            total = self.rows.setdefault(key, [0, 0])
            for n, number in enumerate(numbers):
                total[n] += number

    @property
    def own_us(self) -> float:
        """pyvmm's own time, a unit."""
        return sum(ns for _, ns in self.rows.values()) * measure.US_PER_NS / self.units

    def print_rows(self, unit: str) -> None:
        """Where pyvmm's own time went."""
        for key, (count, ns) in sorted(self.rows.items(), key=lambda item: -item[1][1])[:8]:
            if count:
                each = f"{count / self.units:>8.2f} a {unit}{ns / count:>9.0f} ns each"
                print(f"{'':<38}{key:<20}{each}{ns * measure.US_PER_NS / self.units:>8.2f} us a {unit}")


def ratios(theirs: Used, ours: Used) -> tuple[float, float, float]:
    """How many times as fast ours was, median and 95% interval, by rounds."""
    return ratios_of(theirs.times, ours.times)


def ratios_of(theirs: list[list[float]], ours: list[list[float]]) -> tuple[float, float, float]:
    """The same of times: a list a set, a value a round."""
    groups = [[q / p for q, p in zip(x, y, strict=True)] for x, y in zip(theirs, ours, strict=True)]
    low, high = measure.interval(groups)
    return measure.median([value for each in groups for value in each]), low, high
