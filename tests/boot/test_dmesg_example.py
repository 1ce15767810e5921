"""docs/examples/test_dmesg.py with Debian's kernel, where that boots."""

from __future__ import annotations

from pathlib import Path

import boot_assets
import pytest
from page_blocks import ROOT


@pytest.mark.lab
def test_a_pytest_that_boots_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL", str(boot_assets.kernel("cloud").bzimage))
    monkeypatch.setenv("LIMIT_S", "300")
    monkeypatch.setenv("APPEND", "noxsave")  # the lab's XSETBV has no effect (docs/lab.md), of which Linux warns
    example = ROOT / "docs" / "examples" / "test_dmesg.py"
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(Path("/")), str(example)])
    assert status == 0
