"""Machines that a command does not begin: of a snapshot (--restore), or of another process (--incoming)."""

from __future__ import annotations

from pyvmm.cli.say import say
from pyvmm.errors import ConfigError
from pyvmm.machine import Machine
from pyvmm.options import ON_OFF, split_commas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLOCKS = ("saved", "now")
USE = "give FILE[,check=on][,eager=on|,userfaultfd=on][,prefetch=on][,clock=now]"


def restored(text: str, given: dict[str, Any]) -> Machine:
    """The machine of a snapshot. Its consoles are where they were, but those that were a program's: the terminal."""
    from pyvmm.snapshot import Snapshot

    path, ways = ways_of(text)
    with Snapshot(path) as snapshot:
        if isinstance(snapshot.spec.get("serial"), dict):
            given.setdefault("serial", "stdio")
        if "consoles" not in given and snapshot.spec.get("consoles"):
            from pyvmm.console_options import with_terminal

            consoles = with_terminal(snapshot.spec["consoles"])
            given |= {} if consoles is None else {"consoles": consoles}
        return Machine.restore(snapshot, raw_terminal=True, **ways, **given)


def ways_of(text: str) -> tuple[str, dict[str, Any]]:
    """The path, and what Machine.restore is to do with it. A comma in a path is written twice."""
    path, *words = split_commas(text) or [""]
    ways: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "clock" and value in CLOCKS:
            ways[name] = value
        elif name in ("check", "eager", "userfaultfd", "prefetch") and (value or "on") in ON_OFF:
            ways[name] = ON_OFF[value or "on"]
        else:
            raise ConfigError(f"--restore {path}: there is no {word!r}: {USE}")
    if not path or text.startswith(","):
        raise ConfigError(f"--restore {text!r} names no snapshot: {USE}")
    return path, ways


def arrived(address: str, given: dict[str, Any]) -> Machine:
    """The machine that somebody sends there. Its consoles are those given."""

    def ready(at: str) -> None:
        say(f"waiting for a machine at {at}")

    return Machine.incoming(address, ready=ready, raw_terminal=True, **given)
