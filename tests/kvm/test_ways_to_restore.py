"""Machine.restore's check, eager, prefetch and clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest

import pyvmm
from pyvmm import ConfigError, Machine, Snapshot, StateError

MIB = 1 << 20
NS_PER_S = 1_000_000_000
FAR = 0x200_0000
# Adds up what is at FAR, so that a guest that goes on from a snapshot reads it.
SUM = """
        xor     %eax, %eax
        mov     $0x2000000, %esi
        mov     $0x2100000, %edi
    1:  add     (%rsi), %rax
        add     $4096, %rsi
        cmp     %rdi, %rsi
        jb      1b
        mov     %rax, sum
        finish
        .balign 8
sum:    .quad   0
"""
HOUR_NS = 3600 * NS_PER_S


@pytest.fixture
def saved(boot: Callable[..., Guest], tmp_path: Path) -> Guest:
    """At ``a`` in tmp_path; its memory at FAR is not zero."""
    guest = boot(SUM, memory_mib=64)
    for at in range(FAR, FAR + MIB, 4096):
        guest.machine.memory.write(at, (at >> 12).to_bytes(8, "little"))
    guest.machine.save(tmp_path / "a")
    return guest


def sums(guest: Guest, m: Machine) -> bytes:
    assert m.run(TIMEOUT_S) == PASSED
    return m.memory.read(guest.program.symbols["sum"], 8)


def test_all_ways_come_to_the_same(saved: Guest, tmp_path: Path) -> None:
    expected = sums(saved, saved.machine)
    for way in ({"check": True}, {"eager": True}, {"prefetch": True}, {"check": True, "eager": True, "prefetch": True}):
        with Machine.restore(tmp_path / "a", **way) as m:
            assert sums(saved, m) == expected
    with Machine.restore(tmp_path / "a", eager=True, shared_memory=True) as m:
        assert sums(saved, m) == expected


def test_an_eager_one_needs_no_file(saved: Guest, tmp_path: Path) -> None:
    expected = sums(saved, saved.machine)
    with Machine.restore(tmp_path / "a", eager=True) as m:
        with open(tmp_path / "a", "r+b") as file:
            file.truncate(0)
        assert sums(saved, m) == expected
        m.reset()
        m.save(tmp_path / "b")
    with Machine.restore(tmp_path / "b", check=True) as m:
        assert m.memory.read(FAR, 8) == (FAR >> 12).to_bytes(8, "little")


def test_any_change_of_memory_is_found_where_asked(saved: Guest, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with Snapshot(path) as snapshot:
        snapshot.check()
        _fd, at = snapshot.sources()[0]
        end = at + snapshot.memory_bytes
    for place in (at, at + FAR + 4096, end - 1):
        with open(path, "r+b") as file:
            before = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([before[0] ^ 1]), place)
            descriptors = len(os.listdir("/proc/self/fd"))
            with pytest.raises(StateError, match="is damaged: the memory at 0x0 has been changed"):
                Machine.restore(path, check=True)
            with pytest.raises(StateError, match="the memory at 0x0 has been changed"):
                pyvmm.Template(path, check=True)
            assert len(os.listdir("/proc/self/fd")) == descriptors
            Machine.restore(path).close()
            os.pwrite(file.fileno(), before, place)
    with Snapshot(path) as snapshot:
        snapshot.check()


def test_differences_are_checked_with_their_base(saved: Guest, tmp_path: Path) -> None:
    with Machine.restore(tmp_path / "a") as m, Snapshot(tmp_path / "a") as base:
        m.memory.write(FAR, b"another page")
        m.save(tmp_path / "b", base=base)
        with Snapshot(tmp_path / "b") as other:
            other.check()
            place = other.pieces[0].runs[-1][2]
    with open(tmp_path / "b", "r+b") as file:
        os.pwrite(file.fileno(), b"!", place + 100)
    with pytest.raises(StateError, match="memory at 0x0 has been changed"):
        Machine.restore(tmp_path / "b", check=True)
    with open(tmp_path / "b", "r+b") as file:
        os.pwrite(file.fileno(), b"\0", place + 100)
    with Machine.restore(tmp_path / "b", check=True, eager=True) as m:
        assert m.memory.read(FAR, 12) == b"another page"


def mapped_pages(m: Machine, at: int, size: int) -> int:
    """How many pages of the range the process has mapped (/proc/self/pagemap)."""
    first = (m.memory.ram[0].host_address + at) // 4096
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = file.read(size // 4096 * 8)
    return sum(entry >> 7 for entry in entries[7::8])


def test_what_was_in_use_is_read_ahead(saved: Guest, tmp_path: Path) -> None:
    """A machine that goes on from a snapshot, and is saved, has noted what it touched; not all that there is."""
    saved.machine.memory.write(0x300_0000, b"x" * MIB)
    saved.machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a") as m:
        assert m.run(TIMEOUT_S) == PASSED
        m.reset()
        m.save(tmp_path / "b")
    with Snapshot(tmp_path / "b") as snapshot:
        used = snapshot.pieces[0].used
        assert any(start <= FAR and start + size >= FAR + MIB for start, size in used)
        assert not any(start < 0x300_0000 + MIB and start + size > 0x300_0000 for start, size in used)
    with Machine.restore(tmp_path / "b", prefetch=True) as m:
        m.board.chassis.join_background()
        assert mapped_pages(m, FAR, MIB) == MIB // 4096
        assert mapped_pages(m, 0x300_0000, MIB) == 0


# Tells the time-stamp counter, again and again.
TELL = """
    1:  rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        mov     %rax, last
        incl    count
        jmp     1b
        .balign 8
last:   .quad   0
count:  .long   0
"""


@pytest.mark.parametrize("irqchip", ["kernel", "off"])
def test_clocks_go_on_from_now(boot: Callable[..., Guest], tmp_path: Path, irqchip: str) -> None:
    guest = boot(TELL, irqchip=irqchip)
    guest.start()
    while guest.value("count") < 10:
        pass
    guest.machine.pause()
    guest.machine.save(tmp_path / "a")
    with Snapshot(tmp_path / "a") as origin:
        # An hour ago.
        origin.saved_ns = time.time_ns() - HOUR_NS
        then = origin.parts["clock"]["state"]["now_ns"]
        kvm_clock = origin.parts["KVM's clock"]["state"]
        with Machine.restore(origin) as m:
            assert m.clock.now_ns() == then
        with Machine.restore(origin, clock="now") as m:
            passed = m.clock.now_ns() - then
            assert HOUR_NS <= passed < 2 * HOUR_NS
            now = m.save_state(memory=False)["parts"]["KVM's clock"]["state"]
            assert now["clock_ns"] >= kvm_clock["clock_ns"] + HOUR_NS
            m.resume()
            before = m.memory.read(guest.program.symbols["count"], 4)
            while m.memory.read(guest.program.symbols["count"], 4) == before:
                pass
            m.pause()
            if m.cpus[0].vcpu.tsc_offset:
                tsc = int.from_bytes(m.memory.read(guest.program.symbols["last"], 8), "little")
                assert tsc >= kvm_clock["tsc"] + kvm_clock["tsc_khz"] * 3600 * 1000
        # A host whose clock has gone back takes nothing away.
        origin.saved_ns = time.time_ns() + HOUR_NS
        with Machine.restore(origin, clock="now") as m:
            assert m.clock.now_ns() == then
        with pytest.raises(ConfigError, match="clock='then': use saved or now"):
            Machine.restore(origin, clock="then")
