"""Code in a network namespace of its own, where it may do with interfaces what it likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

UNSHARE = ("unshare", "--net", *(("--user", "--map-root-user") if os.geteuid() else ()))
LONGEST_S = 120
HEAD = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[3]), str(Path(__file__).parent)]!r}\n"


def in_namespace(code: str) -> str:
    """What ``code`` prints in an interpreter of its own. AssertionError with what it said where it fails."""
    command = [*UNSHARE, sys.executable, "-c", HEAD + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
