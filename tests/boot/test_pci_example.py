"""docs/examples/pci_dma.py's device under Debian's kernel, driven by docs/examples/pci_dma_driver.c."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import boot_assets
import pytest
from page_blocks import ROOT

import pyvmm

EXAMPLES = ROOT / "docs" / "examples"
BOOT_S = 300.0  # on the lab's clock


@pytest.mark.lab
def test_linux_drives_it(tmp_path: Path, make_initrd: Callable[..., Path]) -> None:
    driver = tmp_path / "driver"
    source = EXAMPLES / "pci_dma_driver.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", driver, source], check=True)
    initrd = make_initrd("driver > /dev/ttyS0 2>&1; poweroff -f\n", files={"bin/driver": driver.read_bytes()})
    board = runpy.run_path(str(EXAMPLES / "pci_dma.py"))["WithShouter"]
    said: list[bytes] = []
    options = {"append": "console=ttyS0 quiet panic=-1", "no_reboot": True, "memory_mib": 512}
    kernel = boot_assets.kernel("cloud").bzimage
    with pyvmm.Machine(board=board, machine="pc", kernel=kernel, initrd=initrd, serial=said.append, **options) as m:
        status = m.run(BOOT_S)
    text = b"".join(said).decode(errors="replace")
    assert status == 0, text
    assert "1 interrupt, text: HELLO FROM LINUX" in text
