"""What somebody hears who listens, of things that are done to a machine: snapshots, moves, traces, clients."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import Guest
from test_machine_events import SPIN, Ear

from pyvmm import VmmError


def test_snapshots_moves_and_traces(boot: Callable[..., Guest], tmp_path: Path) -> None:
    machine = boot(SPIN).machine
    ear = Ear(machine, "saved", "loaded", "migration", "trace")
    there, trace, nobody = (str(tmp_path / name) for name in ("snapshot", "trace", "nobody"))
    machine.save(there)
    machine.load(there)
    machine.start_trace(trace)
    machine.stop_trace()
    with pytest.raises(VmmError) as failed:
        machine.migrate_to(nobody)
    ear.wait_for(6)
    assert ear.heard == [
        ("saved", {"path": there}),
        ("loaded", {"path": there}),
        ("trace", {"path": trace, "on": True, "dropped": 0, "error": ""}),
        ("trace", {"path": trace, "on": False, "dropped": 0, "error": ""}),
        ("migration", {"state": "started", "address": nobody, "why": ""}),
        ("migration", {"state": "failed", "address": nobody, "why": str(failed.value)}),
    ]


def test_clients(boot: Callable[..., Guest], tmp_path: Path) -> None:
    machine = boot(SPIN).machine
    ear = Ear(machine, "client")
    machine.serve_qmp(tmp_path / "qmp")
    server = machine.serve_gdb(tmp_path / "gdb")
    for path in (tmp_path / "qmp", server.where):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        ear.wait_for(2)
        protocol = Path(str(path)).name
        assert ear.heard == [("client", {"protocol": protocol, "did": did}) for did in ("came", "left")]
        ear.heard.clear()
