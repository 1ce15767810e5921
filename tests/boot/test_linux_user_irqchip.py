"""A stock Debian kernel whose interrupt controllers are all in Python: it uses them as on any PC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import Console
from linux_shell import ANSWER_S, APPEND, BOOT_S, PROMPT


def use_the_machine(console: Console) -> None:
    console.expect(PROMPT, BOOT_S)
    # The serial port's interrupt comes through the I/O APIC, ticks from the local APIC's timer.
    console.send("cat /proc/interrupts; echo done=$((6 * 7))\n")
    told = console.expect("done=42", ANSWER_S)
    assert "IO-APIC" in told
    assert "XT-PIC" not in told
    ticks = next(line.split() for line in told.splitlines() if line.strip().startswith("LOC:"))
    assert int(ticks[1]) > 100
    console.send("poweroff -f\n")
    assert console.wait(ANSWER_S) == 0


@pytest.mark.lab
def test_apics_in_python(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], guest_console: Callable[..., Console]
) -> None:
    initrd = str(make_initrd(SHELL_ON_TTYS0))
    args = ("--irqchip", "off", "--memory", "512", "--kernel", str(cloud_kernel.vmlinux), "--initrd", initrd)
    args += ("--append", APPEND)
    with guest_console(*args) as console:
        use_the_machine(console)
