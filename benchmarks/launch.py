"""``pyvmm bench launch``: from the shell to the guest and to the end of it, in pyvmm and in other VMMs.

    small     a guest of a few instructions: to its first byte, to the process gone
    linux     a distribution's kernel with a busybox initrd: to its first console message, to its init, to the end.
              Where this KVM is software, and Linux gets no further: to the message only, from the unpacked kernel
    process   in one process: Machine made, run to its first exit, closed; beside the same in C
    memory    what a VMM holds beyond guest RAM while its guest waits
    many      1, 8 and 64 launches at once: until the last one's guest has spoken, and until all are gone
    trace     where pyvmm's time goes, step by step

Launches take turns, A B C C B A a round (sampling.py); the clock is the parent's (stopwatch.py).
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyvmm
from pyvmm import bundle_build
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import cycles, environment, footprint, launch_guests, stopwatch
from pyvmm_benchmarks.contenders.exit_contender import environment as child_environment
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.contenders.launch_others import CloudHypervisor, Firecracker, Kvmtool
from pyvmm_benchmarks.contenders.launch_pyvmm import Pyvmm
from pyvmm_benchmarks.contenders.launch_qemu import Qemu
from pyvmm_benchmarks.launch_guests import Guest
from pyvmm_benchmarks.report import TOLERANCE, Case, Report, Result, case_lines, print_comparison
from pyvmm_benchmarks.stopwatch import AtOnce, Failed, Launch

Value = TypeVar("Value")

PARTS = ("small", "linux", "process", "memory", "many", "trace")
REFERENCE = "qemu-pc"
MS_PER_NS = 1e-6

SMALL_LIMIT_S = 30.0
LINUX_LIMIT_S = 180.0
# An emulated or nested KVM loses a wake-up now and then, whatever the VMM: a launch that hangs is tried again, and the
# output says so.
LINUX_TRIES = 2
MANY_LIMIT_S = 180.0
# For each of many at once there must be so much memory.
MANY_MIB_EACH = 100

OPTIONS = (
    Option("--quick", "", "few rounds, 1 and 8 at once, Linux only where it comes to its init"),
    Option("--cases", "A,B", f"only these of {', '.join(PARTS)}"),
    Option("--contenders", "A,B", "only these (see --list)"),
    Option("--rounds", "N", "rounds of two turns each (default 10, Linux 3; --quick 3, Linux 1)", int),
    Option("--kernel", "FILE", "bzImage of Linux (default: a checkout's, or the running one)"),
    Option("--busybox", "FILE", "a statically linked busybox for the initrd"),
    Option("--initrd", "FILE", f"another initrd, whose init first says {launch_guests.INIT_TEXT.decode()!r}"),
    Option("--append", "TEXT", f"Linux's command line (default {launch_guests.APPEND!r})"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--plot", "PREFIX", "pictures: PREFIX-distributions, PREFIX-ratios and PREFIX-trace, each .png and .svg"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--from", "FILE", "measure nothing: take what --json has written (for --plot and --compare)", key="from_"),
    Option("--list", "", "the cases and the contenders"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench launch [OPTIONS]

What it takes to launch a guest: pyvmm beside QEMU, kvmtool, Firecracker and cloud-hypervisor, where they are
installed. docs/benchmarks.md has the method."""


class Settings(NamedTuple):
    """How much of it."""

    quick: bool
    rounds: int
    linux_rounds: int
    sets: int  # of processes, in one process each
    many: tuple[int, ...]


def settings_of(given: Mapping[str, object]) -> Settings:
    quick = bool(given.get("quick"))
    rounds, linux_rounds = (3, 1) if quick else (10, 3)
    if "rounds" in given:
        rounds = linux_rounds = int(str(given["rounds"]))
    if rounds < 1:
        raise ConfigError("--rounds: give at least 1")
    return Settings(quick, rounds, linux_rounds, 1 if quick else 3, (1, 8) if quick else (1, 8, 64))


