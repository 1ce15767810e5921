"""A contender of ``pyvmm bench launch``: how a VMM is told to run a guest, from the shell."""

from __future__ import annotations

from pyvmm_benchmarks import environment
from pyvmm_benchmarks.launch_guests import Guest


class Launcher:
    """Its name, whether it is there, what it can't launch.

    ``ours``: getting slower counts as a regression of pyvmm. ``programs``: its names on PATH; ``variable``: the
    environment variable that names it instead.
    """

    name = ""
    ours = False
    programs: tuple[str, ...] = ()
    variable = ""

    def __init__(self) -> None:
        found = (environment.find(program, self.variable) for program in self.programs)
        self.program = next((path for path in found if path), None)

    def version(self) -> str | None:
        """For the head of the report. None for what comes with pyvmm."""
        return environment.version(self.program, "--version") if self.program else "not installed"

    def why_not(self, guest: Guest) -> str:
        """The reason why it can't launch this guest; empty where it can."""
        return "" if self.program else f"not installed (or name it in {self.variable})"

    def command(self, guest: Guest) -> list[str]:
        """Its serial console goes to standard output, and it ends when the guest does."""
        raise NotImplementedError
