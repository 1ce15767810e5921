"""MachineConfig and its files: every wrong value is one sentence with what to give instead."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.config import MachineConfig
from pyvmm.errors import ConfigError


@pytest.mark.parametrize("value", ["std", "", 1, "TEXT"])
def test_vga_is_text_or_nothing(value: object) -> None:
    with pytest.raises(ConfigError, match="use text or none: there is no graphics"):
        MachineConfig(flat=b"\xf4", vga=value)
    assert MachineConfig(flat=b"\xf4", vga="text").vga == "text"


def test_defaults() -> None:
    config = MachineConfig()
    assert (config.memory_mib, config.cpus, config.irqchip, config.cpu) == (256, 1, "kernel", "host")
    assert (config.kernel, config.serial, config.no_reboot, config.debug_exit) == (None, None, False, 0xF4)


def test_values_are_taken() -> None:
    config = MachineConfig(
        memory_mib=64, cpus=2, kernel="vmlinuz", initrd=b"cpio", append="quiet", no_reboot=True
    )
    assert (config.memory_mib, config.cpus, config.kernel, config.append) == (64, 2, "vmlinuz", "quiet")
    assert MachineConfig().memory_mib == 256


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory_mib": 0}, "memory_mib=0: give a whole number of MiB"),
        ({"memory_mib": -1}, "memory_mib=-1"),
        ({"memory_mib": 1.5}, "memory_mib=1.5"),
        ({"memory_mib": "256"}, "memory_mib='256'"),
        ({"memory_mib": True}, "memory_mib=True"),
        ({"memory_mib": None}, "memory_mib=None"),
        ({"cpus": 0}, "cpus=0: give a whole number of vCPUs, at least 1"),
        ({"cpus": -3}, "cpus=-3"),
        ({"cpus": 2.0}, "cpus=2.0"),
        ({"irqchip": "split"}, "use kernel or off"),
        ({"irqchip": "off", "cpus": 2}, "use cpus=1"),
        ({"kernel": "a", "flat": "b"}, "both a kernel and a flat binary"),
        ({"flat": "b", "append": "quiet"}, "a flat binary takes no"),
        ({"flat": "b", "initrd": "i"}, "a flat binary takes no"),
        ({"flat": "b", "modules": [("m", "")]}, "a flat binary takes no"),
        ({"initrd": "i"}, "without a kernel"),
        ({"append": "quiet"}, "without a kernel"),
        ({"modules": [("m", "")]}, "without a kernel"),
        ({"kernel": "k", "initrd": "i", "modules": [("m", "")]}, "both an initrd and modules"),
        ({"flat_mode": "real32"}, "use real16, protected32 or long64"),
        ({"debug_exit": -1}, "give a port"),
        ({"debug_exit": 0xFFFF}, "give a port"),
        ({"debug_exit": "0xf4"}, "give a port"),
        ({"kernal": "k"}, "there is no option 'kernal': did you mean kernel"),
        ({"memory": 64}, "there is no option 'memory'"),
        ({"xyzzy": 1}, "there is no option 'xyzzy'"),
        ({"check": 1}, "there is no option 'check'"),
        ({"__class__": 1}, "there is no option '__class__'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_debug_exit_at_all() -> None:
    assert MachineConfig(debug_exit=None).debug_exit is None
