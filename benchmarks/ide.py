"""The IDE disk: sectors a second by PIO and by the BIOS, pyvmm beside QEMU, natively, in one interleaved run.

One guest program (guests/ide.S) boots under SeaBIOS from the same disk image in every contender, and then does
what it is told over its serial port: so many commands of a case, timed by RDTSC.

    qemu        qemu-system-x86_64 -M pc, IDE, cache=writeback, aio=threads, its in-kernel irqchip
    window      pyvmm as it comes, KVM gathering no writes: every word of REP OUTSW is an exit
    coalesced   pyvmm with KVM's coalesced PIO on the data port and the registers before the command register

The contenders take turns, A B C C B A, each on a copy of the image of its own (an image is open for writing once);
whose turn it is not halts. A ratio is that of one round's turns: QEMU's time by pyvmm's; the figure is the
median over all rounds with its bootstrap 95% interval. At the end the copies must be the same.

Exits a sector: KVM's tracepoint kvm_userspace_exit counted by perf where that works (perf stat, root), in a turn
that is not timed. For pyvmm also by its exit profiler, which tells where the time goes as well: `own` is
what was spent between leaving KVM_RUN and entering it again, the rest is the guest's and KVM's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import measure
from measure import interval, median

# As the guest's table `cases`: name, sectors a command, commands a turn, the mark it should reach (window, coalesced).
CASES = (
    ("PIO read, 1 a command", 1, 1000, (1.2, 1.2)),
    ("PIO read, 128", 128, 16, (1.2, 1.2)),
    ("PIO READ MULTIPLE 16, 128", 128, 64, (1.2, 1.2)),
    ("PIO write, 1 a command", 1, 100, (1.1, 2.0)),
    ("PIO write, 128", 128, 1, (1.1, 2.0)),
    ("PIO WRITE MULTIPLE 16, 128", 128, 1, (1.1, 2.0)),
    ("int 13h read, 1", 1, 400, (1.2, 1.2)),
    ("int 13h read, 64", 64, 30, (1.2, 1.2)),
    ("int 13h write, 1", 1, 100, (1.1, 2.0)),
    ("int 13h write, 64", 64, 2, (1.1, 2.0)),
)
NOTHING = len(CASES)  # the case that does nothing: what a turn's own serial traffic costs in exits

CONTENDERS = ("qemu", "window", "coalesced")
IMAGE_MIB = 32
SECTOR_BYTES = 512
READY_S = 60.0
TURN_S = 60.0
# Data port and registers, without the command register, whose writes must arrive at once.
GATHERED_PORT, GATHERED_PORTS = 0x1F0, 7


# -- in the child: a guest that is told what to do --------------------------------------------------------------


class Line:
    """The host's end of the guest's serial port: whole lines of what it says."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._lines: list[str] = []
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

    def next(self, timeout_s: float) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: self._lines, timeout_s):
                raise SystemExit(f"the guest said nothing for {timeout_s} s; the last was {bytes(self._said)!r}")
            return self._lines.pop(0)

    def until(self, mark: str, timeout_s: float) -> None:
        while self.next(timeout_s) != mark:
            pass


