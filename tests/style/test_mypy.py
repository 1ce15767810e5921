"""mypy --strict (pyproject.toml) on the package, compiled units by their stubs."""

from __future__ import annotations

import subprocess
import sys

from tree import ROOT


def test_mypy() -> None:
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"\n{run.stdout}{run.stderr}"
