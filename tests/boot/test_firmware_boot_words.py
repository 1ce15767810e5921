"""SeaBIOS does what --boot's words tell it."""

from __future__ import annotations

from pathlib import Path

import disk_images
from console import Console, pyvmm_run

BOOT_S = 120.0


def run_firmware(firmware: Path, *args: str) -> Console:
    return pyvmm_run("--firmware", str(firmware), "--memory", "32", "--timeout", "200", *args)


def blank(path: Path) -> str:
    path.write_bytes(bytes(disk_images.MIB))
    return str(path)


def test_the_boot_menu(tmp_path: Path, firmware: Path) -> None:
    """The second disk, which no order would try first."""
    second = tmp_path / "second.img"
    disk_images.handoff(second)
    drives = [blank(tmp_path / "first.img"), str(second)]
    with run_firmware(firmware, "--boot", "menu=on,splash-time=60000", *drives) as console:
        console.expect("Press ESC for boot menu", BOOT_S)
        console.send("\x1b")
        menu = console.expect("2. ", BOOT_S)
        assert "Select boot device" in menu
        console.send("2")
        assert "DL: 80 " in console.expect("Press any key", BOOT_S)


def test_trying_again_where_nothing_boots(tmp_path: Path, firmware: Path) -> None:
    disk = blank(tmp_path / "blank.img")
    with run_firmware(firmware, "--boot", "reboot-timeout=1000", "--boot", "c", "--no-reboot", disk) as console:
        console.expect("No bootable device.  Retrying in 1 seconds.", BOOT_S)
        assert console.wait(BOOT_S) == 6