class ExitCount:
    """KVM's own count of exits to user space of one process, by perf; None where perf does not count."""

    def __init__(self, pid: int) -> None:
        self.command = ["perf", "stat", "-x", ",", "-D", "-1", "-e", "kvm:kvm_userspace_exit", "-p", str(pid)]

    def __enter__(self) -> ExitCount:
        control, self._control = os.pipe()
        self._acks, acks = os.pipe()
        self.count: int | None = None
        try:
            self._process = subprocess.Popen(
                [*self.command, "--control", f"fd:{control},{acks}"],
                pass_fds=(control, acks),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError:
            self._process = None
        os.close(control)
        os.close(acks)
        self._say("enable")
        return self

    def _say(self, word: str) -> None:
        if self._process is not None:
            try:
                os.write(self._control, word.encode() + b"\n")
                os.read(self._acks, 16)  # "ack", or the end where perf has given up
            except OSError:
                pass

    def __exit__(self, *exc: object) -> None:
        self._say("disable")
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            words = self._process.communicate()[1]
            for row in words.splitlines():
                fields = row.split(",")
                if len(fields) > 2 and fields[2].startswith("kvm:") and fields[0].isdigit():
                    self.count = int(fields[0])
        os.close(self._control)
        os.close(self._acks)


def children(work: dict[str, Any]) -> None:
    """A line of JSON for every line of JSON: {"case", "count", "perf"} -> {"ticks", "polls", "exits", "rows"}."""
    {"qemu": qemu}.get(work["contender"], pyvmm)(work)


def serve(line: Line, send: Any, pid: int, rows: Any) -> None:
    turn = 0
    for text in sys.stdin:
        request = json.loads(text)
        turn = (turn + 1) % 10
        before = rows()
        with ExitCount(pid) if request["perf"] else contextlib.nullcontext() as counted:
            send(bytes([request["case"], request["count"] & 0xFF, request["count"] >> 8, ord("0") + turn]))
            kind, tag, *numbers = line.next(TURN_S).split()
        if kind != "T" or tag != str(turn):
            raise SystemExit(f"{CASES[request['case']][0]}: the guest failed with {kind} {numbers}")
        after = rows()
        answer = {
            "ticks": int(numbers[0], 16),
            "polls": int(numbers[1], 16),
            "exits": None if counted is None else counted.count,
            "rows": {key: [new - old for new, old in zip(row, before.get(key, (0, 0)), strict=True)]
                     for key, row in after.items()},
        }  # fmt: skip
        print(json.dumps(answer), flush=True)


def pyvmm(work: dict[str, Any]) -> None:
    import pyvmm
    from pyvmm.block.options import DriveOptions
    from pyvmm.chardev import CallableChardev

    line = Line()
    serial = CallableChardev(line.hear)

    def rows() -> dict[str, tuple[float, float]]:
        return {
            f"{row.reason} {'' if row.address is None else hex(row.address)} {row.direction}": (row.count, row.sum_ns)
            for row in m.exit_stats()
        }

    drive = DriveOptions(work["image"])
    with pyvmm.Machine(machine="pc", memory_mib=measure.MEMORY_MIB, drives=[drive], serial=serial) as m:
        if work["contender"] == "coalesced":
            m.coalesce(m.pio, GATHERED_PORT, GATHERED_PORTS)
        m.resume()
        line.until("READY", READY_S)
        print(json.dumps({"tsc_khz": m.cpus[0].vcpu.tsc_khz}), flush=True)
        serve(line, serial.feed, os.getpid(), rows)


def qemu(work: dict[str, Any]) -> None:
    command = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-m", str(measure.MEMORY_MIB)]
    command += ["-no-user-config", "-nodefaults", "-display", "none", "-vga", "none", "-serial", "stdio"]
    # Made up for lost ticks, a PIT would keep software KVM from ever taking another interrupt.
    command += ["-global", "kvm-pit.lost_tick_policy=discard"]
    command += ["-drive", f"file={work['image']},if=ide,format=raw,cache=writeback,aio=threads"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    line = Line()
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def listen() -> None:
            while data := stdout.read(4096):
                line.hear(data)

        threading.Thread(target=listen, daemon=True).start()
        try:
            line.until("READY", READY_S)
            print(json.dumps({}), flush=True)
            serve(line, stdin.write, process.pid, dict)
        finally:
            process.terminate()  # it flushes and closes the image


# -- the benchmark -----------------------------------------------------------------------------------------------


def build_guest(directory: Path) -> bytes:
    obj, elf, binary = (str(directory / name) for name in ("ide.o", "ide.elf", "ide.bin"))
    subprocess.run(["as", "--32", "-o", obj, str(measure.HERE / "guests" / "ide.S")], check=True)
    link = ["ld", "-melf_i386", "-N", "-e0", "--no-warn-rwx-segments", "-Ttext=0x7c00", "-o", elf, obj]
    subprocess.run(link, check=True)
    subprocess.run(["objcopy", "-O", "binary", elf, binary], check=True)
    return Path(binary).read_bytes()


class Guest(measure.Contender):
    def __init__(self, name: str, image: Path) -> None:
        super().__init__(measure.child_command(__file__, {"contender": name, "image": str(image)}))
        self.hello = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} ended early, with status {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, case: int, count: int, *, perf: bool = False) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "count": count, "perf": perf}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(READY_S)
        return ""


class Found:
    """One contender, one case."""

    def __init__(self) -> None:
        self.ticks: list[list[int]] = []  # a list a set, a value a round: its two turns together
        self.polls = 0
        self.sectors = 0
        self.exits: float | None = None  # a sector, by perf
        self.rows: dict[str, list[float]] = {}

    def take(self, answer: dict[str, Any], sectors: int, rows: bool) -> int:
        self.sectors += sectors
        self.polls += answer["polls"]
        if rows:
            for key, (count, ns) in answer["rows"].items():
                total = self.rows.setdefault(key, [0, 0])
                total[0] += count
                total[1] += ns
        return int(answer["ticks"])


