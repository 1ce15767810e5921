"""Machine.load: a machine goes back to a snapshot of itself, once and again, and on from there."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import TIMEOUT_S, Guest
from lives import what_changed
from qmp_peer import QmpPeer
from test_saved_state import demo_machine

import pyvmm
from pyvmm import ConfigError, RunState, StateError

COUNTER = """
1:  incl counter(%rip)
    incl far_away(%rip)
    jmp 1b
    .balign 8
counter: .long 0
    .balign 0x10000
far_away: .long 0
"""
LONGEST_S = 0.02


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
def test_the_demo_guest_at_random_moments(irqchip: str, tmp_path: Path) -> None:
    """It lives each piece of its life twice, and comes to the end that it comes to in one go."""
    chance = random.Random(irqchip)
    said = bytearray()
    back = 0
    with demo_machine(said, irqchip) as machine:
        while True:
            machine.resume()
            machine.wait(chance.uniform(0, LONGEST_S) if back < 15 else TIMEOUT_S)
            machine.pause()
            if machine.state is RunState.SHUTDOWN:
                break
            machine.save(tmp_path / "demo.snap")
            before, so_far, now_ns = machine.save_state(), len(said), machine.clock.now_ns()
            machine.resume()
            machine.wait(chance.uniform(0, LONGEST_S))
            machine.pause()
            machine.load(tmp_path / "demo.snap", twin=False)
            assert machine.state is RunState.PAUSED
            assert machine.clock.now_ns() == now_ns
            del said[so_far:]
            different = what_changed(machine.save_state(), before)
            assert not different, different
            back += 1
        assert machine.status == 0
    text = said.decode()
    assert back > 5
    assert "FAILED" not in text
    assert [line.endswith("  ok") for line in text.splitlines()].count(True) == 9, text


def test_one_that_runs_runs_on(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(COUNTER)
    machine = guest.machine
    machine.serve_qmp(tmp_path / "qmp.sock")
    with QmpPeer(tmp_path / "qmp.sock") as peer:
        peer.get("stop")
        peer.get("snapshot-save", filename=str(tmp_path / "at-zero.snap"))
        peer.get("cont")
        while guest.value("counter") < 100 or guest.value("far_away") < 100:
            assert machine.state is RunState.RUNNING
        peer.get("snapshot-save", filename=str(tmp_path / "counting.snap"))
        peer.get("snapshot-load", filename=str(tmp_path / "counting.snap"))
        assert machine.state is RunState.RUNNING
        assert guest.value("counter") >= 100
        peer.get("stop")
        peer.events.clear()
        peer.get("snapshot-load", filename=str(tmp_path / "at-zero.snap"))
        assert machine.state is RunState.PAUSED
        assert (guest.value("counter"), guest.value("far_away")) == (0, 0)
        peer.get("cont")
        while not guest.value("counter"):
            assert machine.state is RunState.RUNNING
        # What is wrong with one leaves it as it is.
        assert "nowhere" in peer.error("snapshot-load", filename="/nowhere/at/all")
        (tmp_path / "bad.snap").write_bytes(b"x" * 8192)
        assert "bad.snap" in peer.error("snapshot-load", filename=str(tmp_path / "bad.snap"))
        assert machine.state is RunState.RUNNING


def test_one_that_has_ended(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("movl $1, known(%rip)\n mov $0x2000, %ax\n mov $0x604, %dx\n out %ax, %dx\n hlt\n known: .long 0")
    guest.machine.save(tmp_path / "vm.snap")
    for _ in range(3):
        assert guest.machine.run(TIMEOUT_S) == 0
        assert guest.value("known") == 1
        guest.machine.load(tmp_path / "vm.snap")
        assert (guest.machine.state, guest.value("known")) == (RunState.PAUSED, 0)


def test_what_it_can_not_go_back_to(boot: Callable[..., Guest], tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    guest = boot("1: pause\n jmp 1b", machine="pc", memory_mib=4, drives=[f"file={disk},if=virtio,format=raw"])
    machine = guest.machine
    machine.save(tmp_path / "vm.snap")
    machine.load(tmp_path / "vm.snap")
    with boot("1: pause\n jmp 1b", machine="pc", memory_mib=5).machine as other:
        with pytest.raises(StateError, match="the state is of a machine with memory"):
            other.load(tmp_path / "vm.snap")
        assert other.state is RunState.PRELAUNCH
    with disk.open("r+b") as image:
        image.write(b"x")
    with pytest.raises(StateError, match="has been written since"):
        machine.load(tmp_path / "vm.snap")
    with pytest.raises(ConfigError):
        machine.load(tmp_path / "none.snap")
    assert machine.state is RunState.PAUSED


def test_memory_that_is_a_snapshot_s_own(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """A restored machine goes back too, to that snapshot and to another one."""
    guest = boot(COUNTER)
    guest.machine.save(tmp_path / "first.snap")
    with pyvmm.Machine.restore(tmp_path / "first.snap") as machine:
        address = guest.program.symbols["counter"]
        machine.resume()
        while machine.memory.read(address, 4) == bytes(4):
            assert machine.state is RunState.RUNNING
        machine.save(tmp_path / "second.snap")
        machine.pause()
        for name, zero in (("first", True), ("second", False), ("first", True)):
            machine.load(tmp_path / f"{name}.snap")
            assert (machine.memory.read(address, 4) == bytes(4)) is zero
