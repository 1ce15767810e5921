"""Configuration files: what they say, and what is told of those that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyvmm.balloon_options import BalloonOptions
from pyvmm.block.options import DriveOptions
from pyvmm.config import MachineConfig
from pyvmm.config_file import MOST_BYTES, from_file
from pyvmm.console_options import ConsoleOptions
from pyvmm.errors import ConfigError
from pyvmm.net.options import NetOptions


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(path: str) -> str:
    """What is said of it, without the path."""
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**from_file(path))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600
    assert caught.value.__cause__ is None
    assert said.removeprefix("config file ").startswith(f"{path}:"), said
    return said.removeprefix("config file ").removeprefix(path)


def test_a_toml_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vm.toml", 'memory_mib = 512\ncpus = 2\nkernel = "vmlinuz"\nno_reboot = true\n')
    options = from_file(path)
    assert options == {"memory_mib": 512, "cpus": 2, "kernel": "vmlinuz", "no_reboot": True}
    assert MachineConfig(**options).cpus == 2


def test_a_json_file(tmp_path: Path) -> None:
    path = write(tmp_path / "vm.json", '{"$schema": "x", "kernel": "vmlinuz", "append": "quiet", "debug_exit": 1281}')
    assert from_file(path) == {"kernel": "vmlinuz", "append": "quiet", "debug_exit": 1281}


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert from_file(write(tmp_path / "vm.toml", "")) == {}
    assert from_file(write(tmp_path / "vm.json", "{}")) == {}


TABLES = """
kernel = "k"
memory_mib = "2G"
debug_exit = "none"
nets = ["passt"]
modules = []
balloon = "64M,free-page-reporting=on"
[[drives]]
file = "a.img"
size = "1M"
[[drives]]
file = "b.img"  # a comment
read_only = true
[[consoles]]
where = "pty"
name = "agent"
[run]
timeout = 5
"""


def test_tables_words_and_sizes(tmp_path: Path) -> None:
    config = MachineConfig(**from_file(write(tmp_path / "vm.toml", TABLES)))
    taken = config.taken()
    assert (config.memory_mib, config.debug_exit) == (2048, None)
    assert taken["drives"] == (DriveOptions("a.img", size=1 << 20), DriveOptions("b.img", read_only=True))
    assert (taken["nets"], taken["consoles"]) == ((NetOptions("passt"),), (ConsoleOptions("pty", name="agent"),))
    assert taken["balloon"] == BalloonOptions(64, free_page_reporting=True)


def test_fw_cfg_names_files_whose_bytes_are_read(tmp_path: Path) -> None:
    write(tmp_path / "x", b"\x00\xff")
    path = write(tmp_path / "vm.toml", f'[fw_cfg]\n"opt/x" = "{tmp_path / "x"}"\n')
    assert from_file(path) == {"fw_cfg": {"opt/x": b"\x00\xff"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("memory_mib = ", ":1: this is no TOML: Invalid value"),
        ("cpus = 1\nmemory_mib = 'lots'", ":2: memory_mib='lots': that is no SIZE (RAM: 256, 256M or 2G"),
        ("memory_mib = 1.5", ":1: memory_mib is 1.5: give a whole number or a string"),
        ("# ours\n\nmemroy_mib = 64", ":3: there is no option 'memroy_mib': did you mean memory_mib?"),
        ("cpus = 1\ncpus = 2", ":2: this is no TOML: Cannot overwrite a value"),
        ("[machine]\ncpus = 1", ":1: machine is a table: give a string"),
        (b"cpus = 1\n\xff\xfe\x00", ":2: this is no UTF-8: save it as such"),
        ("cpus = " + "[" * 100_000, ": nested too deeply: options are plain values"),
        ("cpus = " + "9" * 5_000, ": a number in it is too long: options are smaller"),
        ("#" * (MOST_BYTES + 1), f": it is longer than {MOST_BYTES} bytes: that is no machine's"),
        ('{"cpus": 1}', ":1: this is no TOML: Invalid statement"),
        ("[build-system]\nrequires = []", ":1: there is no option 'build-system': docs/configuration.md has"),
        ("no_reboot = 1", ":1: no_reboot is 1: give true or false"),
        ("cpus = '1'", ":1: cpus is '1': give a whole number"),
        ("cpus = true", ":1: cpus is True: give a whole number"),
        ("cpus = 0", ":1: cpus=0: give a whole number of vCPUs, at least 1"),
        ("irqchip = 'split'", ":1: irqchip='split': use kernel or off"),
        ("raw_terminal = true", ":1: there is no option 'raw_terminal'"),
        ("drives = 'a.img'", ":1: drives is 'a.img': give a list"),
        ("drives = [\n 'a.img',\n 5]", ":3: drives[1] is 5: give a string or a table"),
        ("drives = [\n 'a.img',\n 'file=b,cach=none']", ":3: a drive has no option 'cach': did you mean cache?"),
        ("[[drives]]\nfile='a'\n[[drives]]\nif='ide'", ":4: a drive has no option 'if': here it is interface"),
        ("[[drives]]\nfile='a'\ncach='none'", ":3: a drive has no option 'cach': did you mean cache?"),
        ("[[drives]]\nfile='a'\ncache='nope'", ":3: drive option cache='nope': use writeback, none, writethrough,"),
        ("cpus=1\n[[drives]]\nformat='raw'", ":2: a disk without an image"),
        ("[[nets]]\nforward = [8080]", ":2: net option forward=8080: give HOST:GUEST"),
        ("nets = [{kind = 'tap', tap = 'x', mtu = 1}]", ":1: net option mtu=1: give a whole number from 68 to 65535"),
        ("[fw_cfg]\nx = 5", ":2: x is 5: give a string"),
        ("vsock = 5", ":1: vsock is 5: give a string or a table"),
        ("[vsock]\ncid = 2", ":2: vsock option cid=2: give the guest's address"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_toml_is_told_with_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert refused(write(tmp_path / "vm.toml", content)).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ":1: this is no JSON: Expecting value"),
        ("[]", ":1: give an object of options"),
        ("null", ":1: give an object of options"),
        ('{"cpus": null}', ":1: cpus is None: give a whole number"),
        ('{"cpus": 1,\n "nope": 2}', ":2: there is no option 'nope'"),
        ('{"cpus": 1,\n "cpus": 2}', ": 'cpus' is there twice: give it once"),
        ('{"cpus": 1', ":1: this is no JSON: Expecting"),
        (b'{"kernel": "\xff"}', ":1: this is no UTF-8"),
        ('{"append": ' + "[" * 100_000, ": nested too deeply"),
        ('{"drives": [\n{"file": "a"},\n{"file": "b",\n "cache": 1}]}', ":4: cache is 1: give a string"),
        ('{"cpus": NaN}', ":1: cpus is nan: give a whole number"),
    ],
)
def test_what_is_wrong_with_json_is_told_with_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert refused(write(tmp_path / "vm.json", content)).startswith(said)


def test_a_file_that_is_not_there_or_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*give a TOML or JSON file"):
        from_file(str(tmp_path / "missing.toml"))
    with pytest.raises(ConfigError, match="Is a directory"):
        from_file(str(tmp_path))
    with pytest.raises(ConfigError, match="longer than"):
        from_file("/dev/zero")
    with pytest.raises(ConfigError, match="null"):
        from_file("a\0b.toml")


def test_a_file_may_set_every_option_but_one(tmp_path: Path) -> None:
    values = {"string": "none", "integer": 1, "boolean": True, "array": [], "object": {}}
    words = {"machine": "pc", "flat_mode": "long64", "irqchip": "off", "huge_pages": "2M", "accel": "qtest"}
    words |= {"boot": "c", "virtio_ring": "packed", "virtio_ioeventfd": "off", "virtio_irqfd": "off", "cpu": "host"}
    words |= {"virtio_disable_legacy": "on", "virtio_disable_modern": "off"}
    words |= {"uuid": "12345678-1234-1234-1234-123456789abc"}
    names = set(MachineConfig.rows) - {"raw_terminal"}  # which a command decides for itself
    said = {name: words.get(name, values[MachineConfig.rows[name].kind.file.split()[0]]) for name in names}
    assert set(from_file(write(tmp_path / "vm.json", json.dumps(said)))) == names
