"""`pyvmm run --gdb`: what it says, who it waits for, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import asm
import pytest
from gdb_client import LIMIT_S, GdbClient

Run = Callable[..., "subprocess.Popen[str]"]
FLAT = ("--flat-mode", "long64", "--memory", "16M", "--serial", "none")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made: list[subprocess.Popen[str]] = []

    def start(source: str, *options: str) -> subprocess.Popen[str]:
        image = tmp_path / "guest.bin"
        image.write_bytes(asm.assemble(source).image)
        command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(image), *FLAT, *options]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Where it says that gdb can connect."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("pyvmm: gdb: target remote "), line
    return line.split()[-1]


def test_it_waits_for_gdb_and_ends_with_its_guest(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    process = run("nop\n finish 3", "--gdb", str(path), "--wait-gdb")
    assert said(process) == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with GdbClient(path) as gdb:
        gdb.no_ack()
        assert gdb.ask("?") == "T05thread:1;"
        assert gdb.ask("vCont;s:1") == "T05thread:1;"
        assert gdb.ask("vCont;c") == "W07"
    assert process.wait(LIMIT_S) == 7
    assert not path.exists()


def test_breakpoints_and_interrupts_are_no_end_of_it(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gdb"
    process = run("1: jmp 1b", "--gdb", str(path))
    said(process)
    for _ in range(2):
        with GdbClient(path) as gdb:
            gdb.no_ack()
            assert gdb.ask("?") == "T05thread:1;"
            gdb.send("vCont;c")
            gdb.interrupt()
            assert gdb.reply() == "T02thread:1;"
    assert process.poll() is None
    with GdbClient(path) as gdb:
        gdb.send("k")
        assert gdb.gone()
    assert process.wait(LIMIT_S) == 0


def test_a_port(run: Run) -> None:
    import socket

    process = run("finish", "--gdb", "0", "--wait-gdb")
    where = said(process)
    assert where[0] == ":"
    with socket.create_connection(("127.0.0.1", int(where[1:])), LIMIT_S) as client:
        client.sendall(b"$vCont;c#a8")
        data = b""
        while piece := client.recv(100):
            data += piece
    assert data == b"+$W01#b8"
    assert process.wait(LIMIT_S) == 1


def test_what_is_wrong(run: Run, tmp_path: Path) -> None:
    for options, sentence in (
        (("--wait-gdb",), "give --gdb PATH or PORT too"),
        (("--gdb", "70000"), "give the path of a socket, or a port below 65536"),
        (("--gdb", "tcp:example.org:1"), "--gdb tcp:example.org:1"),
        (("--gdb", str(tmp_path / "no" / "where")), "gdb="),
    ):
        process = run("finish", *options)
        assert process.wait(LIMIT_S) == 2
        assert process.stderr is not None
        assert sentence in process.stderr.read()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        *(("tcp::1234", 1234), ("1234", 1234), (":0", 0), ("tcp:localhost:9,server=on", 9)),
        *(("unix:/a,server=on", "/a"), ("/a/b", "/a/b"), ("gdb.sock", "gdb.sock")),
        *(("unix:0", "./0"), ("unix:tcp::1", "./tcp::1"), ("unix:unix:a", "./unix:a"), ("./tcp::1", "./tcp::1")),
    ],
)
def test_where(text: str, place: str | int) -> None:
    from pyvmm.cli.run import gdb_place

    assert gdb_place(text) == place
