"""Spec: complete, unchangeable, written down and read again; all mistakes are told before anything is opened."""

from __future__ import annotations

import builtins
import os
import posix
from pathlib import Path
from typing import Any

import pytest

from pyvmm.block import DriveOptions
from pyvmm.config import MachineConfig
from pyvmm.errors import ConfigError
from pyvmm.spec import Spec, specify

HLT = b"\xf4"


def test_the_board_is_chosen() -> None:
    assert Spec(flat=HLT).machine == "microvm"
    assert Spec(drives=["a.img"]).machine == "pc"
    assert Spec(drives=["file=a.img,if=virtio"]).machine == "pc"
    assert Spec(kernel="k", drives=["a.img"]).machine == "pc"
    assert Spec(kernel="k", drives=["file=a.img,if=virtio"]).machine == "microvm"
    assert Spec(kernel="k", firmware="bios.bin", drives=["file=a.img,if=virtio"]).machine == "pc"
    assert Spec(kernel="k", drives=["file=a.img,if=virtio", "b.img"]).machine == "pc"
    assert Spec(firmware="bios.bin").machine == "pc"
    assert Spec(accel="qtest").machine == "pc"
    assert Spec(machine="pc", flat=HLT).machine == "pc"


def test_it_comes_of_a_configuration_that_stays_as_it_is() -> None:
    drive = DriveOptions("a.img")
    config = MachineConfig(drives=[drive, "file=b.img,media=cdrom"], serial="none", vga="none", no_reboot=True)
    before = repr(config)
    spec = specify(config, {})
    assert repr(config) == before
    assert (drive.index, config.machine) == (None, None)
    assert [(d.file, d.index, d.id, d.serial) for d in spec.drives] == [
        ("a.img", 0, "ide0-hd0", "PV00001"),
        ("b.img", 2, "ide1-cd0", "PV00003"),
    ]
    assert (spec.serial, spec.vga, spec.no_reboot, spec.memory_mib) == (None, None, True, 256)
    assert specify(spec, {}) is spec


def test_it_does_not_change() -> None:
    spec = Spec(flat=HLT)
    with pytest.raises(AttributeError, match="does not change"):
        spec.cpus = 2
    assert spec.changed(cpus=2).cpus == 2
    assert spec.cpus == 1


