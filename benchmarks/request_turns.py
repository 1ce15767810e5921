"""Contenders whose guests do requests, so many a turn, and time themselves: for benchmarks of disks and networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvmm.errors import ConfigError
from pyvmm_benchmarks.contenders.exit_contender import LOOK_S, CantRun, Kind
from pyvmm_benchmarks.contenders.request_contender import RequestCase, RequestContender, SystemCalls
from pyvmm_benchmarks.exits import tsc_khz
from pyvmm_benchmarks.mailbox import Hung
from pyvmm_benchmarks.report import Case, Result

TURN_S = 30.0


class Found:
    """What all contenders gave in one case. Times in us a ``unit``, counts a unit."""

    def __init__(self, case: RequestCase, contenders: Sequence[Kind], reference: str, unit: str) -> None:
        self.case = case
        self.reference = reference
        self.unit = unit
        self.contenders = contenders
        self.sets: dict[str, list[list[float]]] = {kind.name: [] for kind in contenders}
        self.counts: dict[str, dict[str, float]] = {kind.name: {} for kind in contenders}
        self.reasons = {kind.name: kind.why_not(case) for kind in contenders}

    def case_report(self) -> Case:
        results = [
            Result(
                kind.name,
                [] if self.reasons[kind.name] else self.sets[kind.name],
                ours=kind.ours,
                reason=self.reasons[kind.name],
                details=dict(self.counts[kind.name]),
            )
            for kind in self.contenders
        ]
        case = Case(self.case.name, self.case.title, f"us a {self.unit}", results, reference=self.reference)
        case.details = {**self.case._asdict()}
        return case

    def count_lines(self) -> list[str]:
        names = ("system calls", "wake-ups", "Python calls", "doorbells", "interrupts", "threads' us")
        lines = [f"  {f'a {self.unit}':<18}" + "".join(f"{name:>14}" for name in names)]
        for kind in self.contenders:
            if counts := self.counts[kind.name]:
                lines.append(f"  {kind.name:<18}" + "".join(number(counts.get(name)) for name in names))
        return lines


def number(value: float | None) -> str:
    return f"{'-':>14}" if value is None else f"{value:>14.3f}"


def one_set(
    cases: Sequence[RequestCase],
    contenders: Sequence[Kind],
    directory: Path,
    found: dict[str, Found],
    rounds: int,
    scale: float,
    pin: int | None,
) -> None:
    """Fresh processes, all cases."""
    started: dict[str, RequestContender] = {}

    def drop(name: str, reason: str) -> None:
        started.pop(name).close()
        for one in found.values():
            if not any(one.sets[name]):
                one.reasons[name] = reason

    try:
        for kind in contenders:
            if not found[cases[0].name].reasons[kind.name]:
                started[kind.name] = kind.start(cases[0], directory, pin)
                wait(kind.name, started, drop)
        for case in cases:
            play(found[case.name], case, max(1, round(case.requests * scale)), rounds, started, drop)
    finally:
        for contender in started.values():
            contender.close()


def wait(name: str, started: dict[str, RequestContender], drop: Callable[[str, str], None]) -> None:
    try:
        while not started[name].try_ready():
            time.sleep(LOOK_S)
    except CantRun as error:
        drop(name, str(error))


def play(
    found: Found,
    case: RequestCase,
    count: int,
    rounds: int,
    started: dict[str, RequestContender],
    drop: Callable[[str, str], None],
) -> None:
    """A B C C B A, after a round that does not count; then what a request costs besides time."""
    us = 1e3 / tsc_khz() / count
    times: dict[str, list[float]] = {name: [] for name in started}
    sums: set[int] = set()
    for n in range(-1, rounds):
        for name in [*started, *reversed(started)]:
            if name not in started:
                continue
            try:
                answer = started[name].requests(case, count, TURN_S)
            except Hung as error:
                drop(name, f"{case.name}: {error}")
                continue
            if n >= 0:
                times[name].append(answer.ticks * us)
            if answer.sum is not None:
                sums.add(answer.sum)
    if len(sums) > 1:
        raise ConfigError(f"{case.name}: the contenders have moved different bytes: {sums}")
    for name, contender in started.items():
        # Two turns each: the lesser, for whatever disturbs one only adds to it.
        found.sets[name].append([min(pair) for pair in zip(times[name][::2], times[name][1::2], strict=True)])
        if not found.counts[name]:
            found.counts[name] = counts(contender, case, count)


def counts(contender: RequestContender, case: RequestCase, count: int) -> dict[str, float]:
    """Of turns that are not timed."""
    switches, own_ns = contender.switches(), contender.own_ns()
    answer = contender.requests(case, count, TURN_S)
    found = {
        "wake-ups": (contender.switches() - switches) / count,
        "threads' us": (contender.own_ns() - own_ns) / count / 1e3,
        "doorbells": answer.kicks / count,
        "interrupts": answer.interrupts / count,
    }
    with SystemCalls(contender.process.pid) as calls:
        contender.requests(case, count, TURN_S)
    if calls.count is not None:
        found["system calls"] = calls.count / count
    if contender.python_calls(True) is not None:
        contender.requests(case, count, TURN_S)
        found["Python calls"] = (contender.python_calls(False) or 0) / count
    return found
