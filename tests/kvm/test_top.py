"""`pyvmm top` beside running machines: on a pipe, and on a terminal, which it gives back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from console import Console
from guests import TIMEOUT_S

from pyvmm import ConfigError, Machine
from pyvmm.cli.machines import connected
from pyvmm.cli.top import Machines
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


def test_a_machine_that_is_looked_at_is_connected_to_once(machine: Machine) -> None:
    came: list[str] = []
    machine.events.listen(lambda event: came.append(event.data["did"]), "client")
    machines = Machines([])
    machines.look(1)
    (first,) = machines.look(1)[:1]
    machine.events.flush()
    before = came.count("came")
    assert first.startswith("web: running")
    for _ in range(5):
        assert machines.look(1)[0].startswith("web: running")
    machine.events.flush()
    assert came.count("came") == before
    machines.close()


def test_one_that_is_stopped_holds_up_neither_others_nor_the_rest(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty listen and say nothing, as processes do that were stopped: they are waited for at the same time."""
    silent = [each for n in range(20) for each in Registry().register(f"silent{n}")]
    monkeypatch.setattr("pyvmm.cli.top.LIMIT_S", 1.0)
    machines = Machines([])
    begin = time.monotonic()
    lines = machines.look(1) + machines.look(1)
    assert time.monotonic() - begin < 20
    assert lines.count("silent7: silent") == 2
    assert any(line.startswith("web: running") for line in lines)
    machines.close()
    monkeypatch.setattr("pyvmm.cli.machines.GREETING_LIMIT_S", 0.2)
    with pytest.raises(ConfigError, match=r"machine silent7: .*its process is stopped"):
        connected("silent7")
    for each in silent:
        each.close()


def test_what_is_told_by_another_version_ends_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines([])
    machines.look(1)
    for told in ([{}], [None], 7):
        monkeypatch.setattr(QmpClient, "receive", lambda client, told=told: told)
        assert machines.look(1)[0] == "web: silent"
    machines.close()


@pytest.mark.parametrize("words", [("--interval", "0"), ("--batch", "0"), ("--all", "web"), ("--batch", "x")])
def test_words_that_are_wrong(words: tuple[str, ...]) -> None:
    wrong = top(*words)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert json.dumps(wrong.stdout) == '""'
