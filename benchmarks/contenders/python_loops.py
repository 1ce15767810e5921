"""Run loops in nothing but Python, by fcntl.ioctl and by ctypes: loop_child.py. What Cython buys is the difference."""

from __future__ import annotations

from pathlib import Path

from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import Contender, Kind
from pyvmm_benchmarks.contenders.ours import python_command

CHILD = Path(__file__).with_name("loop_child.py")


class Running(Contender):
    tells_memory = True


class Loop(Kind):
    """``how`` is fcntl or ctypes."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.name = f"python-{how}"

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        return python_command(CHILD, case, directory / f"{case.guest}.rom", self.how)

    def start(self, case: ExitCase, directory: Path, pin: int | None) -> Contender:
        return Running(self, case, self.command(case, directory), pin)
