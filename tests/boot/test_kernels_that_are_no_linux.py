"""Programs in a Linux kernel's clothes, from Debian's packages, on a full KVM: what they say is what QEMU shows."""

from __future__ import annotations

import re
from pathlib import Path

import boot_assets
import pytest

import pyvmm
from pyvmm.dialog import Dialog
from pyvmm.pytest_plugin import Machines

LIMIT_S = 240.0


def test_what_wants_a_bios_is_told_so() -> None:
    with pytest.raises(pyvmm.ConfigError, match=r"ipxe\.lkrn has to be started by a BIOS.*add --firmware"):
        pyvmm.Machine(kernel=boot_assets.ipxe(), memory_mib=64)


@pytest.mark.lab
@pytest.mark.after_consoles
def test_ipxe_by_firmware(firmware: Path, vm: Machines, console: Dialog) -> None:
    """Its set-up code is real-mode code that calls the BIOS. Software KVM lacks the IRET of its shell."""
    vm(machine="pc", memory_mib=64, firmware=firmware, kernel=boot_assets.ipxe()).resume()
    console.expect("iPXE initialising devices...", LIMIT_S)  # newer ones say no more "ok"
    console.expect("Open Source Network Boot Firmware", LIMIT_S)
    console.expect("No more network devices", LIMIT_S)


@pytest.mark.lab
@pytest.mark.after_consoles
@pytest.mark.parametrize("cpus", [1, 2])
def test_memtest_tests_with_all_processors(cpus: int, vm: Machines, console: Dialog) -> None:
    """Its own local APIC is off when it wakes the others. Software KVM lacks FWAIT, with which it begins."""
    m = vm(kernel=boot_assets.memtest(), append="console=ttyS0,115200", cpus=cpus, memory_mib=64)
    m.resume()
    said = console.expect("Status: Testing", LIMIT_S)
    threads = re.findall(r"SMP: (\w+)", said)
    assert threads[-1] == ("Disabled" if cpus == 1 else f"{cpus}T")
    assert m.resets.count == 0
