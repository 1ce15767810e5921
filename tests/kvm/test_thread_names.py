"""Whoever looks at the process with top or perf sees which thread is which vCPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from guests import Guest


def test_each_vcpu_s_thread_has_its_name(boot: Callable[..., Guest]) -> None:
    guest = boot("1: mov $0x700, %dx\n in (%dx), %al\n jmp 1b", cpus=2)
    guest.start()
    # pause() returns when every thread has been to its loop or parked: by then it has its name.
    guest.machine.pause()
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert {"CPU 0/KVM", "CPU 1/KVM"} <= names
