"""A machine that is dropped without close(): it is freed, with a ResourceWarning, whatever it has done before."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import asm
import pytest
from guests import PORT, TIMEOUT_S, Recorder
from test_leaks import descriptors

import pyvmm

SAY = "mov $0x3f8, %edx\n mov $'x', %al\n outb %al, %dx\n inb $0x80, %al\n finish"
LIMIT_S = TIMEOUT_S / 2


def thread_names() -> list[str]:
    """Of this process. Not the kernel's own thread for a VM, which it ends when it likes to (kvm-nx-lpage-recovery)."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:
            continue  # it has ended
    return sorted(name for name in names if not name.startswith("kvm-nx-"))


def settled(look: Callable[[], object], wanted: object) -> bool:
    """A thread's entry in /proc goes a moment after its end has been waited for."""
    end = time.monotonic() + LIMIT_S
    while look() != wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def make(source: str = SAY, **options: object) -> pyvmm.Machine:
    program = asm.assemble(source, "long64")
    return pyvmm.Machine(flat=program.image, flat_mode="long64", memory_mib=4, **options)


def ended(**options: object) -> pyvmm.Machine:
    machine = make(**options)
    assert machine.run(TIMEOUT_S) == 1
    return machine


def timed_out() -> pyvmm.Machine:
    machine = make("1: jmp 1b")
    with pytest.raises(TimeoutError):
        machine.run(0.05)
    return machine


def failed() -> pyvmm.Machine:
    class Broken(pyvmm.Device):
        def write(self, offset: int, size: int, value: int) -> None:
            raise ValueError("wrong")

    machine = make("mov $DEVICE_PORT, %edx\n outb %al, %dx\n finish")
    machine.pio.map(PORT, 1, Broken())
    with pytest.raises(pyvmm.DeviceError):
        machine.run(TIMEOUT_S)
    return machine


def reset() -> pyvmm.Machine:
    machine = ended()
    machine.reset()
    return machine


def in_a_cycle() -> pyvmm.Machine:
    class Knows(pyvmm.Device):
        def __init__(self, machine: pyvmm.Machine) -> None:
            self.machine = machine
            self.timer = machine.clock.timer(self.tick)

        def tick(self) -> None:
            pass

    machine = make()
    device = Knows(machine)
    machine.pio.map(PORT, 1, device)
    assert machine.run(TIMEOUT_S) == 1
    device.timer.arm(machine.clock.now_ns() + 1)
    return machine


def ran_on() -> pyvmm.Machine:
    """Nobody waited for it; its guest has ended by itself."""
    machine = make("mov $DEVICE_PORT, %edx\n 1: inb %dx, %al\n test %al, %al\n jz 1b\n finish")
    over = [0]
    device = Recorder(lambda offset, size: over[0])
    machine.pio.map(PORT, 1, device)
    machine.resume()
    device.wait_for(1)
    gone = weakref.ref(machine)
    del machine
    gc.collect()
    machine = gone()
    assert machine is not None, "a guest that runs keeps its machine"
    over[0] = 1
    assert machine.wait(TIMEOUT_S)
    return machine


KINDS: dict[str, Callable[[], pyvmm.Machine]] = {
    "never run": make,
    "ended": ended,
    "timed out": timed_out,
    "failed": failed,
    "reset": reset,
    "in a cycle": in_a_cycle,
    "ran on": ran_on,
    "two vCPUs": lambda: ended(cpus=2),
    "irqchip off": lambda: ended(irqchip="off"),
    "pc": lambda: ended(machine="pc"),
    "console": lambda: ended(serial=lambda data: None),
    "pty": lambda: ended(serial="pty"),
}


