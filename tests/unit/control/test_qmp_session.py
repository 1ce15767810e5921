"""QMP's conversation, on a machine without a vCPU: negotiation, ids, errors, events, clients that are a nuisance."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qmp_peer import LIMIT_S, QmpPeer

from pyvmm import ConfigError, Machine, StateError, __version__
from pyvmm.control.qmp import status
from pyvmm.control.qmp.kinds import BOOL, INT, STR, Alternate, Enum, Int, Kind, ListOf, Optional, QmpError, Struct
from pyvmm.control.qmp.table import COMMANDS
from pyvmm.control.socket import UNREAD_MOST_BYTES


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(accel="qtest", memory_mib=4) as made:
        yield made


@pytest.fixture
def path(machine: Machine, tmp_path: Path) -> Path:
    at = tmp_path / "qmp.sock"
    machine.serve_qmp(at)
    return at


@pytest.fixture
def peer(path: Path) -> Iterator[QmpPeer]:
    with QmpPeer(path) as it:
        yield it


# The conversation


def test_the_greeting(path: Path) -> None:
    with QmpPeer(path, negotiate=False) as peer:
        version = peer.greeting["QMP"].pop("version")
        assert peer.greeting == {"QMP": {"capabilities": []}}
        assert "{major}.{minor}.{micro}".format(**version["qemu"]) == __version__
        assert version["package"] == f"pyvmm-{__version__}"


def test_nothing_before_the_negotiation(path: Path) -> None:
    with QmpPeer(path, negotiate=False) as peer:
        error = {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}
        assert peer.ask("query-status") == {"error": error}
        assert peer.error("qmp_capabilities", enable=["oob"]) == "This monitor does not support Out-Of-Band (OOB)"
        assert "does not accept value 'x'" in peer.error("qmp_capabilities", enable=["x"])
        assert peer.ask("query-status") == {"error": error}
        assert peer.ask("nothing") == {"error": error}
        assert peer.get("qmp_capabilities", enable=[]) == {}
        assert peer.get("query-status")["status"] == "prelaunch"


def test_it_is_negotiated_once(peer: QmpPeer) -> None:
    answer = peer.ask("qmp_capabilities")
    assert answer["error"]["class"] == "CommandNotFound"
    assert "already complete" in answer["error"]["desc"]


@pytest.mark.parametrize("id_", [1, "x", None, [1, {"a": 2}], {"a": None}, 1.5, "\ud800"])
def test_an_id_comes_back(peer: QmpPeer, id_: object) -> None:
    import json

    for name in ("query-uuid", "nothing"):
        peer.send(json.dumps({"execute": name, "id": id_}).encode())
        answer = peer.reply()
        assert answer["id"] == id_
        assert ("return" in answer) == (name == "query-uuid")


@pytest.mark.parametrize(
    ("request_", "class_", "desc"),
    [
        (b'{"execute": "nothing"}', "CommandNotFound", "The command nothing has not been found"),
        (b"{}", "GenericError", "QMP input lacks member 'execute'"),
        (b'{"execute": 1}', "GenericError", "QMP input member 'execute' must be a string"),
        (b'{"execute": "stop", "arguments": []}', "GenericError", "QMP input member 'arguments' must be an object"),
        (b'{"execute": "stop", "extra": 1}', "GenericError", "QMP input member 'extra' is unexpected"),
        (b'{"exec-oob": "stop"}', "GenericError", "QMP input member 'exec-oob' is unexpected"),
        (b'{"execute": "stop", "arguments": {"x": 1}}', "GenericError", "Parameter 'x' is unexpected"),
        (b"hello\n", "GenericError", "JSON parse error, expecting an object"),
        (b'{"execute": }', "GenericError", "JSON parse error, Expecting value"),
    ],
)
def test_requests_that_are_none(peer: QmpPeer, request_: bytes, class_: str, desc: str) -> None:
    peer.send(request_)
    assert peer.reply() == {"error": {"class": class_, "desc": desc}}
    assert peer.get("query-status")["status"] == "prelaunch"


def test_many_at_once_are_answered_in_order(peer: QmpPeer) -> None:
    """Some of them on threads of their own."""
    names = ["stop", "query-status", "system_reset", "query-name", "quit", "stop"]
    for n, name in enumerate(names):
        peer.send(b'{"execute": "%s", "id": %d}' % (name.encode(), n))
    assert [peer.reply()["id"] for _ in names] == list(range(len(names)))


# Kinds


@pytest.mark.parametrize(
    ("kind", "good", "bad", "desc"),
    [
        (STR, "a", 1, "Invalid parameter type for 'x', expected: string"),
        (BOOL, True, 1, "Invalid parameter type for 'x', expected: boolean"),
        (INT, -1, True, "Invalid parameter type for 'x', expected: integer"),
        (INT, 1, 1.0, "Invalid parameter type for 'x', expected: integer"),
        (INT, 1, 1 << 63, f"Parameter 'x' expects an integer from {-(1 << 63)} to {(1 << 63) - 1}"),
        (Int(1, 5), 5, 6, "Parameter 'x' expects an integer from 1 to 5"),
        (Enum("a", "b"), "b", "c", "Parameter 'x' does not accept value 'c'"),
        (Enum("a", "b"), "b", [], "Invalid parameter type for 'x', expected: string"),
        (ListOf(STR), ["a"], "a", "Invalid parameter type for 'x', expected: array"),
        (ListOf(STR), [], ["a", 2], "Invalid parameter type for 'x[1]', expected: string"),
        (Struct({"y": STR}), {"y": ""}, [], "Invalid parameter type for 'x', expected: object"),
        (Struct({"y": STR}), {"y": ""}, {}, "Parameter 'x.y' is missing"),
        (Struct({"y": Optional(STR)}), {}, {"z": 1}, "Parameter 'x.z' is unexpected"),
        (Struct({"y": ListOf(Struct({"z": INT}))}), {"y": []}, {"y": [{"z": ""}]},
         "Invalid parameter type for 'x.y[0].z', expected: integer"),
        (Alternate(STR, INT), 4, None, "Invalid parameter type for 'x', expected: string or integer"),
    ],
)  # fmt: skip
def test_what_is_taken(kind: Kind, good: object, bad: object, desc: str) -> None:
    assert kind.take("x", good) == good
    with pytest.raises(QmpError) as error:
        kind.take("x", bad)
    assert error.value.desc == desc


# Errors of commands


@pytest.mark.parametrize(
    ("raised", "desc"),
    [
        (ConfigError("give another one"), "give another one"),
        (StateError("two\nlines"), "two lines"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (TimeoutError("too late"), "too late"),
        (MemoryError(), "this host has no memory left for that"),
    ],
)
def test_what_a_command_may_raise(
    peer: QmpPeer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], raised: Exception, desc: str
) -> None:
    def raises(served: object) -> None:
        raise raised

    monkeypatch.setattr(COMMANDS["query-uuid"], "function", raises)
    assert peer.error("query-uuid") == desc
    assert capfd.readouterr().err == ""


def test_a_mistake_of_ours_is_told_and_printed(
    peer: QmpPeer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], machine: Machine
) -> None:
    for name in ("query-uuid", "stop"):  # on the server's thread, and on one of its own
        monkeypatch.setattr(COMMANDS[name], "function", lambda served: {}["x"])
        assert peer.error(name) == "internal error: KeyError: 'x'"
        assert "Traceback" in capfd.readouterr().err
    assert peer.get("query-status")["status"] == "prelaunch"


# Events


def test_only_who_has_negotiated_is_told(machine: Machine, path: Path) -> None:
    with QmpPeer(path) as hears, QmpPeer(path, negotiate=False) as does_not:
        assert hears.get("system_reset") == {}
        assert does_not.ask("query-status")["error"]["class"] == "CommandNotFound"
        assert not does_not.events
        told = hears.event("RESET")
        assert told["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        assert 0 <= told["timestamp"]["microseconds"] < 1_000_000
        assert told["timestamp"]["seconds"] > 1_600_000_000


def test_events_come_before_the_answer(peer: QmpPeer) -> None:
    for _ in range(50):
        peer.ask("system_reset")
    assert [event["event"] for event in peer.events] == ["RESET"] * 50


def test_with_nobody_there_nobody_listens(machine: Machine, path: Path) -> None:
    machine.events.tell("wakeup", events=0)
    with QmpPeer(path) as peer:
        assert peer.get("query-status")
        assert machine.events._listeners
        left = threading.Event()
        forget = machine.events.forget
        machine.events.forget = lambda listener: (forget(listener), left.set())  # type: ignore[method-assign]
    assert left.wait(60)
    assert not machine.events._listeners


def test_the_end_is_told(machine: Machine, path: Path) -> None:
    with QmpPeer(path) as peer:
        assert peer.get("quit") == {}
        assert peer.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
        machine.close()
        with pytest.raises(EOFError):
            while True:
                peer.read()
    assert not path.exists()


# Clients that are a nuisance


def test_a_client_that_does_not_read_is_cut_off(machine: Machine, path: Path) -> None:
    with QmpPeer(path) as deaf, QmpPeer(path) as other:
        told = 0
        while told < 2 * UNREAD_MOST_BYTES:
            machine.events.tell("console-port", console="x" * 5000, open=True)
            machine.events.flush()
            told += 5000
            assert other.event("VSERPORT_CHANGE")["data"]["open"]
        with pytest.raises((EOFError, ConnectionError)):
            while True:
                deaf.read()
        assert other.get("query-status")


def test_a_client_that_asks_and_does_not_read_is_held(path: Path) -> None:
    with QmpPeer(path) as deaf, QmpPeer(path) as other:
        count = 2000
        sender = threading.Thread(target=lambda: deaf.send(b'{"execute": "query-commands"}' * count))
        sender.start()
        assert other.get("query-status")
        for _ in range(count):
            assert deaf.reply()["return"]
        sender.join(60)
        assert not sender.is_alive()


def test_twenty_at_once(path: Path) -> None:
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            with QmpPeer(path) as peer:
                for _ in range(30):
                    assert peer.get("query-status")
                    assert peer.get("stop") == {}
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=drive) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed


def test_garbage_from_one_is_nothing_to_the_others(path: Path) -> None:
    with QmpPeer(path) as good, QmpPeer(path) as bad:
        for _ in range(20):
            bad.send(os.urandom(5000) + b"\n")
            assert good.get("query-status")


# Sockets


def test_only_its_user_may_connect(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_several_and_one_that_is_taken(machine: Machine, path: Path, tmp_path: Path) -> None:
    machine.serve_qmp(tmp_path / "second.sock")
    with QmpPeer(path) as first, QmpPeer(tmp_path / "second.sock") as second:
        assert first.get("query-status") == second.get("query-status")
        with pytest.raises(ConfigError, match="give another path"):
            machine.serve_qmp(path)
        assert first.get("query-status")


def test_a_closed_machine_serves_nobody(tmp_path: Path) -> None:
    made = Machine(accel="qtest", memory_mib=4)
    made.close()
    with pytest.raises(StateError, match="closed"):
        made.serve_qmp(tmp_path / "late.sock")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_machine_that_is_dropped_hangs_up(tmp_path: Path) -> None:
    made: Machine | None = Machine(accel="qtest", memory_mib=4)
    assert made is not None
    made.serve_qmp(tmp_path / "dropped.sock")
    dropped = weakref.ref(made)
    with QmpPeer(tmp_path / "dropped.sock") as peer:
        made = None
        deadline_s = time.monotonic() + LIMIT_S
        while dropped() is not None and time.monotonic() < deadline_s:
            gc.collect()  # its server's thread may be about to leave the last call
        with pytest.raises(EOFError):
            peer.read()
    assert not (tmp_path / "dropped.sock").exists()


# The schema


def test_the_schema_has_what_there_is(peer: QmpPeer) -> None:
    schema: list[dict[str, Any]] = peer.get("query-qmp-schema")
    by_name = {entry["name"]: entry for entry in schema}
    assert len(by_name) == len(schema)
    commands = {entry["name"] for entry in schema if entry["meta-type"] == "command"}
    assert commands == {each["name"] for each in peer.get("query-commands")} == set(COMMANDS)
    for entry in schema:
        wanted = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        wanted += [member["type"] for member in entry.get("members", ()) if "type" in member]
        assert all(name in by_name for name in wanted), entry
    returned = by_name[by_name["query-status"]["ret-type"]]
    assert {member["name"]: by_name[member["type"]]["meta-type"] for member in returned["members"]} == {
        "running": "builtin", "status": "enum",
    }  # fmt: skip


def test_the_version_is_numbers() -> None:
    assert COMMANDS["query-version"].returns.take("", status.version())
