"""``pyvmm bench snapshot`` measures: a small part of a run, with real machines on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli.bench import load

load()

from pyvmm_benchmarks import snapshot  # noqa: E402

# Its guest is measured by a clock: too much for an emulated host.
pytestmark = pytest.mark.native


def test_a_restore_and_a_live_save(tmp_path: Path) -> None:
    bench = snapshot.Bench(tmp_path, rounds=1, sets=1)
    kind = snapshot.Kind("kernel", 256)
    path = bench.snapshot(kind)
    floor = bench.floor(path, kind, 2)
    assert floor is not None
    commands = {"c": floor, "path": bench.child(path, "path", 2), "fork": bench.child(path, "fork", 2)}
    case = bench.case("restore", "", commands, tuple(commands))
    assert all(result.value is not None and result.value.value > 0 for result in case.results)
    stood, save = (case.results[0].value for case in bench.part("live"))
    assert stood is not None and save is not None
    assert 0 < stood.value < save.value


def test_inputs_beside_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "INPUTS", 3)
    (case,) = snapshot.Bench(tmp_path, rounds=1, sets=1).part("inputs")
    assert [result.name for result in case.results] == ["pyvmm", "qemu-pc", "qemu-microvm"]
    assert all(result.reason or (result.value is not None and result.value.value > 0) for result in case.results)
    assert not case.results[0].reason
