"""The lab's clock: what passes on it while QEMU's threads wait for a processor of the host."""

from __future__ import annotations

import time

import lab  # noqa: F401  # its path to the package below
import pytest
from nested_lab.emulator import LabClock

STEP_S = 0.25


class Host:
    """Says how long QEMU's threads have waited, and what time it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.waited_ns = {"vCPU 0": 0, "vCPU 1": 0}
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(LabClock, "_waited_ns", lambda _clock: dict(self.waited_ns))
        self.clock = LabClock()
        self.clock.tick()

    def step(self, **waited_s: float) -> float:
        """What passes on the lab's clock in the next STEP_S of the host's."""
        before = self.clock.now
        self.now_s += STEP_S
        for (thread, ns), s in zip(self.waited_ns.items(), waited_s.values(), strict=False):
            self.waited_ns[thread] = ns + int(s * 1e9)
        return self.clock.tick() - before


def test_a_quiet_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Host(monkeypatch).step() == STEP_S


def test_threads_that_wait_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Host(monkeypatch).step(one=0.1, other=0.1) == pytest.approx(0.05)


def test_a_wait_that_is_told_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    passed = [host.step() for _ in range(3)] + [host.step(one=1.0)] + [host.step() for _ in range(4)]
    assert sum(passed) == pytest.approx(4 * STEP_S, rel=0.1)
    assert passed[-1] == STEP_S


def test_however_long_they_waited_the_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    assert host.step(one=1000.0) > 0
    steps = int(LabClock.LONGEST_WAIT_S / STEP_S)
    assert [host.step() for _ in range(steps + 1)][-1] == STEP_S
