"""The logger "pyvmm": a sentence for each event, for whoever wants to hear, and nothing for who does not."""

from __future__ import annotations

import logging
import subprocess
import sys
from errno import ENOSPC
from typing import Any

import pytest

from pyvmm import log
from pyvmm.events import DEBUG, ERROR, LEVELS, NAMES, WARNING, Events
from pyvmm.run_control import ExitStatus
from pyvmm.run_state import RunState

SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "resume": ({"state": RunState.PRELAUNCH}, "the guest begins"),
    "stop": (
        {"state": RunState.IO_ERROR, "status": ExitStatus(10, "io-error: ide0"), "error": None, "cpu": None,
         "detail": {}},
        "the machine stands: io-error: io-error: ide0",
    ),
    "shutdown": ({"status": ExitStatus(0, "shutdown")}, "the guest has ended: status 0, shutdown"),
    "reset": ({"guest": True, "by": "a triple fault"}, "reset by the guest: a triple fault"),
    "suspend": ({}, "the guest has suspended itself to RAM"),
    "wakeup": ({"events": 1}, "the guest is awake again"),
    "powerdown": ({}, "the power button was pressed"),
    "saved": ({"path": "/x"}, "a snapshot is in /x"),
    "loaded": ({"path": "/x"}, "back to the snapshot in /x"),
    "migration": (
        {"state": "failed", "address": "/run/x", "why": "nobody is there"},
        "migration to /run/x: failed: nobody is there",
    ),
    "trace": (
        {"path": "/t", "on": False, "dropped": 3, "error": ""}, "the trace in /t is at its end, 3 records are missing",
    ),
    "balloon": ({"actual_bytes": 3 << 20}, "3 MiB are in the balloon"),
    "tray": ({"drive": "cd", "open": True}, "the tray of cd is open"),
    "console-port": ({"console": "org.x", "open": False}, "port org.x is closed in the guest"),
    "rx-filter": ({"device": "net0"}, "net0 lets other frames through"),
    "client": ({"protocol": "qmp", "did": "came"}, "a client of qmp came"),
    "io-error": (
        {"drive": "ide0", "operation": "write", "errno": ENOSPC, "action": "stop"},
        "drive ide0: write: No space left on device: the machine stops",
    ),
    "device-broken": ({"device": "blk0", "why": "a ring in a ring"}, "blk0 waits for a reset: a ring in a ring"),
    "console-lost": (
        {"console": "serial", "bytes": 9}, "output of console serial is lost: nobody reads it fast enough",
    ),
    "panic": ({"goes_on": False}, "the guest's kernel has panicked"),
}  # fmt: skip


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def kept() -> Any:
    handler = Kept()
    before = log.LOGGER.level
    log.LOGGER.addHandler(handler)
    yield handler
    log.LOGGER.removeHandler(handler)
    log.LOGGER.setLevel(before)


def events(**options: Any) -> Events:
    """Told at once."""

    def fail(error: BaseException) -> None:
        raise error

    return Events(lambda callback: callback(), fail, machine="vm1", **options)


def test_every_event_has_a_sentence() -> None:
    assert SAMPLES.keys() == log.SENTENCES.keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_logged(kept: Kept, name: str) -> None:
    data, sentence = SAMPLES[name]
    log.LOGGER.setLevel(DEBUG)
    told = events()
    told.tell(name, **data)
    (record,) = kept.records
    assert (record.getMessage(), record.levelno, record.name) == (sentence, LEVELS[name], "pyvmm")
    about: Any = record
    assert (about.event, about.machine) == (name, "vm1")
    assert about.data.keys() == data.keys()
    assert all(value is None or isinstance(value, (bool, int, str, dict)) for value in about.data.values())


def test_only_what_is_asked_for(kept: Kept) -> None:
    log.LOGGER.setLevel(WARNING)
    told = events()
    told.tell("suspend")
    told.tell("panic", goes_on=False)
    assert [record.levelno for record in kept.records] == [ERROR]


def test_listeners_hear_first_and_all_the_same(kept: Kept) -> None:
    log.LOGGER.setLevel(ERROR)
    heard: list[str] = []
    told = events()
    told.listen(lambda event: heard.append(event.name))
    told.tell("suspend")
    assert (heard, kept.records) == (["suspend"], [])


def test_errors_are_their_first_line() -> None:
    error = RuntimeError("KVM can't go on\nrax 0\n")
    data = {"state": RunState.INTERNAL_ERROR, "status": None, "error": error, "cpu": 1, "detail": {}}
    assert log.stop(data) == "the machine stands: internal-error, by vCPU 1: KVM can't go on"


def test_a_machine_that_nobody_logs_loads_none_of_it_and_prints_nothing() -> None:
    script = """
import sys
import pyvmm
with pyvmm.Machine(accel="qtest", memory_mib=16, serial="none") as machine:
    machine.events.tell("panic", goes_on=False)
    machine.events.flush()
    assert not {"logging", "pyvmm.log"} & set(sys.modules), "it is loaded"
    import logging
    machine.events.tell("panic", goes_on=False)     # a warning or worse: whoever imports logging hears those
    machine.events.flush()
    assert "pyvmm.log" in sys.modules
    assert logging.root.handlers == []
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
