"""``pyvmm --version``: what this is, what it was built from and with, and what runs it."""

from __future__ import annotations

import os
import sys

import pyvmm

BUILT = "built.txt"  # setup.py writes it beside the package's modules


def version_text() -> str:
    """The first line is for programs, "pyvmm 1.2.3"; the others are for people."""
    home = os.path.dirname(os.path.abspath(pyvmm.__file__))
    lines = [f"pyvmm {pyvmm.__version__}"]
    for name, value in built(home):
        lines.append(f"  {name:<11}{value}")
    release = sys.version.split()[0]
    threads = ", free-threaded" if not getattr(sys, "_is_gil_enabled", lambda: True)() else ""
    lines.append(f"  {'runs on':<11}CPython {release}{threads}, {sys.executable or 'an unknown interpreter'}")
    lines.append(f"  {'package':<11}{home}")
    return "\n".join(lines) + "\n"


def built(home: str) -> list[tuple[str, str]]:
    """What built.txt says, line by line; empty for a checkout that has never been built by setup.py."""
    try:
        with open(os.path.join(home, BUILT), encoding="utf-8") as file:
            pairs = [line.rstrip("\n").partition(": ") for line in file]
    except OSError:
        return []
    return [(name, value) for name, _, value in pairs]
