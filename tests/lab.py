"""The nested lab (ci/lab) as tests use it: commands and consoles there, its clock, and how often it broke."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from console import PYVMM_RUN, GuestConsole

ROOT = Path(__file__).resolve().parents[1]
CI_LAB = ROOT / "ci" / "lab"
sys.path.append(str(ROOT / "ci"))
from nested_lab.client import LabConnection, NoLabError  # noqa: E402

__all__ = ["CI_LAB", "Lab", "NoLabError"]


class Lab:
    """A lab, up when this returns: one of its own for this process, or that which the process ``owner`` keeps there.

    ``shared`` is a directory that commands in the lab see at the same path and may write. Raises NoLabError with the
    reason if there is none.
    """

    def __init__(self, directory: Path, shared: Path, owner: int | None = None) -> None:
        self.directory = directory
        self._ours = owner is None
        up = [CI_LAB, "up", "--at", directory, "--scratch", shared, "--with", str(owner or os.getpid())]
        made = subprocess.run(up, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if made.returncode:
            raise NoLabError(made.stderr.strip())
        self._supervisor = LabConnection(directory)

    def clock(self) -> float:
        """Seconds that the lab was given: they do not pass while its processors wait for one of this machine's."""
        return self._supervisor.clock_s()

    def status(self) -> dict[str, Any]:
        """As `ci/lab status` prints it: ``boot`` counts boots, ``breaks`` tells what ended the others."""
        return self._supervisor.status()

    def command(self, *argv: str, tty: bool = False) -> list[str]:
        """What runs `argv` there, as a command of this machine."""
        return [str(CI_LAB), "exec", "--at", str(self.directory), *(["--tty"] if tty else []), "--", *argv]

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """subprocess.Popen of a command in the lab: its streams, signals and status are the command's."""
        return subprocess.Popen(self.command(*argv), **options)

    def guest_console(self, *args: str) -> GuestConsole:
        """`pyvmm run` with these arguments on a terminal in the lab."""
        return GuestConsole(*self.command(*PYVMM_RUN, *args, tty=True), clock=self.clock)

    def close(self) -> None:
        self._supervisor.close()
        if self._ours:
            subprocess.run([CI_LAB, "down", "--at", self.directory], check=False)
