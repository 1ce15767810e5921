"""`pyvmm top` beside running machines: on a pipe, and on a terminal, which it gives back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from console import Console
from guests import TIMEOUT_S

from pyvmm import Machine
from pyvmm.control.qmp_client import QmpClient
from pyvmm.control.registry import Registry

COMMAND = (sys.executable, "-m", "pyvmm", "top")
SPIN_ON_A_PORT = bytes.fromhex("e680 ebfc")  # 1: out %al, $0x80; jmp 1b


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Machine(flat=SPIN_ON_A_PORT, memory_mib=2, name="web") as made:
        made.register()
        made.resume()
        with QmpClient(Registry().find("web")) as client:
            client.ask("query-status")  # it is served
            yield made


def top(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_on_a_pipe(machine: Machine) -> None:
    done = top("--batch", "2", "--interval", "0.2", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    looks = done.stdout.split("web: running, ")[1:]
    assert len(looks) == 2
    for look in looks:
        row = next(line.split() for line in look.splitlines() if "0x80" in line)
        assert row[:3] == ["IO", "0x80", "out"] and float(row[3]) > 0
        assert "vCPU 0" in look


def test_what_it_asks_for_agrees_with_exit_stats(machine: Machine) -> None:
    machine.pause()
    with QmpClient(Registry().find("web")) as client:
        told = client.ask("query-exits")
        rows = machine.exit_stats()
        assert [(row["reason"], row.get("address"), row["count"], row["time-ns"]) for row in told] == [
            (row.reason, row.address, row.count, row.sum_ns) for row in rows
        ]
        threads = client.ask("query-threads")
    assert {thread["thread-id"] for thread in threads if thread.get("vcpu") == 0} == {machine.cpus[0].thread_id}
    assert os.getpid() in {thread["thread-id"] for thread in threads}


def test_on_a_terminal_that_it_gives_back(machine: Machine) -> None:
    for leave, status in (("q", 0), ("\x03", 130)):
        with Console(*COMMAND, "--interval", "0.1") as console:
            before = termios.tcgetattr(console.master)
            console.expect("\x1b[?1049h", TIMEOUT_S)
            console.expect("web: running", TIMEOUT_S)
            console.expect("vCPU 0", TIMEOUT_S)
            assert not termios.tcgetattr(console.master)[3] & termios.ECHO
            if leave == "q":
                console.send(leave)
            else:
                console.process.send_signal(signal.SIGINT)
            assert console.wait(TIMEOUT_S) == status
            assert console.output.rstrip().endswith("\x1b[?25h\x1b[?1049l")
            assert termios.tcgetattr(console.master) == before


def test_machines_come_and_go(machine: Machine) -> None:
    assert "web: running" in top("--once", "--all").stdout
    machine.close()
    assert top("--once").stdout == "no machine with a name is running\n\n"
    gone = top("--once", "web")
    assert gone.returncode == 2 and "no machine called 'web' is running" in gone.stderr


@pytest.mark.parametrize("words", [("--interval", "0"), ("--batch", "0"), ("--all", "web"), ("--batch", "x")])
def test_words_that_are_wrong(words: tuple[str, ...]) -> None:
    wrong = top(*words)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert json.dumps(wrong.stdout) == '""'
