"""``pyvmm bench snapshot``: known times come out as they are; its floor compiles; its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm_benchmarks import cycles, environment, snapshot
from pyvmm_benchmarks.contenders import c_floor

MS = 1_000_000


def maker(*numbers: int) -> list[str]:
    line = " ".join(map(str, numbers))
    return [sys.executable, "-S", "-c", f"import sys\nwhile sys.stdin.readline(): print('{line}', flush=True)"]


def bench(directory: Path) -> snapshot.Bench:
    return snapshot.Bench(directory, rounds=4, sets=2)


def test_what_counts_is_to_the_first_exit(tmp_path: Path) -> None:
    """Not closing."""
    commands = {"c": maker(MS, MS, 9 * MS), "pyvmm": maker(2 * MS, MS, 9 * MS)}
    case = bench(tmp_path).case("restore", "", commands, ("c", "pyvmm"))
    floor, ours = case.results
    assert floor.value is not None and ours.value is not None and ours.ratio is not None
    assert (floor.value.value, ours.value.value, ours.ratio.value) == (2, 3, 1.5)
    assert (floor.ours, ours.ours) == (False, True)


def test_without_a_compiler_there_is_no_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_floor, "compiler", lambda: None)
    made = bench(tmp_path)
    assert made.floor(tmp_path / "none", snapshot.KINDS[0], 1) is None
    case = made.case_of("restore", "", [cycles.take_turns({"pyvmm": maker(MS, MS, MS)}, 2)], ("c", "pyvmm"))
    assert case.results[0].reason.startswith("no C compiler: install one of")
    assert case.results[1].ran


def test_the_floor_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = c_floor.compiler()
    assert compiler is not None
    command = [compiler, *c_floor.FLAGS, "-Werror", "-o", str(tmp_path / "floor"), str(snapshot.SOURCE)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    usage = subprocess.run([tmp_path / "floor"], capture_output=True, text=True)
    assert (usage.returncode, usage.stderr.split(":")[0]) == (2, "usage")


def test_its_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert snapshot.main(["--help"]) == 0
    assert snapshot.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in snapshot.PARTS)
    for words in (["--cases", "nothing"], ["--rounds", "0"]):
        with pytest.raises(ConfigError):
            snapshot.main(words)


@pytest.fixture
def fake_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched is Python in the place of pyvmm; the snapshot is none."""
    monkeypatch.setattr(snapshot, "shell_command", lambda: [sys.executable, "-S", "-c", "pass"])
    monkeypatch.setattr(snapshot.Bench, "snapshot", lambda self, kind: self.directory / "none")


def test_a_qemu_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_shell: None) -> None:
    monkeypatch.setattr(environment, "find", lambda program, variable: None)
    (case,) = bench(tmp_path).part("shell")
    python, ours, *others = case.results
    assert python.ran and ours.ran
    assert [each.reason.split(" (")[0] for each in others] == ["not installed"] * 2


def test_a_qemu_that_does_not_save_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_shell: None) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho this KVM is none >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(environment, "find", lambda program_, variable: str(program))
    (case,) = bench(tmp_path).part("shell")
    assert [each.reason for each in case.results[2:]] == ["savevm: this KVM is none"] * 2
