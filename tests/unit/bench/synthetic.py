"""Contenders with known costs, for the harness to find out (synthetic_child.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyvmm_benchmarks import environment, exits
from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import Contender, Kind
from pyvmm_benchmarks.report import Case, Report

CHILD = Path(__file__).with_name("synthetic_child.py")
TSC_KHZ = 2_000_000
# Two contenders are enough for a ratio; the guest's bytes are not run.
CASE = ExitCase("outl_to_qemu", "made up", "outl_to_qemu")
SETTINGS = exits.Settings(quick=False, sets=2, rounds=6, pin=None, turn_s=5e-3)


class Telling(Contender):
    tells_memory = True


class Synthetic(Kind):
    """See synthetic_child.py for the options; ``ours`` counts as pyvmm."""

    def __init__(self, name: str, cost_us: float, *, ours: bool = False, **work: Any) -> None:
        self.name = name
        self.ours = ours
        self.work = {"cost_us": cost_us, "overhead_us": 0, "noise": 0, "disturbed": 0, "tsc_khz": TSC_KHZ, **work}
        self.started: list[Contender] = []

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        return [sys.executable, "-S", str(CHILD), json.dumps(self.work)]

    def start(self, case: ExitCase, directory: Path, pin: int | None) -> Contender:
        kind = Telling if self.work.get("tells", True) else Contender
        contender = kind(self, case, self.command(case, directory), pin)
        self.started.append(contender)
        return contender


class CantEver(Synthetic):
    def why_not(self, case: ExitCase) -> str:
        return "not installed"


def measure(directory: Path, *kinds: Kind, settings: exits.Settings = SETTINGS, case: ExitCase = CASE) -> Case:
    return exits.measure(case, kinds, settings, directory)


def report(*cases: Case) -> Report:
    return Report("exits", environment.describe(None), SETTINGS._asdict(), cases)
