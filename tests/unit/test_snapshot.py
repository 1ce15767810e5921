"""Snapshots of machines without a vCPU: a manifest may come from a stranger, and a drive may be another one."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_machine_state import DISK_SECTORS, SECTOR, Hand, machine
from test_state import spoil

from pyvmm import ConfigError, Machine, RunState, Snapshot, StateError, VmmError
from pyvmm.block.options import DriveOptions
from pyvmm.snapshot_file import SnapshotFile, SnapshotWriter

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(Random(1).randbytes(DISK_SECTORS * SECTOR))
    (tmp_path / "cd.iso").write_bytes(Random(2).randbytes(16 * 2048))
    return tmp_path


def rewritten(path: Path, change: Any) -> Path:
    """A copy with another manifest, as a stranger would write it: with right checksums."""
    to = path.with_name("changed.snap")
    with SnapshotFile(str(path)) as file, SnapshotWriter(str(to)) as copy:
        manifest = file.manifest
        for entry in manifest["memory"]:
            place = copy.reserve(entry["size"])
            copy.write(place, os.pread(file.fd, entry["size"], entry["offset"]))
            entry["offset"] = place
        change(manifest)
        copy.commit(manifest)
    return to


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
def test_a_board_goes_on_from_a_file(images: Path, seed: int) -> None:
    with machine(images) as one:
        Hand(one).run(seed, 20)
        one.save(images / "a.snap")
        state = one.save_state()
    with Machine.restore(images / "a.snap", twin=False) as other:
        again = other.save_state()
        for name in ("machine", "parts", "memory"):
            assert again[name] == state[name] or name == "parts"
        assert {k: v for k, v in again["parts"].items() if k != "clock"} == {
            k: v for k, v in state["parts"].items() if k != "clock"
        }


@given(seed=st.integers(0, 1 << 32), data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
def test_a_hostile_manifest(images: Path, seed: int, data: st.DataObject) -> None:
    """One field is changed: an error of one sentence and no descriptor left, or a machine that can be used."""
    with machine(images) as one:
        Hand(one).run(seed, 5)
        one.save(images / "a.snap")
    before = len(os.listdir("/proc/self/fd"))
    parts = ["spec", "machine", "memory", "images", "drives", "base", "id", "saved_ns", "untouched", "all"]
    part = data.draw(st.sampled_from(parts))

    def change(manifest: dict[str, Any]) -> None:
        if part == "all":
            spoil(manifest, data)
            return
        inside = {part: manifest[part]}
        spoil(inside, data)
        manifest.update(inside)

    try:
        path = rewritten(images / "a.snap", change)
    except StateError:
        return  # a number that no file can have
    try:
        with Machine.restore(path) as other:
            Hand(other).run(seed + 1, 5)
    except VmmError as error:
        assert "\n" not in str(error)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("base"), "is damaged: base is missing"),
        (lambda m: m.update(id=b"short"), "is damaged: id has 5 bytes, not 16"),
        (lambda m: m.update(untouched="rtc"), "is damaged: untouched is 'rtc', no list"),
        (lambda m: m.update(untouched=["rtc", 5]), "is damaged: untouched is 5, no text"),
        (lambda m: m.update(memory=[]), "has 0 MiB of memory"),
        (lambda m: m["memory"].append(m["memory"][0]), "is damaged: it has memory at 0x0 twice"),
        (lambda m: m["memory"][0].update(size=1 << 50), "is damaged: memory that it names is not in it"),
        (lambda m: m["memory"][0].update(size=4095), "is damaged: size is 0xfff, no whole pages"),
        (lambda m: m["memory"][0].update(gpa=4096), "has 0 MiB of memory"),
        (lambda m: m["memory"][0].update(offset=1), "is damaged: memory that it names is not in it"),
        (lambda m: m["spec"].update(memory_mib=1 << 40), "memory_mib"),
        (lambda m: m["spec"].update(colour="red"), "colour"),
        (lambda m: m["spec"].update(modules=7), "its spec can't be read"),
        (lambda m: m["images"].update(kernel={"offset": 0, "size": 10, "sum": 0}), "memory that it names is not in it"),
        (lambda m: m["base"] or m.update(base={"id": m["id"], "path": "/x"}), "its bases go round in a circle"),
        (lambda m: m["memory"][0].update(used=[[0, 1 << 40]]), "is damaged: a run leaves its memory"),
        (lambda m: m["memory"][0].update(used=[[1, 4096]]), "is damaged: used is 0x1, no whole pages"),
        (lambda m: m["memory"][0].update(sums=bytes(1 << 20)), "is damaged: sums has 1048576 bytes"),
        (lambda m: m["machine"].update(cpus=2), "with cpus 2, this one has 0"),
        (lambda m: m["parts"].pop("serial"), "the state has no serial"),
    ],
)
def test_what_a_stranger_may_write(images: Path, change: Any, said: str) -> None:
    with machine(images) as one:
        one.save(images / "a.snap")
    path = rewritten(images / "a.snap", change)
    with pytest.raises(VmmError, match=said) as caught:
        Machine.restore(path)
    assert "\n" not in str(caught.value)


def test_a_drive_that_was_written_since(images: Path) -> None:
    with machine(images) as one:
        one.save(images / "a.snap")
    with (images / "disk.img").open("r+b") as disk:
        disk.write(b"something else")
    with pytest.raises(StateError, match=r"drive ide0-hd0: .*/disk.img has been written since"):
        Machine.restore(images / "a.snap")
    drives = [DriveOptions(str(images / "disk.img")), DriveOptions(str(images / "cd.iso"), media="cdrom", index=1)]
    with Machine.restore(images / "a.snap", drives=drives) as other:
        assert other.state is RunState.PRELAUNCH
    (images / "disk.img").unlink()
    with pytest.raises(ConfigError, match=r"drive ide0-hd0: .*/disk.img: No such file .* give drives="):
        Machine.restore(images / "a.snap")


def test_two_machines_do_not_write_to_one_image(images: Path) -> None:
    drives = [DriveOptions(str(images / "disk.img"))]
    with Machine(accel="qtest", memory_mib=1, drives=drives) as one:
        one.save(images / "a.snap")
        with pytest.raises(ConfigError, match=r"another process|lock"):
            Machine.restore(images / "a.snap")
    with Machine.restore(images / "a.snap"):
        pass


def test_a_snapshot_is_open_until_the_last_has_closed_it(images: Path) -> None:
    with machine(images) as one:
        one.save(images / "a.snap")
    before = len(os.listdir("/proc/self/fd"))
    snapshot = Snapshot(str(images / "a.snap"))
    assert snapshot.spec["memory_mib"] == 1
    one, other = Machine.restore(snapshot), Machine.restore(snapshot)
    one.close()
    snapshot.close()
    other.save(images / "b.snap", base=snapshot)
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StateError, match="is closed: open it again"):
        Machine.restore(snapshot)
