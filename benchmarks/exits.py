"""``pyvmm bench exits``: what a VM exit costs, in pyvmm, at the floor, and elsewhere.

Each contender is a process whose guest takes turns of a few milliseconds (sampling.py); between its turns the process
is stopped. In a turn the guest times, by RDTSC, pairs of a short and a long block of accesses in the tightest loop
there is (the difference gives the cost of one, without that of beginning and ending), and then single accesses, whose
distribution is shown. Counts are chosen so that a block is shorter than the stretches a busy host leaves undisturbed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm.kvm.system import Kvm
from pyvmm_benchmarks import environment, exit_guests, markdown, sampling
from pyvmm_benchmarks.cases import CASES, ExitCase
from pyvmm_benchmarks.contenders.c_floor import Floor
from pyvmm_benchmarks.contenders.exit_contender import LOOK_S, CantRun, Contender, Kind
from pyvmm_benchmarks.contenders.others import CloudHypervisor, Firecracker, Kvmtool
from pyvmm_benchmarks.contenders.ours import Pyvmm
from pyvmm_benchmarks.contenders.python_loops import Loop
from pyvmm_benchmarks.contenders.qemu import Qemu
from pyvmm_benchmarks.mailbox import Hung, Plan, Ticks
from pyvmm_benchmarks.report import TOLERANCE, Case, Report, Result, case_lines, print_comparison

Named = TypeVar("Named", ExitCase, Kind)

REFERENCE = "c"

# A first turn that is not over by then never will be: some instructions hang inside some KVMs.
FIRST_TURN_S = 3.0
TURN_S = 20.0
CALIBRATION = Plan(warm_up=10, pairs=0, short=0, long=0, singles=9)

# A block that takes longer is rarely left undisturbed on a busy host.
BLOCK_S = 150e-6
LEAST_LONG, MOST_LONG = 2, 1000
SHORT_PART = 5  # a short block is that part of a long one
MOST_PAIRS, MOST_SINGLES = 12, 100
LEAST_PAIRS, LEAST_SINGLES = 2, 5

QUICK_S = 50.0
QUICK_SETS = 2
QUICK_ROUNDS = (3, 30)  # at least and at most
TURN_LENGTH_S = 3e-3
SETS, ROUNDS = 4, 30

OPTIONS = (
    Option("--quick", "", "within a minute: fewer sets of processes, as many rounds as there is time for"),
    Option("--cases", "A,B", "only these (see --list)"),
    Option("--contenders", "A,B", "only these; c is the reference"),
    Option("--sets", "N", f"sets of fresh processes (default {SETS})", int),
    Option("--rounds", "N", f"rounds a set (default {ROUNDS})", int),
    Option("--pin", "CPU|none", "where contenders run that need only one CPU (default: the last one)"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--plot", "PREFIX", "pictures: PREFIX-distributions and PREFIX-ratios, each .png and .svg"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--from", "FILE", "measure nothing: take what --json has written (for --plot and --compare)", key="from_"),
    Option("--markdown", "FILE", "put a table between the markers <!-- pyvmm bench exits --> and <!-- end --> of FILE"),
    Option("--list", "", "the cases and the contenders"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench exits [OPTIONS]

What a VM exit costs: cases named as kvm-unit-tests' vmexit, in pyvmm, in a minimal loop in C, in loops in Python, in
QEMU, kvmtool, Firecracker and cloud-hypervisor, where they are installed. docs/benchmarks.md has the method."""


class Settings(NamedTuple):
    """How to measure. ``quick``: rounds by the clock."""

    quick: bool
    sets: int
    rounds: int
    pin: int | None
    turn_s: float


