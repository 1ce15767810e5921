"""Machines one after the other and many at once: no descriptor, no thread, no mapping stays; memory is flat."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import asm
import pytest
from guests import PASSED, TIMEOUT_S

import pyvmm

# One timer tick of COM1's FIFO timeout and a few exits: the event loop's thread is started too.
SOURCE = "mov $0x3f8, %edx\n mov $'x', %al\n outb %al, %dx\n inb $0x80, %al\n finish"


def descriptors() -> list[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # the directory's own
    return sorted(names)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def no_more_threads_than(tasks: int) -> bool:
    """The kernel lists a joined thread a moment longer: at the first count (an earlier test's) and at the last."""
    end = time.monotonic() + TIMEOUT_S
    while threads() > tasks and time.monotonic() < end:
        time.sleep(0.01)
    return threads() <= tasks


def rss_kib() -> int:
    """Anonymous memory: what this process holds, without what it maps of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/self/status")


def one(image: bytes, irqchip: str = "kernel", cpus: int = 1) -> None:
    with pyvmm.Machine(
        flat=image, flat_mode="long64", memory_mib=4, irqchip=irqchip, cpus=cpus, serial=lambda data: None
    ) as m:
        timer = m.clock.timer(lambda: None)
        timer.arm(m.clock.now_ns() + 10**12)
        assert m.run(TIMEOUT_S) == PASSED


@pytest.fixture
def image() -> bytes:
    return asm.assemble(SOURCE).image


def test_two_hundred_one_after_the_other(image: bytes) -> None:
    for n in range(20):  # what is made once in a process is made
        one(image, "off" if n % 4 == 0 else "kernel", 1 if n % 4 == 0 else 2)
    gc.collect()
    before, fds, tasks = rss_kib(), descriptors(), threads()
    for n in range(200):
        one(image, "off" if n % 4 == 0 else "kernel", 1 if n % 4 == 0 else 2)
    gc.collect()
    assert descriptors() == fds
    assert no_more_threads_than(tasks)
    # 20 KiB a machine would be a page table, a thread's stack, a buffer that stays.
    assert rss_kib() - before < 200 * 20


def test_thirty_two_at_once(image: bytes) -> None:
    one(image)
    gc.collect()
    fds, tasks = descriptors(), threads()
    machines = [pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4) for _ in range(32)]
    results: list[int] = []
    runners = [threading.Thread(target=lambda m=m: results.append(m.run(TIMEOUT_S))) for m in machines]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(TIMEOUT_S)
    assert results == [PASSED] * 32
    for machine in machines:
        machine.close()
    machines.clear()
    runners.clear()
    gc.collect()
    assert descriptors() == fds
    assert no_more_threads_than(tasks)


def test_machines_that_were_never_run(image: bytes) -> None:
    one(image)
    fds, tasks = descriptors(), threads()
    for _ in range(10):
        pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4).close()
    assert descriptors() == fds
    assert no_more_threads_than(tasks)


def test_machines_that_failed_to_be_built(image: bytes) -> None:
    """Whatever step fails, what was made before it is given back."""
    one(image)
    gc.collect()
    fds, tasks = descriptors(), threads()
    wrong: list[Callable[[], pyvmm.Machine]] = [
        lambda: pyvmm.Machine(kernel=b"no kernel at all", memory_mib=4),
        lambda: pyvmm.Machine(kernel="/no/such/kernel", memory_mib=4),
        lambda: pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4, cpu="host,-no-such-feature"),
        lambda: pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4, serial="file:/no/such/directory/log"),
        lambda: pyvmm.Machine(flat=image, flat_mode="long64", memory_mib=4, cpus=100_000),
        lambda: pyvmm.Machine(flat=bytes(8 << 20), flat_mode="long64", memory_mib=4),
    ]
    for make in wrong * 3:
        with pytest.raises(pyvmm.VmmError):
            make()
    gc.collect()
    assert descriptors() == fds
    assert no_more_threads_than(tasks)
