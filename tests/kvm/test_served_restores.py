"""Machine.restore with userfaultfd: memory comes out of the snapshot when somebody touches it, and where it can't the
machine ends with a sentence.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, PORT, TIMEOUT_S, Guest, Recorder
from test_fork import descriptors, in_child

import pyvmm
from pyvmm import ConfigError, Machine, RunState, Snapshot, StateError
from pyvmm.cli.restored import ways_of
from pyvmm.errors import HostError

pytestmark = pytest.mark.userfaultfd
MIB = 1 << 20
FAR = 0x200_0000
# Adds up what is at FAR, tells a device of the sum, and ends.
SUM = """
        xor     %eax, %eax
        mov     $0x2000000, %esi
        mov     $0x2100000, %edi
    1:  add     (%rsi), %rax
        add     $4096, %rsi
        cmp     %rdi, %rsi
        jb      1b
        mov     %rax, sum
        mov     $DEVICE_PORT, %edx
        out     %eax, %dx
        finish
        .balign 8
sum:    .quad   0
"""
EXPECTED = sum(range(FAR >> 12, FAR + MIB >> 12))


@pytest.fixture
def saved(boot: Callable[..., Guest], tmp_path: Path) -> Guest:
    """At ``a`` in tmp_path; its memory at FAR is not zero."""
    guest = boot(SUM, memory_mib=64)
    for at in range(FAR, FAR + MIB, 4096):
        guest.machine.memory.write(at, (at >> 12).to_bytes(8, "little"))
    guest.machine.save(tmp_path / "a")
    return guest


def served(path: Path, **options: object) -> tuple[Machine, Recorder]:
    device = Recorder()
    m = Machine.restore(path, userfaultfd=True, **options)
    m.pio.map(PORT, 4, device)
    return m, device


def sum_of(guest: Guest, m: Machine) -> int:
    return int.from_bytes(m.memory.read(guest.program.symbols["sum"], 8), "little")


def test_the_guest_finds_its_memory(saved: Guest, tmp_path: Path) -> None:
    m, device = served(tmp_path / "a")
    with m:
        memory = m.served_memory
        assert memory is not None
        before = memory.copied_bytes
        assert before < MIB  # what the restore itself has looked at
        assert m.run(TIMEOUT_S) == PASSED
        assert sum_of(saved, m) == EXPECTED
        assert device.writes == [EXPECTED & 0xFFFF_FFFF]
        assert memory.faults >= MIB // 0x10000
        assert MIB <= memory.copied_bytes < 8 * MIB
    with Machine.restore(tmp_path / "a") as other:
        assert other.served_memory is None


def test_a_device_reads_memory_that_nobody_has_touched(saved: Guest, tmp_path: Path) -> None:
    """Its handler is Python, with the GIL, while the guest waits; and a drive's request is the kernel's."""
    m = Machine.restore(tmp_path / "a", userfaultfd=True)
    with m, open(tmp_path / "out", "w+b", buffering=0) as out:
        found: list[bytes] = []

        class Reads(Recorder):
            def write(self, offset: int, size: int, value: int) -> None:
                found.append(m.memory.read(FAR + 0x8000, 2))
                os.pwritev(out.fileno(), [m.memory.view(FAR + 0x9000, 2)], 0)

        m.pio.map(PORT, 4, Reads())
        m.memory.write(saved.program.symbols["sum"], bytes(8))
        m.cpus[0].regs = {**m.cpus[0].regs, "rdi": 0}
        assert m.run(TIMEOUT_S) == PASSED
        assert found == [(FAR + 0x8000 >> 12).to_bytes(2, "little")]
        assert os.pread(out.fileno(), 2, 0) == (FAR + 0x9000 >> 12).to_bytes(2, "little")


def test_differences_and_their_base(saved: Guest, tmp_path: Path) -> None:
    with Machine.restore(tmp_path / "a") as m, Snapshot(tmp_path / "a") as base:
        m.memory.write(FAR, b"\1" + bytes(7))
        m.memory.write(FAR + 0x5000, b"\2" + bytes(7))
        m.save(tmp_path / "b", base=base)
    m, _device = served(tmp_path / "b")
    with m:
        assert m.run(TIMEOUT_S) == PASSED
        assert sum_of(saved, m) == EXPECTED - (FAR >> 12) - (FAR + 0x5000 >> 12) + 3


def test_what_was_in_use_is_read_ahead(saved: Guest, tmp_path: Path) -> None:
    m, _device = served(tmp_path / "a", prefetch=True)
    with m:
        m.board.chassis.join_background()
        memory = m.served_memory
        assert memory is not None
        assert memory.copied_bytes >= MIB
        faults = memory.faults
        assert m.memory.read(FAR + 0x3000, 2) == (FAR + 0x3000 >> 12).to_bytes(2, "little")
        assert memory.faults == faults


@pytest.mark.parametrize("running", [True, False])
def test_it_is_saved_forked_and_goes_back(boot: Callable[..., Guest], tmp_path: Path, running: bool) -> None:
    """What has not been touched is read first; from then on it is a machine like any other."""
    guest = boot("1: incl count\n jmp 1b\n .balign 8\n count: .quad 0", memory_mib=64)
    for at in range(FAR, FAR + MIB, 4096):
        guest.machine.memory.write(at, (at >> 12).to_bytes(8, "little"))
    guest.machine.save(tmp_path / "a")

    def check(m: Machine) -> None:
        for at in range(FAR, FAR + MIB, 4096):
            assert m.memory.read(at, 8) == (at >> 12).to_bytes(8, "little")

    for act in ("save", "fork", "load"):
        with Machine.restore(tmp_path / "a", userfaultfd=True) as m:
            if running:
                m.resume()
            if act == "save":
                m.save(tmp_path / "b")
                (tmp_path / "a").rename(tmp_path / "c")
                with Machine.restore(tmp_path / "b", check=True) as other:
                    check(other)
                (tmp_path / "c").rename(tmp_path / "a")
            elif act == "fork":
                for other in m.fork(2):
                    with other:
                        check(other)
            else:
                m.memory.write(FAR, b"changed")
                m.load(tmp_path / "a")
            check(m)
            assert m.memory.discard(FAR, 4096)
            expected = bytes(8) if act != "fork" else (FAR >> 12).to_bytes(8, "little")
            assert m.memory.read(FAR, 8) == expected
            assert m.control.state is (RunState.RUNNING if running else RunState.PAUSED)


def test_pages_given_back_are_the_file_s_again(saved: Guest, tmp_path: Path) -> None:
    """As of a mapping: so a balloon does the same with both."""
    with Machine.restore(tmp_path / "a", userfaultfd=True) as m:
        m.memory.write(FAR, b"changed")
        assert m.memory.discard(FAR, 4096, zeros=True) == 0
        assert m.memory.read(FAR, 7) == b"changed"
        assert m.memory.discard(FAR, 4096) == 4096
        assert m.memory.read(FAR, 8) == (FAR >> 12).to_bytes(8, "little")


# -- files that fail ---------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(MIB)


CUT_OFF = "is damaged: it was cut off while a machine had its memory there"


def test_a_guest_that_touches_what_is_gone(saved: Guest, tmp_path: Path) -> None:
    """The machine ends with a sentence, and its guest has not executed one instruction with what is not its memory."""
    m, device = served(tmp_path / "a")
    with m:
        truncated(tmp_path / "a")
        with pytest.raises(StateError, match=CUT_OFF):
            m.run(TIMEOUT_S)
        assert m.control.state is RunState.INTERNAL_ERROR
        assert device.writes == []
        assert sum_of(saved, m) == 0
        with pytest.raises(StateError, match=CUT_OFF):
            m.save(tmp_path / "b")
        assert not (tmp_path / "b").exists()
        assert m.memory.read(FAR, 8) == bytes(8)


def test_a_file_that_can_t_be_read(saved: Guest, tmp_path: Path) -> None:
    with Snapshot(tmp_path / "a") as origin:
        m, device = served(origin)  # type: ignore[arg-type]
        with m:
            fd, _offset = origin.sources()[0]
            other = os.open("/dev/null", os.O_WRONLY)
            os.dup2(other, fd)
            os.close(other)
            with pytest.raises(HostError, match=r"a: Bad file descriptor at 0x.*: keep it where it can be read, or"):
                m.run(TIMEOUT_S)
            assert device.writes == []


def test_a_handler_that_holds_the_gil_is_not_kept_waiting(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("mov $DEVICE_PORT, %edx\n out %al, %dx\n out %al, %dx\n finish", memory_mib=64)
    guest.machine.memory.write(FAR, b"there")
    guest.machine.save(tmp_path / "a")
    m = Machine.restore(tmp_path / "a", userfaultfd=True)
    with m:
        found: list[bytes] = []

        class Reads(Recorder):
            def write(self, offset: int, size: int, value: int) -> None:
                truncated(tmp_path / "a")
                found.append(m.memory.read(FAR, 5))

        m.pio.map(PORT, 1, Reads())
        with pytest.raises(StateError, match=CUT_OFF):
            m.run(TIMEOUT_S)
        assert set(found) == {bytes(5)}


def test_a_paused_machine_whose_memory_is_looked_at(saved: Guest, tmp_path: Path) -> None:
    m, device = served(tmp_path / "a")
    with m:
        truncated(tmp_path / "a")
        failed = threading.Event()
        m.events.listen(lambda event: failed.set(), "stop")
        assert m.memory.read(FAR, 8) == bytes(8)
        assert failed.wait(TIMEOUT_S)
        assert CUT_OFF in str(m.control.error)
        with pytest.raises(StateError, match="internal-error: reset"):
            m.run(TIMEOUT_S)
        assert device.writes == []


class Looks(pyvmm.Device):
    """One that looks at memory when its state has been loaded, as a virtio device does at its rings."""

    def __init__(self, m: Machine, before: Callable[[], object] = lambda: None) -> None:
        self.memory = m.memory
        self.before = before
        self.found = b""

    def after_load(self) -> None:
        self.before()
        self.found = self.memory.read(FAR, 2)


def test_a_device_that_finds_its_memory_gone(saved: Guest, tmp_path: Path) -> None:
    """Then there is no machine: it would go on from what never was."""
    made: list[Looks] = []

    def prepare(m: Machine, before: Callable[[], object] = lambda: None) -> None:
        made.append(Looks(m, before))
        m.board.add("looks", made[-1])

    prepare(saved.machine)
    saved.machine.save(tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))
    with Machine.restore(tmp_path / "a", userfaultfd=True, prepare=prepare):
        assert made[-1].found == (FAR >> 12).to_bytes(2, "little")
    with pytest.raises(StateError, match=CUT_OFF):
        Machine.restore(
            tmp_path / "a", userfaultfd=True, prepare=lambda m: prepare(m, lambda: truncated(tmp_path / "a"))
        )
    assert made[-1].found == bytes(2)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_cut_off_meanwhile_has_no_holes(saved: Guest, tmp_path: Path) -> None:
    """What is missing would be taken for zeros, by a restore that reads all of it too."""
    before = len(os.listdir("/proc/self/fd"))
    for way in ({"userfaultfd": True}, {"eager": True}):
        saved.machine.save(tmp_path / "a")
        with pytest.raises(StateError, match=r"a is damaged: it was cut off$"):
            Machine.restore(tmp_path / "a", prepare=lambda m: truncated(tmp_path / "a"), **way)  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_image_that_is_gone(saved: Guest, tmp_path: Path) -> None:
    """Those that are in the file are read, also where they are checked: a mapping would be a SIGBUS."""
    before = len(os.listdir("/proc/self/fd"))
    for way in ({"userfaultfd": True}, {"eager": True}, {}):
        saved.machine.save(tmp_path / "a")
        with Snapshot(tmp_path / "a") as origin:
            truncated(tmp_path / "a")
            with pytest.raises(StateError, match="a is damaged: it was cut off"):
                Machine.restore(origin, **way)  # type: ignore[arg-type]
    saved.machine.save(tmp_path / "a")
    with Snapshot(tmp_path / "a") as origin:
        offset, size, _crc = origin._images["flat"]
        with open(tmp_path / "a", "r+b") as file:
            file.truncate(offset + size - 1)
        with pytest.raises(StateError, match="a is damaged: it was cut off"):
            origin.check()
    assert len(os.listdir("/proc/self/fd")) == before


# -- what it does not do -----------------------------------------------------------------------------------------------


def test_refused(saved: Guest, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="eager beside userfaultfd"):
        Machine.restore(tmp_path / "a", userfaultfd=True, eager=True)
    with pytest.raises(ConfigError, match="memory that other processes have too"):
        Machine.restore(tmp_path / "a", userfaultfd=True, shared_memory=True)
    with pytest.raises(ConfigError, match="huge_pages='2M' can't be served"):
        Machine.restore(tmp_path / "a", userfaultfd=True, huge_pages="2M")
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_left(saved: Guest, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        m, _device = served(tmp_path / "a")
        with m:
            view = m.memory.view(FAR, 8)
            assert m.run(TIMEOUT_S) == PASSED
        assert bytes(view) == (FAR >> 12).to_bytes(8, "little")
        del view
    assert len(os.listdir("/proc/self/fd")) == before
    assert "pages" not in {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def test_a_child_of_fork_closes_its_own(saved: Guest, tmp_path: Path) -> None:
    m, device = served(tmp_path / "a")
    with m:

        def body() -> list[str]:
            m.close()
            return [name for name in descriptors() if "userfaultfd" in name]

        assert in_child(body) == "[]"
        assert m.run(TIMEOUT_S) == PASSED
        assert device.writes == [EXPECTED & 0xFFFF_FFFF]


def test_the_command_s_words() -> None:
    assert ways_of("a.snap,userfaultfd=on,prefetch") == ("a.snap", {"userfaultfd": True, "prefetch": True})
    assert pyvmm.Machine.restore.__kwdefaults__["userfaultfd"] is False