def test_a_drive_s_idle_workers_hold_nothing(tmp_path: Path) -> None:
    from pyvmm.block.thread_pool import ThreadPool

    class Owner:
        def __init__(self) -> None:
            self.over = threading.Event()
            self.pool = ThreadPool(self.work, idle_s=LIMIT_S)

        def work(self, job: object) -> None:
            self.over.set()

    owner = Owner()
    owner.pool.submit(5)
    assert owner.over.wait(LIMIT_S)
    idle = owner.pool._idle
    assert settled(lambda: len(idle), 1)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_one_with_a_drive_that_was_used(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    fds = descriptors()
    machine = ended(drives=[str(disk)])
    over = threading.Event()
    (backend,) = machine.backends.values()
    backend.aio_writev(0, [memoryview(bytearray(b"x" * 512))], lambda ret: over.set())
    assert over.wait(LIMIT_S)
    gone = weakref.ref(machine)
    del machine, backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert settled(lambda: (gc.collect(), gone())[1], None)
    assert descriptors() == fds
    assert disk.read_bytes()[:513] == b"x" * 512 + b"\0"


def test_no_copy_of_one_closes_it() -> None:
    machine = ended()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(pyvmm.StateError, match="can't be copied"):
            attempt(machine)
    gc.collect()
    assert machine.state.value == "shutdown"
    machine.close()


def test_what_was_never_finished() -> None:
    """A subclass that forgets super().__init__(), or closes in its own."""

    class Forgetful(pyvmm.Machine):
        def __init__(self) -> None:
            pass

    class Hasty(pyvmm.Machine):
        def __init__(self) -> None:
            super().__init__(flat=b"\xf4", memory_mib=4)
            self.close()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for kind in (Forgetful, Hasty):
            with kind() as machine:
                machine.close()
                assert repr(machine) == "<Machine closed>"
            del machine
        gc.collect()
    assert said == []


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_freed(kind: str) -> None:
    KINDS["ended"]().close()
    gc.collect()
    fds, tasks = descriptors(), thread_names()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gone = weakref.ref(KINDS[kind]())
        end = time.monotonic() + LIMIT_S
        while gone() is not None and time.monotonic() < end:
            gc.collect()  # a thread of its may be on the way to where it holds on to nothing
    assert gone() is None
    assert [w.category for w in said] == [ResourceWarning]
    assert "Machine" in str(said[0].message)
    assert "without close()" in str(said[0].message)
    assert descriptors() == fds
    assert settled(thread_names, tasks)


def test_a_closed_one_says_nothing() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        machine = ended()
        machine.close()
        del machine
        with pytest.raises(pyvmm.ConfigError):
            make(cpu="host,-no-such-feature")
        with pytest.raises(pyvmm.ConfigError):
            pyvmm.Machine(memory_mib=0)
        gc.collect()
    assert said == []


def test_the_collector_comes_by_on_a_thread_of_its_own() -> None:
    """There nobody may wait for that very thread: another one closes it."""
    machine = ended()
    cpu = machine.cpus[0]
    fds = descriptors()
    assert cpu._thread is not None
    ident, cpu._thread.ident = cpu._thread.ident, threading.get_ident()  # as if this were the vCPU's thread
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            machine.__del__()
    finally:
        cpu._thread.ident = ident
    assert settled(lambda: machine.state.value, "closed")
    assert settled(lambda: len(descriptors()) < len(fds), True)
    machine.close()


def test_many_dropped_in_a_row_keep_nothing() -> None:
    ended().close()
    gc.collect()
    fds, tasks = descriptors(), thread_names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(20):
            ended()
        while len(descriptors()) > len(fds):
            gc.collect()
    assert descriptors() == fds
    assert settled(thread_names, tasks)


@pytest.mark.parametrize("state", ["ended", "running", "never run"])
def test_the_interpreter_ends_with_one_left(state: str) -> None:
    program = asm.assemble("1: jmp 1b" if state == "running" else SAY, "long64")
    script = "import pyvmm, sys\n"
    script += f"m = pyvmm.Machine(flat=bytes.fromhex({program.image.hex()!r}), flat_mode='long64', memory_mib=4)\n"
    script += {"ended": "m.run(60)\n", "running": "m.resume()\n", "never run": ""}[state]
    script += "m.me = m\nprint('over')\n"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (run.returncode, run.stdout, run.stderr) == (0, "over\n", "")


def test_a_closed_machine_that_is_kept_holds_no_memory_of_its_guest() -> None:
    kept = ended()
    start = f"{kept.memory.ram[0].host_address:x}-"
    assert start in Path("/proc/self/maps").read_text()
    kept.close()
    gc.collect()
    assert start not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("options", [{"irqchip": "off"}, {"irqchip": "kernel"}, {"cpus": 2}, {"serial": "none"}])
def test_one_that_is_closed_is_no_work_for_the_collector(options: dict[str, object]) -> None:
    """Its parts refer to each other for as long as it lives, and no longer."""
    gc.collect()
    gc.disable()
    try:
        machine = ended(**options)
        parts = (machine, machine.board, machine.event_loop, machine.control, machine.irqchip, machine.cpus[0])
        alive = [weakref.ref(part) for part in parts]
        machine.close()
        del machine, parts
        assert [part() for part in alive] == [None] * len(alive)
    finally:
        gc.enable()
