"""`pyvmm run` of somebody who does not know yet what to run; the host's own kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.cli import first_guest, main
from pyvmm.cli.run import take_host_kernel
from pyvmm.errors import ConfigError


def host(root: Path, *files: str) -> str:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return f"{root}/"


def test_the_kernel_that_runs_is_taken_with_its_initrd(tmp_path: Path) -> None:
    running = os.uname().release
    root = host(tmp_path, "boot/vmlinuz-9.9-other", f"boot/vmlinuz-{running}", f"boot/initrd.img-{running}")
    assert first_guest.host_kernel(root) == (f"{root}boot/vmlinuz-{running}", f"{root}boot/initrd.img-{running}")


def test_else_the_newest_there_is(tmp_path: Path) -> None:
    root = host(tmp_path, "boot/vmlinuz-5.1", "boot/vmlinuz-6.1", "boot/initramfs-6.1.img")
    assert first_guest.host_kernel(root) == (f"{root}boot/vmlinuz-6.1", f"{root}boot/initramfs-6.1.img")
    assert first_guest.host_kernel(host(tmp_path / "b", f"usr/lib/modules/{os.uname().release}/vmlinuz"))[1] is None


def test_none_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no kernel that can be read.*give --kernel FILE"):
        first_guest.host_kernel(f"{tmp_path}/")
    root = host(tmp_path, "boot/vmlinuz-6.1")
    monkeypatch.setattr(first_guest.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"sudo chmod \+r"):
        first_guest.host_kernel(root)


def test_what_is_given_beside_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_guest, "host_kernel", lambda: ("/boot/vmlinuz-1", "/boot/initrd.img-1"))
    given = {"kernel": "host", "initrd": "mine.gz"}
    take_host_kernel(given)
    assert given == {"kernel": "/boot/vmlinuz-1", "initrd": "mine.gz", "append": "console=ttyS0"}


def test_what_would_work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    access = os.access
    monkeypatch.setattr(first_guest.os, "access", lambda path, mode: path == "/dev/kvm" or access(path, mode))
    monkeypatch.setattr(first_guest, "host_kernel", lambda: ("/boot/vmlinuz-1", None))
    (tmp_path / "my disk.qcow2").write_bytes(b"")
    assert first_guest.suggestions() == ["pyvmm run './my disk.qcow2'", "pyvmm run --kernel host", "pyvmm demo"]
    monkeypatch.setattr(first_guest.os, "access", lambda path, mode: path != "/dev/kvm")
    assert first_guest.suggestions()[0] == "pyvmm doctor"


def test_run_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("pyvmm: no guest: give a disk image")
    assert len(said) == 4 and all(line.startswith("  pyvmm ") for line in said[1:])
