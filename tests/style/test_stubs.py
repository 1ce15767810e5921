"""The stubs say what the compiled modules are: mypy.stubtest compares the two."""

from __future__ import annotations

import subprocess
import sys

from tree import ROOT, compiled_modules

ALLOWLIST = ROOT / "tests" / "style" / "stubtest_allowlist.txt"


def test_stubtest() -> None:
    # What an entry is about may be there with one version of Python and not with another.
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "--concise"),
            *("--allowlist", ALLOWLIST, "--ignore-unused-allowlist", "--mypy-config-file", ROOT / "pyproject.toml"),
            *compiled_modules(),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"\n{run.stdout}{run.stderr}"


def test_every_entry_of_the_allowlist_has_its_reason() -> None:
    reason = False
    for line in ALLOWLIST.read_text().splitlines():
        if line.startswith("#"):
            reason = True
        elif not line:
            reason = False
        else:
            assert reason, f"no reason above {line}"
