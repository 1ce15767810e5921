"""A package that this machine's Debian lacks leaves its tests out, with a sentence; one that is missing fails them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHY = "no Debian package linux-image-cloud-amd64 can be had here"


def run_with(cache: Path) -> tuple[int, str]:
    """The exit status and the output of a pytest of one test that needs the cloud kernel."""
    test = ROOT / "tests" / "boot" / "test_assets.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{test}::test_both_extractors_agree[cloud]"],
        cwd=ROOT, env={**os.environ, "PYVMM_CACHE": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.returncode, run.stdout


def test_what_cannot_be_had_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "debian").mkdir()
    status, said = run_with(tmp_path)
    assert status == 1
    assert "1 failed" in said and "run ci/setup test" in said
    (tmp_path / "debian" / "linux-image-cloud-amd64.left-out").write_text(f"{WHY}\n")
    status, said = run_with(tmp_path)
    assert status == 0
    assert "1 skipped" in said and f"left out: {WHY}" in said
