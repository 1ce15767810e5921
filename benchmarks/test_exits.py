"""The exit cases of pyvmm and of the C floor: a round of pytest-benchmark is a turn of so many accesses.

A turn's time on the clock has the way there and back in it; the cost of one access by the guest's own clock is in
``extra_info`` (us_an_access).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm_benchmarks import exits, sampling
from pyvmm_benchmarks.cases import CASES, ExitCase
from pyvmm_benchmarks.contenders.c_floor import Floor
from pyvmm_benchmarks.contenders.exit_contender import Contender, Kind
from pyvmm_benchmarks.contenders.ours import Pyvmm
from pyvmm_benchmarks.environment import choose_pin, left_to_contenders
from pyvmm_benchmarks.mailbox import Hung

ROUNDS, WARM_UP_ROUNDS = 30, 3
TURN_S = 5e-3


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled floor, and the guests."""
    return tmp_path_factory.mktemp("exits")


@pytest.mark.parametrize("kind", [Floor(), Pyvmm()], ids=lambda kind: str(kind.name))
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_exit(benchmark: Any, case: ExitCase, kind: Kind, directory: Path) -> None:
    if reason := kind.why_not(case):
        pytest.skip(reason)
    pin = choose_pin(None)
    exits.write_images(case, directory)
    contender = kind.start(case, directory, pin)
    try:
        contender.wait_until_ready()
        with left_to_contenders(None if case.threads else pin):
            measure(benchmark, case, contender)
    finally:
        contender.close()


def measure(benchmark: Any, case: ExitCase, contender: Contender) -> None:
    try:
        ticks = contender.turn(exits.CALIBRATION, exits.FIRST_TURN_S)
    except Hung as error:
        pytest.skip(f"this KVM can't: {error}")
    khz = exits.tsc_khz()
    cost_s = max(1.0, sampling.median(ticks.singles)) / (khz * 1e3)
    plan = exits.plan_for(cost_s, TURN_S, blocks=case.blocks)
    costs_us: list[float] = []

    def turn() -> None:
        costs_us.append(exits.cost(contender.turn(plan, exits.TURN_S), plan) * 1e3 / khz)

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)
    benchmark.extra_info["us_an_access"] = round(sampling.median(costs_us[WARM_UP_ROUNDS:]), 3)
    benchmark.extra_info["accesses_a_turn"] = plan.accesses
