"""``pyvmm bench snapshot``: from a snapshot to the guest's first instruction, forks, and for how long a save stops it.

    restore   in one process: a machine of a snapshot, or of a Template, to its first exit; beside the same in C
              (restore_floor.c)
    fork      a hundred machines of one that stands, until each has executed an instruction; beside a hundred in C
    live      how long a guest stands that is saved while it writes to 50 MB of pages a second
    inputs    one input tried on a machine of its own, as a fuzzer does it: from the snapshot to the guest's end and
              closed; beside QEMU's loadvm, again and again in one process
    shell     `pyvmm run --restore`, to the end of the process, beside a Python that starts and ends; and QEMU's
              -loadvm of as much memory, where QEMU is there

Contenders take turns, A B C C B A a round (sampling.py). Snapshots are in memory (tmpfs).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pyvmm import Machine, Snapshot
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import cycles, environment, inputs_guest, sampling, stopwatch
from pyvmm_benchmarks.contenders import c_floor
from pyvmm_benchmarks.contenders.launch_pyvmm import shell_command
from pyvmm_benchmarks.contenders.snapshot_qemu import LoadvmAgain, QemuLoadvm
from pyvmm_benchmarks.launch import chosen
from pyvmm_benchmarks.report import TOLERANCE, Case, Report, Result, case_lines, print_comparison

MIB = 1 << 20
MS_PER_NS = 1e-6
KIB_PER_MIB = 1024
SOURCE = Path(__file__).with_name("contenders") / "restore_floor.c"
RESTORE_CHILD, LIVE_CHILD = SOURCE.with_name("restore_child.py"), SOURCE.with_name("live_child.py")
INPUTS_CHILD = SOURCE.with_name("inputs_child.py")
MEMORY_DIRECTORY = "/dev/shm"
PARTS = ("restore", "fork", "live", "inputs", "shell")
# Where the guest's working set is, in a snapshot that has one.
TOUCHED_AT, TOUCHED_MIB = 64 * MIB, 128
FORKS = 100
INPUTS, INPUTS_MIB = 50, 64
LIVE_MIB, LIVE_MB_PER_S = 256, 50
SHELL_LIMIT_S = 60.0
QEMU_MACHINES = ("pc", "microvm")

OPTIONS = (
    Option("--quick", "", "few rounds, one set of processes"),
    Option("--cases", "A,B", f"only these of {', '.join(PARTS)}"),
    Option("--rounds", "N", "rounds of two turns each (default 20; --quick 5)", int),
    Option("--directory", "DIR", f"where snapshots are made (default: {MEMORY_DIRECTORY})"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--plot", "PREFIX", "pictures: PREFIX-distributions and PREFIX-ratios, each .png and .svg"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--list", "", "the cases"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench snapshot [OPTIONS]

What it takes to go on from a snapshot, to fork a machine and to save one that runs; beside the same in C."""


class Kind(NamedTuple):
    """Of a snapshot."""

    irqchip: str
    memory_mib: int
    touched: bool = False

    @property
    def name(self) -> str:
        return f"{self.irqchip}_{self.memory_mib}" + ("_touched" if self.touched else "")


KINDS = (
    *(Kind("off", mib) for mib in (256, 4096, 16384)),
    *(Kind("kernel", 256), Kind("off", 256, touched=True)),
)


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench snapshot")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print((__doc__ or "").split("\n\n")[1])
        return 0
    old = Report.read(given["compare"], "snapshot") if "compare" in given else None
    report = measured(given)
    if "json" in given:
        report.write(given["json"])
    if "plot" in given:
        from pyvmm_benchmarks import plots

        for path in plots.draw(report, given["plot"]):
            print(f"wrote {path}")
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def measured(given: Mapping[str, object]) -> Report:
    """Measure as the options say, printing each case as it is done."""
    parts = chosen(str(given.get("cases", "")), PARTS, "case")
    quick = bool(given.get("quick"))
    rounds = int(str(given.get("rounds", 5 if quick else 20)))
    if rounds < 1:
        raise ConfigError("--rounds: give at least 1")
    versions = {"qemu": QemuLoadvm(QEMU_MACHINES[0]).version() or ""}
    settings = {"quick": quick, "rounds": rounds, "sets": 1 if quick else 3}
    report = Report("snapshot", environment.describe(None, versions), settings)
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    place = str(given.get("directory", MEMORY_DIRECTORY if Path(MEMORY_DIRECTORY).is_dir() else "")) or None
    with tempfile.TemporaryDirectory(dir=place) as name:
        bench = Bench(Path(name), rounds, settings["sets"])
        for part in parts:
            for case in bench.part(part):
                report.cases.append(case)
                print("\n".join(case_lines(case)) + "\n", flush=True)
    return report