def kinds() -> list[Kind]:
    """Every contender there may be, the reference first."""
    return [
        *(Floor(), Pyvmm(), Loop("fcntl"), Loop("ctypes"), Qemu("microvm"), Qemu("pc")),
        *(Kvmtool(), Firecracker(), CloudHypervisor()),
    ]


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench exits")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print_list()
        return 0
    old = Report.read(given["compare"], "exits") if "compare" in given else None
    report = Report.read(given["from_"], "exits") if "from_" in given else measured(given)
    if "from_" in given:
        print_report(report)
    if "json" in given:
        report.write(given["json"])
    if "markdown" in given:
        markdown.put(report, given["markdown"])
    if "plot" in given:
        from pyvmm_benchmarks import plots

        for path in plots.draw(report, given["plot"]):
            print(f"wrote {path}")
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def print_list() -> None:
    print("cases:")
    for case in CASES:
        alias = f" (vmexit: {case.vmexit})" if case.vmexit and case.vmexit != case.name else ""
        print(f"  {case.name:<25}{case.title}{alias}")
    print("contenders:")
    for kind in kinds():
        print(f"  {kind.name:<25}{kind.version() or 'comes with pyvmm'}")


def print_report(report: Report) -> None:
    print("\n".join(environment.lines(report.host)) + "\n")
    print(report.table())


def measured(given: dict[str, object]) -> Report:
    """Measure as the options say, printing each case as it is done."""
    cases = chosen(str(given.get("cases", "")), CASES, "case")
    contenders = chosen(str(given.get("contenders", "")), kinds(), "contender")
    quick = bool(given.get("quick"))
    try:
        pin = environment.choose_pin(str(given["pin"]) if "pin" in given else None)
    except ValueError:
        raise ConfigError(f"--pin {given['pin']}: give the number of a CPU, or none") from None
    settings = Settings(
        quick,
        int(str(given.get("sets", QUICK_SETS if quick else SETS))),
        int(str(given.get("rounds", QUICK_ROUNDS[1] if quick else ROUNDS))),
        pin,
        TURN_LENGTH_S,
    )
    if settings.sets < 1 or settings.rounds < 1:
        raise ConfigError("--sets and --rounds: give at least 1")
    started = time.monotonic()
    programs = {kind.name: version for kind in contenders if (version := kind.version()) is not None}
    report = Report("exits", environment.describe(pin, programs), settings._asdict())
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as name, environment.left_to_contenders(pin):
        directory = Path(name)
        for n, case in enumerate(cases):
            left_s = QUICK_S - (time.monotonic() - started) if quick else None
            limit_s = None if left_s is None else left_s / (len(cases) - n)
            report.cases.append(measure(case, contenders, settings, directory, limit_s))
            print("\n".join(case_lines(report.cases[-1])) + "\n", flush=True)
    report.host["took_s"] = round(time.monotonic() - started, 1)
    return report


def chosen(names: str, among: Sequence[Named], what: str) -> list[Named]:
    """Those of the names ("a,b"), in their own order; all where there are none."""
    wanted = [name for name in names.split(",") if name]
    known = [each.name for each in among]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"there is no {what} {name!r}: choose of {', '.join(known)}")
    return [each for each in among if not wanted or each.name in wanted]


# -- one case ----------------------------------------------------------------------------------------------------


class Found:
    """What one contender gave, over all sets, in us."""

    def __init__(self) -> None:
        self.sets: list[list[float]] = []
        self.samples: list[float] = []
        self.own: dict[str, float] | None = None
        self.reason = ""


def measure(
    case: ExitCase, contenders: Sequence[Kind], settings: Settings, directory: Path, limit_s: float | None = None
) -> Case:
    """All contenders in one case. With ``limit_s`` as many rounds as fit, by and large."""
    begin = time.monotonic()
    write_images(case, directory)
    found = {kind.name: Found() for kind in contenders}
    for kind in contenders:
        found[kind.name].reason = kind.why_not(case)
    details: dict[str, object] = {}
    for n in range(settings.sets):
        end = None if limit_s is None else begin + limit_s * (n + 1) / settings.sets
        able = [kind for kind in contenders if not found[kind.name].reason]
        if able:
            details = one_set(case, able, settings, directory, found, end)
    results = []
    for kind in contenders:
        one = found[kind.name]
        if not one.reason and not one.sets:
            one.reason = "nothing was measured"
        taken = ([], [], None) if one.reason else (one.sets, one.samples, one.own)
        results.append(Result(kind.name, taken[0], taken[1], ours=kind.ours, reason=one.reason, own=taken[2]))
    made = Case(case.name, case.title, "us", results, reference=REFERENCE)
    made.details = {"vmexit": case.vmexit, "vcpus": case.cpus, "pinned": not case.threads, **details}
    return made


