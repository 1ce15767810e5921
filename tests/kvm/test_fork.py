"""A child of os.fork() has the machine's descriptors and mappings, and none of its threads: close() gives those back
and waits for nobody, and all else is a StateError. The parent's machine notices nothing.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import MMIO, PASSED, PORT, TIMEOUT_S, Guest, Recorder

import pyvmm
from pyvmm import RunState, StateError

LIMIT_S = TIMEOUT_S / 2  # a child of fork starts anew what its parent has, and the lab is slow
SPIN = "mov $DEVICE_PORT, %edx\n 1: inb %dx, %al\n test %al, %al\n jz 1b\n finish"


def in_child(body: Callable[[], object]) -> str:
    """What ``body()`` gives in a child of this process, as text; TimeoutError where the child hangs."""
    heard, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's word about threads and fork: what this is about
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(heard)
            os.write(tell, str(body()).encode())
            status = 0
        except BaseException as error:
            os.write(tell, repr(error).encode())
        finally:
            os._exit(status)
    os.close(tell)
    told = b""
    try:
        while select.select([heard], [], [], LIMIT_S)[0]:
            data = os.read(heard, 4096)
            if not data:
                os.waitpid(pid, 0)
                return told.decode()
            told += data
        raise TimeoutError("the child hangs")
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(heard)


def descriptors() -> Counter[str]:
    """What this process has open, and how often."""
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return Counter(os.readlink(link) for link in links if link.exists() or link.is_symlink())


def mapped() -> int:
    """Mappings of vCPUs."""
    return Path("/proc/self/maps").read_text().count("kvm-vcpu")


@pytest.fixture
def guest(boot: Callable[..., Guest]) -> Guest:
    gc.collect()  # descriptors of tests before this one, which its children would have too
    before = descriptors()
    made = boot(SPIN)
    made.before = before  # type: ignore[attr-defined]
    made.device = Recorder(lambda offset, size: made.done)  # type: ignore[attr-defined]
    made.done = 0  # type: ignore[attr-defined]
    made.machine.pio.map(PORT, 1, made.device)  # type: ignore[attr-defined]
    made.machine.clock.timer(lambda: None).arm(1 << 62)  # the event loop has its thread and its descriptors too
    return made


def finish(guest: Guest) -> None:
    guest.start()  # first: one that runs may end as soon as it is told
    guest.done = 1  # type: ignore[attr-defined]
    guest.wait()
    assert guest.machine.status == PASSED


def close_and_look(guest: Guest) -> list[object]:
    guest.machine.close()
    guest.machine.close()
    more = descriptors() - guest.before  # type: ignore[attr-defined]
    left = [name for name in more if "kvm" in name or "eventpoll" in name or "eventfd" in name]
    return [left, mapped(), guest.machine.state.value]


@pytest.mark.parametrize("state", ["running", "paused"])
def test_the_child_closes_and_goes_on(guest: Guest, state: str) -> None:
    guest.start()
    guest.device.wait_for(10)  # type: ignore[attr-defined]
    if state == "paused":
        guest.machine.pause()
    assert in_child(lambda: close_and_look(guest)) == "[[], 0, 'closed']"
    assert guest.machine.state.value == state
    finish(guest)


def test_irqfds_are_given_back(guest: Guest) -> None:
    irqfd = guest.machine.irqchip.irqfd(10, resample=True)
    guest.start()
    guest.device.wait_for(10)  # type: ignore[attr-defined]
    assert in_child(lambda: close_and_look(guest)) == "[[], 0, 'closed']"
    irqfd.signal()
    finish(guest)


def test_the_with_block_is_left(guest: Guest) -> None:
    guest.start()
    guest.device.wait_for(10)  # type: ignore[attr-defined]

    def body() -> str:
        with guest.machine:
            pass
        return "left"

    assert in_child(body) == "left"
    finish(guest)


def test_a_child_that_drops_it_says_nothing(guest: Guest) -> None:
    guest.start()
    guest.device.wait_for(10)  # type: ignore[attr-defined]

    def body() -> list[object]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            guest.machine.__del__()
        return [said, mapped()]

    assert in_child(body) == "[[], 0]"
    finish(guest)


VERBS: dict[str, Callable[[pyvmm.Machine], object]] = {
    "run": lambda machine: machine.run(),
    "wait": lambda machine: machine.wait(),
    "resume": lambda machine: machine.resume(),
    "pause": lambda machine: machine.pause(),
    "reset": lambda machine: machine.reset(),
    "stop": lambda machine: machine.stop(),
    "powerdown": lambda machine: machine.powerdown(),
    "nmi": lambda machine: machine.nmi(),
    "irq_line": lambda machine: machine.irq_line(5),
    "coalesce": lambda machine: machine.coalesce(machine.pio, PORT, 1),
    "exit_stats": lambda machine: machine.exit_stats(),
    "exit_stats_table": lambda machine: machine.exit_stats_table(),
    "drain": lambda machine: machine.drain(),
    "regs": lambda machine: machine.cpus[0].regs,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", ["running", "paused"])
def test_everything_else_is_refused(guest: Guest, verb: str, state: str) -> None:
    guest.start()
    guest.device.wait_for(10)  # type: ignore[attr-defined]
    if state == "paused":
        guest.machine.pause()

    def body() -> str:
        try:
            VERBS[verb](guest.machine)
        except StateError as error:
            return str(error)
        return "taken"

    assert "in a child of fork" in in_child(body)
    finish(guest)


def test_a_fork_while_another_thread_is_in_the_machine_s_locks(guest: Guest) -> None:
    """At the moment of the fork any lock may be held by a thread that the child does not have."""
    over = threading.Event()

    def busy() -> None:
        while not over.is_set():
            guest.machine.pause()
            guest.machine.resume()

    guest.start()
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(20):
            assert in_child(lambda: close_and_look(guest)) == "[[], 0, 'closed']"
    finally:
        over.set()
        thread.join()
    finish(guest)


def test_a_machine_of_the_child_s_own_runs(boot: Callable[..., Guest], guest: Guest) -> None:
    guest.start()

    def body() -> int:
        with Guest("finish 3") as own:
            return own.run()

    assert in_child(body) == "7"
    finish(guest)


def test_drives_consoles_and_images(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Nothing is flushed, nothing is unlocked: the parent's drive and console go on."""
    disk, log, kernel = tmp_path / "disk.img", tmp_path / "log", tmp_path / "fw"
    disk.write_bytes(bytes(1 << 20))
    kernel.write_bytes(b"file")
    guest = boot(
        "mov $0x3f8, %edx\n mov $'x, %al\n outb %al, %dx\n finish", drives=[disk], serial=f"file:{log}", debugcon="pty"
    )

    def body() -> list[str]:
        guest.machine.close()
        return [name for name in descriptors() if "kvm" in name or str(tmp_path) in name or "ptmx" in name]

    assert in_child(body) == "[]"
    assert guest.run() == PASSED
    guest.machine.close()
    assert log.read_bytes() == b"x"


