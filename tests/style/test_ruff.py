"""The linter has nothing to say about anything in the repository."""

from __future__ import annotations

import subprocess
import sys

from tree import ROOT


def test_ruff() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"\n{run.stdout}{run.stderr}"