def launchers() -> list[Launcher]:
    """Every contender there may be, the reference first."""
    return [
        *(Qemu("pc"), Qemu("microvm"), Pyvmm("microvm"), Pyvmm("pc")),
        *(Kvmtool(), Firecracker(), CloudHypervisor()),
    ]


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench launch")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print((__doc__ or "").split("\n\n")[1])
        print("contenders:")
        for launcher in launchers():
            print(f"  {launcher.name:<18}{launcher.version() or 'comes with pyvmm'}")
        return 0
    old = Report.read(given["compare"], "launch") if "compare" in given else None
    if "from_" in given:
        report = Report.read(given["from_"], "launch")
        print("\n".join(environment.lines(report.host)) + "\n")
        print(report.table())
        print("\n".join(verdict(report.cases)))
    else:
        report = measured(given)
    if "json" in given:
        report.write(given["json"])
    if "plot" in given:
        from pyvmm_benchmarks import launch_plots, plots

        compared = [case for case in report.cases if not case.name.startswith(launch_plots.PREFIX)]
        drawn = plots.draw(Report(report.kind, report.host, report.settings, compared), given["plot"])
        for path in [*drawn, *launch_plots.draw(report, given["plot"])]:
            print(f"wrote {path}")
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def measured(given: Mapping[str, object]) -> Report:
    """Measure as the options say, printing each case as it is done."""
    parts = chosen(str(given.get("cases", "")), PARTS, "case")
    all_launchers = launchers()
    names = chosen(str(given.get("contenders", "")), [each.name for each in all_launchers], "contender")
    contenders = [launcher for launcher in all_launchers if launcher.name in names]
    settings = settings_of(given)
    # As pip leaves an installed package.
    compileall.compile_dir(str(Path(pyvmm.__file__).parent), quiet=1)
    with contextlib.suppress(OSError):
        bundle_build.build(str(Path(pyvmm.__file__).parent))
    programs = {each.name: version for each in contenders if (version := each.version()) is not None}
    report = Report("launch", environment.describe(None, programs), settings._asdict())
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), contenders, settings, given)
        for part in parts:
            for case in bench.part(part):
                report.cases.append(case)
                print("\n".join(case_lines(case)) + "\n", flush=True)
    print("\n".join(verdict(report.cases)))
    report.host["took_s"] = round(time.monotonic() - started, 1)
    return report


def chosen(names: str, among: Sequence[str], what: str) -> list[str]:
    """Those of the names ("a,b"), in their own order; all where there are none."""
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in among:
            raise ConfigError(f"there is no {what} {name!r}: choose of {', '.join(among)}")
    return [name for name in among if not wanted or name in wanted]


def verdict(cases: Sequence[Case]) -> list[str]:
    """A line a case from the shell: pyvmm beside the fastest of the others."""
    lines = []
    for case in cases:
        ran = {result.name: result.value.value for result in case.results if result.value is not None}
        others = {result.name for result in case.results if not result.ours} & ran.keys()
        if case.reference == REFERENCE and "pyvmm" in ran and others:
            best = min(others, key=lambda name: ran[name])
            lines.append(f"{case.name}: pyvmm takes {ran['pyvmm'] / ran[best]:.2f} of the best other ({best})")
    return lines


# What the contenders' turns gave, and why others took none.
Turns = dict[str, list[Value]]
Reasons = dict[str, str]

# -- what is measured --------------------------------------------------------------------------------------------


