"""Not collected by itself: what test_lab_plugin.py runs in a pytest of its own, and breaks the lab under."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from console import Console

# mov $0x3f8, %dx; mov $'!', %al; out %al, (%dx); jmp .: a guest that says that it is there, and never ends.
SPIN = bytes.fromhex("baf803 b021 ee ebfe")


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that this pytest and its lab both see."""
    return Path(os.environ.get("LAB_SCRATCH") or tmp_path_factory.getbasetemp())


def tries(shared: Path, name: str) -> int:
    """How often this was called for `name` by now, this time included."""
    with open(shared / name, "a") as file:
        file.write("x")
    return (shared / name).stat().st_size


@pytest.mark.lab
def test_there_before(shared: Path) -> None:
    assert "PYVMM_LAB" in os.environ
    assert tries(shared, "before") == 1


@pytest.mark.lab
@pytest.mark.parametrize("number", ["SIGSTOP", "SIGKILL"])
def test_here(number: str, shared: Path, guest_console: Callable[..., Console]) -> None:
    assert "PYVMM_LAB" not in os.environ
    if tries(shared, number) == 1:
        (shared / "spin").write_bytes(SPIN)
        with guest_console("--flat", str(shared / "spin")) as console:
            console.expect("!", 120.0)
            (shared / "break").write_text(number)
            console.wait(200.0)
            raise AssertionError("the lab broke")
    with guest_console("--help") as console:
        console.expect("usage: pyvmm run", 120.0)
        assert console.wait(60.0) == 0


@pytest.mark.lab
def test_there_after(shared: Path) -> None:
    assert tries(shared, "after") == 1


@pytest.mark.lab
def test_there_that_fails(shared: Path, pytestconfig: pytest.Config) -> None:
    os.write(pytestconfig.stash[fault_handler_stderr_fd_key], b"where its threads stood")
    assert tries(shared, "fails") == 2, "a failure is no reason to try again"
