"""pyvmm run --log: what somebody who runs many machines finds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from guests import TIMEOUT_S

DEBUG_EXIT = bytes.fromhex("b0 15 e6 f4 f4")  # mov $0x15, %al; out %al, $0xf4; hlt
# mov $0x505, %dx; mov $1, %al; out %al, %dx; then as above
PANIC = bytes.fromhex("ba0505 b001 ee") + DEBUG_EXIT


def run(directory: Path, code: bytes, *args: str, stderr: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    image = directory / "guest.bin"
    image.write_bytes(code)
    command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(image), *args]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=TIMEOUT_S
    )


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_life_on_standard_error(tmp_path: Path) -> None:
    uuid = "0e5ce1b0-1d2c-4f5b-9a70-3c3a2e1f6b5d"
    done = run(tmp_path, DEBUG_EXIT, "--log", "info", "--uuid", uuid, "--trace", str(tmp_path / "trace"))
    assert done.returncode == 43
    found = lines(done.stderr)
    assert [line["event"] for line in found] == ["trace", "resume", "shutdown", "stop", "trace"]
    assert all(line["machine"] == uuid and line["level"] == "info" and line["pid"] > 1 for line in found)
    assert (found[2]["status"], found[2]["message"]) == (43, "the guest has ended: status 43, debug-exit")
    assert all(line["time"].endswith("Z") and len(line["time"]) == 27 for line in found)
    times = [line["time"] for line in found]
    assert times == sorted(times)


def test_several_machines_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        done = run(tmp_path, DEBUG_EXIT, "--log", f"info,file={path}")
        assert (done.returncode, done.stderr) == (43, "")
    assert [line["event"] for line in lines(path.read_text())] == ["resume", "shutdown", "stop"] * 2


def test_only_from_a_level_on(tmp_path: Path) -> None:
    done = run(tmp_path, PANIC, "--pvpanic", "--log", "warning")
    (line,) = lines(done.stderr)
    assert (line["event"], line["level"], line["goes_on"]) == ("panic", "error", False)


@pytest.mark.parametrize("words", ["loud", "info,", "info,path=x", "info,file="])
def test_words_that_mean_nothing(tmp_path: Path, words: str) -> None:
    done = run(tmp_path, DEBUG_EXIT, "--log", words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pyvmm: --log {words}: that is no LEVEL[,file=PATH]")


def test_files_that_can_not_be_had(tmp_path: Path) -> None:
    done = run(tmp_path, DEBUG_EXIT, "--log", f"info,file={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"pyvmm: --log {tmp_path}: Is a directory: give a file that can be written\n"


def test_a_drive_is_no_place_for_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    done = run(tmp_path, DEBUG_EXIT, "--drive", f"file={disk},format=raw,if=virtio", "--log", f"debug,file={disk}")
    assert done.returncode == 2
    assert done.stderr == f"pyvmm: --log {disk}: it is the image of a drive: give another file\n"
    assert disk.read_bytes() == bytes(1 << 20)


def test_a_full_disk_does_not_hold_up_the_guest(tmp_path: Path) -> None:
    assert run(tmp_path, DEBUG_EXIT, "--log", "info,file=/dev/full").returncode == 43
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        assert run(tmp_path, DEBUG_EXIT, "--log", "info", stderr=full).returncode == 43
    finally:
        os.close(full)


def test_lines_that_are_missing_are_counted_at_the_end(tmp_path: Path) -> None:
    done = run(tmp_path, DEBUG_EXIT, "--log", "info,file=/dev/full")
    assert done.stderr == (
        "pyvmm: --log /dev/full: 3 lines are missing, No space left on device: free some space there, or write"
        " elsewhere\n"
    )
