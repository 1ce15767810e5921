"""The I/O APIC: its register window, edges and levels, where messages go, and the end of an interrupt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.apic_bus import INIT, LOWEST_PRIORITY, NMI, ApicBus
from pyvmm.devices.ioapic import Ioapic
from pyvmm.devices.lapic import Lapic

BASE = 0xFEC0_0000
LAPIC_PAGES = 0xFEE0_0000
MASKED, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11
EOI, LDR, SVR = 0xB0, 0xD0, 0xF0


class Bench:
    """An I/O APIC and two local APICs, enabled; ``nmis`` and ``inits`` count what the processors were told."""

    def __init__(self, enable: bool = True) -> None:
        self.bus = ApicBus()
        self.clock = VirtualClock()
        self.nmis = [0, 0]
        self.inits = [0, 0]
        self.ioapic = Ioapic(self.bus)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.mmio.map(BASE, 0x1000, self.ioapic)
        self.cpus = [self.cpu(n) for n in (0, 1)]
        if enable:
            for n in (0, 1):
                self.lapic(n, SVR, 0x1FF)

    def cpu(self, n: int) -> Lapic:
        def count(counts: list[int]) -> None:
            counts[n] += 1

        lapic = Lapic(
            self.bus,
            self.clock,
            n,
            bootstrap=n == 0,
            on_nmi=lambda: count(self.nmis),
            on_init=lambda: count(self.inits),
        )
        self.mmio.map(LAPIC_PAGES + 0x1000 * n, 0x1000, lapic)
        return lapic

    def lapic(self, n: int, register: int, value: int) -> None:
        self.mmio.write(LAPIC_PAGES + 0x1000 * n + register, 4, value)

    def write(self, index: int, value: int) -> None:
        self.mmio.write(BASE, 4, index)
        self.mmio.write(BASE + 0x10, 4, value)

    def read(self, index: int) -> int:
        self.mmio.write(BASE, 4, index)
        return self.mmio.read(BASE + 0x10, 4)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self.write(0x11 + 2 * pin, destination << 24)
        self.write(0x10 + 2 * pin, low)

    def low(self, pin: int) -> int:
        return self.read(0x10 + 2 * pin)

    def pulse(self, pin: int) -> None:
        self.ioapic.set(pin, 1)
        self.ioapic.set(pin, 0)

    def taken(self, n: int = 0) -> list[int]:
        """The vectors that processor takes now, each ended at once."""
        vectors = []
        while self.cpus[n].output:
            vectors.append(self.cpus[n].acknowledge())
            self.lapic(n, EOI, 0)
        return vectors


# Registers


def test_power_on() -> None:
    bench = Bench()
    assert bench.mmio.read(BASE, 4) == 0
    assert bench.read(0) == 0
    assert bench.read(1) == 0x0017_0011
    assert bench.read(2) == 0
    assert [bench.read(0x10 + n) for n in range(48)] == [MASKED, 0] * 24


def test_the_select_register_has_eight_bits_and_any_access_size() -> None:
    bench = Bench()
    bench.mmio.write(BASE, 4, 0x1FF)
    assert bench.mmio.read(BASE, 4) == 0xFF
    bench.mmio.write(BASE, 1, 0x10)
    assert [bench.mmio.read(BASE, size) for size in (1, 2, 4, 8)] == [0x10] * 4
    assert bench.mmio.read(BASE + 1, 1) == 0


def test_the_window_takes_whole_words_only() -> None:
    bench = Bench()
    bench.mmio.write(BASE, 4, 0x10)
    for size, value in ((1, 0x31), (2, 0x3131)):
        bench.mmio.write(BASE + 0x10, size, value)
    assert bench.mmio.read(BASE + 0x10, 4) == MASKED


def test_the_id_has_four_bits_and_shows_as_arbitration_id_too() -> None:
    bench = Bench()
    bench.write(0, 0xFFFF_FFFF)
    assert bench.read(0) == bench.read(2) == 0x0F00_0000


def test_version_and_arbitration_are_read_only() -> None:
    bench = Bench()
    for index in (1, 2):
        bench.write(index, 0xFFFF_FFFF)
    assert (bench.read(1), bench.read(2)) == (0x0017_0011, 0)


def test_what_an_entry_keeps() -> None:
    """Not the two status bits, not what is reserved."""
    bench = Bench()
    bench.write(0x10, 0xFFFF_FFFF)
    bench.write(0x11, 0xFFFF_FFFF)
    assert bench.read(0x10) == 0x1_AFFF
    assert bench.read(0x11) == 0xFF00_0000


def test_what_is_no_register_reads_zero_and_takes_nothing() -> None:
    bench = Bench()
    before = bench.ioapic.save()
    for index in (3, 0xF, 0x40, 0xFF):
        bench.write(index, 0xFFFF_FFFF)
        assert bench.read(index) == 0
    for offset in (0x04, 0x14, 0x20, 0x40, 0xFFC):
        bench.mmio.write(BASE + offset, 4, 0xFFFF_FFFF)
        assert bench.mmio.read(BASE + offset, 4) == 0
    assert {**bench.ioapic.save(), "select": 0} == before


# Edges


def test_an_edge_interrupts_once() -> None:
    bench = Bench()
    bench.route(4, 0x34)
    bench.ioapic.set(4, 1)
    bench.ioapic.set(4, 1)
    assert bench.taken() == [0x34]
    bench.ioapic.set(4, 0)
    assert bench.taken() == []
    bench.pulse(4)
    assert bench.taken() == [0x34]


def test_an_edge_on_a_masked_pin_is_lost() -> None:
    bench = Bench()
    bench.route(4, 0x34 | MASKED)
    bench.ioapic.set(4, 1)
    bench.route(4, 0x34)
    assert bench.taken() == []


# Levels


def test_a_level_interrupts_until_it_falls() -> None:
    bench = Bench()
    bench.route(9, 0x39 | LEVEL)
    bench.ioapic.set(9, 1)
    assert bench.low(9) == 0x39 | LEVEL | REMOTE_IRR
    for _ in range(3):
        assert bench.cpus[0].acknowledge() == 0x39
        assert not bench.cpus[0].output  # the first is not ended yet
        bench.lapic(0, EOI, 0)
        assert bench.cpus[0].output
    assert bench.cpus[0].acknowledge() == 0x39
    bench.ioapic.set(9, 0)
    bench.lapic(0, EOI, 0)
    assert bench.low(9) == 0x39 | LEVEL
    assert not bench.cpus[0].output


def test_a_level_that_fell_before_it_was_taken_still_interrupts_once() -> None:
    bench = Bench()
    bench.route(9, 0x39 | LEVEL)
    bench.pulse(9)
    assert bench.taken() == [0x39]


def test_unmasking_an_asserted_level_interrupts() -> None:
    bench = Bench()
    bench.ioapic.set(9, 1)
    bench.route(9, 0x39 | LEVEL | MASKED)
    assert bench.taken() == []
    bench.write(0x10 + 18, 0x39 | LEVEL)
    assert bench.cpus[0].acknowledge() == 0x39


def test_switching_to_edge_ends_an_interrupt_by_hand() -> None:
    """What kernels do for want of an EOI register: mask and edge, then back to level."""
    bench = Bench()
    bench.route(9, 0x39 | LEVEL)
    bench.ioapic.set(9, 1)
    bench.write(0x10 + 18, 0x39 | MASKED)
    assert bench.low(9) == 0x39 | MASKED
    bench.write(0x10 + 18, 0x39 | LEVEL)
    assert bench.low(9) == 0x39 | LEVEL | REMOTE_IRR


def test_an_end_of_interrupt_is_for_the_pins_with_that_vector() -> None:
    bench = Bench()
    for pin, vector in ((8, 0x38), (9, 0x39), (10, 0x39)):
        bench.route(pin, vector | LEVEL)
        bench.ioapic.set(pin, 1)
        bench.ioapic.set(pin, 0)
    assert bench.cpus[0].acknowledge() == 0x39
    bench.lapic(0, EOI, 0)
    assert [bool(bench.low(pin) & REMOTE_IRR) for pin in (8, 9, 10)] == [True, False, False]


def test_a_level_waits_for_a_local_apic_to_be_enabled() -> None:
    bench = Bench(enable=False)
    bench.route(9, 0x39 | LEVEL)
    bench.ioapic.set(9, 1)
    assert bench.low(9) == 0x39 | LEVEL
    bench.lapic(0, SVR, 0x1FF)
    assert bench.cpus[0].acknowledge() == 0x39


# Where it goes


def test_physical_destinations() -> None:
    bench = Bench()
    for destination, takers in ((0, [0]), (1, [1]), (2, []), (0xFF, [0, 1])):
        bench.route(4, 0x34, destination)
        bench.pulse(4)
        assert [n for n in (0, 1) if bench.taken(n)] == takers


def test_logical_destinations() -> None:
    bench = Bench()
    bench.lapic(0, LDR, 1 << 24)
    bench.lapic(1, LDR, 2 << 24)
    for destination, takers in ((1, [0]), (2, [1]), (3, [0, 1]), (4, []), (0xFF, [0, 1])):
        bench.route(4, 0x34 | LOGICAL, destination)
        bench.pulse(4)
        assert [n for n in (0, 1) if bench.taken(n)] == takers


def test_lowest_priority_goes_to_one() -> None:
    bench = Bench()
    bench.route(4, 0x34 | LOWEST_PRIORITY << 8, 0xFF)
    bench.lapic(0, 0x80, 0x40)  # TPR: the other one has less to do
    bench.pulse(4)
    assert (bench.taken(0), bench.taken(1)) == ([], [0x34])
    bench.lapic(0, 0x80, 0)
    bench.lapic(1, SVR, 0xFF)  # disabled: no candidate
    bench.pulse(4)
    assert (bench.taken(0), bench.taken(1)) == ([0x34], [])


def test_nmi_and_init_go_to_the_processor() -> None:
    bench = Bench()
    bench.route(4, NMI << 8, 1)
    bench.pulse(4)
    bench.route(4, INIT << 8 | LEVEL, 0)  # these are edges whatever the entry says
    bench.ioapic.set(4, 1)
    assert (bench.nmis, bench.inits) == ([0, 1], [1, 0])
    assert not bench.low(4) & REMOTE_IRR


def test_an_illegal_vector_interrupts_nobody() -> None:
    bench = Bench()
    bench.route(4, 0x0F)
    bench.pulse(4)
    assert bench.taken() == []
    bench.lapic(0, 0x280, 0)
    assert bench.mmio.read(LAPIC_PAGES + 0x280, 4) == 1 << 6  # received, illegal


# The contract


def test_reset_masks_everything_and_leaves_the_pins_alone() -> None:
    bench = Bench()
    bench.write(0, 3 << 24)
    bench.route(9, 0x39 | LEVEL)
    bench.ioapic.set(9, 1)
    bench.ioapic.reset()
    assert bench.read(0) == 0
    assert bench.low(9) == MASKED
    bench.route(9, 0x35 | LEVEL)
    assert bench.low(9) & REMOTE_IRR


def test_a_saved_state_goes_on() -> None:
    old = Bench()
    old.write(0, 3 << 24)
    old.route(9, 0x39 | LEVEL)
    old.ioapic.set(9, 1)
    new = Bench()
    new.ioapic.load(old.ioapic.save())
    new.ioapic.after_load()
    assert new.ioapic.save() == old.ioapic.save()
    assert not new.cpus[0].output  # sent before the state was saved
    new.ioapic.end_of_interrupt(0x39)
    assert new.cpus[0].acknowledge() == 0x39  # the pin is still asserted


offsets = st.sampled_from([0, 1, 2, 4, 0x10, 0x11, 0x12, 0x14, 0x20, 0xFF8])
accesses = st.tuples(st.booleans(), offsets, st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
lines = st.tuples(st.integers(0, 23), st.booleans())
words = st.tuples(st.integers(0, 0x41), st.integers(0, (1 << 32) - 1))


@given(st.lists(st.one_of(accesses, lines, words), max_size=60))
def test_whatever_the_guest_writes(steps: list[tuple[int, ...]]) -> None:
    bench = Bench()
    for step in steps:
        if len(step) == 4:
            is_write, offset, size, value = step
            if is_write:
                bench.mmio.write(BASE + offset, size, value & (1 << 8 * size) - 1)
            else:
                assert 0 <= bench.mmio.read(BASE + offset, size) < 1 << 8 * size
        elif isinstance(step[1], bool):
            bench.ioapic.set(step[0], int(step[1]))
        else:
            bench.write(*step)
        assert all(0 <= entry < 1 << 64 and not entry & ~(0xFF << 56 | 0x1_EFFF) for entry in bench.ioapic.table)
        for lapic in bench.cpus:
            assert lapic.output == 0 or lapic.acknowledge() in (-1, *range(16, 256))  # -1: the PIC's, and there is none
