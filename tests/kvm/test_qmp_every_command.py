"""Every command, said by other people's clients to a machine that runs: QMPClient and qmp-shell of the package
qemu.qmp; and what a crowd of clients does to a machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guests import TIMEOUT_S, Guest
from qemu.qmp import ExecuteError, QMPClient

from pyvmm import RunState
from pyvmm.control.qmp import server  # noqa: F401  # all groups of commands
from pyvmm.control.qmp.table import COMMANDS

SPIN = "movl $1, ready(%rip)\n1: incq count(%rip)\n jmp 1b\n .balign 8\n count: .quad 0\n ready: .long 0"
REFUSED = {"qmp_capabilities", "migrate_cancel", "system_wakeup"}  # said already; none under way; it does not sleep
CONNECTS = int(os.environ.get("PYVMM_CONNECTS", "500"))


@pytest.fixture
def guest(boot: Callable[..., Guest], tmp_path: Path) -> Guest:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "cd.iso").write_bytes(bytes(2048 * 100))
    drives = [f"file={tmp_path}/disk.img,if=virtio,id=d,format=raw", f"file={tmp_path}/cd.iso,media=cdrom,id=cd"]
    nets = [f"unix={tmp_path}/net.sock,server=on,id=n"]
    made = boot(SPIN, machine="pc", drives=drives, nets=nets, balloon=0, consoles=["none"])
    made.machine.serve_qmp(tmp_path / "qmp.sock")
    made.machine.resume()
    return made


def told(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What each command is given, in an order that leaves the machine running to the last."""
    file = {name: str(tmp_path / name) for name in ("memory", "physical", "core", "vm.snap", "cd.iso", "trace")}
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    given: dict[str, dict[str, Any]] = {
        "stop": {},
        "cont": {},
        "inject-nmi": {},  # a guest without a handler begins anew
        "system_powerdown": {},
        "set_link": {"name": "n", "up": False},
        "query-rx-filter": {"name": "n"},
        "announce-self": {"initial": 50, "max": 550, "rounds": 5, "step": 50, "interfaces": ["n"], "id": "a"},
        "balloon": {"value": 1 << 20},
        "block_resize": {"node-name": "d", "size": 2 << 20},
        "eject": {"id": "cd"},
        "blockdev-change-medium": {"id": "cd", "filename": file["cd.iso"]},
        "block_set_io_throttle": {"id": "d", **limits, "iops": 1000},
        "memsave": {"val": 0x100000, "size": 4096, "filename": file["memory"]},
        "pmemsave": {"val": 0, "size": 4096, "filename": file["physical"]},
        "dump-guest-memory": {"paging": False, "protocol": f"file:{file['core']}"},
        "qom-list": {"path": "/machine"},
        "qom-get": {"path": "/machine", "property": "type"},
        "query-stats": {"target": "vm"},
        "human-monitor-command": {"command-line": "info"},
        "snapshot-save": {"filename": file["vm.snap"]},
        "snapshot-load": {"filename": file["vm.snap"]},
        "x-pyvmm-trace-start": {"filename": file["trace"]},
        "x-pyvmm-trace-stop": {},
        "migrate": {"uri": f"unix:{tmp_path}/nobody"},
    }
    queries = {name: given.get(name, {}) for name in COMMANDS if name.startswith("query-")}
    last: dict[str, dict[str, Any]] = {"system_reset": {}, "quit": {}}
    others = {name: {} for name in COMMANDS if name not in {*queries, *given, *last}}
    return {**queries, **{name: words for name, words in given.items() if name not in queries}, **others, **last}


def test_the_client_of_the_package(guest: Guest, tmp_path: Path) -> None:
    async def drive() -> dict[str, str]:
        client = QMPClient("a test")
        await client.connect(str(tmp_path / "qmp.sock"))
        refused = {}
        for name, arguments in told(tmp_path).items():
            assert guest.machine.state is RunState.RUNNING or name == "cont", name
            try:
                COMMANDS[name].returns.take("", await client.execute(name, arguments))
            except ExecuteError as error:
                refused[name] = str(error)
        try:
            await client.disconnect()
        except EOFError:
            pass  # it has hung up: the machine has ended
        return refused

    refused = asyncio.run(asyncio.wait_for(drive(), TIMEOUT_S))
    assert refused.keys() <= REFUSED, refused
    assert guest.machine.wait(TIMEOUT_S)  # quit is answered before it is done
    assert guest.machine.status == 0
    assert (tmp_path / "memory").stat().st_size == (tmp_path / "physical").stat().st_size == 4096
    assert (tmp_path / "disk.img").stat().st_size == 2 << 20


def test_the_shell_of_the_package(guest: Guest, tmp_path: Path) -> None:
    words = told(tmp_path)
    lines = []
    for name, arguments in words.items():
        said = [f"{key}={word if isinstance(word, str) else json.dumps(word)}" for key, word in arguments.items()]
        lines.append(" ".join([name, *said]))
    shell = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", str(tmp_path / "qmp.sock")],
        input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    said = [line.removeprefix("(QEMU) ") for line in shell.stdout.splitlines()]
    answers = [json.loads(line) for line in said if line.startswith(('{"return"', '{"error"'))]
    assert len(answers) == len(words), shell.stdout + shell.stderr
    failed = {name for name, answer in zip(words, answers, strict=True) if "error" in answer}
    assert failed <= REFUSED, (failed, shell.stdout)
    assert guest.machine.wait(TIMEOUT_S)  # quit is answered before it is done
    assert guest.machine.status == 0


def test_a_crowd(guest: Guest, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twenty at once, one that never reads, one that says garbage, and many that come and go."""
    path = str(tmp_path / "qmp.sock")
    before = len(os.listdir("/proc/self/fd"))
    asked = 0

    async def garbage() -> None:
        while not over.is_set():
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(os.urandom(3000) + b"\n")
            try:
                await writer.drain()
            except ConnectionError:
                pass
            writer.close()
            await asyncio.sleep(0.01)

    async def deaf() -> None:
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"execute": "qmp_capabilities"}')
        try:
            while True:
                writer.write(b'{"execute": "query-commands"}')
                await writer.drain()
        finally:
            writer.transport.abort()

    async def talk(client: Any) -> None:
        nonlocal asked
        while not over.is_set():
            assert (await client.execute("query-status"))["running"]
            asked += 1
            await asyncio.sleep(0.01)

    async def come_and_go() -> None:
        for _ in range(CONNECTS):
            reader, writer = await asyncio.open_unix_connection(path)
            assert json.loads(await reader.readline())["QMP"]["capabilities"] == []
            writer.close()

    async def crowd() -> None:
        clients = [QMPClient(f"client {n}") for n in range(18)]
        for client in clients:
            await client.connect(path)
        nuisance = asyncio.create_task(deaf())
        others = [asyncio.create_task(work) for work in (garbage(), *map(talk, clients))]
        await come_and_go()
        over.set()
        await asyncio.gather(*others)
        nuisance.cancel()
        await asyncio.gather(nuisance, return_exceptions=True)
        for client in clients:
            await client.disconnect()

    over = asyncio.Event()
    count = guest.value("count", 8)
    asyncio.run(asyncio.wait_for(crowd(), TIMEOUT_S))
    assert asked >= 18
    assert guest.machine.state is RunState.RUNNING
    assert guest.value("count", 8) > count
    guest.machine.close()  # which waits for the server
    assert len(os.listdir("/proc/self/fd")) <= before
    assert "Traceback" not in capfd.readouterr().err
