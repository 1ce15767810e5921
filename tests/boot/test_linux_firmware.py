"""A stock Debian kernel that SeaBIOS boots out of fw_cfg: it takes the board as the firmware's tables describe it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import SHELL_ON_TTYS0, Kernel
from console import Console
from linux_shell import ANSWER_S, APPEND, BOOT_S, PROMPT


def answer(console: Console, command: str) -> list[str]:
    """The lines that a command prints. The quotes keep its echo by the terminal from looking like them."""
    console.send(f"echo be''gin; {command}; echo en''d\n")
    console.expect("\r\nbegin", ANSWER_S)
    said = console.expect("\r\nend", ANSWER_S)
    console.expect(PROMPT, ANSWER_S)
    return said.replace("\r", "").split("\n")[1:]


def use_the_machine(console: Console) -> None:
    console.expect("Booting from ROM...", BOOT_S)
    console.expect("Linux version", BOOT_S)
    console.expect(PROMPT, BOOT_S)
    answer(console, "dmesg -n 1")
    assert answer(console, "cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/bios_vendor") == ["pyvmm", "SeaBIOS"]
    # One line a link device, from the interpreter of its _CRS, _PRS and _SRS.
    links = answer(console, "dmesg | grep -o 'link LNK.* for IRQ .*'")
    assert [line.split()[1] for line in links] == ["LNKA", "LNKB", "LNKC", "LNKD", "LNKS"]
    assert {line.split()[-1] for line in links[:4]} <= {"5", "10", "11"}
    assert links[4].endswith("IRQ 9")
    windows = answer(console, "dmesg | grep -o 'root bus resource .*'")
    assert windows == [
        "root bus resource [io  0x0000-0x0cf7 window]",
        "root bus resource [io  0x0d00-0xffff window]",
        "root bus resource [mem 0x000a0000-0x000bffff window]",
        "root bus resource [mem 0x80000000-0xfebfffff window]",
        "root bus resource [bus 00]",
    ]
    unhappy = "ACPI (BIOS )?(Error|Warning|Exception)|Firmware Bug.*ACPI|can't claim|no compatible bridge window"
    assert answer(console, f'dmesg | grep -E "{unhappy}"') == []
    console.send("poweroff -f\n")
    assert console.wait(ANSWER_S) == 0


@pytest.mark.lab
def test_linux_takes_the_board_as_it_is_described(
    firmware: Path, cloud_kernel: Kernel, make_initrd: Callable[..., Path], guest_console: Callable[..., Console]
) -> None:
    args = ["--firmware", str(firmware), "--memory", "512"]
    args += ["--kernel", str(cloud_kernel.bzimage), "--initrd", str(make_initrd(SHELL_ON_TTYS0)), "--append", APPEND]
    with guest_console(*args) as console:
        use_the_machine(console)
