"""Chassis: work in the background stands neither between a machine and its first exit nor in the way of its end."""

from __future__ import annotations

import threading
import time

import pytest

from pyvmm.chassis import Chassis
from pyvmm.clock import VirtualClock
from pyvmm.closers import Closers
from pyvmm.guest_memory import GuestMemory
from pyvmm.spec import specify

LONG_S = 600.0
LIMIT_S = 20.0


@pytest.fixture
def chassis() -> Chassis:
    closers = Closers()
    memory = GuestMemory(1 << 20)
    closers.call(memory.close)
    config = specify(None, {"accel": "qtest", "memory_mib": 16})
    return Chassis(config, memory, closers, lambda loop: VirtualClock())


def test_it_begins_when_the_guest_runs(chassis: Chassis) -> None:
    done: list[str] = []
    chassis.when_it_runs(lambda: done.append("first"))
    chassis.when_it_runs(lambda: done.append("second"))
    assert done == []
    chassis.runs()
    chassis.join_background()
    assert sorted(done) == ["first", "second"]
    chassis.runs()
    chassis.closers.close()
    assert len(done) == 2


def test_a_machine_that_never_ran_does_not_begin_it_at_its_end(chassis: Chassis) -> None:
    done: list[str] = []
    chassis.when_it_runs(lambda: done.append("begun"))
    chassis.closers.close()
    assert done == []


def test_the_end_does_not_wait_for_what_was_to_begin_later(chassis: Chassis) -> None:
    done: list[str] = []
    chassis.in_background(lambda: done.append("begun"), LONG_S)
    chassis.in_background(lambda: done.append("begun"), LONG_S)
    before = time.monotonic()
    chassis.closers.close()
    assert time.monotonic() - before < LONG_S / 10
    assert done == []


def test_what_is_under_way_is_over_before_the_end(chassis: Chassis) -> None:
    done: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(LIMIT_S)
        done.append("over")

    chassis.closers.call(lambda: done.append("the rest"))
    chassis.in_background(work)
    chassis.closers.call(go_on.set)
    assert begun.wait(LIMIT_S)
    chassis.closers.close()
    assert done == ["over", "the rest"]


def test_after_a_while(chassis: Chassis) -> None:
    before = time.monotonic()
    after: list[float] = []
    chassis.in_background(lambda: after.append(time.monotonic() - before), 0.05)
    chassis.join_background()
    assert after[0] >= 0.05
    chassis.closers.close()
