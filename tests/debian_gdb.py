"""Debian's gdb as a client: it is given commands, and what it says is looked at."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

LIMIT_S = 900.0 if "PYVMM_LAB" in os.environ else 120.0
FIRST = ("set pagination off", "set confirm off", "set width 0", "set height 0")


def gdb(remote: Path | str, commands: Iterable[str], symbols: Path | None = None) -> str:
    """What these commands, of a gdb that is connected to ``remote``, have said."""
    given = [*FIRST, f"target remote {remote}", *commands]
    words = [word for command in given for word in ("-ex", command)]
    files = [] if symbols is None else [str(symbols)]
    command = ["gdb", "-q", "-nx", "-batch", *files, *words]
    with tempfile.TemporaryFile("w+") as said:
        ran = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        try:
            status: int | str = ran.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = f"no end within {LIMIT_S:g} s"
        finally:
            ran.kill()
            ran.wait()
        said.seek(0)
        text = said.read()
    assert status == 0, f"{status}\n{text}"
    return text
