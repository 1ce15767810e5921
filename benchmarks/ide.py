"""The IDE disk: sectors a second by PIO and by the BIOS, pyvmm beside QEMU, natively, in one interleaved run.

One guest program (guests/ide.S) boots under SeaBIOS from the same disk image in every contender, and then does
what it is told over its serial port: so many commands of a case, timed by RDTSC.

    qemu    qemu-system-x86_64 -M pc, IDE, cache=writeback, aio=threads, its in-kernel irqchip
    pyvmm   as it comes: KVM gathers writes to the data port (coalesced PIO)
    window  pyvmm without that: every word of a REP OUTSW is an exit that ends in the FIFO window

The contenders take turns, A B C C B A, each on a copy of the image of its own (an image is open for writing once);
whose turn it is not halts. A ratio is that of one round's turns: QEMU's time by pyvmm's; the figure is the
median over all rounds with its bootstrap 95% interval. At the end the copies must be the same.

Exits a sector: KVM's tracepoint kvm_userspace_exit counted by perf where that works (perf stat, root), in a turn
that is not timed; but writes that KVM gathers for pyvmm are no exits. `own` is what pyvmm spent between leaving
KVM_RUN and entering it again, by its exit profiler; the rest of the time is the guest's and KVM's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import told
from measure import median

# As the guest's table `cases`: name, sectors a command, commands a turn, how many times QEMU's speed it should have
# (`pyvmm`, `window`).
CASES = (
    ("PIO read, 1 a command", 1, 1000, (1.2, 1.2)),
    ("PIO read, 128", 128, 16, (1.2, 1.2)),
    ("PIO READ MULTIPLE 16, 128", 128, 64, (1.2, 1.2)),
    ("PIO write, 1 a command", 1, 100, (2.0, 1.1)),
    ("PIO write, 128", 128, 1, (2.0, 1.1)),
    ("PIO WRITE MULTIPLE 16, 128", 128, 1, (2.0, 1.1)),
    ("int 13h read, 1", 1, 400, (1.2, 1.2)),
    ("int 13h read, 64", 64, 30, (1.2, 1.2)),
    ("int 13h write, 1", 1, 100, (2.0, 1.1)),
    ("int 13h write, 64", 64, 2, (2.0, 1.1)),
)
NOTHING = len(CASES)  # the case that does nothing: what a turn's own serial traffic costs in exits

CONTENDERS = ("qemu", "pyvmm", "window")
IMAGE_MIB = 32


def build_guest(directory: Path) -> bytes:
    obj, elf, binary = (str(directory / name) for name in ("ide.o", "ide.elf", "ide.bin"))
    subprocess.run(["as", "--32", "-o", obj, str(measure.HERE / "guests" / "ide.S")], check=True)
    link = ["ld", "-melf_i386", "-N", "-e0", "--no-warn-rwx-segments", "-Ttext=0x7c00", "-o", elf, obj]
    subprocess.run(link, check=True)
    subprocess.run(["objcopy", "-O", "binary", elf, binary], check=True)
    return Path(binary).read_bytes()


class Disk(told.Guest):
    """A guest that moves sectors."""

    def __init__(self, contender: str, image: Path) -> None:
        work = {"contender": contender, "image": str(image), "memory_mib": measure.MEMORY_MIB}
        super().__init__(__file__, work)
        self._turns = 0

    def move(self, case: int, count: int, used: Used | None = None, *, perf: bool = False) -> tuple[int, int | None]:
        """TSC ticks for ``count`` commands of a case, and exits."""
        self._turns = (self._turns + 1) % 10
        tag = str(self._turns)
        answer = self.turn(bytes([case, count & 0xFF, count >> 8, ord(tag)]), perf=perf)
        kind, its_tag, *numbers = answer["said"].split()
        if kind != "T" or its_tag != tag:
            raise SystemExit(f"case {case}: the guest failed: {answer['said']}")
        if used is not None:
            used.take(answer, count * CASES[case][1])
            used.polls += int(numbers[1], 16)
        return int(numbers[0], 16), answer["exits"]


class Used(told.Used):
    polls = 0


def benchmark(args: argparse.Namespace, directory: Path) -> None:
    image = directory / "disk.img"
    guest = build_guest(directory)
    image.write_bytes(guest + random.Random(1).randbytes(IMAGE_MIB * 2**20 - len(guest)))
    names = [name for name in CONTENDERS if name in args.contenders]
    cases = [n for n, _ in enumerate(CASES) if not args.cases or n in args.cases]
    found = {name: [Used() for _ in CASES] for name in names}
    tick_s = 1e-6 / float(measure.cpuinfo("cpu MHz"))  # where KVM is not asked
    for _ in range(args.sets):
        copies = {name: directory / f"{name}.img" for name in names}
        for copy in copies.values():
            shutil.copy(image, copy)
        started = {name: Disk(name, copies[name]) for name in names}
        try:
            for each in started.values():
                if "tsc_khz" in each.hello:
                    tick_s = 1e-3 / each.hello["tsc_khz"]
            for case in cases:
                rounds(args, case, started, {name: found[name][case] for name in names})
        finally:
            for each in started.values():
                with each:
                    each.end()
        if len({hashlib.sha256(copy.read_bytes()).digest() for copy in copies.values()}) > 1:
            raise SystemExit("the contenders' images differ after the same requests")
    report(args, cases, found, tick_s)


def commands(args: argparse.Namespace, case: int) -> int:
    return max(1, round(CASES[case][2] * args.scale))


def rounds(args: argparse.Namespace, case: int, started: dict[str, Disk], found: dict[str, Used]) -> None:
    count = commands(args, case)
    for name, guest in started.items():
        guest.move(case, count)  # warm up
        found[name].times.append([])
        if found[name].exits is None:
            _, idle = guest.move(NOTHING, 1, perf=True)
            _, exits = guest.move(case, count, perf=True)
            if exits is not None and idle is not None:
                found[name].exits = (exits - idle) / (count * CASES[case][1])
    for _ in range(args.rounds):
        ticks = dict.fromkeys(started, 0)
        for name in (*started, *reversed(started)):
            ticks[name] += started[name].move(case, count, found[name])[0]
        for name, value in ticks.items():
            found[name].times[-1].append(value)


def report(args: argparse.Namespace, cases: list[int], found: dict[str, list[Used]], tick_s: float) -> None:
    print(f"{args.sets} sets of processes, {args.rounds} rounds each, two turns a round")
    head = f"{'sectors/s':>10}{'x QEMU':>8} {'(95%)':<14}{'mark':>5}{'exits':>8}{'polls':>7}{'us':>9}{'own':>8}"
    print(f"{'':<28}{'':<7}{head}   a sector")
    for case in cases:
        title, per_command, _, marks = CASES[case]
        for name, columns in found.items():
            one = columns[case]
            sectors = 2 * per_command * commands(args, case)
            rate = sectors / (median([t for each in one.times for t in each]) * tick_s)
            text = f"{title if name == next(iter(found)) else '':<28}{name:<7}{rate:>10.0f}"
            if name != "qemu" and "qemu" in found:
                mark = marks[name == "window"]
                ratio, low, high = told.ratios(found["qemu"][case], one)
                text += f"{ratio:>8.2f} {f'({low:.2f}-{high:.2f})':<14}{mark:>4.1f}{'+' if ratio >= mark else '-'}"
            else:
                text += f"{'':>8} {'':<14}{'':>5}"
            exits = "" if one.exits is None else f"{one.exits:.2f}"
            text += f"{exits:>8}{one.polls / one.units:>7.2f}{1e6 / rate:>9.1f}"
            if one.rows:
                text += f"{one.own_us:>8.1f}"
            print(text)
            if args.ports:
                one.print_rows("sector")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        told.child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contenders", nargs="*", default=list(CONTENDERS), help="of qemu, pyvmm, window")
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
