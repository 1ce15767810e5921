"""Stock Linux suspends to RAM and is woken by its RTC's alarm, with both processors, and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import Console

BOOT_S = 120.0  # on the lab's clock
ANSWER_S = 90.0
PROMPT = "# "


@pytest.mark.lab
@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_suspend_to_ram(
    machine: str,
    cloud_kernel: Kernel,
    make_initrd: Callable[..., Path],
    guest_console: Callable[..., Console],
) -> None:
    initrd = str(make_initrd(SHELL_ON_TTYS0))
    kernel = str(cloud_kernel.bzimage)
    args = ("--machine", machine, "--cpus", "2", "--memory", "512", "--kernel", kernel, "--initrd", initrd)
    with guest_console(*args, "--append", "console=ttyS0 panic=-1 no_console_suspend") as console:
        console.expect(PROMPT, BOOT_S)
        console.send("mount -t sysfs none /sys 2>/dev/null; cat /sys/power/mem_sleep\n")
        console.expect("[deep]", ANSWER_S)
        console.send("echo +2 > /sys/class/rtc/rtc0/wakealarm; echo mem > /sys/power/state; echo woken=$((6 * 7))\n")
        console.expect("ACPI: PM: Preparing to enter system sleep state S3", ANSWER_S)
        console.expect("ACPI: PM: Waking up from system sleep state S3", ANSWER_S)
        console.expect("woken=42", ANSWER_S)
        console.send("echo CPUs=$(nproc)\n")
        console.expect("CPUs=2", ANSWER_S)
        console.send("poweroff -f\n")
        assert console.wait(ANSWER_S) == 0
