"""The parts of ``pyvmm bench launch``: what is launched, how often, and what is made of it. launch.py lists them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import cycles, footprint, instructions, launch_guests, stopwatch
from pyvmm_benchmarks.contenders.exit_contender import environment as child_environment
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.contenders.launch_pyvmm import Pyvmm
from pyvmm_benchmarks.launch_guests import Guest
from pyvmm_benchmarks.report import Case, Result
from pyvmm_benchmarks.stopwatch import AtOnce, Failed, Launch

Value = TypeVar("Value")

PARTS = ("small", "linux", "process", "memory", "many", "instructions", "trace")
REFERENCE = "qemu-pc"
MS_PER_NS = 1e-6

SMALL_LIMIT_S = 30.0
LINUX_LIMIT_S = 180.0
MANY_LIMIT_S = 180.0
# For each of many at once there must be so much memory.
MANY_MIB_EACH = 100
# A guest's first exit comes within a fraction of that where nothing of KVM's own stands in its way.
WAITED_MS = 5.0


class Settings(NamedTuple):
    """How much of it."""

    quick: bool
    rounds: int
    linux_rounds: int
    sets: int  # of processes, in one process each
    many: tuple[int, ...]


# What the contenders' turns gave, and why others took none.
Turns = dict[str, list[Value]]
Reasons = dict[str, str]


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
            "instructions": self._instructions,
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
        """One launch. Failed."""
        limit_s = LINUX_LIMIT_S if guest.linux else SMALL_LIMIT_S
        return stopwatch.launch(launcher.command(guest), marks, limit_s=limit_s, until=until, env=self.env)

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
            self.case("small_processor", "processor time of the process until its end, its guest's in it", "ms", turns,
                      reasons, processor_ms),
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

    def held(self, launcher: Launcher, guest: Guest, count: int = 1) -> footprint.Footprint:
        """What each of ``count`` of a launcher's holds whose guests have all spoken and wait: the mean."""
        runnings: list[stopwatch.Running] = []
        try:
            for _ in range(count):
                runnings.append(stopwatch.Running(launcher.command(guest), {}, self.env, ()))
            for running in runnings:
                stopwatch.watch(running, MANY_LIMIT_S, stopwatch.FIRST_BYTE)
                if running.first_ns is None:
                    raise Failed(f"ended and said nothing: {running.words()}")
            return footprint.mean([footprint.beyond_guest(each.process.pid, guest.memory_mib) for each in runnings])
        except (footprint.NoGuestRam, OSError) as error:
            raise Failed(f"its memory can't be told apart: {error}") from None
        finally:
            for running in runnings:
                running.close()

    def _many(self) -> list[Case]:
        guest = self.small()
        waiting = launch_guests.write_flat("waiting", self.directory, launch_guests.WAIT)
        made = []
        for count in self.settings.many:

            def at_once(launcher: Launcher, count: int = count) -> AtOnce:
                room_for(count)
                return stopwatch.at_once([launcher.command(guest)] * count, limit_s=MANY_LIMIT_S, env=self.env)

            def held(launcher: Launcher, count: int = count) -> footprint.Footprint:
                room_for(count)
                return self.held(launcher, waiting, count)

            rounds = self.settings.rounds if count == 1 else max(1, self.settings.rounds // 3)
            turns, reasons = self.take_turns(guest, at_once, rounds)
            footprints, why = self.take_turns(waiting, held, 1)
            made += [
                self.case(f"many_{count}", f"{count} at once: until the last guest has written its byte", "ms", turns,
                          reasons, lambda each: each.first_ns * MS_PER_NS),
                self.case(f"many_{count}_gone", f"{count} at once: until all processes are gone", "ms", turns, reasons,
                          lambda each: each.end_ns * MS_PER_NS),
                self.case(f"many_{count}_pss", f"{count} whose guests wait: what each holds beyond guest RAM, shared "
                          "pages by their parts (PSS)", "MiB", footprints, why, lambda each: each.pss_mib),
            ]  # fmt: skip
        return made

    def _instructions(self) -> list[Case]:
        guest = self.small()
        title = "instructions of the small guest's launch, in user space, all threads"
        count = instructions.counter()
        if count is None:
            reason = "neither perf nor callgrind counts here (Debian: valgrind)"
            return [Case("small_instructions", title, "M", [Result(REFERENCE, reason=reason)], reference=REFERENCE)]

        def counted(launcher: Launcher) -> float:
            return count(launcher.command(guest), self.env, SMALL_LIMIT_S * 10)

        turns, reasons = self.take_turns(guest, counted, 1)
        return [self.case("small_instructions", title, "M", turns, reasons, lambda each: each)]

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
            traced = [self.traced(guest, marks) for _ in range(2 * rounds + 1)][1:]
            names = list(dict.fromkeys(step for each in traced for step in each.steps))
            taken = {step: [each.steps.get(step, 0.0) for each in traced] for step in names}
            results = [Result(step, [values], values, ours=True) for step, values in taken.items()]
            what = "the small guest" if guest.linux is None else "Linux"
            made.append(Case(name, f"where pyvmm's time goes, {what}", "ms", results, reference=""))
            first = [each.first_exit_ms for each in traced]
            made.append(first_exits(f"first_exit_{name.removeprefix('trace_')}", first))
        return made

    def traced(self, guest: Guest, marks: Mapping[str, bytes]) -> Traced:
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
        return Traced(steps_of(start_ns, spoken(launched), told), told["first_exit"] * MS_PER_NS)


class Traced(NamedTuple):
    """A launch of pyvmm's. ``steps``: milliseconds a step, in the order of their beginning; together they are all the
    time there is. ``first_exit_ms``: from the first KVM_RUN to the guest's first exit.
    """

    steps: dict[str, float]
    first_exit_ms: float


def first_exits(name: str, taken: list[float]) -> Case:
    """How long KVM took; its title says how many starts waited."""
    waited = sum(ms > WAITED_MS for ms in taken)
    title = (
        f"from the first KVM_RUN to the first exit; {waited} of {len(taken)} starts waited more than {WAITED_MS:g} ms"
    )
    return Case(name, title, "ms", [Result("pyvmm", [taken], taken, ours=True)], reference="")


def room_for(count: int) -> None:
    """Failed where there is no memory for so many at once."""
    if available_mib() < count * MANY_MIB_EACH:
        raise Failed(f"{count} at once want {count * MANY_MIB_EACH} MiB of free memory")


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


def processor_ms(launched: Launch) -> float:
    return float(launched.cpu_ns * MS_PER_NS)


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
