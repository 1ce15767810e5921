"""SeaBIOS and GRUB from an NBD server's disk over IDE: the controller's PIO, one request of the guest's at a time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import disk_images
import pytest
from console import SerialLine
from disk_images import GRUB_LEGACY_PROMPT, HELLO

import pyvmm

LIMIT_S = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """qemu-nbd, listening, with GRUB's disk."""
    disk, line, pid = tmp_path / "grub.img", tmp_path / "nbd", tmp_path / "pid"
    disk_images.grub_legacy(disk)
    # --fork: the command ends when its child listens.
    words = ("qemu-nbd", "--fork", "--socket", line, "--pid-file", pid, "--format", "raw", "--persistent", disk)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=LIMIT_S)
    yield f"nbd:unix:{line}"
    os.kill(int(pid.read_text()), signal.SIGTERM)


def test_grub_comes_from_an_nbd_server(server: str, firmware: Path) -> None:
    line = SerialLine()
    drive = pyvmm.DriveOptions(server, format="raw", interface="ide")
    with pyvmm.Machine(machine="pc", drives=[drive], firmware=firmware, memory_mib=64, serial=line.chardev) as m:
        m.resume()
        line.expect(GRUB_LEGACY_PROMPT, LIMIT_S)
        line.send("cat (hd0,0)/hello.txt\r")
        assert HELLO.strip() in line.expect(GRUB_LEGACY_PROMPT, LIMIT_S)
