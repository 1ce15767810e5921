"""A stock Debian kernel with a busybox initrd under `pyvmm run`: shell, all its CPUs, suspend, reboot, power-off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import Console
from linux_shell import ANSWER_S, APPEND, BOOT_S, PROMPT, suspend_and_wake


def use_the_machine(console: Console, cpus: int, alarm: bool) -> None:
    """From the first boot through a suspend and a reset to the power-off."""
    console.expect("Linux version", BOOT_S)
    console.expect(PROMPT, BOOT_S)
    console.send("echo CPUs=$(nproc)\n")
    console.expect(f"CPUs={cpus}", ANSWER_S)
    suspend_and_wake(console, cpus, alarm)
    console.send("reboot -f\n")
    console.expect("Linux version", BOOT_S)
    console.expect(PROMPT, BOOT_S)
    # Typed input, arithmetic done in the guest: not an echo of what was sent.
    console.send("echo again=$((6 * 7))\n")
    console.expect("again=42", ANSWER_S)
    console.send("poweroff -f\n")
    assert console.wait(ANSWER_S) == 0


@pytest.mark.lab
@pytest.mark.parametrize(("machine", "image", "cpus"), [("microvm", "bzimage", 2), ("pc", "vmlinux", 4)])
def test_shell_suspend_reboot_poweroff(
    machine: str,
    image: str,
    cpus: int,
    cloud_kernel: Kernel,
    make_initrd: Callable[..., Path],
    guest_console: Callable[..., Console],
) -> None:
    kernel = str(getattr(cloud_kernel, image))
    initrd = str(make_initrd(SHELL_ON_TTYS0))
    args = ("--machine", machine, "--cpus", str(cpus), "--memory", "512", "--kernel", kernel, "--initrd", initrd)
    with guest_console(*args, "--append", f"{APPEND} no_console_suspend") as console:
        use_the_machine(console, cpus, alarm=machine == "pc")