class Bench:
    """One run. Each ``_part`` gives its cases."""

    def __init__(self, directory: Path, rounds: int, sets: int) -> None:
        self.directory = directory
        self.rounds = rounds
        self.sets = sets

    def part(self, name: str) -> list[Case]:
        parts: dict[str, Callable[[], list[Case]]] = {
            "restore": self._restore,
            "fork": self._fork,
            "live": self._live,
            "inputs": self._inputs,
            "shell": self._shell,
        }
        return parts[name]()

    def snapshot(self, kind: Kind) -> Path:
        """Of a machine that has not begun: its guest's first instructions make an exit."""
        path = self.directory / kind.name
        if not path.exists():
            with Machine(
                flat=cycles.FIRST_EXIT, flat_mode="real16", memory_mib=kind.memory_mib, irqchip=kind.irqchip
            ) as machine:
                if kind.touched:
                    for at in range(TOUCHED_AT, TOUCHED_AT + TOUCHED_MIB * MIB, MIB):
                        machine.memory.write(at, at.to_bytes(8, "little") * (MIB // 8))
                machine.save(path)
        return path

    def floor(self, path: Path, kind: Kind, count: int) -> list[str] | None:
        """None where there is no compiler."""
        compiler = c_floor.compiler()
        binary = self.directory / "restore_floor"
        if compiler is None:
            return None
        if not binary.exists():
            subprocess.run([compiler, *c_floor.FLAGS, "-o", str(binary), str(SOURCE)], check=True, capture_output=True)
        with Snapshot(path) as snapshot:
            sources = snapshot.sources()
            pieces = [f"{gpa}:{snapshot.pieces[gpa].size}:{offset}" for gpa, (_fd, offset) in sorted(sources.items())]
        return [str(binary), str(path), str(int(kind.irqchip == "kernel")), str(count), *pieces]

    def child(self, path: Path, how: str, count: int) -> list[str]:
        return [sys.executable, "-P", str(RESTORE_CHILD), str(path), how, str(count)]

    # -- the parts

    def _restore(self) -> list[Case]:
        made = []
        for kind in KINDS:
            path = self.snapshot(kind)
            commands = {"pyvmm": self.child(path, "path", 1), "pyvmm-template": self.child(path, "open", 1)}
            if (floor := self.floor(path, kind, 1)) is not None:
                commands = {"c": floor, **commands}
            what = f"irqchip {kind.irqchip}, {kind.memory_mib} MiB" + (
                f", {TOUCHED_MIB} in use" if kind.touched else ""
            )
            title = f"a machine of a snapshot, to its first exit: {what}"
            made.append(self.case(f"restore_{kind.name}", title, commands, ("c", "pyvmm", "pyvmm-template")))
        return made

    def _fork(self) -> list[Case]:
        kind = KINDS[0]
        path = self.snapshot(kind)
        commands = {"pyvmm": self.child(path, "fork", FORKS)}
        if (floor := self.floor(path, kind, FORKS)) is not None:
            commands = {"c": floor, **commands}
        title = f"{FORKS} forks of a machine, until each has made its first exit"
        taken = [cycles.take_turns(commands, max(1, self.rounds // 4)) for _ in range(self.sets)]
        grown = [[turn[3] / KIB_PER_MIB for turns in each["pyvmm"] for turn in turns] for each in taken]
        pss = Result("pyvmm", grown, ours=True)
        return [
            self.case_of(f"fork_{FORKS}", title, taken, ("c", "pyvmm")),
            Case(
                "fork_pss", "memory of the process for each of them, their first exit made", "MiB", [pss], reference=""
            ),
        ]

    def _live(self) -> list[Case]:
        command = [sys.executable, "-P", str(LIVE_CHILD), str(self.directory), str(LIVE_MIB), str(LIVE_MB_PER_S)]
        taken = [cycles.take_turns({"pyvmm": command}, self.rounds)["pyvmm"] for _ in range(self.sets)]
        what = f"{LIVE_MIB} MiB, {LIVE_MB_PER_S} MB of pages written a second"
        made = []
        for n, (name, title) in enumerate(
            (("live_stood", "how long the guest stands"), ("live_save", "all of a save"))
        ):
            values = [[sum(turn[n] for turn in turns) / 2 * MS_PER_NS for turns in rounds] for rounds in taken]
            samples = [turn[n] * MS_PER_NS for rounds in taken for turns in rounds for turn in turns]
            result = Result("pyvmm", values, samples, ours=True)
            made.append(Case(name, f"{title}: {what}", "ms", [result], reference=""))
        return made

    def _inputs(self) -> list[Case]:
        path = self.directory / "inputs"
        with Machine(flat=inputs_guest.END, flat_mode="real16", memory_mib=INPUTS_MIB) as machine:
            machine.save(path)
        child = cycles.Maker([sys.executable, "-P", str(INPUTS_CHILD), str(path), str(INPUTS)])
        turns: dict[str, Callable[[], float]] = {"pyvmm": lambda: child.cycle()[0] / INPUTS * MS_PER_NS}
        absent, started = [], []
        try:
            for machine_kind in QEMU_MACHINES:
                qemu = LoadvmAgain(machine_kind)
                try:
                    if qemu.program is None:
                        reason = f"not installed (Debian: qemu-system-x86; or name it in {qemu.variable})"
                        absent.append(Result(qemu.name, reason=reason))
                        continue
                    started.append(qemu)
                    qemu.start(self.directory, INPUTS_MIB)
                    turns[qemu.name] = lambda qemu=qemu: qemu.attempts(INPUTS) / INPUTS * MS_PER_NS  # type: ignore[misc]
                except (RuntimeError, OSError) as error:
                    absent.append(Result(qemu.name, reason=str(error)))
            for turn in turns.values():
                turn()  # that does not count
            values = sampling.rounds(turns, self.rounds)
        finally:
            child.close()
            for qemu in started:
                qemu.close()
        results = [Result(name, [values[name]], values[name], ours=name == "pyvmm") for name in turns] + absent
        title = f"an input tried on a machine of its own, {INPUTS_MIB} MiB, {INPUTS} in a row"
        return [Case("inputs", title, "ms", results, reference=f"qemu-{QEMU_MACHINES[0]}")]

    def _shell(self) -> list[Case]:
        path = self.snapshot(KINDS[1])
        commands = {
            "python": [sys.executable, "-I", "-S", "-c", "pass"],
            "pyvmm": [*shell_command(), "run", "--restore", str(path)],
        }

        def turn(command: list[str]) -> Callable[[], float]:
            return lambda: stopwatch.launch(command, limit_s=SHELL_LIMIT_S).end_ns * MS_PER_NS

        absent = []
        for machine in QEMU_MACHINES:
            qemu = QemuLoadvm(machine)
            try:
                if qemu.program is not None:
                    commands[qemu.name] = qemu.saved(self.directory, KINDS[1].memory_mib)
                    continue
                reason = f"not installed (Debian: qemu-system-x86; or name it in {qemu.variable})"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                reason = str(error)
            absent.append(Result(qemu.name, reason=reason))
        turns = {name: turn(command) for name, command in commands.items()}
        values = sampling.rounds(turns, self.rounds)
        results = [Result(name, [values[name]], values[name], ours=name == "pyvmm") for name in commands] + absent
        title = f"`pyvmm run --restore`, {KINDS[1].memory_mib} MiB, to the end of the process"
        return [Case("shell_restore", title, "ms", results, reference="python")]

    # -- what is made of it

    def case(self, name: str, title: str, commands: Mapping[str, Sequence[str]], names: Sequence[str]) -> Case:
        taken = [cycles.take_turns(commands, self.rounds) for _ in range(self.sets)]
        return self.case_of(name, title, taken, names)

    def case_of(self, name: str, title: str, taken: Sequence[cycles.Cycles], names: Sequence[str]) -> Case:
        """Of each turn what it took to make and to run: not to close."""
        results = []
        for who in names:
            mine = [each[who] for each in taken if who in each]
            if not mine:
                reason = f"no C compiler: install one of {', '.join(c_floor.COMPILERS)}"
                results.append(Result(who, reason=reason))
                continue
            values = [
                [sum(sum(turn[:2]) for turn in turns) / len(turns) * MS_PER_NS for turns in each] for each in mine
            ]
            samples = [sum(turn[:2]) * MS_PER_NS for each in mine for turns in each for turn in turns]
            results.append(Result(who, values, samples, ours=who != "c"))
        return Case(name, title, "ms", results, reference="c")
