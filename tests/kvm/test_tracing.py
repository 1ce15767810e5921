"""Coverage, debuggers and profilers see what runs on a machine's threads, as on those of ``threading``."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from guests import PASSED, PORT, Guest, Recorder

import pyvmm

SOURCE = "mov $DEVICE_PORT, %edx\n inb %dx, %al\n outb %al, %dx\n 1: inb %dx, %al\n test %al, %al\n jz 1b\n finish"


class Handled(Recorder):
    """Answers 0 until a timer has ticked."""

    ticked = 0

    def __init__(self) -> None:
        super().__init__(lambda offset, size: self.ticked)

    def tick(self) -> None:
        self.ticked = 1


class Watcher:
    """Names of the functions that begin, by thread."""

    def __init__(self) -> None:
        self.called: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Watcher:
        if event == "call":
            self.called.add((frame.f_code.co_qualname, threading.get_ident()))
        return self

    def names(self) -> set[str]:
        return {name for name, _ in self.called}


@pytest.fixture(params=["settrace", "setprofile"])
def watch(request: pytest.FixtureRequest) -> Iterator[Callable[[Watcher | None], None]]:
    before = threading.gettrace(), threading.getprofile()
    yield getattr(threading, request.param)
    threading.settrace(before[0])  # type: ignore[arg-type]  # None is taken
    threading.setprofile(before[1])


def run(guest: Guest) -> None:
    device = Handled()
    region = guest.machine.pio.map(PORT, 1, device)
    guest.machine.clock.timer(device.tick).arm(0)
    assert guest.run() == PASSED
    guest.machine.pio.unmap(region)


def test_handlers_and_callbacks(boot: Callable[..., Guest], watch: Callable[[Watcher | None], None]) -> None:
    watcher = Watcher()
    watch(watcher)
    run(boot(SOURCE))
    assert {"Recorder.read", "Recorder.write", "Handled.tick"} <= watcher.names()
    # They are of two threads, and neither is this one.
    threads = {ident for name, ident in watcher.called if name in ("Recorder.read", "Handled.tick")}
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_one_that_comes_after_the_threads(
    boot: Callable[..., Guest], watch: Callable[[Watcher | None], None]
) -> None:
    """A debugger is attached between two runs, and goes away again."""
    guest = boot(SOURCE)
    run(guest)
    watcher = Watcher()
    watch(watcher)
    guest.machine.reset()
    run(guest)
    assert {"Recorder.read", "Handled.tick"} <= watcher.names()
    watch(None)
    watcher.called.clear()
    guest.machine.reset()
    run(guest)
    assert not {"Recorder.read", "Handled.tick"} & watcher.names()


def test_a_drive_s_workers(
    boot: Callable[..., Guest], tmp_path: Path, watch: Callable[[Watcher | None], None]
) -> None:
    from pyvmm.block.thread_pool import ThreadPool

    watcher = Watcher()
    watch(watcher)
    over = threading.Event()

    def work(job: object) -> None:
        over.set()

    pool = ThreadPool(work)
    pool.submit(5)
    assert over.wait(60)
    pool.close()
    assert f"{test_a_drive_s_workers.__name__}.<locals>.work" in watcher.names()


def test_where_nobody_asks_nothing_is_loaded_or_set() -> None:
    script = """
import sys
import pyvmm
m = pyvmm.Machine(flat=bytes.fromhex("b003e6f4f4"), memory_mib=4)
class Device(pyvmm.Device):
    def write(self, offset, size, value):
        print(sys.gettrace(), sys.getprofile(), "threading" in sys.modules)
m.pio.unmap(m.pio.find(0xf4))
m.pio.map(0xf4, 1, Device())
m.resume()
m.wait(0.2)
m.close()
"""
    path = f"import sys; sys.path.insert(0, {str(Path(pyvmm.__file__).parents[1])!r})"
    command = [sys.executable, "-I", "-S", "-c", path + script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.stdout, run.stderr) == ("None None False\n", "")