def write_images(case: ExitCase, directory: Path) -> None:
    (directory / f"{case.guest}.rom").write_bytes(exit_guests.rom(case.guest))
    (directory / f"{case.guest}.bin").write_bytes(exit_guests.payload(case.guest))


def one_set(
    case: ExitCase,
    able: Sequence[Kind],
    settings: Settings,
    directory: Path,
    found: dict[str, Found],
    end: float | None,
) -> dict[str, object]:
    """Fresh processes of all that can run, their rounds, what they gave into ``found``. The plan, for the report."""
    started: dict[str, Contender] = {}
    try:
        start_all(case, able, settings, directory, found, started)
        if not started:
            return {}
        plan = calibrate(case, started, settings, found)
        us = 1e3 / tsc_khz()
        turns = {name: Turns(contender, plan, us) for name, contender in started.items()}
        length_s = warm_up(turns, started, found)
        rounds = settings.rounds
        if end is not None and length_s:
            least, most = QUICK_ROUNDS
            rounds = min(most, rounds, max(least, int((end - time.monotonic()) / length_s)))
        play(rounds, turns, started, found)
        for name, each in turns.items():
            if name not in started:
                continue
            if not all(started[name].others()):
                drop(name, "a vCPU beside the first made no access at all", started, found)
            else:
                found[name].sets.append(each.rounds())
                found[name].samples += each.samples
                found[name].own = own_share(case, started[name], plan, settings, directory)
        return plan._asdict()
    finally:
        for contender in started.values():
            contender.kill()
        for contender in started.values():
            contender.close()


def start_all(
    case: ExitCase,
    able: Sequence[Kind],
    settings: Settings,
    directory: Path,
    found: dict[str, Found],
    started: dict[str, Contender],
) -> None:
    """All at once. Whoever is ready is stopped: its guest would take the time of those that are not. Who can't is taken
    out, with its reason in ``found``.
    """
    for kind in able:
        try:
            started[kind.name] = kind.start(case, directory, settings.pin)
        except (CantRun, OSError) as error:
            found[kind.name].reason = str(error)
    waiting = list(started)
    while waiting:
        for name in list(waiting):
            try:
                if started[name].try_ready():
                    waiting.remove(name)
            except CantRun as error:
                waiting.remove(name)
                drop(name, str(error), started, found)
        time.sleep(LOOK_S)


def drop(name: str, reason: str, started: dict[str, Contender], found: dict[str, Found]) -> None:
    found[name].reason = reason
    started.pop(name).close()


def calibrate(case: ExitCase, started: dict[str, Contender], settings: Settings, found: dict[str, Found]) -> Plan:
    """The counts for this case, by what it costs whoever is first. Where that hangs nobody else is asked."""
    first = next(iter(started))
    try:
        ticks = started[first].turn(CALIBRATION, FIRST_TURN_S)
    except Hung as error:
        drop(first, f"hangs in this KVM: {error}", started, found)
        for name in list(started):
            drop(name, f"not tried: the same guest hangs in {first}", started, found)
        return CALIBRATION
    cost_s = max(sampling.median(ticks.singles), 1) / (tsc_khz() * 1e3)
    return plan_for(cost_s, settings.turn_s, blocks=case.blocks)


