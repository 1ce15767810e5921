"""Every command of QMP, its arguments left out, of a wrong kind, twice or unknown, in every run state: an error each
time, no traceback, and nothing has changed. Made of the table of commands itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import Guest
from qmp_peer import QmpPeer

from pyvmm import ExitStatus, Machine, RunState
from pyvmm.control.qmp import server  # noqa: F401  # all groups of commands
from pyvmm.control.qmp.kinds import Alternate, AnyKind, Builtin, Enum, Int, Kind, ListOf, Optional, Struct
from pyvmm.control.qmp.table import COMMANDS

WRONG: tuple[Any, ...] = (None, True, -1, 1 << 70, 1.5, "", "x", [], ["x"], {}, {"x": 1})
STATES = [state for state in RunState if state is not RunState.CLOSED]


def good(kind: Kind) -> Any:
    """A value that its kind takes."""
    if isinstance(kind, Enum):
        return kind.values[0]
    if isinstance(kind, Int):
        return max(kind.least, 1)
    if isinstance(kind, Builtin):
        return {"str": "none-such", "bool": False, "number": 1, "null": None}[kind.name]
    if isinstance(kind, ListOf):
        return []
    if isinstance(kind, Struct):
        return {name: good(inner) for name, inner in kind.members.items() if not isinstance(inner, Optional)}
    assert isinstance(kind, (AnyKind, Alternate))
    return good(kind.kinds[0]) if isinstance(kind, Alternate) else 1


def refused(kind: Kind, value: Any) -> bool:
    try:
        kind.take("x", value)
    except Exception:
        return True
    return False


def careless(name: str) -> Iterator[bytes]:
    """Requests, none of which may do anything."""
    members = COMMANDS[name].arguments.members
    kinds = {each: kind.kind if isinstance(kind, Optional) else kind for each, kind in members.items()}
    right = {each: good(kind) for each, kind in kinds.items()}

    def said(arguments: Any) -> bytes:
        return json.dumps({"execute": name, "arguments": arguments}).encode()

    for each, kind in members.items():
        if not isinstance(kind, Optional):
            yield said({other: value for other, value in right.items() if other != each})
        for value in WRONG:
            if refused(kinds[each], value):
                yield said({**right, each: value})
        twice = said(right)[:-2] + b", " + json.dumps({each: right[each]}).encode()[1:-1] + b"}}"
        yield twice
    yield said({**right, "none-such": 1})
    yield said([])
    yield said("x")
    yield b'{"execute": "%s", "execute": "%s"}' % (name.encode(), name.encode())
    yield b'{"execute": "%s", "none-such": 1}' % name.encode()


def bring_to(machine: Machine, state: RunState) -> None:
    control = machine.control
    if state is RunState.PRELAUNCH:
        return
    machine.resume()
    if state is RunState.SUSPENDED:
        control.request("suspend", then=control.suspend, wait=True)
    elif state is RunState.PAUSED:
        machine.pause()
    elif state is not RunState.RUNNING:
        error = ValueError("a test") if state is RunState.INTERNAL_ERROR else None
        control.end(state, ExitStatus(16, "a test"), error)
        assert machine.wait(60)
    assert machine.state is state


def looks(machine: Machine) -> dict[str, Any]:
    """What a command could have changed."""
    return {
        "state": machine.state,
        "status": machine.status,
        "resets": machine.resets.count,
        "drives": machine.config.drives,
        "limits": [backend.options for backend in machine.backends.values()],
        "balloon": machine.board.balloon and machine.board.balloon.told,
        "pm": machine.devices["acpi_pm"].save(),
    }


@pytest.mark.parametrize("state", STATES, ids=str)
def test_careless_requests(
    boot: Callable[..., Guest], tmp_path: Path, capfd: pytest.CaptureFixture[str], state: RunState
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    guest = boot("1: pause\n jmp 1b", machine="pc", drives=[f"file={tmp_path}/disk.img,if=virtio,id=d"], balloon=0)
    machine = guest.machine
    machine.serve_qmp(tmp_path / "qmp.sock")
    bring_to(machine, state)
    with QmpPeer(tmp_path / "qmp.sock") as peer:
        before = looks(machine)
        files = sorted(tmp_path.iterdir())
        asked = 0
        for name in COMMANDS:
            for request in careless(name):
                peer.send(request)
                answer = peer.reply()
                assert answer.keys() == {"error"}, request
                assert answer["error"]["class"] in ("GenericError", "CommandNotFound"), request
                assert "internal error" not in answer["error"]["desc"], request
                asked += 1
        assert asked > 500
        after = looks(machine)
        if state in (RunState.RUNNING, RunState.SUSPENDED):  # time goes on
            after["pm"] = before["pm"]
        assert after == before
        assert not peer.events
        assert sorted(tmp_path.iterdir()) == files
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("state", STATES, ids=str)
def test_every_command_in_every_state_is_answered(
    boot: Callable[..., Guest], tmp_path: Path, capfd: pytest.CaptureFixture[str], state: RunState
) -> None:
    """With arguments that it takes, twice: what comes is an answer, and no mistake of ours."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    guest = boot("1: pause\n jmp 1b", machine="pc", drives=[f"file={tmp_path}/disk.img,if=virtio,id=d"], balloon=0)
    guest.machine.serve_qmp(tmp_path / "qmp.sock")
    bring_to(guest.machine, state)
    with QmpPeer(tmp_path / "qmp.sock") as peer:
        for name in [name for name in COMMANDS if name not in ("quit", "qmp_capabilities")] + ["quit"]:
            kinds = COMMANDS[name].arguments.members
            required = {each: good(kind) for each, kind in kinds.items() if not isinstance(kind, Optional)}
            for member in required:
                if member == "filename":
                    required[member] = str(tmp_path / "out")
            for _ in range(2):
                answer = peer.ask(name, required)
                if "return" in answer:
                    COMMANDS[name].returns.take("", answer["return"])
                else:
                    assert "internal error" not in answer["error"]["desc"], name
    assert "Traceback" not in capfd.readouterr().err


