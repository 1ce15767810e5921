"""The plugin in a pytest of its own, on boards without a vCPU: what it closes, what a report shows, what is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from errno import ENOENT
from pathlib import Path

import pytest

from pyvmm import pytest_plugin
from pyvmm.errors import KvmError

SUITE = '''
import pytest

import pyvmm

MADE = []


def test_fails(vm, console):
    m = vm(accel="qtest")
    MADE.append(m)
    assert vm.console_of(m) is console
    console.chardev.write(b"last words\\r\\n")
    assert not "this"


def test_the_next_finds_it_closed(vm, console):
    with pytest.raises(pyvmm.StateError):
        MADE[0].pause()
    first, second = vm(accel="qtest"), vm(accel="qtest")
    assert vm.console_of(first) is console is not vm.console_of(second)
    own = vm(accel="qtest", serial="none")
    with pytest.raises(KeyError):
        vm.console_of(own)


@pytest.mark.kvm_full
def test_that_needs_more_than_there_is(vm):
    assert not "reached"
'''


def inner(directory: Path, *words: str) -> str:
    """What pytest says of SUITE on a host whose KVM is software."""
    (directory / "test_suite.py").write_text(SUITE)
    (directory / "conftest.py").write_text(
        "from pyvmm import pytest_plugin\npytest_plugin.what_is_missing = lambda full: full and 'no VMX here'\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-rs", *words, "."]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=directory, env=clean, capture_output=True, text=True, timeout=120).stdout


def test_a_failure_shows_the_guest_and_all_are_closed(tmp_path: Path) -> None:
    said = inner(tmp_path)
    assert "1 failed, 1 passed, 1 skipped" in said, said
    assert "pyvmm: console" in said and "last words" in said
    assert "pyvmm: state" in said and "prelaunch" in said
    assert "pyvmm: exits" in said and "pyvmm: dump" in said
    assert "no VMX here" in said


def test_what_must_not_be_skipped_fails(tmp_path: Path) -> None:
    said = inner(tmp_path, "--pyvmm-kvm=fail")
    assert "1 failed, 1 passed, 1 error" in said and "Failed: no VMX here" in said, said


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __init__(self) -> None:
            raise KvmError("there is no /dev/kvm", ENOENT)

    class Some:
        def close(self) -> None:
            pass

    monkeypatch.setattr("pyvmm.kvm.system.Kvm", Nothing)
    assert pytest_plugin.what_is_missing(full=False).startswith("there is no /dev/kvm")
    monkeypatch.setattr("pyvmm.kvm.system.Kvm", Some)
    monkeypatch.setattr("pyvmm.kvm.kind.kvm_kind", lambda: "kvm_pvm: software virtualization")
    assert pytest_plugin.what_is_missing(full=False) == ""
    assert "need VMX or SVM, and this host has kvm_pvm" in pytest_plugin.what_is_missing(full=True)
