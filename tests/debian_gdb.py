"""Debian's gdb as a client: it is given commands, and what it says is looked at."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

LIMIT_S = 900.0 if "PYVMM_LAB" in os.environ else 120.0
FIRST = ("set pagination off", "set confirm off", "set width 0", "set height 0")


def gdb(remote: Path | str, commands: Iterable[str], symbols: Path | None = None) -> str:
    """What these commands, of a gdb that is connected to ``remote``, have said."""
    given = [*FIRST, f"target remote {remote}", *commands]
    words = [word for command in given for word in ("-ex", command)]
    files = [] if symbols is None else [str(symbols)]
    ran = subprocess.run(
        ["gdb", "-q", "-nx", "-batch", *files, *words],
        capture_output=True, text=True, check=False, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr
