"""pyvmm itself, as an embedder uses it: pyvmm_child.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import Contender, Kind, read_line
from pyvmm_benchmarks.mailbox import MEMORY_MIB

CHILD = Path(__file__).with_name("pyvmm_child.py")
ANSWER_S = 10.0


def python_command(child: Path, case: ExitCase, image: Path, *words: str) -> list[str]:
    """A child in Python, by the interpreter that runs this. -P: the modules beside it are no concern of its."""
    work = {**case._asdict(), "image": str(image), "memory_mib": MEMORY_MIB}
    return [sys.executable, "-P", str(child), *words, json.dumps(work)]


class Running(Contender):
    tells_memory = True

    def own(self) -> dict[str, float] | None:
        """By its exit profiler, of the case's port or page; kept since the machine was made."""
        if not self.case.has_own_share:
            return None
        assert self.process.stdin is not None
        self.go()
        self.process.stdin.write(b"own\n")
        self.process.stdin.flush()
        line = read_line(self.process.stdout, time.monotonic() + ANSWER_S)
        self.stop()
        found: dict[str, float] | None = json.loads(line) if line else None
        return found


class Pyvmm(Kind):
    name = "pyvmm"
    ours = True

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        return python_command(CHILD, case, directory / f"{case.guest}.bin")

    def start(self, case: ExitCase, directory: Path, pin: int | None) -> Contender:
        return Running(self, case, self.command(case, directory), pin)
