"""Machine.save and Machine.restore: a guest goes on from a file."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest
from lives import MOMENTS, Lives
from test_saved_state import COUNTER, NOTEBOOK_BYTES, demo_machine

import pyvmm
from pyvmm import Machine, StateError
from pyvmm.cli.demo import NOTEBOOK_IRQ, NOTEBOOK_MMIO, NOTEBOOK_PORT, Notebook
from pyvmm.net.options import NetOptions
from pyvmm.snapshot import Snapshot
from pyvmm.x86 import layout

MIB = 1 << 20


def add_notebook(m: Machine) -> None:
    notebook = m.board.add("notebook", Notebook(m.irq_line(NOTEBOOK_IRQ), m.cpus[0].vcpu.tsc_khz))
    m.pio.map(NOTEBOOK_PORT, NOTEBOOK_BYTES, notebook)
    m.mmio.map(NOTEBOOK_MMIO, NOTEBOOK_BYTES, notebook)


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
def test_the_demo_guest_at_random_moments(irqchip: str, tmp_path: Path) -> None:
    lives = 0
    for seed in range(MOMENTS):
        said = bytearray()

        def restore(path: Path, said: bytearray = said) -> Machine:
            return Machine.restore(path, prepare=add_notebook, twin=False, serial=said.extend)

        def make(said: bytearray = said) -> Machine:
            return demo_machine(said, irqchip)

        with Lives(make, seed, by=tmp_path / "demo.snap", restore=restore) as guest:
            assert guest.to_the_end(TIMEOUT_S) == 0
            lives += guest.count
        text = said.decode()
        assert "FAILED" not in text
        assert [line.endswith("  ok") for line in text.splitlines()].count(True) == 9, text
        if lives >= MOMENTS:
            return
    pytest.fail(f"{lives} lives only")


def test_a_machine_that_runs_goes_on(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Saved in the middle of its work, it comes to the same end as the one that goes on from the file."""
    path = tmp_path / "a.snap"
    whole, first = boot(COUNTER), boot(COUNTER)
    assert whole.run() == PASSED
    first.start()
    while not first.value("sum", 8):
        pass
    saved = first.machine.save(path)
    assert saved.written_bytes > 0
    assert saved.stood_ns > 0
    first.wait()
    for _ in range(2):
        with Machine.restore(path) as second:
            assert second.state is pyvmm.RunState.PAUSED
            assert second.run(TIMEOUT_S) == PASSED
            assert second.cpus[0].vcpu.regs == whole.regs() == first.regs()
            sum_of = second.memory.read(whole.program.symbols["sum"], 8)
            assert sum_of == whole.bytes_at("sum", 8)


# Counts in memory for ever, in one page for each of the lowest bits of the count.
PAGES = """
    .set    FIRST, 0x200000
        xor     %ebx, %ebx
    1:  inc     %rbx
        mov     %ebx, %ecx
        and     $0xff, %ecx
        shl     $12, %ecx
        mov     %rbx, FIRST(%rcx)
        jmp     1b
"""


def is_consistent(m: Machine) -> int:
    """The guest's count; AssertionError where its memory is not that of one moment."""
    regs = m.cpus[0].vcpu.regs
    last = regs["rbx"]
    found = [int.from_bytes(m.memory.read(0x200000 + (n << 12), 8), "little") for n in range(256)]
    for n, value in enumerate(found):
        newest = last - (last - n) % 256
        assert value in (newest, newest - 256, 0), (n, value, last)
    return last


