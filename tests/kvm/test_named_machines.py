"""`pyvmm run --name`, and what finds it: list, attach, qmp, save; another of that name, and one that was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import asm
import pytest
from console import Console
from guests import TIMEOUT_S

from pyvmm import ConfigError, Machine
from pyvmm.control.registry import Registry

ECHO = """1: mov $0x3fd, %dx
 in %dx, %al
 test $1, %al
 jz 1b
 mov $0x3f8, %dx
 in %dx, %al
 out %al, %dx
 jmp 1b"""
COMMAND = (sys.executable, "-m", "pyvmm")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def guest(place: Path) -> Path:
    path = place / "guest.bin"
    path.write_bytes(asm.assemble(ECHO, "real16", None).image)
    return path


@pytest.fixture
def start(guest: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def run(*args: str) -> subprocess.Popen[str]:
        words = [*COMMAND, "run", "--flat", str(guest), "--memory", "2", "--serial", "none", *args]
        made.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return made[-1]

    yield run
    for each in made:
        each.kill()
        each.wait()
        if each.stderr is not None:
            each.stderr.close()


def pyvmm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def wait_until_there(process: subprocess.Popen[str], name: str) -> None:
    while name not in Registry().names():
        assert process.poll() is None, process.stderr and process.stderr.read()


def test_the_life_of_a_named_machine(start: Callable[..., subprocess.Popen[str]], place: Path) -> None:
    machine = start("--name", "web")
    wait_until_there(machine, "web")
    status = pyvmm("qmp", "web", "query-status")  # waits until the guest runs
    assert (status.returncode, json.loads(status.stdout)) == (0, {"running": True, "status": "running"})
    assert json.loads(pyvmm("qmp", "web", "query-name").stdout) == {"name": "web"}

    (entry,) = json.loads(pyvmm("list", "--json").stdout)
    assert entry.pop("uptime-s") >= 0
    assert entry == {"name": "web", "pid": machine.pid, "state": "running", "vcpus": 1, "memory-bytes": 2 << 20}
    head, line = pyvmm("list").stdout.splitlines()
    assert head.split() == ["NAME", "PID", "STATE", "VCPUS", "MEMORY", "UPTIME"]
    assert line.split()[:5] == ["web", str(machine.pid), "running", "1", "2M"]

    refused = pyvmm("qmp", "web", "memsave", "val=0", "size=x", f"filename={place}/m")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert json.loads(refused.stderr)["error"]["class"] == "GenericError"
    written = pyvmm("qmp", "web", "pmemsave", json.dumps({"val": 0x7C00, "size": 3, "filename": f"{place}/m"}))
    assert (written.returncode, (place / "m").read_bytes()) == (0, b"\xba\xfd\x03")

    with Console(*COMMAND, "attach", "web") as one, Console(*COMMAND, "attach", "web", "serial") as two:
        for each in (one, two):
            each.expect("Ctrl-A x leaves it", TIMEOUT_S)
        one.send_until("ab", "ab", TIMEOUT_S)
        two.expect("ab", TIMEOUT_S)
        one.send("\x01h")
        one.expect("Ctrl-A x", TIMEOUT_S)
        one.send("\x01x")
        assert one.wait(TIMEOUT_S) == 0
        assert "left serial, the machine runs on" in one.output
        piped = subprocess.run(
            [*COMMAND, "attach", "web"], input="gh", capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert (piped.returncode, piped.stderr) == (
            0,
            "pyvmm: left serial, its input has ended, the machine runs on\n",
        )
        two.expect("gh", TIMEOUT_S)
        two.send("cd")
        two.expect("cd", TIMEOUT_S)

        saved = pyvmm("save", "web", f"{place}/snapshot")
        assert saved.returncode == 0, saved.stderr
        again = pyvmm("run", "--restore", f"{place}/snapshot")
        assert again.returncode == 2 and "a machine of that name is running" in again.stderr

        assert pyvmm("qmp", "web", "quit").returncode == 0
        assert two.wait(TIMEOUT_S) == 0
        assert "the machine has ended" in two.output
    assert machine.wait(TIMEOUT_S) == 0
    assert pyvmm("list", "--json").stdout == "[]\n"
    assert os.listdir(place / "pyvmm") == []


def test_another_of_that_name_is_one_sentence(start: Callable[..., subprocess.Popen[str]], guest: Path) -> None:
    machine = start("--name", "web")
    wait_until_there(machine, "web")
    second = pyvmm("run", "--flat", str(guest), "--name", "web")
    assert second.returncode == 2
    assert second.stderr == (
        f"pyvmm: name='web': a machine of that name is running, process {machine.pid}: give another name, --name NAME\n"
    )


def test_one_that_was_killed_is_gone(start: Callable[..., subprocess.Popen[str]], place: Path) -> None:
    machine = start("--name", "web")
    wait_until_there(machine, "web")
    machine.kill()
    machine.wait()
    assert len(os.listdir(place / "pyvmm")) == 2
    gone = pyvmm("qmp", "web", "query-status")
    assert (gone.returncode, gone.stderr) == (
        2, "pyvmm: no machine called 'web' is running; `pyvmm run --name NAME` gives one a name\n",
    )  # fmt: skip
    assert os.listdir(place / "pyvmm") == []


def test_one_that_stands_still_holds_up_no_list(start: Callable[..., subprocess.Popen[str]], place: Path) -> None:
    import signal

    machine, other = start("--name", "stopped"), start("--name", "web")
    for process, name in ((machine, "stopped"), (other, "web")):
        wait_until_there(process, name)
        assert pyvmm("qmp", name, "query-status").returncode == 0
    machine.send_signal(signal.SIGSTOP)
    states = {entry["name"]: entry["state"] for entry in json.loads(pyvmm("list", "--json").stdout)}
    assert states == {"stopped": "silent", "web": "running"}


def test_a_program_s_own_machine(place: Path) -> None:
    with Machine(flat=asm.assemble(ECHO, "real16", None).image, memory_mib=2, name="mine") as machine:
        assert Registry().names() == []  # a name alone is no sockets
        machine.register()
        machine.resume()
        assert json.loads(pyvmm("qmp", "mine", "query-name").stdout) == {"name": "mine"}
    assert Registry().names() == []
    with Machine(flat=b"\xf4", memory_mib=2) as nameless, pytest.raises(ConfigError, match="give it one by name="):
        nameless.register()


@pytest.mark.parametrize("name", ["", "-x", "a/b", "a b", "ä", "x" * 65, ".."])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="give a letter or a digit"):
        Machine(flat=b"\xf4", memory_mib=2, name=name)


def test_arguments_that_are_none() -> None:
    assert "'target': give arguments as KEY=VALUE" in pyvmm("qmp", "web", "query-stats", "target").stderr
    assert pyvmm("qmp", "web", "query-stats", "{x").stderr.startswith("pyvmm: {x: that is no JSON")
    assert pyvmm("qmp", "web").returncode == 2
    assert pyvmm("save", "web").returncode == 2


@pytest.mark.parametrize("console", ["", "no such", "serial\nbreak", "a\x1b[2J", b"\xff", "hvc\u0661"])
def test_what_no_console_can_be_called(place: Path, console: str | bytes) -> None:
    """No second line is said to the machine, and nothing but a sentence comes of it."""
    heard: list[bytes] = []
    with Machine(flat=b"\xf4", memory_mib=2, name="web", serial=heard.append) as machine:
        machine.register()
        words: list[str | bytes] = [*COMMAND, "attach", "web", console]
        wrong = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
        assert wrong.stderr.startswith("pyvmm: there is no console ")
