"""QMP with a guest, by the client of the package qemu.qmp: run state, events, vCPUs, the end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from guests import SPIN_ON_BOTH, TIMEOUT_S, Guest
from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient

from pyvmm import RunState
from pyvmm.cli.run import run_attended

Result = TypeVar("Result")
SPIN = "1: pause\n jmp 1b"


@pytest.fixture
def guest(boot: Callable[..., Guest], tmp_path: Path) -> Guest:
    made = boot(SPIN)
    made.machine.serve_qmp(tmp_path / "qmp.sock")
    return made


def talk(path: Path, work: Callable[[QMPClient], Awaitable[Result]]) -> Result:
    """What ``work(client)`` gives."""

    async def connected() -> Result:
        client = QMPClient("test")
        await client.connect(str(path))
        try:
            return await work(client)
        finally:
            await client.disconnect()

    return asyncio.run(asyncio.wait_for(connected(), TIMEOUT_S))


def test_the_run_states(guest: Guest, tmp_path: Path) -> None:
    async def drive(client: QMPClient) -> list[str]:
        states, events = [], []
        listener = EventListener()
        with client.listen(listener):
            for command in ("cont", "stop", "stop", "system_reset", "cont", "cont", "system_reset", "stop"):
                assert await client.execute(command) == {}
                states.append((await client.execute("query-status"))["status"])
            while len(events) < 6:
                events.append((await listener.get())["event"])
        assert states == ["running", "paused", "paused", "paused", "running", "running", "running", "paused"]
        return events

    assert talk(tmp_path / "qmp.sock", drive) == ["RESUME", "STOP", "RESET", "RESUME", "RESET", "STOP"]
    assert guest.machine.state is RunState.PAUSED


def test_an_end_is_told_and_a_reset_makes_another_run_of_it(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("finish 5")
    guest.machine.serve_qmp(tmp_path / "qmp.sock")

    async def drive(client: QMPClient) -> dict[str, Any]:
        listener = EventListener(["SHUTDOWN", "STOP"])
        with client.listen(listener):
            await client.execute("cont")
            shutdown = await listener.get()
            assert (await listener.get())["event"] == "STOP"
            assert await client.execute("query-status") == {"running": False, "status": "shutdown"}
            with pytest.raises(ExecuteError, match="Resetting the Virtual Machine is required"):
                await client.execute("cont")
            await client.execute("system_reset")
            await client.execute("cont")
            assert (await listener.get())["event"] == "SHUTDOWN"
            return shutdown["data"]

    assert talk(tmp_path / "qmp.sock", drive) == {"guest": True, "reason": "guest-shutdown"}


def test_the_guest_resets_itself(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("mov $0xcf9, %edx\n mov $6, %al\n outb %al, %dx\n 1: jmp 1b")
    guest.machine.serve_qmp(tmp_path / "qmp.sock")

    async def drive(client: QMPClient) -> dict[str, Any]:
        listener = EventListener("RESET")
        with client.listen(listener):
            await client.execute("cont")
            return (await listener.get())["data"]

    assert talk(tmp_path / "qmp.sock", drive) == {"guest": True, "reason": "guest-reset"}


def test_a_kernel_panics(boot: Callable[..., Guest], tmp_path: Path) -> None:
    panic = "mov $0x505, %edx\n mov $2, %al\n outb %al, %dx\n mov $1, %al\n outb %al, %dx\n 1: jmp 1b"
    guest = boot(panic, pvpanic=True)
    guest.machine.serve_qmp(tmp_path / "qmp.sock")

    async def drive(client: QMPClient) -> list[tuple[str, dict[str, Any]]]:
        listener = EventListener(["GUEST_PANICKED", "GUEST_CRASHLOADED", "SHUTDOWN"])
        with client.listen(listener):
            await client.execute("cont")
            heard = [await listener.get() for _ in range(3)]
            return [(event["event"], event["data"]) for event in heard]

    assert talk(tmp_path / "qmp.sock", drive) == [
        ("GUEST_CRASHLOADED", {"action": "run"}),
        ("GUEST_PANICKED", {"action": "poweroff"}),
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}),
    ]
    assert guest.machine.status == 18


def test_vcpus_have_threads(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(SPIN_ON_BOTH, cpus=2)
    guest.machine.serve_qmp(tmp_path / "qmp.sock")

    async def drive(client: QMPClient) -> None:
        assert [cpu["thread-id"] for cpu in await client.execute("query-cpus-fast")] == [0, 0]
        await client.execute("cont")
        cpus = await client.execute("query-cpus-fast")
        while not all(cpu["thread-id"] for cpu in cpus):  # they are on their way
            cpus = await client.execute("query-cpus-fast")
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
        names = [Path(f"/proc/self/task/{cpu['thread-id']}/comm").read_text() for cpu in cpus]
        assert len(set(names)) == 2
        await client.execute("inject-nmi")

    talk(tmp_path / "qmp.sock", drive)


@pytest.fixture
def command(guest: Guest, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A `pyvmm run` of that guest."""
    image, path = tmp_path / "spin.bin", tmp_path / "run.sock"
    image.write_bytes(guest.program.image)
    words = ["--flat", str(image), "--flat-mode", "long64", "--flat-address", hex(guest.program.address)]
    run = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "run", *words, "--serial", "none", "--memory", "4", "--qmp", str(path)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    yield path, run
    run.kill()
    run.communicate()


