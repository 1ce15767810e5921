"""pyvmm.Template: one open snapshot, and as many machines as are wanted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest

import pyvmm
from pyvmm import ConfigError, Machine, StateError, Template

# Counts how often it has begun, and says what it was told to say.
COUNT = """
        incl    count
        mov     $0x3f8, %dx
        mov     letter, %al
        outb    %al, %dx
        finish
        .balign 4
count:  .long   0
letter: .byte   'x'
"""


@pytest.fixture
def path(boot: Callable[..., Guest], tmp_path: Path) -> Path:
    boot(COUNT).machine.save(tmp_path / "a")
    return tmp_path / "a"


def test_machines_of_a_template_begin_where_it_stands(boot: Callable[..., Guest], path: Path) -> None:
    at = boot(COUNT).program.symbols["count"]
    with Template(path) as template:
        machines = [template.start() for _ in range(4)]
        for m in machines:
            assert m.state is pyvmm.RunState.PAUSED
            assert m.run(TIMEOUT_S) == PASSED
        # What one has done no other one sees, and the next begins where the first did.
        assert [m.memory.read(at, 4) for m in machines] == [b"\1\0\0\0"] * 4
        with template.start() as late:
            assert late.cpus[0].regs["rip"] != machines[0].cpus[0].regs["rip"]
            assert late.memory.read(at, 4) == bytes(4)
        generations = {bytes(m.devices["vmgenid"].save()["id"]) for m in machines}
        assert len(generations) == 4
    # They outlive it.
    for m in machines:
        assert m.memory.read(at, 4) == b"\1\0\0\0"
        m.close()


def test_options_are_for_all_or_for_one(path: Path) -> None:
    said, own = bytearray(), bytearray()
    with Template(path, serial=said.extend) as template:
        for _ in range(3):
            with template.start() as m:
                assert m.run(TIMEOUT_S) == PASSED
        with template.start(serial=own.extend) as m:
            assert m.run(TIMEOUT_S) == PASSED
        with pytest.raises(ConfigError, match="no option 'serrial': did you mean serial"):
            template.start(serrial=None)  # type: ignore[call-arg]  # that is the mistake
    assert (said, own) == (b"xxx", b"x")


def test_consoles_are_not_shared(boot: Callable[..., Guest], tmp_path: Path) -> None:
    said = tmp_path / "said"
    with boot(COUNT, serial=f"file:{said}").machine as m:
        m.save(tmp_path / "b")
    with Template(tmp_path / "b") as template, template.start() as m:
        assert m.run(TIMEOUT_S) == PASSED
    assert said.read_bytes() == b""


def test_from_many_threads(path: Path) -> None:
    ended = []

    def work() -> None:
        for _ in range(5):
            with template.start() as m:
                ended.append(m.run(TIMEOUT_S))

    with Template(path) as template:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ended == [PASSED] * 20


def test_devices_of_ones_own_and_a_snapshot_that_is_open(path: Path) -> None:
    with pyvmm.Snapshot(path) as snapshot, Template(snapshot, prepare=lambda m: seen.append(m)) as template:
        seen: list[Machine] = []
        with template.start() as m:
            assert seen == [m]


def test_mistakes_are_one_sentence_and_leave_nothing(path: Path, tmp_path: Path) -> None:
    template = Template(path)
    template.start().close()
    template.close()
    template.close()
    assert "closed" in repr(template)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StateError, match="closed: "):
        template.start()
    with pytest.raises(ConfigError, match="a folder"):
        Template(tmp_path)
    with pytest.raises(StateError, match="leave memory_mib out"):
        Template(path, memory_mib=8)
    (tmp_path / "c").write_bytes(b"no snapshot")
    with pytest.raises(StateError, match="no snapshot of pyvmm"):
        Template(tmp_path / "c")
    assert len(os.listdir("/proc/self/fd")) == before