def test_a_handler_that_forks_and_returns_in_both(boot: Callable[..., Guest]) -> None:
    """The child has this one thread: it ends, and the child with it, when the handler has returned there."""
    guest = boot("mov $DEVICE_PORT, %edx\n inb %dx, %al\n mov $DEVICE_MMIO, %edi\n mov %al, (%rdi)\n finish")
    pids: list[int] = []

    class Forks(Recorder):
        def read(self, offset: int, size: int) -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pids.append(os.fork())
            return 7

    guest.machine.pio.map(PORT, 1, Forks())
    after = Recorder()
    guest.machine.mmio.map(MMIO, 1, after)
    assert guest.run() == PASSED
    assert after.writes == [7]
    assert guest.machine.state is RunState.SHUTDOWN
    child = os.pidfd_open(pids[0])
    try:
        assert select.select([child], [], [], LIMIT_S)[0], "the child hangs"
    finally:
        os.close(child)
        os.waitpid(pids[0], 0)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("where", ["timer", "descriptor"])
def test_a_callback_that_forks_and_returns_in_both(boot: Callable[..., Guest], where: str, raises: bool) -> None:
    """The child has the event loop's thread only, and must not go on with the parent's events and timers."""
    guest = boot("1: jmp 1b")
    loop, parent = guest.machine.event_loop, os.getpid()
    pids: list[int] = []
    ticks: list[int] = []
    heard, tell = os.pipe()

    def fork() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            pids.append(pid)
        elif raises:
            sys.stderr = os.fdopen(tell, "w", buffering=1)
            raise LookupError("in the child")

    def tick() -> None:
        ticks.append(os.getpid())
        guest.machine.stop(33)

    if where == "timer":
        guest.machine.clock.timer(fork).arm(0)
    else:
        loop.call_soon(fork)
    guest.machine.clock.timer(tick).arm(1)
    assert guest.run() == 33
    assert ticks == [parent]
    child = os.pidfd_open(pids[0])
    try:
        assert select.select([child], [], [], LIMIT_S)[0], "the child hangs"
    finally:
        os.close(child)
        os.waitpid(pids[0], 0)
        os.close(tell)
    with os.fdopen(heard) as words:
        text = words.read()
    assert ("LookupError: in the child" in text) == raises
