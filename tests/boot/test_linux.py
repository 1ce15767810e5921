"""A stock Debian kernel with a busybox initrd under `pyvmm run --cpus 2`: shell, two CPUs, reboot, power-off."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import Console, pyvmm_run

BOOT_S = 150.0  # emulated hardware on a shared machine: 10 s where it is quiet, 50 s where it is not
ANSWER_S = 60.0
# The lab's emulated SVM can lose the wake-up of a HLT; a guest that polls when idle does not depend on it.
APPEND = "console=ttyS0 panic=-1 idle=poll"
PROMPT = "# "


def use_the_machine(console: Console) -> None:
    """From the first boot through a reset to the power-off."""
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


@pytest.mark.lab
@pytest.mark.parametrize("image", ["bzimage", "vmlinux"])
def test_shell_reboot_poweroff(image: str, cloud_kernel: Kernel, make_initrd: Callable[..., Path]) -> None:
    kernel = str(getattr(cloud_kernel, image))
    initrd = str(make_initrd(SHELL_ON_TTYS0))
    args = ("--cpus", "2", "--memory", "512", "--kernel", kernel, "--initrd", initrd, "--append", APPEND)
    try:
        with pyvmm_run(*args) as console:
            use_the_machine(console)
    except AssertionError as error:
        # The emulated host under us stands still once in a while, for every VMM: one more try, and it is said.
        warnings.warn(f"once more, after: {error}", stacklevel=1)
        with pyvmm_run(*args) as console:
            use_the_machine(console)
