"""pyvmm from the shell: its microvm, which is what ``pyvmm run`` makes of a kernel, and its pc."""

from __future__ import annotations

import sys
from pathlib import Path

import pyvmm
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.launch_guests import SOFTWARE_HIDDEN, Guest

TRACED = Path(__file__).with_name("launch_traced.py")


class Pyvmm(Launcher):
    """``machine`` is microvm or pc."""

    ours = True

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.name = "pyvmm" if machine == "microvm" else f"pyvmm-{machine}"

    def version(self) -> str | None:
        return None

    def why_not(self, guest: Guest) -> str:
        return ""

    def command(self, guest: Guest) -> list[str]:
        return [*shell_command(), *self.words(guest)]

    def traced(self, guest: Guest, fd: int) -> list[str]:
        """The same by launch_traced.py, which tells the descriptor where its time went."""
        package = str(Path(pyvmm.__path__[0]).parent)
        return [sys.executable, "-I", "-S", str(TRACED), str(fd), package, *self.words(guest)]

    def words(self, guest: Guest) -> list[str]:
        words = ["run", "--machine", self.machine, "--memory", str(guest.memory_mib), "--no-reboot"]
        if guest.linux is None:
            # The pc has firmware at its reset vector, the microvm has none.
            image = ("--firmware", guest.file("rom")) if self.machine == "pc" else ("--flat", guest.file("bin"))
            return [*words, *image]
        linux = guest.linux
        words += ["--kernel", linux.kernel, "--initrd", linux.initrd, "--append", linux.append]
        return words if linux.full else [*words, "--cpu", ",".join(["host", *(f"-{name}" for name in SOFTWARE_HIDDEN)])]


def shell_command() -> list[str]:
    """The command that pip made beside this interpreter, or what it would do."""
    script = Path(sys.executable).with_name("pyvmm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "pyvmm"]