async def connected(path: Path) -> QMPClient:
    """A client of a command that may not have made its socket yet."""
    while True:
        client = QMPClient("test")
        try:
            await client.connect(str(path))
            return client
        except ConnectError:  # the path is there a moment before anybody listens
            await asyncio.sleep(0.01)


async def say_quit(client: QMPClient) -> None:
    """It is answered; then either side may be the first to hang up."""
    assert await client.execute("quit") == {}
    try:
        await client.disconnect()
    except EOFError:
        pass


def test_a_pause_is_no_end_of_the_command(command: tuple[Path, subprocess.Popen[str]]) -> None:
    path, run = command

    async def drive() -> None:
        client = await connected(path)
        assert await client.execute("query-status") == {"running": True, "status": "running"}
        await client.execute("stop")
        assert await client.execute("query-status") == {"running": False, "status": "paused"}
        await client.execute("cont")
        assert run.poll() is None
        await say_quit(client)

    asyncio.run(asyncio.wait_for(drive(), TIMEOUT_S))
    assert run.wait(TIMEOUT_S) == 0
    assert run.stderr is not None
    assert run.stderr.read() == ""
    assert not path.exists()


def test_a_guest_that_waits_for_gdb_has_clients(guest: Guest, tmp_path: Path) -> None:
    image, path = tmp_path / "spin.bin", tmp_path / "run.sock"
    image.write_bytes(guest.program.image)
    words = ["--flat", str(image), "--flat-mode", "long64", "--flat-address", hex(guest.program.address)]
    words += ["--serial", "none", "--memory", "4", "--qmp", str(path)]
    words += ["--gdb", str(tmp_path / "gdb.sock"), "--wait-gdb"]
    run = subprocess.Popen([sys.executable, "-m", "pyvmm", "run", *words], stderr=subprocess.PIPE, text=True)

    async def drive() -> None:
        client = await connected(path)
        assert await client.execute("query-status") == {"running": False, "status": "prelaunch"}
        await say_quit(client)

    asyncio.run(asyncio.wait_for(drive(), TIMEOUT_S))
    run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 0


def test_a_client_that_is_quicker_than_the_guest_s_beginning(guest: Guest) -> None:
    guest.machine.stop(0, "qmp-quit")
    assert run_attended(guest.machine, TIMEOUT_S) == 0


def test_the_time_limit_holds_for_a_paused_guest(guest: Guest, tmp_path: Path) -> None:
    image, path = tmp_path / "spin.bin", tmp_path / "run.sock"
    image.write_bytes(guest.program.image)
    words = ["--flat", str(image), "--flat-mode", "long64", "--flat-address", hex(guest.program.address)]
    words += ["--serial", "none", "--memory", "4", "--qmp", str(path), "--timeout", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", *words], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert run.returncode == 124
    assert "still running after 1.0 s" in run.stderr


def test_qmp_shell_drives_it(guest: Guest, tmp_path: Path) -> None:
    """The package's own command: what people type."""
    shell = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", str(tmp_path / "qmp.sock")],
        input="cont\nquery-status\nstop\n", capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert "Connected to QEMU 0.1.0" in shell.stdout
    assert '"running": true' in shell.stdout.replace("'", '"').replace("True", "true")
    assert guest.machine.state is RunState.PAUSED
