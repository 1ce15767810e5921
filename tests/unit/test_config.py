"""MachineConfig and its files: every wrong value is one sentence with what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm.config import MachineConfig, from_file
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


# -- files ---------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_toml_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vm.toml", 'memory_mib = 512\ncpus = 2\nkernel = "vmlinuz"\nno_reboot = true\n')
    options = from_file(path)
    assert options == {"memory_mib": 512, "cpus": 2, "kernel": "vmlinuz", "no_reboot": True}
    assert MachineConfig(**options).cpus == 2


def test_a_json_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vm.json", '{"kernel": "vmlinuz", "append": "console=ttyS0", "debug_exit": 1281}')
    assert from_file(path) == {"kernel": "vmlinuz", "append": "console=ttyS0", "debug_exit": 1281}


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert from_file(write(tmp_path / "vm.toml", "")) == {}
    assert from_file(write(tmp_path / "vm.json", "{}")) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vm.toml", "memory_mib = "),
        ("vm.toml", "memory_mib = 'lots'"),
        ("vm.toml", "memory_mib = 1.5"),
        ("vm.toml", "memroy_mib = 64"),
        ("vm.toml", "cpus = 1\ncpus = 2"),
        ("vm.toml", "[machine]\ncpus = 1"),
        ("vm.toml", b"\xff\xfe\x00"),
        ("vm.toml", "cpus = " + "[" * 100_000),
        ("vm.toml", '{"cpus": 1}'),
        ("vm.json", ""),
        ("vm.json", "[]"),
        ("vm.json", "null"),
        ("vm.json", '{"cpus": "1"}'),
        ("vm.json", '{"cpus": null}'),
        ("vm.json", '{"cpus": 1, "nope": 2}'),
        ("vm.json", '{"cpus": 1'),
        ("vm.json", b'{"kernel": "\xff"}'),
        ("vm.json", '{"append": ' + "[" * 100_000),
        ("vm.json", '{"no_reboot": 1}'),
    ],
)
def test_a_malformed_file_is_one_sentence_that_names_it(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**from_file(path))
    assert str(caught.value).startswith(f"config file {path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_file_that_is_not_there_or_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*give a TOML or JSON file"):
        from_file(str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        from_file(str(tmp_path))


@pytest.mark.parametrize("content", ["memory_mib = -1", "cpus = 0", "irqchip = 'split'"])
def test_values_of_a_file_are_checked_like_arguments(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError):
        MachineConfig(**from_file(write(tmp_path / "vm.toml", content)))


def test_a_file_may_set_every_option_that_is_plain_data(tmp_path: Path) -> None:
    # What only Python can give: bytes, lists of modules; and what a command decides for itself.
    only_in_python = {"modules", "fw_cfg", "raw_terminal"}
    values = {int: "1", str: "'x'", bool: "true"}
    content = ""
    for option in set(MachineConfig.rows) - only_in_python:
        annotation = MachineConfig.__annotations__[option]
        if "Sequence" in annotation:
            content += f"{option} = ['x']\n"
            continue
        kind = bool if "bool" in annotation else int if "int" in annotation else str
        content += f"{option} = {values[kind]}\n"
    assert set(from_file(write(tmp_path / "vm.toml", content))) == set(MachineConfig.rows) - only_in_python
