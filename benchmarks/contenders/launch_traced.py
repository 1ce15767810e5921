"""``pyvmm run``, with a stopwatch on each step of it: python -I -S launch_traced.py FD DIRECTORY run OPTIONS...

As the command does it (pyvmm/launcher/pyvmm, pyvmm/cli/way_in.py): isolated, without site, the package of DIRECTORY,
the modules from the bundle, and at the end the process goes without finalising the interpreter.

Writes one line of JSON to the descriptor FD: CLOCK_MONOTONIC, ns, when this file's first statement ran (``born``), when
the vCPUs went (``resumed``) and stood (``stopped``), and just before the interpreter goes (``ended``); and ``spent``:
{step: ns}, each step less what it contains of others. Imports are a step of their own wherever they happen.
"""

from time import monotonic_ns

BORN = monotonic_ns()

import builtins  # noqa: E402
import gc  # noqa: E402
import posix  # noqa: E402
import sys  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

IMPORTS = "imports"
# The names of the recipe's steps, and what each is.
STEPS = (
    ("pyvmm.builder", "make_memory", "memory"),
    ("pyvmm.boards.board", "Board.lay_out_memory", "memory"),
    ("pyvmm.platform", "KvmPlatform.__init__", "KVM"),
    ("pyvmm.platform", "KvmPlatform.make_cpus", "KVM"),
    ("pyvmm.platform", "cpuid_table", "CPUID"),
    ("pyvmm.platform", "KvmPlatform.enter", "KVM"),
    ("pyvmm.boards.board", "Board.install", "devices"),
    ("pyvmm.boards.board", "Board.load_guest", "loading"),
    ("pyvmm.boards.microvm", "Microvm.write_tables", "tables"),
    ("pyvmm.closers", "Closers.close", "closing"),
)


class Stopwatch:
    """Self time of nested steps, on one thread."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}
        self._inside: list[str] = []
        self._since = monotonic_ns()

    def _turn(self) -> None:
        """What has passed goes to the step under way."""
        now = monotonic_ns()
        if self._inside:
            name = self._inside[-1]
            self.spent[name] = self.spent.get(name, 0) + now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self._turn()
        self._inside.append(name)

    def leave(self) -> None:
        self._turn()
        self._inside.pop()

    def timed(self, name: str, call: "Callable[..., Any]") -> "Callable[..., Any]":
        def stamped(*args: "Any", **kwargs: "Any") -> "Any":
            self.enter(name)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return stamped


def main() -> int:
    watch = Stopwatch()
    stamps = {"born": BORN}
    fd = int(sys.argv[1])
    sys.path.append(sys.argv[2])
    gc.disable()
    plain = builtins.__import__

    def importing(name: str, *args: "Any", **kwargs: "Any") -> "Any":
        if watch._inside[-1:] == [IMPORTS]:
            return plain(name, *args, **kwargs)
        watch.enter(IMPORTS)
        try:
            return plain(name, *args, **kwargs)
        finally:
            watch.leave()

    builtins.__import__ = importing
    watch.enter("command")
    from pyvmm import cli

    watch.timed(IMPORTS, cli.load_ahead)()
    from pyvmm import machine, run_control

    for module, path, step in STEPS:
        owner: Any = sys.modules[module]
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, watch.timed(step, getattr(owner, name)))
    resume, wait = machine.Machine.resume, run_control.RunControl.wait

    ran: list[machine.Machine] = []

    def resumed(self: "Any") -> None:
        ran.append(self)
        stamps["resumed"] = monotonic_ns()
        watch.enter("guest")
        resume(self)

    def waited(self: "Any", *args: "Any") -> bool:
        try:
            return wait(self, *args)
        finally:
            watch.leave()
            stamps["stopped"] = monotonic_ns()
            stamps["first_exit"] = ran[0].first_exit_ns or 0

    machine.Machine.resume, run_control.RunControl.wait = resumed, waited  # type: ignore
    try:
        return cli.main(sys.argv[3:])
    finally:
        watch.leave()
        builtins.__import__ = plain
        import json

        line = json.dumps({**stamps, "ended": monotonic_ns(), "spent": watch.spent}) + "\n"
        posix.write(fd, line.encode())


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    posix._exit(status)