def benchmark(args: argparse.Namespace, directory: Path) -> bool:
    image = directory / "disk.img"
    guest = build_guest(directory)
    content = guest + random.Random(1).randbytes(IMAGE_MIB * 2**20 - len(guest))
    image.write_bytes(content)
    names = [name for name in CONTENDERS if name in args.contenders]
    cases = [n for n, _ in enumerate(CASES) if not args.cases or n in args.cases]
    found = {name: [Found() for _ in CASES] for name in names}
    tick_s = 0.0
    for _ in range(args.sets):
        copies = {name: directory / f"{name}.img" for name in names}
        for copy in copies.values():
            shutil.copy(image, copy)
        started = {name: Guest(name, copies[name]) for name in names}
        try:
            tick_s = next((1e-3 / g.hello["tsc_khz"] for g in started.values() if "tsc_khz" in g.hello), tick_s)
            for case in cases:
                rounds(args, case, started, {name: found[name][case] for name in names})
        finally:
            for each in started.values():
                with each:
                    each.end()
        if len({hashlib.sha256(copy.read_bytes()).digest() for copy in copies.values()}) > 1:
            raise SystemExit("the contenders' images differ after the same requests")
    return report(args, cases, found, tick_s or 1e-3 / tsc_khz())


def tsc_khz() -> float:
    """Without pyvmm among the contenders: the processor's nominal frequency."""
    return float(measure.cpuinfo("cpu MHz")) * 1e3


def rounds(args: argparse.Namespace, case: int, started: dict[str, Guest], found: dict[str, Found]) -> None:
    _, per_command, commands, _ = CASES[case]
    count = max(1, round(commands * args.scale))
    sectors = count * per_command
    for name, guest in started.items():
        guest.turn(case, count)  # warm up
        found[name].ticks.append([])
        if found[name].exits is None:
            idle = guest.turn(NOTHING, 1, perf=True)["exits"]
            exits = guest.turn(case, count, perf=True)["exits"]
            if exits is not None and idle is not None:
                found[name].exits = (exits - idle) / sectors
    for _ in range(args.rounds):
        ticks = dict.fromkeys(started, 0)
        for name in (*started, *reversed(started)):
            ticks[name] += found[name].take(started[name].turn(case, count), sectors, rows=True)
        for name, value in ticks.items():
            found[name].ticks[-1].append(value)


def report(args: argparse.Namespace, cases: list[int], found: dict[str, list[Found]], tick_s: float) -> bool:
    print(f"{args.sets} sets of processes, {args.rounds} rounds each, two turns a round")
    head = f"{'sectors/s':>10}{'x QEMU':>8} {'(95%)':<14}{'mark':>5}{'exits':>8}{'polls':>7}{'us':>8}{'own':>7}"
    print(f"{'':<28}{'':<10}{head}   a sector")
    met = True
    for case in cases:
        title, per_command, commands, marks = CASES[case]
        sectors = 2 * per_command * max(1, round(commands * args.scale))
        for name, columns in found.items():
            one = columns[case]
            rate = sectors / (median([t for each in one.ticks for t in each]) * tick_s)
            text = f"{title if name == next(iter(found)) else '':<28}{name:<10}{rate:>10.0f}"
            if name != "qemu" and "qemu" in found:
                theirs = found["qemu"][case].ticks
                groups = [[q / p for q, p in zip(x, y, strict=True)] for x, y in zip(theirs, one.ticks, strict=True)]
                low, high = interval(groups)
                ratio = median([value for each in groups for value in each])
                mark = marks[name == "coalesced"]
                met &= ratio >= mark
                verdict = f"{mark:>4.1f}{'+' if ratio >= mark else '-'}"
                text += f"{ratio:>8.2f} {f'({low:.2f}-{high:.2f})':<14}{verdict}"
            else:
                text += f"{'':>8} {'':<14}{'':>5}"
            exits = "" if one.exits is None else f"{one.exits:.2f}"
            text += f"{exits:>8}{one.polls / one.sectors:>7.2f}{1e6 / rate:>8.1f}"
            if one.rows:
                text += f"{sum(ns for _, ns in one.rows.values()) * 1e-3 / one.sectors:>7.1f}"
            print(text)
            if args.ports:
                ports(one)
    print("exits: KVM's count of exits to user space (perf); own: of the us a sector, those outside of KVM_RUN")
    return met


def ports(one: Found) -> None:
    for key, (count, ns) in sorted(one.rows.items(), key=lambda item: -item[1][1])[:8]:
        if count:
            each = f"{count / one.sectors:>8.2f} a sector{ns / count:>9.0f} ns each"
            print(f"{'':<38}{key:<16}{each}{ns * 1e-3 / one.sectors:>8.2f} us a sector")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        children(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help="of qemu, window, coalesced")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0 (default: all)")
    parser.add_argument("--sets", type=int, default=3, help="of fresh processes (default 3)")
    parser.add_argument("--rounds", type=int, default=6, help="a set (default 6)")
    parser.add_argument("--scale", type=float, default=1.0, help="commands a turn, times this")
    parser.add_argument("--ports", action="store_true", help="where pyvmm's own time goes, by port")
    parser.add_argument("--directory", help="where the images are made (default: the temporary directory)")
    args = parser.parse_args()
    measure.print_host(None)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        benchmark(args, Path(directory))


if __name__ == "__main__":
    main()
