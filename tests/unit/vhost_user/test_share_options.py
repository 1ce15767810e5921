"""The words of --share, and what is said about those that can't be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.errors import ConfigError
from pyvmm.spec import Spec
from pyvmm.vhost_user.options import ShareOptions


def test_words() -> None:
    assert ShareOptions.parse("tag=data,path=/srv/a,,b") == ShareOptions("data", "/srv/a,b")
    told = ShareOptions.parse("tag=x,path=/s,cache=always,sandbox=chroot,xattr=on")
    assert told == ShareOptions("x", "/s", cache="always", sandbox="chroot", xattr=True)
    assert ShareOptions("x", Path("here")).path == os.path.abspath("here")
    assert ShareOptions.parse("tag=x,socket=/run/s").socket == "/run/s"
    assert ShareOptions("x", "/s").changed(cache="none").cache == "none"


def test_help_has_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--share", "help"]) == 0
    said = capsys.readouterr().out
    for word in ("tag=TAG", "path=PATH", "socket=PATH", "cache=auto|always|none", "xattr=on|off"):
        assert f"  {word}" in said


def test_of_a_machine() -> None:
    spec = Spec(flat=b"\xf4", shares=["tag=a,path=/a", ShareOptions("b", "/b"), "none"])
    assert [share.tag for share in spec.shares] == ["a", "b"]
    assert spec.shared_memory  # another process has to map it
    assert spec.wants_virtio
    assert not Spec(flat=b"\xf4").shared_memory
    assert Spec.from_plain(spec.plain(), {"flat": b"\xf4"}) == spec


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("path=/x", "share 'path=/x' has no tag: write tag=NAME,path=FOLDER"),
        ("", "has no tag"),
        ("tag=x", "share x has no folder: write path=FOLDER"),
        ("tag=x,path=/a,socket=/b", "share x: path and socket: who listens at a socket has a folder"),
        (f"tag={'x' * 37},path=/a", "give the name that the guest mounts it by, at most 36 bytes"),
        ("tag=,path=/a", "share option tag='': give the name"),
        ("tag=a\nb,path=/a", "give the name"),
        ("tag=x,path", "share option 'path' has no value: write path=VALUE"),
        ("tag=x,path=", "share option path='': give a path"),
        ("tag=x,pth=/a", "a shared folder has no option 'pth': did you mean path?"),
        ("tag=x,path=/a,cache=some", "cache='some': use auto, always or none"),
        ("tag=x,path=/a,sandbox=some", "sandbox='some': use namespace, chroot or none"),
        ("tag=x,path=/a,xattr=1", "share option xattr=1: use on or off"),
    ],
)
def test_what_is_said_about_mistakes(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Spec(flat=b"\xf4", shares=[words])
    assert sentence in str(caught.value)


def test_what_is_said_about_two_with_one_tag_and_about_no_list() -> None:
    with pytest.raises(ConfigError, match="two shares with tag=a: give each its own"):
        Spec(flat=b"\xf4", shares=["tag=a,path=/a", "tag=a,path=/b"])
    with pytest.raises(ConfigError, match="give a list of shared folders"):
        Spec(flat=b"\xf4", shares="tag=a,path=/a")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is no shared folder: give ShareOptions"):
        Spec(flat=b"\xf4", shares=[7])  # type: ignore[list-item]