def test_saved_again_and_again_while_it_runs(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Most of it is written while the guest goes on; each time it is the memory of one moment."""
    first = boot(PAGES, memory_mib=64)
    first.machine.memory.write(0x1000000, os.urandom(16 * MIB))
    first.start()
    while first.machine.memory.read(0x2FF000, 8) == bytes(8):
        pass
    count = 0
    for n in range(5):
        saved = first.machine.save(tmp_path / f"{n}")
        assert saved.written_bytes > 16 * MIB
        with Machine.restore(tmp_path / f"{n}") as m:
            assert is_consistent(m) > count
            count = is_consistent(m)
            assert m.memory.read(0x1000000, 16 * MIB) == first.machine.memory.read(0x1000000, 16 * MIB)
    copies = first.machine.fork(2)
    for m in copies:
        assert is_consistent(m) > count
        m.close()


def test_closed_while_it_is_saved(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Memory stays until nobody reads it any more; nothing is left of the file."""
    guest = boot(PAGES, memory_mib=64)
    guest.start()
    raised: list[BaseException] = []

    def save() -> None:
        try:
            while True:
                guest.machine.save(tmp_path / "a")
        except StateError as error:
            raised.append(error)

    saving = threading.Thread(target=save)
    saving.start()
    while not (tmp_path / "a").exists():
        pass
    guest.machine.close()
    saving.join(TIMEOUT_S)
    assert "closed" in str(raised[0])
    assert os.listdir(tmp_path) == ["a"]


def test_differences_from_a_base(boot: Callable[..., Guest], tmp_path: Path) -> None:
    first = boot(PAGES, memory_mib=64)
    first.start()
    while first.machine.memory.read(0x2FF000, 8) == bytes(8):
        pass
    first.machine.save(tmp_path / "base")
    with Snapshot(str(tmp_path / "base")) as base:
        first.machine.save(tmp_path / "second", base=base)
        with Machine.restore(base) as m:
            assert is_consistent(m) > 0
    first.machine.pause()
    with Machine.restore(tmp_path / "second") as m:
        count = is_consistent(m)
        m.resume()
        while int.from_bytes(m.memory.read(0x200000, 8), "little") < count + 1000:
            pass
        with Snapshot(str(tmp_path / "second")) as base:
            saved = m.save(tmp_path / "third", base=base)
            assert saved.written_bytes < 4 * MIB
            m.pause()
            for name in ("third", "flat"):
                if name == "flat":  # all of it, from a machine whose memory comes from three files
                    m.save(tmp_path / name)
                with Machine.restore(tmp_path / name) as last:
                    assert is_consistent(last) > count
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(pyvmm.ConfigError, match="base"):
        Machine.restore(tmp_path / "third")
    with Machine.restore(tmp_path / "flat") as m:
        is_consistent(m)
    (tmp_path / "flat").rename(tmp_path / "base")
    with pytest.raises(StateError, match=r"its base .* is another one than when it was saved"):
        Machine.restore(tmp_path / "third")


def test_a_base_is_not_written_over(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Nor what it is based on, by whatever name; a snapshot that has nothing to do with it is."""
    paths = [str(tmp_path / name) for name in ("first", "second", "third")]
    machine = boot(COUNTER).machine
    machine.save(paths[0])
    machine.save(paths[2])
    with Snapshot(paths[0]) as base:
        machine.save(paths[1], base=base)
    os.symlink(paths[0], tmp_path / "link")
    with Snapshot(paths[1]) as base:
        for path in (*paths[:2], tmp_path / "link"):
            with pytest.raises(pyvmm.ConfigError, match="is the base, or one of its bases: save to another path"):
                machine.save(path, base=base)
        machine.save(paths[2], base=base)
    with pytest.raises(StateError, match="is closed: open it again"):
        machine.save(paths[2], base=base)
    with Machine.restore(paths[2]) as m:
        assert m.run(TIMEOUT_S) == PASSED


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_has(boot: Callable[..., Guest], name: str) -> None:
    machine = boot(COUNTER).machine
    for call in (machine.save, machine.load, Machine.restore, Snapshot):
        with pytest.raises(pyvmm.ConfigError, match="no file has such a name: give"):
            call(name)
    with pytest.raises(pyvmm.ConfigError, match="no file has such a name: give"):
        boot(COUNTER, serial=f"file:{name}")


def test_what_one_writes_no_other_one_sees(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(PAGES)
    guest.machine.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with Machine.restore(tmp_path / "a") as one, Machine.restore(tmp_path / "a") as other:
        one.resume()
        while one.memory.read(0x2FF000, 8) == bytes(8):
            pass
        assert other.memory.read(0x200000, 1 << 20) == bytes(1 << 20)
        other.resume()
        while other.memory.read(0x2FF000, 8) == bytes(8):
            pass
        one.pause()
        other.pause()
        is_consistent(one)
        is_consistent(other)
    assert (tmp_path / "a").read_bytes() == before


def test_forks_go_on_from_where_it_stood(boot: Callable[..., Guest]) -> None:
    """Each counts on by itself, as does the one they come of, also when it is forked once more."""
    guest = boot(PAGES)
    m = guest.machine
    m.resume()
    for _ in range(2):
        while m.memory.read(0x2FF000, 8) == bytes(8):
            pass
        copies = m.fork(3)
        try:
            assert m.state is pyvmm.RunState.RUNNING
            at = {is_consistent(copy) for copy in copies}
            assert len(at) == 1
            m.pause()
            assert is_consistent(m) >= at.pop()
            copies[0].resume()
            before = is_consistent(copies[1])
            while int.from_bytes(copies[0].memory.read(0x200000, 8), "little") < before + 1000:
                pass
            copies[0].pause()
            assert is_consistent(copies[0]) > before
            assert is_consistent(copies[1]) == is_consistent(copies[2]) == before
            (grandchild,) = copies[0].fork()
            with grandchild:
                assert is_consistent(grandchild) == is_consistent(copies[0])
        finally:
            for copy in copies:
                copy.close()
        m.resume()
    m.pause()
    is_consistent(m)


def test_forks_leave_nothing(boot: Callable[..., Guest]) -> None:
    guest = boot(COUNTER)
    for copy in guest.machine.fork(2):
        copy.close()
    before = len(os.listdir("/proc/self/fd"))
    for copy in guest.machine.fork(20):
        copy.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(pyvmm.ConfigError, match="the third is wrong"):
        guest.machine.fork(5, each=refuse_the_third)
    assert len(os.listdir("/proc/self/fd")) == before
    assert guest.machine.run(TIMEOUT_S) == PASSED


def refuse_the_third(n: int) -> pyvmm.MachineOptions:
    if n == 2:
        raise pyvmm.ConfigError("the third is wrong")
    return {}


# EDX and ECX of CPUID's leaf 1, and out.
SHOW = """
        mov     $1, %eax
        cpuid
        mov     %edx, edx
        mov     %ecx, ecx
        finish
        .balign 4
    edx: .long  0
    ecx: .long  0
"""
SSE2, CX16 = 1 << 26, 1 << 13  # of EDX, of ECX (SDM vol. 2A, CPUID)


def test_the_processor_is_the_one_that_the_guest_has_seen(boot: Callable[..., Guest]) -> None:
    """On a host with more it shows no more, also after a reset; where something is missing it does not go on."""
    state = boot(SHOW).machine.save_state()
    features = state["machine"]["features"]
    assert {"sse2", "cx16", "hypervisor"} <= set(features)

    def loaded(names: object) -> Guest:
        guest = boot(SHOW)
        guest.machine.load_state({**state, "machine": {**state["machine"], "features": names}})
        return guest

    same = loaded(features)
    assert same.run() == PASSED
    assert same.value("ecx") & CX16 and same.value("edx") & SSE2
    less = loaded([name for name in features if name != "cx16"])
    for _ in range(2):
        assert less.run() == PASSED
        assert not less.value("ecx") & CX16 and less.value("edx") & SSE2
        less.machine.reset()
        assert "cx16" not in less.machine.save_state()["machine"]["features"]
    with pytest.raises(StateError, match="features of its processor that there are none of here: avx1024, telepathy:"):
        loaded([*features, "telepathy", "avx1024"])
    for names in (None, [1], "sse2"):
        with pytest.raises(StateError, match="no list of names"):
            loaded(names)


def test_twins_have_another_generation(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """What the guest knows its random numbers by: the saved machine's own in one that takes its place, else a new one,
    which it is told of.
    """
    machine = boot(COUNTER).machine

    def seen(m: Machine) -> tuple[int, int]:
        return m.mmio.read(layout.VM_GENERATION_ID, 8), m.pio.read(layout.PORT_GPE0, 2)

    machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a", twin=False) as same, Machine.restore(tmp_path / "a") as twin:
        copies = machine.fork(2)
        try:
            assert seen(same) == seen(machine)
            assert [seen(m)[1] for m in (machine, twin, *copies)] == [0, *[1 << layout.GPE_VM_GENERATION] * 3]
            assert len({seen(m)[0] for m in (machine, twin, *copies)}) == 4
        finally:
            for m in copies:
                m.close()


def test_forks_have_consoles_of_their_own(boot: Callable[..., Guest]) -> None:
    said: list[bytearray] = [bytearray() for _ in range(4)]
    guest = boot("mov $0x3f8, %dx\n mov $'x', %al\n outb %al, %dx\n finish", serial=said[3].extend)
    for n, copy in enumerate(guest.machine.fork(3, each=lambda n: {"serial": said[n].extend} if n else {})):
        with copy:
            assert copy.run(TIMEOUT_S) == PASSED
            assert said[n] == (b"x" if n else b"")
    assert said[3] == b""


def test_a_card_at_a_descriptor_wants_another_one(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Two machines would write into one stream; and in another process that number is something else."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        machine = boot(COUNTER, nets=[NetOptions("fd", fd=ours.fileno())]).machine
        machine.save(tmp_path / "a")
        wanted = f"net0 was at descriptor {ours.fileno()} of the process that saved it: give nets="
        with pytest.raises(pyvmm.ConfigError, match=wanted):
            Machine.restore(tmp_path / "a")
        with pytest.raises(pyvmm.ConfigError, match=wanted):
            machine.fork()
        with Machine.restore(tmp_path / "a", nets=[NetOptions("fd", fd=theirs.fileno())]) as other:
            assert other.run(TIMEOUT_S) == PASSED


def test_a_disk_has_one_writer(boot: Callable[..., Guest], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    guest = boot(COUNTER, drives=[tmp_path / "disk.img"])
    with pytest.raises(pyvmm.ConfigError, match=r"another process|lock"):
        guest.machine.fork()
    drive = pyvmm.DriveOptions(tmp_path / "disk.img", snapshot=True, locking=False)
    for copy in guest.machine.fork(2, drives=[drive]):
        with copy:
            assert copy.run(TIMEOUT_S) == PASSED


def test_memory_above_4_gib_and_huge_holes(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("mov $0x100000000, %rbx\n mov %rbx, (%rbx)\n finish", memory_mib=5120)
    with guest.machine as m:
        m.memory.write(0x1_0000_0000, b"high")
        saved = m.save(tmp_path / "a")
        assert saved.written_bytes < 4 * MIB
        assert (tmp_path / "a").stat().st_blocks * 512 < 4 * MIB
    with Machine.restore(tmp_path / "a") as m:
        assert m.memory.read(0x1_0000_0000, 4) == b"high"


def test_shared_memory(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(COUNTER, shared_memory=True)
    guest.machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a") as m:
        assert m.memory.ram[0].fd >= 0
        assert m.run(TIMEOUT_S) == PASSED
    with Machine.restore(tmp_path / "a", shared_memory=False) as m:
        assert m.memory.ram[0].fd < 0
        assert m.run(TIMEOUT_S) == PASSED


def test_a_machine_with_another_shape(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(COUNTER)
    guest.machine.save(tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))
    for options, said in (
        ({"memory_mib": 8}, "has 4 MiB of memory: leave memory_mib out"),
        ({"cpus": 2}, "with cpus 1, this one has 2"),
        ({"irqchip": "off"}, "irqchip"),
    ):
        with pytest.raises(StateError, match=said):
            Machine.restore(tmp_path / "a", **options)  # type: ignore[arg-type]
    with pytest.raises(pyvmm.ConfigError, match="no option 'memory_mb'"):
        Machine.restore(tmp_path / "a", memory_mb=8)  # type: ignore[call-arg]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reset_starts_the_guest_again(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Images are loaded again from their files, which the snapshot names; those given as bytes are in it."""
    guest = boot(COUNTER)
    guest.machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a") as m:
        assert m.run(TIMEOUT_S) == PASSED
        m.reset()
        assert m.run(TIMEOUT_S) == PASSED


def test_machines_of_one_snapshot_share_its_memory(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(COUNTER, memory_mib=64)
    guest.machine.memory.write(0x800000, os.urandom(32 * MIB))
    guest.machine.save(tmp_path / "a")
    with Snapshot(str(tmp_path / "a")) as snapshot:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        machines = [Machine.restore(snapshot) for _ in range(20)]
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        for m in machines:
            m.close()
    assert grown_kib < 20 * 1024, "a MiB a machine; the 32 MiB are read by none of them"


def test_from_the_shell(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """A snapshot of a program's machine goes on as a command, its console on standard output."""
    guest = boot("mov $0x3f8, %dx\n mov $'x', %al\n outb %al, %dx\n finish", serial=bytearray().extend)
    guest.machine.save(tmp_path / "a.snap")
    words = f"{tmp_path / 'a.snap'},check=on,prefetch=on,clock=now"
    command = [sys.executable, "-m", "pyvmm", "run", "--restore", words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (PASSED, b"x", b"")
    for words, said in (
        (["--restore", str(tmp_path)], "is a folder: give the file that save() wrote"),
        (["--restore", sys.executable], "is no snapshot of pyvmm"),
        (["--restore", str(tmp_path / "a.snap"), "--memory", "8"], "has 4 MiB of memory"),
        (["--restore", str(tmp_path / "a.snap"), "--config", "x.toml"], "leave one out"),
    ):
        refused = subprocess.run([*command[:4], *words], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