class Bench:
    """One run: where its files are, who takes part, how much of it. Each ``_part`` gives its cases."""

    def __init__(
        self, directory: Path, contenders: Sequence[Launcher], settings: Settings, given: Mapping[str, object]
    ) -> None:
        self.directory = directory
        self.contenders = contenders
        self.settings = settings
        self.given = given
        self.env = child_environment()
        self._linux: Guest | None = None

    def part(self, name: str) -> list[Case]:
        parts: dict[str, Callable[[], list[Case]]] = {
            "small": self._small,
            "linux": self._launch_linux,
            "process": self._process,
            "memory": self._memory,
            "many": self._many,
            "trace": self._trace,
        }
        return parts[name]()

    def small(self) -> Guest:
        return launch_guests.write_flat("first", self.directory, launch_guests.END)

    def linux(self) -> Guest:
        """ConfigError where there is no kernel or no busybox."""
        if self._linux is None:
            kernel = str(self.given.get("kernel") or launch_guests.find_kernel())
            initrd = str(self.given.get("initrd", ""))
            busybox = "" if initrd else str(self.given.get("busybox") or launch_guests.find_busybox())
            append = str(self.given.get("append", ""))
            self._linux = launch_guests.write_linux(self.directory, kernel, busybox, initrd, append)
        return self._linux

    def one(self, launcher: Launcher, guest: Guest, marks: Mapping[str, bytes], until: str = "") -> Launch:
        """One launch. Failed; a Linux that hangs gets a second try."""
        limit_s = LINUX_LIMIT_S if guest.linux else SMALL_LIMIT_S
        for left in reversed(range(LINUX_TRIES if guest.linux else 1)):
            try:
                return stopwatch.launch(launcher.command(guest), marks, limit_s=limit_s, until=until, env=self.env)
            except Failed as error:
                if not left:
                    raise
                print(f"{launcher.name}: once more, after: {error}", flush=True)
        raise AssertionError("unreachable: the last try returns or raises")

    def take_turns(self, guest: Guest, turn: Callable[[Launcher], Value], rounds: int) -> tuple[Turns[Value], Reasons]:
        """``turn(launcher)`` by each in turn, two a round, after one that does not count. Who fails is out."""
        reasons = {each.name: reason for each in self.contenders if (reason := each.why_not(guest))}
        able = {each.name: each for each in self.contenders if each.name not in reasons}
        turns: Turns[Value] = {name: [] for name in able}
        for name, launcher in list(able.items()):
            attempt(name, launcher, turn, able, reasons)
        for _ in range(rounds):
            for name in [*able, *reversed(able)]:
                if name in able:
                    value = attempt(name, able[name], turn, able, reasons)
                    if value is not None:
                        turns[name].append(value)
        return {name: values for name, values in turns.items() if name in able}, reasons

    def case(
        self, name: str, title: str, unit: str, turns: Turns[Value], reasons: Reasons, value: Callable[[Value], float]
    ) -> Case:
        """Of the turns' ``value``: a value a round is the mean of its two turns."""
        results = []
        for launcher in self.contenders:
            taken = [value(each) for each in turns.get(launcher.name, ())]
            rounds = [(a + b) / 2 for a, b in zip(taken[::2], taken[1::2], strict=True)]
            reason = reasons.get(launcher.name, "")
            results.append(Result(launcher.name, [rounds] if taken else [], taken, ours=launcher.ours, reason=reason))
        return Case(name, title, unit, results, reference=REFERENCE)

    # -- the parts

    def _small(self) -> list[Case]:
        guest = self.small()
        turns, reasons = self.take_turns(guest, lambda each: spoken(self.one(each, guest, {})), self.settings.rounds)
        return [
            self.case("first_instruction", "shell to the byte that the guest's first instructions write", "ms", turns,
                      reasons, first_ms),
            self.case("small_gone", "shell to the end of the process, of a guest that ends at once", "ms", turns,
                      reasons, end_ms),
        ]  # fmt: skip

    def _launch_linux(self) -> list[Case]:
        title = "shell to the kernel's first message on its console"
        try:
            guest = self.linux()
        except ConfigError as error:
            return [Case("linux_console", title, "ms", [Result(REFERENCE, reason=str(error))], reference=REFERENCE)]
        assert guest.linux is not None
        marks = {"console": launch_guests.CONSOLE_TEXT}
        if not guest.linux.full:
            if self.settings.quick:
                reason = "takes a minute on software KVM: leave --quick out"
                return [Case("linux_console", title, "ms", [Result(REFERENCE, reason=reason)], reference=REFERENCE)]
            turns, reasons = self.take_turns(guest, lambda each: self.one(each, guest, marks, "console"), 1)
            return [self.case("linux_console", title, "ms", turns, reasons, lambda each: mark_ms(each, "console"))]
        marks["init"] = launch_guests.INIT_TEXT
        turns, reasons = self.take_turns(guest, lambda each: self.one(each, guest, marks), self.settings.linux_rounds)
        return [
            self.case("linux_console", title, "ms", turns, reasons, lambda each: mark_ms(each, "console")),
            self.case("linux_init", "shell to the first line of the guest's init", "ms", turns, reasons,
                      lambda each: mark_ms(each, "init")),
            self.case("linux_gone", "shell to the end of the process; init powers off", "ms", turns, reasons,
                      end_ms),
            self.case("linux_processor", "processor time of the process until its end, the guest's in it", "ms", turns,
                      reasons, lambda each: each.cpu_ns * MS_PER_NS),
        ]  # fmt: skip

    def _process(self) -> list[Case]:
        made = []
        for irqchip in cycles.IRQCHIPS:
            title = f"in one process: machine made, first exit, closed; irqchip {irqchip}"
            rounds = self.settings.rounds * 3
            sets = [cycles.measure(self.directory, irqchip, rounds) for _ in range(self.settings.sets)]
            made.append(Case(f"machine_irqchip_{irqchip}", title, "ms", cycles.results(sets), reference="c"))
        return made

    def _memory(self) -> list[Case]:
        guest = launch_guests.write_flat("waiting", self.directory, launch_guests.WAIT)
        turns, reasons = self.take_turns(guest, lambda each: self.held(each, guest), 1)
        return [
            self.case("memory_rss", "resident beyond guest RAM, while the guest waits", "MiB", turns, reasons,
                      lambda each: each.rss_mib),
            self.case("memory_uss", "of that, what no other process shares", "MiB", turns, reasons,
                      lambda each: each.uss_mib),
        ]  # fmt: skip

    def held(self, launcher: Launcher, guest: Guest) -> footprint.Footprint:
        """Of a launcher whose guest has spoken and waits."""
        running = stopwatch.Running(launcher.command(guest), {}, self.env, ())
        try:
            stopwatch.watch(running, SMALL_LIMIT_S, stopwatch.FIRST_BYTE)
            if running.first_ns is None:
                raise Failed(f"ended and said nothing: {running.words()}")
            return footprint.beyond_guest(running.process.pid, guest.memory_mib)
        except (footprint.NoGuestRam, OSError) as error:
            raise Failed(f"its memory can't be told apart: {error}") from None
        finally:
            running.close()

    def _many(self) -> list[Case]:
        guest = self.small()
        made = []
        for count in self.settings.many:
            room = available_mib() // MANY_MIB_EACH

            def turn(launcher: Launcher, count: int = count, room: int = room) -> AtOnce:
                if room < count:
                    raise Failed(f"{count} at once want {count * MANY_MIB_EACH} MiB of free memory")
                return stopwatch.at_once([launcher.command(guest)] * count, limit_s=MANY_LIMIT_S, env=self.env)

            rounds = self.settings.rounds if count == 1 else max(1, self.settings.rounds // 3)
            turns, reasons = self.take_turns(guest, turn, rounds)
            made += [
                self.case(f"many_{count}", f"{count} at once: until the last guest has written its byte", "ms", turns,
                          reasons, lambda each: each.first_ns * MS_PER_NS),
                self.case(f"many_{count}_gone", f"{count} at once: until all processes are gone", "ms", turns, reasons,
                          lambda each: each.end_ns * MS_PER_NS),
            ]  # fmt: skip
        return made

    def _trace(self) -> list[Case]:
        guests: list[tuple[str, Guest, int, dict[str, bytes]]] = [
            ("trace_small", self.small(), self.settings.rounds, {})
        ]
        try:
            linux = self.linux()
            if linux.linux is not None and linux.linux.full:
                marks = {"console": launch_guests.CONSOLE_TEXT, "init": launch_guests.INIT_TEXT}
                guests.append(("trace_linux", linux, self.settings.linux_rounds, marks))
        except ConfigError:
            pass  # the linux part has said so
        made = []
        for name, guest, rounds, marks in guests:
            steps = [self.traced(guest, marks) for _ in range(2 * rounds + 1)][1:]
            names = list(dict.fromkeys(step for each in steps for step in each))
            taken = {step: [each.get(step, 0.0) for each in steps] for step in names}
            results = [Result(step, [values], values, ours=True) for step, values in taken.items()]
            what = "the small guest" if guest.linux is None else "Linux"
            made.append(Case(name, f"where pyvmm's time goes, {what}", "ms", results, reference=""))
        return made

    def traced(self, guest: Guest, marks: Mapping[str, bytes]) -> dict[str, float]:
        """Milliseconds a step, in the order of their beginning. Together they are all the time there is."""
        heard, tell = os.pipe()
        try:
            start_ns = time.monotonic_ns()
            try:
                launched = stopwatch.launch(
                    Pyvmm("microvm").traced(guest, tell),
                    marks,
                    limit_s=LINUX_LIMIT_S if guest.linux else SMALL_LIMIT_S,
                    env=self.env,
                    pass_fds=(tell,),
                )
            finally:
                os.close(tell)
            told = json.loads(os.read(heard, 1 << 16))
        finally:
            os.close(heard)
        return steps_of(start_ns, spoken(launched), told)


def available_mib() -> int:
    """Of memory, without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0


def attempt(
    name: str,
    launcher: Launcher,
    turn: Callable[[Launcher], Value],
    able: dict[str, Launcher],
    reasons: Reasons,
) -> Value | None:
    """One turn; who fails takes part no more."""
    try:
        return turn(launcher)
    except (Failed, OSError) as error:
        reasons[name] = str(error)
        del able[name]
        return None


def spoken(launched: Launch) -> Launch:
    """Failed where the guest has said nothing."""
    if launched.first_ns is None:
        raise Failed(f"ended with status {launched.status} and said nothing")
    return launched


def first_ms(launched: Launch) -> float:
    assert launched.first_ns is not None
    return float(launched.first_ns * MS_PER_NS)


def end_ms(launched: Launch | AtOnce) -> float:
    return float(launched.end_ns * MS_PER_NS)


def mark_ms(launched: Launch, name: str) -> float:
    return float(launched.marks[name] * MS_PER_NS)


def steps_of(start_ns: int, launched: Launch, told: Mapping[str, object]) -> dict[str, float]:
    """Out of what launch_traced.py has told: {step: ms}. The guest's part is divided by what came out of it."""
    stamp = {name: int(str(told[name])) - start_ns for name in ("born", "resumed", "stopped", "ended")}
    spent = told["spent"]
    assert isinstance(spent, dict)
    before = {name: ns for name, ns in spent.items() if name not in ("guest", "closing")}
    steps = {"interpreter": stamp["born"], **before}
    # What nobody has measured: the tracer's own doing, for the most part.
    steps["between"] = max(0, stamp["resumed"] - stamp["born"] - sum(before.values()))
    points = {"first byte": launched.first_ns, **launched.marks, "end": stamp["stopped"]}
    at = stamp["resumed"]
    for ns, name in sorted((ns, name) for name, ns in points.items() if ns is not None):
        steps[f"guest to {name}"] = max(0, ns - at)
        at = max(at, ns)
    steps["closing"] = spent.get("closing", 0)
    steps["process end"] = max(0, launched.end_ns - stamp["ended"])
    return {name: ns * MS_PER_NS for name, ns in steps.items()}