def test_two_are_equal_where_the_same_machine_comes_of_them(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    assert Spec(kernel=path, serial="none") == Spec(kernel=str(path), cpus=1)
    assert Spec(kernel=path) != Spec(kernel=path, cpus=2)
    assert Spec(flat=HLT) == Spec(flat=bytearray(HLT))
    assert Spec(flat=HLT) != Spec(flat=b"\xf5")
    assert Spec(drives=["a.img"]) == Spec(drives=["file=a.img,index=0,serial=PV00001"])
    assert Spec(drives=["a.img"]) != Spec(drives=["file=a.img,index=1"])
    assert Spec(flat=HLT) != MachineConfig(flat=HLT)


WRITTEN = {
    "machine": "pc",
    "drives": ["a.img", "file=b.img,media=cdrom,cache=none", "file=c.img,throttling.iops-total=5,id=third"],
    "kernel": "vmlinuz",
    "initrd": "initrd.gz",
    "append": "console=ttyS0",
    "fw_cfg": {"opt/x": b"\0\xff"},
    "uuid": "00112233-4455-6677-8899-aabbccddeeff",
    "boot": "order=cd,menu=on",
    "serial": "file:log",
    "debug_exit": None,
    "cpu": "host,-xsave",
    "huge_pages": "2M",
}


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_it_is_written_down_and_read_again(name: str) -> None:
    import msgspec

    format = getattr(msgspec, name)
    spec = Spec(**WRITTEN)
    again = Spec.from_plain(format.decode(format.encode(spec.plain())))
    assert again == spec
    assert [drive.throttle_iops for drive in again.drives] == [0, 5, 0]
    assert again.fw_cfg == {"opt/x": b"\0\xff"}


def test_what_only_this_process_has_is_named_and_given_again() -> None:
    import json

    heard: list[bytes] = []
    given: dict[str, Any] = {"kernel": b"\x7fELF", "serial": heard.append, "modules": [(b"one", "1"), ("two", "2")]}
    spec = Spec(machine="microvm", **given)
    data = json.loads(json.dumps(spec.plain()))
    assert data["kernel"] == {"given": 4}
    assert data["serial"] == {"given": "object"}
    assert data["modules"] == [[{"given": 3}, "1"], ["two", "2"]]
    assert Spec.from_plain(data, given) == spec
    for missing, sentence in (
        ("kernel", "kernel was given as 4 bytes: give the same bytes again"),
        ("serial", "serial was an object of the process"),
        ("modules", "modules[0] was given as 3 bytes"),
    ):
        with pytest.raises(ConfigError) as caught:
            Spec.from_plain(data, {name: value for name, value in given.items() if name != missing})
        assert sentence in str(caught.value)
    with pytest.raises(ConfigError, match="give the same bytes again"):
        Spec.from_plain(data, {**given, "kernel": b"\x7fELF2"})


def test_what_was_written_down_by_another_version_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="there is no option 'flux'"):
        Spec.from_plain({**Spec(flat="x").plain(), "flux": 1})


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to open a file raises; a module that is imported meanwhile is no file of the user's."""
    opened = os.open

    def refuse(*args: object, **options: object) -> Any:
        raise AssertionError(f"opened {args}")

    def refuse_os(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith((".py", ".pyc")):
            return opened(path, *args, **options)
        raise AssertionError(f"opened {path}")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(os, "open", refuse_os)
    monkeypatch.setattr(posix, "open", refuse_os)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"serial": "tcp:1"}, "use none, stdio, pty or file:PATH"),
        ({"debugcon": "file:"}, "file:PATH"),
        ({"huge_pages": "4K"}, "use transparent, 2M or 1G"),
        ({"cpu": "host,-xsvae"}, "there is no CPU feature 'xsvae': did you mean xsave?"),
        ({"cpu": "qemu64"}, "there is no CPU model 'qemu64'"),
        ({"cpu": "host,xsave=maybe"}, "a feature is on or off"),
        ({"boot": "x"}, "letters of c"),
        ({"boot": "menu=maybe"}, "use on or off"),
        ({"uuid": "1-2"}, "8-4-4-4-12"),
        ({"vga": "std"}, "there is no graphics"),
        ({"fw_cfg": {"a" * 56: b""}}, "1 to 55 printable"),
        ({"fw_cfg": {"": b""}}, "1 to 55 printable"),
        ({"drives": ["file=x,cahce=none"]}, "did you mean cache?"),
        ({"drives": ["file=x,index=1", "file=y,index=1"]}, "both want index=1"),
        ({"drives": ["file=x,index=9"]}, "index=9"),
        ({"drives": ["x"] * 5}, "all 4 places"),
        ({"drives": ["file=x,serial=" + "s" * 21]}, "at most 20 characters"),
        ({"drives": ["file=x,id=a", "file=y,id=a"]}, "two drives are called a"),
        ({"machine": "microvm", "drives": ["file=x,if=ide"]}, "no IDE"),
        ({"machine": "microvm", "drives": ["file=x,media=cdrom"]}, "no IDE"),
        ({"drives": ["file=x,if=virtio,bus=1"]}, "bus=1 with if=virtio"),
        ({"drives": ["file=x,num-queues=2"]}, "num_queues=2 with if=ide"),
        ({"cpus": 5000}, "4096 processors at most here, ask for fewer"),
        ({"memory_mib": 0}, "at least 1"),
        ({"kernel": "k", "firmware": "f", "modules": [("m", "")], "flat": None}, "takes no modules"),
        ({"flat": None}, "nothing to run"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_is_opened")
def test_all_mistakes_are_told_before_anything_is_opened(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Spec(**{"flat": HLT, **options})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
