"""The words of --vsock, and what is said about those that can't be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyvmm.cli import main
from pyvmm.config import MachineConfig
from pyvmm.config_file import from_file
from pyvmm.errors import ConfigError
from pyvmm.spec import Spec
from pyvmm.vsock.options import VsockOptions


def test_words() -> None:
    vsock = VsockOptions.parse("cid=42,path=/run/a,,b.sock,connections=7")
    assert vsock == VsockOptions(42, "/run/a,b.sock", connections=7)
    assert VsockOptions.parse("guest-cid=3,path=x") == VsockOptions(3, "x")
    assert VsockOptions.parse("cid=3,path=x,seqpacket=on") == VsockOptions(3, "x", seqpacket=True)
    assert VsockOptions(path=Path("/a")).path == "/a"
    assert (VsockOptions().cid, VsockOptions().path, VsockOptions().connections) == (3, None, 256)
    assert VsockOptions(4, os.fsencode("x" * 96).decode()).changed(cid=5).cid == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("cid=2,path=x", "vsock option cid=2: give the guest's address, a number from 3 to 4294967294: 2 is the host"),
        ("cid=0,path=x", "give the guest's address"),
        ("cid=-1,path=x", "give the guest's address"),
        ("cid=4294967295,path=x", "give the guest's address"),
        ("cid=x,path=x", "vsock option cid=x: give a number"),
        ("cid=3", "vsock 'cid=3' has no path: write path=/run/vm.sock"),
        ("path=/x", "vsock 'path=/x' has no cid: write cid=3"),
        ("", "has no cid"),
        ("cid=3,path", "vsock option 'path' has no value: write path=VALUE"),
        ("cid=3,path=", "vsock option path='': give the path of a socket"),
        ("cid=3,pth=/x", "a vsock device has no option 'pth': did you mean path?"),
        ("cid=3,colour=red", "a vsock device has no option 'colour': see VsockOptions for those there are"),
        (f"cid=3,path=/{'x' * 96}", "ports are put behind it, so give one of 96 bytes at most"),
        ("cid=3,path=x,connections=0", "connections=0: give a whole number from 1 to 4096"),
    ],
)
def test_what_is_said_about_mistakes(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Spec(flat=b"\xf4", vsock=words)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("value", [5, b"cid=3", ["cid=3,path=x"], {"cid": 3}, True])
def test_what_is_no_device(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"give VsockOptions, or 'cid=3,path=/run/vm\.sock'"):
        MachineConfig(vsock=value)


def test_what_is_no_path() -> None:
    for value in (5, b"/x", "a\0b"):
        with pytest.raises(ConfigError, match="give"):
            VsockOptions(3, value)


def test_a_specification_has_it() -> None:
    spec = Spec(flat=b"\xf4", vsock="cid=3,path=/a")
    assert spec.vsock == VsockOptions(3, "/a")
    assert spec.wants_virtio
    data = json.loads(json.dumps(spec.plain()))
    assert Spec.from_plain({**data, "flat": None, "kernel": "k"}).vsock == spec.vsock
    none = Spec(flat=b"\xf4", vsock="none")
    assert none.vsock is None
    assert not none.wants_virtio
    assert none.plain()["vsock"] is None


def test_a_file_has_it(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('kernel = "k"\nvsock = "cid=3,path=/run/vm.sock"\n')
    assert Spec(**from_file(str(path))).vsock == VsockOptions(3, "/run/vm.sock")


@pytest.mark.parametrize("args", [["--vsock", "help"], ["--help", "vsock"]], ids=" ".join)
def test_its_help(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert main(["run", *args]) == 0
    shown = capsys.readouterr().out
    assert "  guest-cid" not in shown
    for words in ("cid=N", "[guest-cid]", "path=PATH", "connections=N", "CONNECT PORT"):
        assert words in shown


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--kernel", "k", "--vsock", "cid=1,path=x"]) == 2
    assert "vsock option cid=1: give the guest's address" in capsys.readouterr().err
    assert main(["run", "--kernel", "k", "--vsock", "cid=3,path=x", "--vsock", "cid=4,path=y"]) == 2
    assert "a guest has one address, give one" in capsys.readouterr().err
    assert main(["run", "-device", "vhost-vsock-pci,guest-cid=3"]) == 2
    assert "use --vsock cid=N,path=PATH" in capsys.readouterr().err