def plan_for(cost_s: float, turn_s: float, *, blocks: bool = True) -> Plan:
    """Blocks of at most BLOCK_S, half of the turn's length for them, the rest for singles.

    What takes longer than such a block by itself is measured singly: the clock's own part in it is small.
    """
    if not blocks or cost_s * LEAST_LONG > BLOCK_S:
        singles = max(LEAST_SINGLES, min(MOST_SINGLES, int(turn_s / cost_s)))
        return Plan(max(1, min(20, singles // 5)), 0, 0, 0, singles)
    long = max(LEAST_LONG, min(MOST_LONG, int(BLOCK_S / cost_s)))
    short = max(1, long // SHORT_PART)
    affordable = turn_s / cost_s
    pairs = max(LEAST_PAIRS, min(MOST_PAIRS, int(0.5 * affordable / (long + short))))
    singles = max(LEAST_SINGLES, min(MOST_SINGLES, int(0.4 * affordable)))
    return Plan(max(1, min(20, int(0.1 * affordable))), pairs, short, long, singles)


class Turns:
    """Of one contender: a call is a turn."""

    def __init__(self, contender: Contender, plan: Plan, us: float) -> None:
        self.contender = contender
        self.plan = plan
        self.us = us  # a tick
        self.costs: list[float] = []
        self.samples: list[float] = []

    def __call__(self) -> None:
        ticks = self.contender.turn(self.plan, TURN_S)
        self.costs.append(cost(ticks, self.plan) * self.us)
        self.samples += [each * self.us for each in ticks.singles]

    def clear(self) -> None:
        self.costs.clear()
        self.samples.clear()

    def rounds(self) -> list[float]:
        """Two turns each: the lesser, for whatever disturbs one only adds to it."""
        return [min(pair) for pair in zip(self.costs[::2], self.costs[1::2], strict=True)]


def cost(ticks: Ticks, plan: Plan) -> float:
    """Of an access, in ticks: what the long blocks take longer than the short ones."""
    if not plan.pairs:
        return sampling.median(ticks.singles)
    long, short = sampling.median(ticks.long), sampling.median(ticks.short)
    # Disturbed through and through: a bound is better than nonsense.
    return (long - short) / (plan.long - plan.short) if long > short else long / plan.long


def warm_up(turns: dict[str, Turns], started: dict[str, Contender], found: dict[str, Found]) -> float:
    """A turn each, whose length tells how long a round takes; who hangs is out."""
    began = time.monotonic()
    for name in list(started):
        attempt(name, turns, started, found)
        turns[name].clear()
    return 2 * (time.monotonic() - began)


def play(rounds: int, turns: dict[str, Turns], started: dict[str, Contender], found: dict[str, Found]) -> None:
    """A B C C B A."""
    for _ in range(rounds):
        for name in [*started, *reversed(started)]:
            if name in started:
                attempt(name, turns, started, found)


def attempt(name: str, turns: dict[str, Turns], started: dict[str, Contender], found: dict[str, Found]) -> None:
    try:
        turns[name]()
    except Hung as error:
        drop(name, str(error), started, found)


def own_share(
    case: ExitCase, contender: Contender, plan: Plan, settings: Settings, directory: Path
) -> dict[str, float] | None:
    """The VMM's own time an access. The C loop's is that of another process, which looks at the clock."""
    if not case.has_own_share:
        return None
    if not isinstance(contender.kind, Floor):
        return contender.own()
    other = Floor(share=True).start(case, directory, settings.pin)
    try:
        other.wait_until_ready()
        other.turn(plan, TURN_S)
        return other.own()
    except (CantRun, Hung):
        return None
    finally:
        other.close()


_tsc_khz: list[int] = []


def tsc_khz() -> int:
    """What KVM says of its guests' TSC; where it does not know, what the kernel says of the CPU."""
    if not _tsc_khz:
        with Kvm() as kvm:
            vm = kvm.create_vm()
            vcpu = vm.create_vcpu(0)
            _tsc_khz.append(vcpu.tsc_khz or round(float(environment.cpuinfo("cpu MHz")) * 1000))
            vcpu.close()
            vm.close()
    return _tsc_khz[0]
