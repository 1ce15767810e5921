"""The fixtures of the pytest plugin with a stock kernel and busybox's shell: what a reader of docs/pytest.md does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import boot_assets
import pytest

from pyvmm.dialog import Dialog
from pyvmm.pytest_plugin import Machines

BOOT_S = 300.0


@pytest.mark.lab
@pytest.mark.kvm_any
def test_commands_in_a_guests_shell(
    cloud_kernel: boot_assets.Kernel, make_initrd: Callable[..., Path], vm: Machines, console: Dialog
) -> None:
    initrd = make_initrd(boot_assets.SHELL_ON_TTYS0)
    vm(kernel=str(cloud_kernel.vmlinux), initrd=str(initrd), append="console=ttyS0 loglevel=4", memory_mib=256).resume()
    console.expect("# ", BOOT_S)
    assert console.run("echo $((6 * 7)); cd /proc", BOOT_S) == (0, "42\n")
    status, text = console.run("cat version", BOOT_S)
    assert status == 0 and text.startswith("Linux version ")
    assert console.run("sh -c 'exit 3'", BOOT_S) == (3, "")
    console.send("poweroff -f\n")
    with pytest.raises(AssertionError, match=r"the machine ended \(.*\) without"):
        console.expect("it is off", BOOT_S)
