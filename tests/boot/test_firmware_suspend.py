"""Suspend to RAM on a pc with SeaBIOS: the BIOS finds by itself that the reset ends a sleep, and goes to the vector."""

from __future__ import annotations

import re
from pathlib import Path

import asm
import disk_images
import pytest
from console import SerialLine

import pyvmm
from pyvmm import RunState

LIMIT_S = 120.0
WAK, RTC, PWRBTN = 0x8000, 0x400, 0x100


def sleeping_disk(path: Path, wakes: str) -> Path:
    source = Path(__file__).with_name("suspend.S").read_text().replace("{wakes}", wakes)
    disk_images.program(path, asm.assemble(source, "real16"))
    return path


@pytest.mark.parametrize("cpus", [1, 2])
def test_the_rtc_wakes_and_seabios_resumes(tmp_path: Path, firmware: Path, cpus: int) -> None:
    disk = sleeping_disk(tmp_path / "disk.img", "call s3_alarm")
    line = SerialLine()
    with pyvmm.Machine(drives=[str(disk)], firmware=firmware, memory_mib=32, cpus=cpus, serial=line.chardev) as m:
        m.resume()
        line.expect("going to sleep", LIMIT_S)
        assert m.wait(LIMIT_S)
        assert m.control.status == 3  # it says so itself
        found = re.search(r"awake (\w{8})(\w{8})(\w{8})", line.output)
        assert found
        assert [int(word, 16) for word in found.groups()] == [0x200, WAK | RTC, 0]


def test_wakeup_and_a_second_boot_by_reset(tmp_path: Path, firmware: Path) -> None:
    """A reset of the machine while its guest sleeps is no wake-up: SeaBIOS starts from the beginning."""
    disk = sleeping_disk(tmp_path / "disk.img", "")
    line = SerialLine()
    with pyvmm.Machine(drives=[str(disk)], firmware=firmware, memory_mib=32, serial=line.chardev) as m:
        m.resume()
        line.expect("going to sleep", LIMIT_S)
        until_suspended(m)
        m.reset()
        line.expect("Booting from Hard Disk", LIMIT_S)
        line.expect("going to sleep", LIMIT_S)
        until_suspended(m)
        m.wakeup()
        assert m.wait(LIMIT_S)
        assert m.control.status == 3
        assert f"awake 00000200{WAK | PWRBTN:08x}" in line.output


def until_suspended(m: pyvmm.Machine) -> None:
    while m.state is not RunState.SUSPENDED:
        assert not m.wait(0.01), m.control.status
