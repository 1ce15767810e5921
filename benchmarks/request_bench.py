"""A benchmark of requests as a command: its options, what it measures in turns (request_turns.py), its report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.contenders.exit_contender import Kind
from pyvmm_benchmarks.contenders.request_contender import RequestCase
from pyvmm_benchmarks.exits import chosen
from pyvmm_benchmarks.report import TOLERANCE, Report, case_lines, print_comparison
from pyvmm_benchmarks.request_turns import Found, one_set

SETS, ROUNDS = 3, 10
QUICK_SETS, QUICK_ROUNDS = 1, 4


class RequestBench:
    """One verb of ``pyvmm bench``. A class of it says what is measured, and between whom."""

    verb: str
    unit: str
    """What is requested, in a word."""
    title: str
    """Of its help."""
    cases: Sequence[RequestCase]
    more_options: tuple[Option, ...] = ()

    def kinds(self) -> Sequence[Kind]:
        """Every contender there may be, the reference first."""
        raise NotImplementedError

    def settings(self, given: dict[str, Any], contenders: Sequence[Any]) -> dict[str, object]:
        """Those of its own options, for the report. ConfigError for what can't be."""
        return {}

    def directory(self, given: dict[str, Any]) -> str | None:
        """In which the run has one of its own; None: where temporary files are."""
        return None

    def before_all(self, directory: Path) -> None:
        """Once, before any contender starts."""

    def before_set(self, directory: Path, contenders: Sequence[Any], given: dict[str, Any]) -> None:
        """Before those of a set start."""

    @property
    def reference(self) -> str:
        return self.kinds()[0].name

    @property
    def options(self) -> tuple[Option, ...]:
        return (
            Option("--quick", "", "fewer sets of processes, fewer rounds"),
            Option("--cases", "A,B", "only these (see --list)"),
            Option("--contenders", "A,B", f"only these; {self.reference} is the reference"),
            Option("--sets", "N", f"sets of fresh processes (default {SETS})", int),
            Option("--rounds", "N", f"rounds a set (default {ROUNDS})", int),
            Option("--scale", "N", f"{self.unit}s a turn, times this (default 1)", float),
            Option("--pin", "CPU|none", "where the vCPU runs; all other threads run elsewhere (default: the last one)"),
            *self.more_options,
            Option("--json", "FILE", "write everything found to FILE"),
            Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
            Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
            Option("--list", "", "the cases and the contenders"),
            Option("--help -h", "", "this"),
        )

    def main(self, args: Sequence[str]) -> int:
        given = parse(self.options, args, verb=f"bench {self.verb}")
        if given.get("help"):
            print(usage(self.title, self.options), end="")
            return 0
        if given.get("list"):
            print("cases:", *(f"  {case.name:<20}{case.title}" for case in self.cases), sep="\n")
            lines = (f"  {kind.name:<20}{kind.version() or 'comes with pyvmm'}" for kind in self.kinds())
            print("contenders:", *lines, sep="\n")
            return 0
        old = Report.read(given["compare"], self.verb) if "compare" in given else None
        report = self.measured(given)
        if "json" in given:
            report.write(given["json"])
        return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))

    def measured(self, given: dict[str, Any]) -> Report:
        """All of it, printed as it comes."""
        cases = chosen(given.get("cases", ""), self.cases, "case")
        contenders = chosen(given.get("contenders", ""), self.kinds(), "contender")
        sets = given.get("sets", QUICK_SETS if given.get("quick") else SETS)
        rounds = given.get("rounds", QUICK_ROUNDS if given.get("quick") else ROUNDS)
        scale = given.get("scale", 1.0)
        if sets < 1 or rounds < 1:
            raise ConfigError("--sets and --rounds: give at least 1")
        try:
            pin = environment.choose_pin(given.get("pin"))
        except ValueError:
            raise ConfigError(f"--pin {given['pin']}: give the number of a CPU, or none") from None
        settings = {**self.settings(given, contenders), "sets": sets, "rounds": rounds, "scale": scale, "pin": pin}
        programs = {kind.name: version for kind in contenders if (version := kind.version()) is not None}
        report = Report(self.verb, environment.describe(pin, programs), settings)
        print("\n".join(environment.lines(report.host)) + "\n", flush=True)
        with tempfile.TemporaryDirectory(dir=self.directory(given)) as name, environment.left_to_contenders(pin):
            directory = Path(name)
            self.before_all(directory)
            found = {case.name: Found(case, contenders, self.reference, self.unit) for case in cases}
            for _ in range(sets):
                self.before_set(directory, contenders, given)
                one_set(cases, contenders, directory, found, rounds, scale, pin)
            for one in found.values():
                report.cases.append(one.case_report())
                print("\n".join([*case_lines(report.cases[-1]), *one.count_lines(), ""]), flush=True)
        return report
