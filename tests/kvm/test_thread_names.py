"""Whoever looks at the process with top or perf sees which thread is which vCPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from guests import PORT, Guest, Recorder

from pyvmm.cpu_exec import CpuExec


def names() -> set[str]:
    return {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def test_a_vcpu_s_thread_has_its_name(boot: Callable[..., Guest]) -> None:
    guest = boot("1: mov $DEVICE_PORT, %dx\n in (%dx), %al\n jmp 1b")
    device = Recorder()
    guest.machine.pio.map(PORT, 1, device)
    guest.start()
    device.wait_for(1)
    assert "CPU 0/KVM" in names()


def test_the_number_is_the_vcpu_s() -> None:
    found: list[set[str]] = []

    def vcpu() -> None:
        CpuExec.prepare_thread(17)
        found.append(names())

    thread = threading.Thread(target=vcpu)
    thread.start()
    thread.join()
    assert "CPU 17/KVM" in found[0]
