"""``pyvmm image``: its words, what it prints, its statuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pyvmm.cli.image import image
from pyvmm.errors import ConfigError


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    assert image(["create", "disk.qcow2", "1G"]) == 0
    assert capsys.readouterr().out == "disk.qcow2: qcow2, a disk of 1073741824 bytes (1 GiB)\n"
    return tmp_path / "disk.qcow2"


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert image([*words]) == status
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--cluster-size 512", "--cluster-size 2M --refcount-bits 1", "--compat 0.10", "--zstd --lazy-refcounts",
        "--preallocation metadata", "--preallocation falloc", "--cluster-size 4k --preallocation full",
        "--refcount-bits 64 --cluster-size 1k --preallocation metadata",
    ],
)  # fmt: skip
def test_qemu_has_nothing_to_say_of_a_new_image(
    tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "new.qcow2")
    assert image(["create", *words.split(), path, "9M"]) == 0
    checked = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert (checked.returncode, "No errors" in checked.stdout) == (0, True), checked.stdout
    told = json.loads(subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True).stdout)
    capsys.readouterr()
    ours = json.loads(said(capsys, "info", "--json", path))
    special, other = ours["format-specific"]["data"], told["format-specific"]["data"]
    assert {name: other[name] for name in special} == special
    assert {name: told[name] for name in ("virtual-size", "cluster-size", "format", "dirty-flag")} == {
        name: ours[name] for name in ("virtual-size", "cluster-size", "format", "dirty-flag")
    }
    found = json.loads(said(capsys, "check", "--json", path))
    assert (found["corruptions"], found["leaks"]) == (0, 0)


def test_info_in_words(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "fir\x1bst", disk], check=True)
    said(capsys, "create", "top", "-b", "disk.qcow2")
    text = said(capsys, "info", "top")
    assert "backing filename        disk.qcow2\n" in text
    assert "virtual size            1073741824 (1 GiB)\n" in text
    assert "internal snapshot       1: fir?st\n" in said(capsys, "info", "disk.qcow2")


def test_check_tells_by_its_status(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 errors, 0 leaked" in said(capsys, "check", "disk.qcow2")
    with open(disk, "r+b") as file:
        file.seek(2 * 65536 + 2 * 100)
        file.write(b"\0\1")
    assert "leaked cluster 100" in said(capsys, "check", "disk.qcow2", status=3)
    with open(disk, "r+b") as file:
        file.seek(2 * 65536 + 2 * 3)
        file.write(b"\0\0")
    assert "ERROR cluster 3" in said(capsys, "check", "disk.qcow2", status=2)
    assert "0 and 0 are left" in said(capsys, "check", "-r", "disk.qcow2")
    assert "0 errors, 0 leaked" in said(capsys, "check", "disk.qcow2")


def test_convert_and_resize(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image(["convert", "disk.qcow2", "disk.raw", "--to", "raw", "--progress"]) == 0
    assert capsys.readouterr().err.endswith("\r100%\n")
    assert Path("disk.raw").stat().st_size == 1 << 30
    assert "2147483648 bytes (2 GiB) now" in said(capsys, "resize", "disk.qcow2", "+1G")
    assert "536870912 bytes (512 MiB) now" in said(capsys, "resize", "--shrink", "disk.raw", "512M")
    assert "format                  raw\n" in said(capsys, "info", "disk.raw")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("frobnicate", "there is no pyvmm image frobnicate"),
        ("info", "give pyvmm image info IMAGE"),
        ("info a b", "not 2 words"),
        ("info nowhere", "nowhere does not exist"),
        ("create new", "give its size"),
        ("create new 1x", "give a number"),
        ("create new 1000", "whole sectors"),
        ("create new 1G --cluster-size 3k", "a power of two"),
        ("create new 1G --refcount-bits 3", "1, 2, 4, 8"),
        ("create new 9E0G", "give a number"),
        ("create new 8000000T", "larger cluster_size"),
        ("create -f vmdk new 1G", "use raw or qcow2"),
        ("create -f raw new 1G --zstd", "has no backing file and no options"),
        ("create nowhere/new 1G", "can't be made"),
        ("convert disk.qcow2 disk.qcow2", "the image that is copied"),
        ("check disk.qcow2 --format raw", "is raw"),
        ("resize disk.qcow2 1M", "--shrink"),
        ("resize disk.qcow2 4000000T", "can't become so large"),
    ],
)
def test_a_mistake_is_one_sentence(disk: Path, words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        image(words.split())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "info IMAGE" in said(capsys, "--help")
    assert "--backing-format" in said(capsys, "create", "--help")
    assert image([]) == 2


@pytest.mark.parametrize("backing", ["base.raw", "./base.raw", "middle.qcow2"])
def test_no_new_image_takes_the_place_of_what_it_stands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(b"what was there".ljust(1 << 20, b"."))
    image(["create", "middle.qcow2", "-b", "base.raw"])
    with pytest.raises(ConfigError) as caught:
        image(["create", "base.raw", "-b", backing])
    assert "base.raw" in str(caught.value)
    assert Path("base.raw").read_bytes() == b"what was there".ljust(1 << 20, b".")
