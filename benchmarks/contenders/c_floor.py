"""The floor: floor.c, compiled when it is wanted."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from pyvmm_benchmarks import environment, sampling
from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import CantRun, Contender, Kind
from pyvmm_benchmarks.mailbox import MEMORY_MIB, Memory

SOURCE = Path(__file__).with_name("floor.c")
MOST_SHARES = 1 << 16  # as floor.c keeps
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O2", "-Wall", "-Wextra", "-pthread")


def compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


class Running(Contender):
    tells_memory = True

    def own(self) -> dict[str, float] | None:
        """Of the last accesses, where it was started to note them."""
        if "share" not in self.said:
            return None
        memory = Memory(self.process.pid)
        try:
            at = int(self.said["share"], 0)
            count = min(struct.unpack("<Q", memory.read(at, 8))[0], MOST_SHARES)
            ticks = struct.unpack(f"<{count}I", memory.read(at + 8, 4 * count))
        finally:
            memory.close()
        if not ticks:
            return None
        ns = [1e6 * each / self.tsc_khz for each in ticks]
        return {
            "p50": sampling.median(ns),
            "p99": sampling.quantile(ns, 0.99),
            "mean": sum(ns) / len(ns),
            "min": min(ns),
        }


class Floor(Kind):
    """``share``: the loop that notes its own share, which costs something; it is not the reference."""

    name = "c"

    def __init__(self, *, share: bool = False) -> None:
        self.share = share

    def version(self) -> str | None:
        found = compiler()
        return environment.version(found, "--version") if found else "no C compiler"

    def why_not(self, case: ExitCase) -> str:
        return "" if compiler() else f"no C compiler: install one of {', '.join(COMPILERS)}"

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        command = [str(self.binary(directory)), str(directory / f"{case.guest}.rom"), str(MEMORY_MIB)]
        command.append(f"cpus={case.cpus}")
        command += [f"doorbell={case.doorbell}"] if case.doorbell else []
        command += [f"coalesce={case.coalesce}"] if case.coalesce else []
        switches = {"answer": case.answer, "irqs": case.irqs, "kick": case.kick, "share": self.share}
        return command + [name for name, on in switches.items() if on]

    def start(self, case: ExitCase, directory: Path, pin: int | None) -> Contender:
        return Running(self, case, self.command(case, directory), pin)

    def binary(self, directory: Path) -> Path:
        """Compiled into ``directory``, once."""
        path = directory / "floor"
        if not path.exists():
            command = [compiler() or "cc", *FLAGS, "-o", str(path), str(SOURCE)]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise CantRun(f"{' '.join(command)}: {ran.stderr.strip()}")
        return path