def test_no_file_has_such_a_name(
    boot: Callable[..., Guest], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine = boot("1: pause\n jmp 1b").machine
    machine.serve_qmp(tmp_path / "qmp.sock")
    files = sorted(tmp_path.iterdir())
    asked = []
    with QmpPeer(tmp_path / "qmp.sock") as peer:
        for name, command in COMMANDS.items():
            for member in command.arguments.members.keys() & {"filename", "base", "protocol"}:
                for path in ("", "a\0b", "file:a\0b", "\ud800", "file:\ud800"):
                    arguments = {**good(command.arguments), member: path}
                    peer.send(json.dumps({"execute": name, "arguments": arguments}).encode())
                    assert peer.reply()["error"]["desc"] == f"Parameter '{member}' expects the path of a file", name
                    asked.append(name)
    assert {"x-pyvmm-trace-start", "snapshot-save", "snapshot-load", "pmemsave", "dump-guest-memory"} <= set(asked)
    assert sorted(tmp_path.iterdir()) == files
    assert "Traceback" not in capfd.readouterr().err


def test_what_has_moved_away_is_nothing_of_ours(
    boot: Callable[..., Guest], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every command, with arguments that it takes, to a machine whose guest, and so whose images, another one has."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 16))
    (tmp_path / "cd.iso").write_bytes(bytes(2048 * 10))
    drives = [f"file={tmp_path}/disk.img,if=virtio,id=d,format=raw", f"file={tmp_path}/cd.iso,media=cdrom,id=cd"]
    machine = boot("1: pause\n jmp 1b", machine="pc", drives=drives, balloon=0).machine
    machine.serve_qmp(tmp_path / "qmp.sock")
    machine.resume()
    arrived: list[Machine] = []
    other = threading.Thread(target=lambda: arrived.append(Machine.incoming(str(tmp_path / "move.sock"))))
    other.start()
    while not (tmp_path / "move.sock").exists():
        assert other.is_alive()
    machine.migrate_to(str(tmp_path / "move.sock"))
    other.join()
    said = {
        "block_resize": {"device": "d", "size": 1 << 17},
        "eject": {"id": "cd"},
        "blockdev-change-medium": {"id": "cd", "filename": str(tmp_path / "cd.iso")},
        "balloon": {"value": 1 << 20},
    }
    with arrived[0] as there, QmpPeer(tmp_path / "qmp.sock") as peer:
        before, size_bytes = looks(there), (tmp_path / "disk.img").stat().st_size
        for reset in (False, True):
            for name in (name for name in COMMANDS if name not in ("quit", "qmp_capabilities", "system_reset")):
                required = {name: str(tmp_path / "out") if name == "filename" else value
                            for name, value in good(COMMANDS[name].arguments).items()}  # fmt: skip
                answer = peer.ask(name, said.get(name, required))
                assert "internal error" not in answer.get("error", {}).get("desc", ""), name
                if name == "block_resize":
                    assert "was moved to another process" in answer["error"]["desc"]
                if name == "cont":
                    assert ("in use by" if reset else "is required") in answer["error"]["desc"]
                assert peer.ask("query-status")["return"]["running"] is False, name
            peer.get("system_reset")
        assert looks(there) == before
        assert (tmp_path / "disk.img").stat().st_size == size_bytes
    assert "Traceback" not in capfd.readouterr().err
