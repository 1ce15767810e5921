"""A stock Debian kernel with a busybox initrd under `pyvmm run --cpus 2`: shell, two CPUs, reboot, power-off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import pyvmm_run

BOOT_S = 240.0  # emulated hardware on a shared machine
ANSWER_S = 60.0
# The lab's emulated SVM can lose the wake-up of a HLT; a guest that polls when idle does not depend on it.
APPEND = "console=ttyS0 panic=-1 idle=poll"
PROMPT = "# "


@pytest.mark.lab
@pytest.mark.parametrize("image", ["bzimage", "vmlinux"])
def test_shell_reboot_poweroff(image: str, cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    initrd = make_initrd(SHELL_ON_TTYS0)
    kernel = str(getattr(cloud_kernel, image))
    args = ("--cpus", "2", "--memory", "512", "--kernel", kernel, "--initrd", str(initrd), "--append", APPEND)
    with pyvmm_run(*args) as console:
        console.expect("Linux version", BOOT_S)
        console.expect(PROMPT, BOOT_S)
        console.send("echo CPUs=$(nproc)\n")
        console.expect("CPUs=2", ANSWER_S)
        console.send("reboot -f\n")
        console.expect("Linux version", BOOT_S)
        console.expect(PROMPT, BOOT_S)
        # Typed input, arithmetic done in the guest: not an echo of what was sent.
        console.send("echo again=$((6 * 7))\n")
        console.expect("again=42", ANSWER_S)
        console.send("poweroff -f\n")
        assert console.wait(ANSWER_S) == 0
