"""Instructions of a program in user space, all its threads: a count that another load on the machine does not move.

By perf where the processor's counters are there (perf-stat(1)), else by callgrind, which runs the program in an
emulator (valgrind(1)): fifty times as long, the same count.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyvmm_benchmarks.stopwatch import Failed

MILLION = 1e6
# Of what a program said, when it was not counted.
WORDS = 300

Counter = Callable[[Sequence[str], Mapping[str, str] | None, float], float]


def counter() -> Counter | None:
    """What counts here: a function of a command, its environment and a limit in seconds, that gives millions of
    instructions and raises Failed. None where nothing does.
    """
    if shutil.which("perf"):
        try:
            by_perf(["true"], None, 10.0)
            return by_perf
        except Failed:
            pass  # no such counter in this machine
    return by_callgrind if shutil.which("valgrind") else None


def by_perf(command: Sequence[str], env: Mapping[str, str] | None, limit_s: float) -> float:
    with tempfile.NamedTemporaryFile() as said:
        run(["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", said.name, "--", *command], env, limit_s)
        return counted(r"^(\d+),.*instructions:u", Path(said.name).read_text())


def by_callgrind(command: Sequence[str], env: Mapping[str, str] | None, limit_s: float) -> float:
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--trace-children=yes"]
    with tempfile.TemporaryDirectory() as directory:
        run([*valgrind, f"--log-file={directory}/%p", *command], env, limit_s)
        # A file for each process: what a launcher is before it becomes the VMM has one with no count.
        logs = [path.read_text() for path in Path(directory).iterdir()]
        return sum(counted(r"I +refs: +([\d,]+)", log) for log in logs if "refs:" in log) or counted("refs", logs[0])


def run(command: Sequence[str], env: Mapping[str, str] | None, limit_s: float) -> None:
    try:
        subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"not over after {limit_s:g} s") from None


def counted(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise Failed(f"not counted: {text.strip()[-WORDS:]}")
    return int(found[1].replace(",", "")) / MILLION
