"""Machine.migrate_to and Machine.incoming: a guest goes on in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import PASSED, TIMEOUT_S, Guest

from pyvmm import ConfigError, Machine, RunState, StateError
from pyvmm.errors import HostError
from pyvmm.migration_stream import GO, LOADED, READY, Cancelled, MigrationStream

MIB = 1 << 20
# Counts in memory for ever, in one page for each of the lowest bits of the count; ends when it is told to.
PAGES = """
    .set    FIRST, 0x200000
        xor     %ebx, %ebx
    1:  inc     %rbx
        mov     %ebx, %ecx
        and     $0xff, %ecx
        shl     $12, %ecx
        mov     %rbx, FIRST(%rcx)
        cmpb    $0, end
        je      1b
        finish
end:    .byte   0
"""


def is_consistent(m: Machine) -> int:
    """The guest's count; AssertionError where its memory is not that of one moment."""
    last = m.cpus[0].vcpu.regs["rbx"]
    for n in range(256):
        value = int.from_bytes(m.memory.read(0x200000 + (n << 12), 8), "little")
        newest = last - (last - n) % 256
        assert value in (newest, newest - 256, 0), (n, value, last)
    return last


class Destination:
    """``Machine.incoming`` on a thread of its own."""

    def __init__(self, address: str | Path, **options: Any) -> None:
        self.machine: Machine | None = None
        self.error: BaseException | None = None
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(address, options))
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S)

    def _wait(self, address: str | Path, options: Any) -> None:
        try:
            self.machine = Machine.incoming(address, timeout_s=TIMEOUT_S, ready=self._is_ready, **options)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    def _is_ready(self, address: str) -> None:
        self.address = address
        self._ready.set()

    def come(self) -> Machine:
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.machine is not None
        return self.machine


@pytest.fixture
def running(boot: Callable[..., Guest]) -> Iterator[Guest]:
    guest = boot(PAGES, memory_mib=64)
    guest.machine.memory.write(0x100_0000, os.urandom(8 * MIB))
    guest.start()
    while guest.machine.memory.read(0x2FF000, 8) == bytes(8):
        pass
    yield guest


@pytest.mark.parametrize("address", ["unix", "tcp:127.0.0.1:0"])
def test_a_guest_that_writes_goes_on_there(running: Guest, tmp_path: Path, address: str) -> None:
    there = Destination(tmp_path / "socket" if address == "unix" else address)
    moved = running.machine.migrate_to(there.address)
    assert moved.sent_bytes > 8 * MIB
    assert 0 < moved.stood_ns <= moved.took_ns
    assert (running.machine.state, running.machine.status) == (RunState.SHUTDOWN, 0)
    assert running.machine.status is not None
    assert running.machine.status.reason == "migrated"
    with there.come() as m:
        assert m.state is RunState.PAUSED
        count = is_consistent(m)
        assert count == is_consistent(running.machine)
        assert bytes(m.memory.ram[0]) == bytes(running.machine.memory.ram[0])
        m.memory.write(running.program.symbols["end"], b"\1")
        assert m.run(TIMEOUT_S) == PASSED
        assert is_consistent(m) >= count
    with pytest.raises(StateError):
        running.machine.resume()
    assert not (tmp_path / "socket").exists()


def test_one_that_is_paused_and_one_that_was_restored(running: Guest, tmp_path: Path) -> None:
    running.machine.pause()
    running.machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a") as m:
        m.memory.write(0x180_0000, b"written since")
        there = Destination(str(tmp_path / "socket"))
        m.migrate_to(there.address)
        with there.come() as other:
            assert is_consistent(other) == is_consistent(running.machine)
            assert bytes(other.memory.ram[0]) == bytes(m.memory.ram[0])
            assert other.devices["vmgenid"].save() == m.devices["vmgenid"].save()
            # It reboots from the image that came with it.
            other.reset()
            other.memory.write(running.program.symbols["end"], b"\1")
            assert other.run(TIMEOUT_S) == PASSED


def test_between_two_commands(running: Guest, tmp_path: Path) -> None:
    """`pyvmm run --incoming` goes on with it, to the guest's own end."""
    socket = tmp_path / "socket"
    command = [sys.executable, "-m", "pyvmm", "run", "--incoming", str(socket), "--timeout", str(TIMEOUT_S)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
        assert other.stderr is not None
        assert other.stderr.readline() == f"waiting for a machine at {socket}\n"
        running.machine.pause()
        running.machine.memory.write(running.program.symbols["end"], b"\1")
        running.machine.migrate_to(socket)
        assert other.wait(TIMEOUT_S) == PASSED
    assert running.machine.status == 0


def test_called_off_at_any_moment_it_stays(running: Guest, tmp_path: Path) -> None:
    m = running.machine
    with pytest.raises(StateError, match="no migration is under way"):
        m.cancel_migration()
    stayed = 0
    for n in range(12):
        there = Destination(str(tmp_path / f"{n}"))
        begun = threading.Event()

        def off(m: Machine = m, begun: threading.Event = begun, turns: int = n * n) -> None:
            begun.wait()
            for _ in range(turns * 200):
                pass
            try:
                m.cancel_migration()
            except StateError:
                pass  # not yet, or no longer

        thread = threading.Thread(target=off)
        thread.start()
        begun.set()
        try:
            m.migrate_to(there.address)
        except Cancelled:
            stayed += 1
            assert m.state is RunState.RUNNING
            with pytest.raises((HostError, StateError)):
                there.come()
        else:
            m = there.come()
            m.resume()
        finally:
            thread.join()
        m.pause()
        before = is_consistent(m)
        m.resume()
        while int.from_bytes(m.memory.read(0x200000, 8), "little") < before:
            pass
    m.pause()
    is_consistent(m)
    m.close()


@pytest.mark.parametrize("moment", ["greeting", "READY", "memory", "LOADED"])
def test_a_destination_that_dies_leaves_the_source_running(running: Guest, tmp_path: Path, moment: str) -> None:
    import socket

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)

    def destination() -> None:
        connection, _ = listener.accept()
        with MigrationStream(connection) as stream:
            if moment == "greeting":
                return
            stream.meet()
            for kind in (1, 2):
                _, length = stream.frame(kind)
                stream.bytes(length)
            if moment == "READY":
                return
            stream.send(READY)
            while moment != "memory":
                kind, length = stream.frame(3, 4, 5)
                stream.bytes(length)
                if kind == 5:
                    return

    thread = threading.Thread(target=destination)
    thread.start()
    with pytest.raises(HostError, match=r"\Athe connection (broke|has ended)") as caught:
        running.machine.migrate_to(str(tmp_path / "socket"))
    thread.join()
    listener.close()
    assert "\n" not in str(caught.value)
    assert running.machine.state is RunState.RUNNING
    running.machine.pause()
    is_consistent(running.machine)


