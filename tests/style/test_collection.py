"""Whatever is missing or broken on a host: pytest collects all tests, and what a broken package is for fails alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT
from tried import TRIALS, what_becomes_of

LIMIT_S = 300


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which every package with machine code of its own kills whoever imports it, as one does that
    was made for another processor; and in which no program can be found.
    """
    for name in (*TRIALS, "liburing"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}


def run_pytest(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def test_everything_is_collected(broken: dict[str, str]) -> None:
    collected = run_pytest(broken, "--collect-only", "tests", "benchmarks")
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-3000:]
    assert "tests/unit/block/test_block_engines.py::" in collected.stdout


def test_what_needs_a_broken_package_fails_alone(broken: dict[str, str]) -> None:
    ran = run_pytest(broken, "tests/unit/x86/test_x86_bzimage.py", "-k", "test_every_packing_unpacks")
    assert ran.returncode == 1, ran.stderr
    assert "2 failed, 4 passed" in ran.stdout
    for name in ("lz4", "zstandard"):
        assert f"{name} is missing or broken: tried in a process of its own, it died of SIGILL" in ran.stdout


def test_what_becomes_of_a_trial_is_told() -> None:
    assert what_becomes_of("pass") == ""
    assert what_becomes_of("import no_such_thing") == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert what_becomes_of("import os; os.abort()") == "it died of SIGABRT"
    assert what_becomes_of("raise SystemExit(3)") == "it ended with status 3"


@pytest.mark.parametrize("name", sorted(set(TRIALS) - {"atheris"}))
def test_each_trial_goes_well_here(name: str) -> None:
    assert what_becomes_of(TRIALS[name]) == ""
