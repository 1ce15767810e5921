"""What a benchmark found: as a table, as JSON, and against an earlier run.

A Report has cases; a case has a Result for each contender: its values, or the reason why there are none. One contender
is the reference, the C floor where there is one. docs/benchmarks.md ("The JSON") documents the file.

Compared are ratios to the reference, which a host's drift does not move, and values where there is no ratio. A change
is beyond noise where the two 95% intervals have nothing in common and it is larger than the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyvmm
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment, sampling
from pyvmm_benchmarks.sampling import Estimate, Sets

SCHEMA = "pyvmm-bench/1"
TOLERANCE = 0.05


class Result:
    """One contender in one case, in the case's unit.

    ``sets``: the values the figures are made from, a list a set of processes, a value a round. ``samples``: single
    measurements, whose 99th percentile and distribution are shown. ``own``: VMM's own share, ns, by name. ``reason``:
    why there is nothing, else empty. ``ours``: getting slower is a regression.
    """

    def __init__(
        self,
        name: str,
        sets: Sets = (),
        samples: Sequence[float] = (),
        *,
        ours: bool = False,
        reason: str = "",
        own: dict[str, float] | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.sets = [list(each) for each in sets]
        self.samples = sampling.thinned(samples)
        self.ours = ours
        self.reason = reason
        self.own = own
        self.details = details or {}
        self.value: Estimate | None = None
        self.ratio: Estimate | None = None
        self.p50: float | None = None
        self.p99: float | None = None
        if self.ran:
            self.value = sampling.estimate(self.sets)
        elif not reason:
            raise ValueError(f"{name}: neither values nor a reason")
        if samples:
            self.p50, self.p99 = sampling.quantile(samples, 0.5), sampling.quantile(samples, 0.99)

    @property
    def ran(self) -> bool:
        return any(self.sets)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "ours": self.ours,
            "ran": self.ran,
            "reason": self.reason,
            "value": plain_estimate(self.value),
            "ratio": plain_estimate(self.ratio),
            "p50": self.p50,
            "p99": self.p99,
            "own_ns": self.own,
            "details": self.details,
            "sets": self.sets,
            "samples": self.samples,
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Result:
        self = cls(
            data["name"],
            data["sets"],
            ours=data["ours"],
            reason=data["reason"],
            own=data["own_ns"],
            details=data["details"],
        )
        # Of all the samples there were, not of those that were kept.
        self.samples, self.p50, self.p99 = data["samples"], data["p50"], data["p99"]
        self.ratio = Estimate(**data["ratio"]) if data["ratio"] else None
        return self


class Case:
    """``title`` says what is measured, ``unit`` is us, ms or MiB; ``reference`` names the contender ratios are to."""

    def __init__(
        self, name: str, title: str, unit: str, results: Iterable[Result] = (), *, reference: str = "c"
    ) -> None:
        self.name = name
        self.title = title
        self.unit = unit
        self.reference = reference
        self.details: dict[str, Any] = {}
        self.results: list[Result] = []
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        """The reference first: the ratios of those after it are made here."""
        self.results.append(result)
        floor = self.find(self.reference)
        if result.ratio is not None or floor is None or floor is result:
            return
        if floor.ran and result.ran and same_rounds(result, floor):
            result.ratio = sampling.ratio(result.sets, floor.sets)

    def find(self, name: str) -> Result | None:
        return next((result for result in self.results if result.name == name), None)

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "reference": self.reference,
            "details": self.details,
            "contenders": [result.plain() for result in self.results],
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Case:
        results = [Result.from_plain(each) for each in data["contenders"]]
        self = cls(data["name"], data["title"], data["unit"], results, reference=data["reference"])
        self.details = data["details"]
        return self


def same_rounds(a: Result, b: Result) -> bool:
    return [len(each) for each in a.sets] == [len(each) for each in b.sets]


class Report:
    """``kind`` is the benchmark (exits, launch); ``host`` is environment.describe()'s, ``settings`` how it was run."""

    def __init__(
        self, kind: str, host: dict[str, Any], settings: dict[str, Any], cases: Iterable[Case] = ()
    ) -> None:
        self.kind = kind
        self.host = host
        self.settings = settings
        self.cases = list(cases)

    def find(self, name: str) -> Case | None:
        return next((case for case in self.cases if case.name == name), None)

    # -- JSON ----------------------------------------------------------------------------------------------------

    def plain(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "benchmark": self.kind,
            "pyvmm": pyvmm.__version__,
            "environment": self.host,
            "settings": self.settings,
            "cases": [case.plain() for case in self.cases],
        }

    def write(self, path: str | Path) -> None:
        try:
            Path(path).write_text(json.dumps(self.plain(), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: name a file that can be written") from None

    @classmethod
    def read(cls, path: str | Path, kind: str) -> Report:
        """ConfigError where that is no report of this benchmark."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}: give a file that --json has written") from None
        except ValueError:
            raise ConfigError(f"{path} is no JSON: give a file that --json has written") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("benchmark") != kind:
            raise ConfigError(f"{path} is no report of `pyvmm bench {kind}`: give a file that its --json has written")
        try:
            cases = [Case.from_plain(each) for each in data["cases"]]
            return cls(kind, data["environment"], data["settings"], cases)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is incomplete ({error}): give a file that --json has written") from None

    # -- the table -----------------------------------------------------------------------------------------------

    def table(self) -> str:
        """Everything, for people."""
        return "\n".join(line for case in self.cases for line in [*case_lines(case), ""])


HEAD = f"{'median':>10} {'(95%)':<17}{'ratio':>7} {'(95%)':<15}{'p50':>9}{'p99':>9}"


def case_lines(case: Case) -> list[str]:
    """A head with the case's name, and a line a contender."""
    has_own = any(result.own for result in case.results)
    own = f"  own ns: {'p50':>6}{'p99':>7}{'mean':>7}{'min':>6}" if has_own else ""
    lines = [f"{case.name}: {case.title}", f"  {case.unit:<17}{HEAD}{own}"]
    for result in case.results:
        lines.append(f"  {result.name:<17}{result_text(result)}".rstrip())
    return lines


def result_text(result: Result) -> str:
    if result.value is None:
        return f"  - {result.reason}"
    value = result.value
    text = f"{figure(value.value):>10} {f'({figure(value.low)}-{figure(value.high)})':<17}"
    if result.ratio is None:
        text += f"{'':>7} {'':<15}"
    else:
        text += f"{result.ratio.value:>7.3f} {f'({result.ratio.low:.3f}-{result.ratio.high:.3f})':<15}"
    text += f"{figure(result.p50):>9}{figure(result.p99):>9}"
    if result.own:
        o = result.own
        text += f"{'':10}{o['p50']:>6.0f}{o['p99']:>7.0f}{o['mean']:>7.0f}{o['min']:>6.0f}"
    return text


def figure(value: float | None) -> str:
    """With the digits that say something."""
    if value is None:
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def plain_estimate(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else value._asdict()


# -- against an earlier run --------------------------------------------------------------------------------------


class Change:
    """``regression``: it counts against us. ``text`` is for people."""

    def __init__(self, text: str, regression: bool = False) -> None:
        self.text = text
        self.regression = regression

    def __repr__(self) -> str:
        return f"<Change {self.text!r}{' REGRESSION' if self.regression else ''}>"


def compare(old: Report, new: Report, tolerance: float = TOLERANCE) -> list[Change]:
    """What changed beyond noise, of what both have measured."""
    changes = []
    for case in new.cases:
        before = old.find(case.name)
        if before is None:
            continue
        for result in case.results:
            was = before.find(result.name)
            if was is not None:
                changes += compare_results(case, before, was, result, tolerance)
    return changes


def compare_results(case: Case, before: Case, was: Result, now: Result, tolerance: float) -> list[Change]:
    where = f"{case.name}, {now.name}"
    if was.ran and not now.ran:
        return [Change(f"{where}: ran, and does not any more: {now.reason}", now.ours)]
    if now.ran and not was.ran:
        return [Change(f"{where}: runs now")]
    if was.value is None or now.value is None:
        return []
    floors = before.find(before.reference), case.find(case.reference)
    if was.ratio is not None and now.ratio is not None and None not in floors and now.name != case.reference:
        a, b, what = was.ratio, now.ratio, f"times {case.reference}"
    else:
        a, b, what = was.value, now.value, case.unit
    if not a.apart(b) or abs(b.value / a.value - 1) <= tolerance:
        return []
    slower = b.value > a.value
    word = ("more" if slower else "less") if case.unit == "MiB" else ("slower" if slower else "faster")
    percent = abs(b.value / a.value - 1) * 100
    figures = " -> ".join(f"{figure(e.value)} ({figure(e.low)}-{figure(e.high)})" for e in (a, b))
    return [Change(f"{where}: {percent:.0f}% {word}: {figures} {what}", slower and now.ours)]


def print_comparison(old: Report, new: Report, tolerance: float = TOLERANCE) -> int:
    """Prints it; the exit status: 1 where something of ours got worse."""
    for line in environment.differences(old.host, new.host):
        print(f"another host or set-up: {line}")
    changes = compare(old, new, tolerance)
    for change in changes:
        print(f"{'REGRESSION  ' if change.regression else '            '}{change.text}")
    if not changes:
        print(f"nothing changed beyond noise (intervals apart and more than {tolerance:.0%})")
    return int(any(change.regression for change in changes))