def test_without_the_last_word_it_is_paused(running: Guest, tmp_path: Path) -> None:
    """It may be running there: two of it would be worse than none for a while."""
    import socket

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)

    def destination() -> None:
        connection, _ = listener.accept()
        with MigrationStream(connection) as stream:
            stream.meet()
            for kind in (1, 2):
                stream.bytes(stream.frame(kind)[1])
            stream.send(READY)
            kind = 0
            while kind != 5:
                kind, length = stream.frame(3, 4, 5)
                stream.bytes(length)
            stream.send(LOADED)
            stream.frame(GO)

    thread = threading.Thread(target=destination)
    thread.start()
    with pytest.raises(HostError, match="not known whether the machine goes on at the other side"):
        running.machine.migrate_to(str(tmp_path / "socket"))
    thread.join()
    listener.close()
    assert running.machine.state is RunState.PAUSED
    before = is_consistent(running.machine)
    running.machine.resume()
    while int.from_bytes(running.machine.memory.read(0x200000, 8), "little") < before:
        pass
    running.machine.pause()


def test_what_can_not_be_is_one_sentence_and_it_stays(running: Guest, tmp_path: Path) -> None:
    m = running.machine
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"nobody at .*: begin `pyvmm run --incoming` there first"):
        m.migrate_to(str(tmp_path / "nobody"))
    for address in ("tcp:", "tcp:host", "tcp:host:99999", ""):
        with pytest.raises(ConfigError, match="give"):
            m.migrate_to(address)
    with pytest.raises(TimeoutError, match="no machine came"):
        Machine.incoming(str(tmp_path / "late"), timeout_s=0)
    # The other side wants something else of it.
    there = Destination(str(tmp_path / "socket"), cpu="host,-sse3")
    with pytest.raises(StateError, match=r"the other side refuses: .*with cpu 'host', this one has"):
        m.migrate_to(there.address)
    with pytest.raises(StateError):
        there.come()
    there = Destination(str(tmp_path / "socket"), memory_mib=128)
    with pytest.raises(StateError, match=r"the other side refuses: .*leave memory_mib out"):
        m.migrate_to(there.address)
    with pytest.raises(StateError):
        there.come()
    assert m.state is RunState.RUNNING
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_the_images_of_drives_are_handed_over(boot: Callable[..., Guest], tmp_path: Path, aio: str) -> None:
    """One of the two machines has them at any moment, and nobody else may."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    drives = [f"file={image},if=virtio,aio={aio}"]
    guest = boot(PAGES, drives=drives)
    m = guest.machine
    m.resume()

    def is_taken() -> bool:
        try:
            boot(PAGES, drives=drives).machine.close()
        except ConfigError as error:
            assert "is in use by" in str(error)
            return True
        return False

    assert is_taken()
    # One that is refused at the last moment: somebody has the image.
    there = Destination(str(tmp_path / "socket"), prepare=lambda m: setattr(m.drives, "claim", refuse))
    with pytest.raises(StateError, match="the other side refuses: not now"):
        m.migrate_to(there.address)
    with pytest.raises(ConfigError):
        there.come()
    assert m.state is RunState.RUNNING
    assert is_taken()
    there = Destination(str(tmp_path / "socket"))
    m.migrate_to(there.address)
    with there.come() as other:
        assert is_taken()
        m.close()
        assert is_taken()
        other.memory.write(guest.program.symbols["end"], b"\1")
        assert other.run(TIMEOUT_S) == PASSED
    assert not is_taken()


def refuse() -> None:
    raise ConfigError("not now")


def test_an_image_that_somebody_took_meanwhile(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """The machine stays paused, and says who has it."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    drives = [f"file={image},if=virtio"]
    m = boot(PAGES, drives=drives).machine
    m.drives.give_up()
    with boot(PAGES, drives=drives).machine:
        with pytest.raises(ConfigError, match="in use by this process"):
            m.resume()
        assert m.state is RunState.PRELAUNCH
    m.resume()
    m.pause()
