"""Breakpoints: bytes in memory, debug registers, watched data, and what a stop means because of them."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.breakpoints import (
    ACCESS,
    EXECUTION,
    MOST_SOFTWARE,
    STEPS_A_ROUND,
    STEPS_WITH_INTERRUPTS,
    WRITE,
    Breakpoints,
    NoMore,
)
from pyvmm.cpu_exec import StopReason
from pyvmm.debug_probe import INT1, INT3, Facilities
from pyvmm.errors import BusError, ConfigError, StateError
from pyvmm.guest_memory import GuestMemory
from pyvmm.kvm.vcpu import GUESTDBG_BLOCKIRQ, GUESTDBG_SINGLESTEP, GUESTDBG_USE_SW_BP
from pyvmm.memory_map import MemoryMap

PAGE = 4096
DEBUG, FAILED, KICKED = StopReason.DEBUG, StopReason.INTERNAL_ERROR, StopReason.KICKED


def facilities(byte: bytes | None = INT3, *, registers: bool = True) -> Facilities:
    return Facilities(byte, breakpoints=registers, watchpoints=registers, steps=True, holds_interrupts=True)


class FakeVcpu:
    """No paging, as far as addresses go, unless ``tables`` is given."""

    def __init__(self) -> None:
        self.sregs: dict[str, Any] = {"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0}
        self.events: dict[str, int] = {}
        self.debugregs: dict[str, int] = {}


class FakeExec:
    def __init__(self) -> None:
        self.detail: dict[str, Any] = {}

    def run(self) -> StopReason:
        raise AssertionError


class FakeCpu:
    index = 0
    stepping = 0

    def __init__(self) -> None:
        self.programmed = 0
        self.vcpu: Any = FakeVcpu()
        self.exec = FakeExec()
        self.debug_points: list[tuple[int, int, int]] = []
        self.rip = 0

    def linear_rip(self) -> int:
        return self.rip

    def program(self) -> None:
        self.programmed += 1


class Bench:
    def __init__(self, what: Facilities | None = None) -> None:
        self.memory = GuestMemory(16 * PAGE)
        self.memory.write(0, bytes(range(256)) * 256)
        self.map = MemoryMap(self.memory, AddressSpace("mmio", 1 << 52))
        self.set = Breakpoints(self.map, what or facilities())
        self.cpu = FakeCpu()

    def byte(self, gpa: int) -> bytes:
        return self.memory.read(gpa, 1)

    def judge(self, reason: StopReason, rip: int = 0, **detail: Any) -> StopReason | None:
        self.cpu.rip = rip
        self.cpu.exec.detail = {"exception": 1, "dr6": 0, "pc": rip, **detail}
        self.cpu.debug_points = self.set.points
        return self.set.judge(self.cpu, reason)


def test_a_byte_comes_and_goes() -> None:
    bench = Bench()
    assert not bench.set
    bench.set.add_software(0x10, bench.cpu)
    bench.set.add_software(0x10, bench.cpu)  # again is fine
    assert bench.set
    assert (bench.byte(0x10), bench.set.flags) == (INT3, GUESTDBG_USE_SW_BP)
    assert bench.set.remove_software(0x10)
    assert not bench.set.remove_software(0x10)
    assert (bench.byte(0x10), bench.set.flags) == (b"\x10", 0)


def test_two_addresses_of_one_byte() -> None:
    """It stays until both are gone. Without paging addresses have 32 bits."""
    bench = Bench()
    bench.set.add_software(0x20, bench.cpu)
    bench.set.add_software(0x1_0000_0020, bench.cpu)
    assert bench.set.remove_software(0x20)
    assert bench.byte(0x20) == INT3
    assert bench.judge(DEBUG, 0x20, exception=3) is DEBUG  # by its other address, too
    bench.set.clear()
    assert bench.byte(0x20) == b"\x20"


def test_where_there_can_be_none() -> None:
    bench = Bench()
    with pytest.raises(BusError):
        bench.set.add_software(0xF000_0000, bench.cpu)
    bench.cpu.vcpu.sregs = {"cr0": 1 << 31, "cr3": 0xF000_0000, "cr4": 0x20, "efer": 0x400}
    with pytest.raises(BusError):  # its page tables are nowhere
        bench.set.add_software(0x10, bench.cpu)
    with pytest.raises(StateError):
        Bench(facilities(None)).set.add_software(0x10, FakeCpu())
    bench.cpu.vcpu.sregs["cr0"] = 0
    for n in range(MOST_SOFTWARE):
        bench.set.add_software(n, bench.cpu)
    with pytest.raises(ConfigError, match="take some away"):
        bench.set.add_software(MOST_SOFTWARE, bench.cpu)


def test_what_is_written_there_meanwhile_stays() -> None:
    bench = Bench()
    bench.set.add_software(0x30, bench.cpu)
    bench.memory.write(0x30, b"\x99")  # the guest, or a disk's DMA
    bench.set.remove_software(0x30)
    assert bench.byte(0x30) == b"\x99"


def test_lifted() -> None:
    bench = Bench()
    bench.set.add_software(0x30, bench.cpu)
    with bench.set.lifted:
        assert bench.byte(0x30) == b"\x30"
    assert bench.byte(0x30) == INT3
    with bench.set.lifted:
        bench.memory.write(0x30, b"\x99")  # another state was loaded
    assert bench.byte(0x30) == b"\x99"


def test_after_memory_was_written_anew() -> None:
    bench = Bench()
    for gpa in (0x30, 0x31, 0x32):
        bench.set.add_software(gpa, bench.cpu)
    bench.memory.write(0x30, b"\x30\x99")  # the same instruction; another one; nothing
    bench.set.put_again()
    assert bench.memory.read(0x30, 3) == INT3 + b"\x99" + INT3
    bench.memory.write(0x31, b"\x31")
    bench.set.put_again()
    assert bench.byte(0x31) == INT3


def test_readers_and_writers_do_not_see_it() -> None:
    bench = Bench()
    bench.set.add_software(0x31, bench.cpu)
    data = bytearray(bench.memory.read(0x30, 4))
    bench.set.hide(0x30, data)
    assert data == b"\x30\x31\x32\x33"
    new = bytearray(b"\xa0\xa1\xa2")
    bench.set.keep(0x30, new)
    assert new == b"\xa0" + INT3 + b"\xa2"
    bench.memory.write(0x30, new)
    bench.set.clear()
    assert bench.memory.read(0x30, 3) == b"\xa0\xa1\xa2"


def test_debug_registers() -> None:
    bench = Bench()
    bench.set.add_point(EXECUTION, 0x1000, 1, 0)
    bench.set.add_point(EXECUTION, 0x1000, 1, 0)
    bench.set.add_point(WRITE, 0x2003, 6, 0)  # 1, 4 and 1 bytes
    assert bench.set.points == [(0, 0x1000, 1), (1, 0x2003, 1), (1, 0x2004, 4), (1, 0x2008, 1)]
    with pytest.raises(NoMore, match="take some away"):
        bench.set.add_point(ACCESS, 0x3000, 1, 0)
    assert bench.set.remove_point(WRITE, 0x2003, 6)
    assert not bench.set.remove_point(WRITE, 0x2003, 6)
    with pytest.raises(NoMore):
        bench.set.add_point(ACCESS, 0x3000, 8, 3)  # three are somebody else's
    bench.set.add_point(ACCESS, 0x3000, 8, 2)
    assert bench.set.points == [(0, 0x1000, 1), (3, 0x3000, 8)]
    with pytest.raises(StateError):
        Bench(facilities(registers=False)).set.add_point(EXECUTION, 0, 1, 0)


def test_what_a_stop_means() -> None:
    bench = Bench()
    bench.set.add_software(0x40, bench.cpu)
    bench.set.add_point(EXECUTION, 0x1000, 1, 0)
    bench.set.add_point(WRITE, 0x2000, 4, 0)
    bench.set.add_point(ACCESS, 0x3000, 8, 0)
    detail = bench.cpu.exec.detail
    assert bench.judge(KICKED) is KICKED
    assert bench.judge(DEBUG, 0x40, exception=3) is DEBUG
    detail = bench.cpu.exec.detail
    assert (detail["stop"], detail["address"]) == ("software", 0x40)
    for dr6, kind, address in ((1, "hardware", 0x1000), (2, "write", 0x2000), (4, "access", 0x3000)):
        assert bench.judge(DEBUG, 0x50, dr6=dr6) is DEBUG
        detail = bench.cpu.exec.detail
        assert (detail["stop"], detail["address"]) == (kind, address)
    bench.cpu.stepping = 1
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is DEBUG
    assert bench.cpu.exec.detail["stop"] == "step"


def test_the_guests_own_exceptions_are_the_guests() -> None:
    bench = Bench()
    bench.set.add_point(EXECUTION, 0x1000, 1, 0)
    bench.memory.write(0x60, INT3)
    assert bench.judge(DEBUG, 0x60, exception=3) is None
    assert bench.cpu.vcpu.events == {"exception_injected": 1, "exception_nr": 3, "exception_has_error_code": 0}
    bench.cpu.vcpu.events = {}
    # One of ours that was taken away a moment ago is just executed.
    assert bench.judge(DEBUG, 0x61, exception=3) is None
    assert bench.cpu.vcpu.events == {}
    # A step that its own debugger makes.
    assert bench.judge(DEBUG, 0x62, dr6=0x4000) is None
    assert bench.cpu.vcpu.events["exception_nr"] == 1
    assert bench.cpu.vcpu.debugregs == {"dr6": 0x4000}


def test_an_emulator_that_gives_up() -> None:
    bench = Bench(facilities(INT1))
    bench.set.add_software(0x40, bench.cpu)
    assert bench.byte(0x40) == INT1
    assert bench.judge(FAILED, 0x40, suberror=1) is DEBUG
    assert bench.cpu.exec.detail == {
        "exit": "DEBUG", "exception": 3, "pc": 0x40, "dr6": 0, "dr7": 0, "stop": "software", "address": 0x40,
    }  # fmt: skip
    # KVM has put an exception in line.
    assert bench.cpu.vcpu.events == {"exception_injected": 0, "exception_pending": 0}
    assert bench.judge(FAILED, 0x41, suberror=1) is FAILED
    assert bench.judge(FAILED, 0x40, suberror=3) is FAILED


def test_data_is_watched_by_looking() -> None:
    bench = Bench(facilities(registers=False))
    bench.set.watch(2 * PAGE - 2, 4)
    assert bench.set.flags == GUESTDBG_SINGLESTEP | GUESTDBG_BLOCKIRQ
    bench.set.begin(bench.cpu)
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None
    bench.memory.write(2 * PAGE + 1, b"\x77")
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is DEBUG
    assert (bench.cpu.exec.detail["stop"], bench.cpu.exec.detail["address"]) == ("write", 2 * PAGE - 2)
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None  # told once
    bench.memory.write(2 * PAGE + 2, b"\x77")  # beside it
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None
    assert bench.set.unwatch(2 * PAGE - 2, 4)
    assert not bench.set.unwatch(2 * PAGE - 2, 4)
    assert bench.set.flags == 0


def test_what_is_nowhere_is_watched_too() -> None:
    bench = Bench(facilities(registers=False))
    bench.set.watch(0xF000_0000, 8)
    bench.set.begin(bench.cpu)
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None
    for size in (0, 4097):
        with pytest.raises(ConfigError, match="bytes to watch"):
            bench.set.watch(0, size)
    for n in range(3):
        bench.set.watch(n, 1)
    with pytest.raises(NoMore):
        bench.set.watch(9, 1)


def test_interrupts_come_in_now_and_then() -> None:
    """Or a guest that waits for one would wait for ever; but not at every step, or it would do nothing else."""
    bench = Bench(facilities(registers=False))
    bench.set.trap(0x7000)
    open_steps = 0
    for _ in range(4 * STEPS_A_ROUND):
        open_steps += not bench.set.flags_of(0) & GUESTDBG_BLOCKIRQ
        assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None
    assert open_steps == 4 * STEPS_WITH_INTERRUPTS
    assert bench.cpu.programmed == 8


def test_code_is_trapped_by_looking() -> None:
    bench = Bench(facilities(None, registers=False))
    bench.set.trap(0x60)
    assert bench.set.begin(bench.cpu) is None
    assert bench.judge(DEBUG, 0x50, dr6=0x4000) is None
    assert bench.judge(DEBUG, 0x60, dr6=0x4000) is DEBUG
    assert (bench.cpu.exec.detail["stop"], bench.cpu.exec.detail["address"]) == ("software", 0x60)
    # One that stands there and has not been stepped away stops again; as at a byte in memory.
    assert bench.set.begin(bench.cpu) is DEBUG
    bench.cpu.stepping = 1
    assert bench.set.begin(bench.cpu) is None
    assert bench.judge(DEBUG, 0x60, dr6=0x4000) is DEBUG
    assert bench.cpu.exec.detail["stop"] == "step"
    assert bench.set.untrap(0x60)
    assert not bench.set.untrap(0x60)
    assert not bench.set
    for n in range(MOST_SOFTWARE):
        bench.set.trap(n)
    with pytest.raises(NoMore):
        bench.set.trap(MOST_SOFTWARE)
