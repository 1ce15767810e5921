"""Each example in docs/examples runs as its reader runs it; what it shows it asserts by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guests import TIMEOUT_S
from page_blocks import ROOT, stand_ins

EXAMPLES = ROOT / "docs" / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_"))
ARGUMENTS = {"fuzz_forks.py": ["60"]}  # so many forks: it has found something by then
SHOWS = {
    "counter.py": r"3 \+ 4 = 7",
    "exit_latency.py": r"nobody's port: p1 \d+ ns, median \d+ ns",
    "fuzz_forks.py": r"\d+ forks a minute",
    "hundred_machines.py": "100 machines made",
    "pci_dma.py": "found an H",
    "tiny_os.py": r"switched \d+ times",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example(name: str, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, ())],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(SHOWS[name], made.stdout), made.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_an_example_is_a_page(path: Path) -> None:
    if path.is_file():
        assert len(path.read_text().splitlines()) < 100


def test_the_test_of_a_kernel_fails_for_what_is_none(tmp_path: Path) -> None:
    # tests/boot/test_dmesg_example.py has it pass.
    (tmp_path / "kernel").write_bytes(stand_ins(tmp_path)["vmlinux"])
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_dmesg.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "KERNEL": str(tmp_path / "kernel")},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert made.returncode == 1, made.stdout + made.stderr
    assert "3 failed, 1 passed" in made.stdout
