"""A lab that breaks under a test: the one test that this hit is tried again, the others are as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulator
HERE = Path(__file__).resolve().parent
LIMIT_S = 900.0


def emulators(below: Path) -> list[int]:
    """The QEMUs whose current directory is somewhere below: those of its labs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(below) and b"qemu" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # gone meanwhile, or not ours
    return found


def when_asked(run: subprocess.Popen[str], base: Path) -> str:
    """Waits until the sample wants its lab broken: by which signal."""
    asked, end = base / "break", time.monotonic() + LIMIT_S
    while not (asked.exists() and asked.read_text()):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)
    number = asked.read_text()
    asked.unlink()
    return number


def test_an_emulator_that_is_stopped_and_one_that_is_killed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(base), str(HERE / "lab_sample.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]) as run:
        for expected in ("SIGSTOP", "SIGKILL"):
            number = when_asked(run, base)
            assert number == expected
            (emulator,) = emulators(base)
            os.kill(emulator, signal.Signals[number])
        output = run.communicate(timeout=LIMIT_S)[0]
    assert re.search(r"1 failed, 4 passed", output), output
    assert "lab: 3 boots, 2 broke, 2 tests tried again" in output
    assert re.findall(r"lab: tried again \S*::(\S+): ", output) == ["test_here[SIGSTOP]", "test_here[SIGKILL]"]
    assert "where its threads stood" in output  # what that process wrote past pytest, as faulthandler does
    assert not emulators(base)
