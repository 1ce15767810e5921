"""In one process: a machine from nothing to its first exit and closed again, pyvmm beside the floor in C.

Each side is a process that makes a machine for every line it reads and prints the nanoseconds to make it, to its first
exit, to close it (floor.c, ``start``; contenders/cycle_child.py). They take turns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvmm_benchmarks import sampling
from pyvmm_benchmarks.contenders import c_floor
from pyvmm_benchmarks.contenders.exit_contender import environment
from pyvmm_benchmarks.report import Result

IRQCHIPS = ("off", "kernel")
MEMORY_MIB = 256
WARM_UP = 3
MS_PER_NS = 1e-6
SOURCE = Path(__file__).with_name("floor.c")
CHILD = Path(__file__).with_name("contenders") / "cycle_child.py"
# xor al, al; out 0xf4, al
FIRST_EXIT = bytes.fromhex("30c0 e6f4")
PHASES = ("create", "first exit", "close")

# Of one contender, a set: per round the phases of its two turns, ns.
Cycle = tuple[int, ...]
Cycles = dict[str, list[list[Cycle]]]


class Maker:
    """A process that makes machines."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def cycle(self) -> Cycle:
        """EOFError where it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"\n")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return tuple(int(word) for word in line.split())

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def commands(directory: Path, irqchip: str) -> dict[str, list[str]]:
    """The floor first, where there is a compiler."""
    image = directory / "first_exit.bin"
    image.write_bytes(FIRST_EXIT)
    found = {}
    if (binary := floor(directory)) is not None:
        found["c"] = [str(binary), "start", str(image), str(MEMORY_MIB), str(int(irqchip == "kernel"))]
    found["pyvmm"] = [sys.executable, "-P", str(CHILD), str(image), str(MEMORY_MIB), irqchip]
    return found


def floor(directory: Path) -> Path | None:
    compiler = c_floor.compiler()
    binary = directory / "start_floor"
    if compiler is None:
        return None
    if not binary.exists():
        subprocess.run([compiler, "-O2", "-Wall", "-o", str(binary), str(SOURCE)], check=True, capture_output=True)
    return binary


def measure(directory: Path, irqchip: str, rounds: int) -> Cycles:
    """A set: fresh processes, that many rounds after a warm-up. {contender: [its two turns, a round]}."""
    return take_turns(commands(directory, irqchip), rounds)


def take_turns(by_name: Mapping[str, Sequence[str]], rounds: int) -> Cycles:
    """The same of any such processes."""
    makers = {name: Maker(command) for name, command in by_name.items()}
    try:
        for _ in range(WARM_UP):
            for maker in makers.values():
                maker.cycle()
        taken: Cycles = {name: [] for name in makers}
        for _ in range(rounds):
            for name, turns in sampling.one_round({name: maker.cycle for name, maker in makers.items()}).items():
                taken[name].append(list(turns))
        return taken
    finally:
        for maker in makers.values():
            maker.close()


def results(sets: Sequence[Cycles]) -> list[Result]:
    """For the report: whole cycles in ms, the phases' medians as details."""
    made = []
    for name in ("c", "pyvmm"):
        mine = [each[name] for each in sets if name in each]
        if not mine:
            made.append(Result(name, reason=f"no C compiler: install one of {', '.join(c_floor.COMPILERS)}"))
            continue
        values = [[sum(map(sum, turns)) / len(turns) * MS_PER_NS for turns in rounds] for rounds in mine]
        cycles = [turn for rounds in mine for turns in rounds for turn in turns]
        phases = {
            phase: sampling.median([cycle[n] for cycle in cycles]) * MS_PER_NS for n, phase in enumerate(PHASES)
        }
        samples = [sum(cycle) * MS_PER_NS for cycle in cycles]
        made.append(Result(name, values, samples, ours=name == "pyvmm", details=phases))
    return made
