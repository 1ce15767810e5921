"""The test device, register by register as kvm-unit-tests uses them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.devices.testdev import IRQ_LINES, MEMORY_BYTES, TestDev
from pyvmm.errors import BusError
from pyvmm.irq import IrqLine


class Bench:
    def __init__(self) -> None:
        self.flushed: list[int] = []
        self.gsis: list[tuple[int, int]] = []
        self.dev = TestDev(self.flushed.append, [self.line(n) for n in range(IRQ_LINES)])
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(0xE0, 4, self.dev)
        self.pio.map(0xE4, 4, self.dev.flush)
        self.pio.map(0xE8, 4, self.dev.latch_bytes)
        self.pio.map(0x2000, IRQ_LINES, self.dev.irqs)

    def line(self, gsi: int) -> IrqLine:
        return IrqLine(lambda level: self.gsis.append((gsi, level)), gsi)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(("size", "value"), [(1, 0x12), (2, 0x1234), (4, 0x12345678)])
def test_the_latch_gives_back_what_was_written(bench: Bench, size: int, value: int) -> None:
    bench.pio.write(0xE0, size, value)
    assert bench.pio.read(0xE0, size) == value


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (0, 4)]),
            st.sampled_from([0xE0, 0xE8]),
            st.integers(0, 0xFFFFFFFF),
        )
    )
)
def test_both_windows_show_the_same_four_bytes(writes: list[tuple[tuple[int, int], int, int]]) -> None:
    bench = Bench()
    latch = bytearray(4)
    for (offset, size), port, value in writes:
        data = value.to_bytes(4, "little")[:size]
        bench.pio.write(port + offset, size, int.from_bytes(data, "little"))
        latch[offset : offset + size] = data
        for window in (0xE0, 0xE8):
            assert bench.pio.read(window, 4) == int.from_bytes(latch, "little")
            assert bench.pio.read(window + offset, size) == int.from_bytes(data, "little")


def test_flush_takes_the_page_of_a_dword(bench: Bench) -> None:
    bench.pio.write(0xE4, 4, 0x12345678)
    assert bench.flushed == [0x12345000]
    bench.pio.write(0xE4, 2, 0x1000)
    bench.pio.write(0xE4, 1, 0x10)
    assert bench.flushed == [0x12345000], "four bytes or nothing"
    assert bench.pio.read(0xE4, 4) == 0


def test_flush_of_an_address_without_ram_is_no_error() -> None:
    def flush_page(gpa: int) -> None:
        raise BusError(hex(gpa))

    TestDev(flush_page, ()).flush.write(0, 4, 0xFFFF_F000)


def test_irq_lines_follow_the_bytes(bench: Bench) -> None:
    bench.pio.write(0x200E, 1, 1)
    bench.pio.write(0x2017, 1, 0x80)
    bench.pio.write(0x200E, 1, 0)
    bench.pio.write(0x2018, 1, 1)  # past the last
    assert bench.gsis == [(14, 1), (23, 1), (14, 0)]
    assert bench.pio.read(0x2000, 1) == 0


def test_reset_lowers_lines_and_clears_latch_and_memory_in_place(bench: Bench) -> None:
    memory = bench.dev.memory
    assert len(memory) == MEMORY_BYTES == 65536
    memory[5] = 7
    bench.pio.write(0xE0, 4, 0xFFFFFFFF)
    bench.pio.write(0x2003, 1, 1)
    bench.gsis.clear()
    bench.dev.reset()
    assert bench.gsis == [(3, 0)]
    assert bench.pio.read(0xE0, 4) == 0
    assert bench.dev.memory is memory
    assert memory == bytes(MEMORY_BYTES)
    bench.dev.reset()
    assert bench.gsis == [(3, 0)]


def test_save_and_load(bench: Bench) -> None:
    bench.pio.write(0xE0, 4, 0x89ABCDEF)
    bench.pio.write(0x2003, 1, 1)
    bench.dev.memory[100:103] = b"abc"
    other = Bench()
    other.dev.load(bench.dev.save())
    assert other.pio.read(0xE8, 4) == 0x89ABCDEF
    assert other.dev.memory == bench.dev.memory
    assert other.gsis == [], "load touches no line"
    other.dev.after_load()
    assert other.gsis == [(3, 1)]
    other.dev.reset()
    assert other.gsis == [(3, 1), (3, 0)]
