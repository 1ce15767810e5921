"""The local APIC: priorities, acknowledge and end, LINT pins and the PIC, IPIs, errors, the timer, CR8 and its base."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.apic_bus import EXTINT, FIXED, INIT, LOWEST_PRIORITY, NMI, SMI, STARTUP, ApicBus
from pyvmm.devices.lapic import MIN_INTERVAL_NS, Lapic

PAGE = 0xFEE0_0000
ID, VERSION, TPR, APR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
LVTS = (0x320, 0x330, 0x340, 0x350, 0x360, 0x370)
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC, LEVEL, REMOTE_IRR = 1 << 16, 1 << 17, 1 << 15, 1 << 14
BY_1, BY_2, BY_128 = 0b1011, 0, 0b1010
SELF, ALL, OTHERS = 1 << 18, 2 << 18, 3 << 18
EXT = EXTINT << 8


class Cpu:
    """A processor's own registers."""

    cr8 = 0
    apic_base = PAGE | 1 << 11


class Bench:
    """Processor ``n`` of a bus: its local APIC, and everything it was told."""

    def __init__(self, bus: ApicBus | None = None, n: int = 0, *, enable: bool = True, bootstrap: bool = True) -> None:
        self.bus = bus or ApicBus()
        self.clock = VirtualClock()
        self.outputs: list[int] = []
        self.told: list[object] = []
        self.pic_vectors: list[int] = []
        self.apic = Lapic(
            self.bus,
            self.clock,
            n,
            bootstrap=bootstrap,
            on_output=self.outputs.append,
            acknowledge_pic=self.acknowledge_pic,
            on_nmi=lambda: self.told.append("nmi"),
            on_init=lambda: self.told.append("init"),
            on_startup=self.told.append,
        )
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.mmio.map(PAGE, 0x1000, self.apic)
        if enable:
            self.write(SVR, 0x1FF)

    def acknowledge_pic(self) -> int:
        assert self.pic_vectors, "the PIC has nothing"
        vector = self.pic_vectors.pop()
        self.apic.set_lint(0, int(bool(self.pic_vectors)))
        return vector

    def read(self, register: int) -> int:
        return self.mmio.read(PAGE + register, 4)

    def write(self, register: int, value: int) -> None:
        self.mmio.write(PAGE + register, 4, value)

    def accept(self, *vectors: int, level: bool = False) -> None:
        with self.bus.lock:
            for vector in vectors:
                self.apic.accept(FIXED, vector, level)

    def vectors(self, base: int) -> list[int]:
        """The set bits of ISR, TMR or IRR."""
        bitmap = sum(self.read(base + 0x10 * n) << 32 * n for n in range(8))
        return [vector for vector in range(256) if bitmap >> vector & 1]

    def take(self) -> list[int]:
        """Everything the processor can take without ending anything."""
        taken = []
        while self.apic.output:
            taken.append(self.apic.acknowledge())
        return taken


@pytest.fixture
def bench() -> Bench:
    return Bench()


# Registers


def test_power_on() -> None:
    bench = Bench(n=3, enable=False)
    assert bench.read(ID) == 3 << 24
    assert bench.read(VERSION) == 0x5_0014
    assert (bench.read(SVR), bench.read(DFR), bench.read(LDR)) == (0xFF, 0xFFFF_FFFF, 0)
    assert [bench.read(lvt) for lvt in LVTS] == [MASKED, MASKED, MASKED, EXT, MASKED, MASKED]
    zeros = (TPR, APR, PPR, EOI, 0xC0, ESR, ICR, ICR_HIGH, INITIAL, CURRENT, DIVIDE)
    assert [bench.read(register) for register in zeros] == [0] * len(zeros)
    assert bench.vectors(ISR) == bench.vectors(TMR) == bench.vectors(IRR) == []
    assert bench.outputs == []


def test_another_processor_starts_with_lint0_masked() -> None:
    assert Bench(bootstrap=False, enable=False).read(LVT_LINT0) == MASKED


def test_what_registers_keep(bench: Bench) -> None:
    expected = {
        TPR: 0xFF, LDR: 0xFF00_0000, DFR: 0xFFFF_FFFF, SVR: 0x3FF, ICR_HIGH: 0xFF00_0000, DIVIDE: 0b1011,
        0x320: 0x3_00FF, 0x330: 0x1_07FF, 0x340: 0x1_07FF, 0x350: 0x1_A7FF, 0x360: 0x1_A7FF, 0x370: 0x1_00FF,
        INITIAL: 0xFFFF_FFFF, ID: 0xFF00_0000,
    }  # fmt: skip
    for register, value in expected.items():
        bench.write(register, 0xFFFF_FFFF)
        assert bench.read(register) == value, hex(register)
    bench.write(DFR, 0)
    assert bench.read(DFR) == 0x0FFF_FFFF


def test_read_only_registers(bench: Bench) -> None:
    for register in (VERSION, APR, PPR, 0xC0, CURRENT, ISR, TMR + 0x70, IRR):
        before = bench.read(register)
        bench.write(register, 0xFFFF_FFFF)
        assert bench.read(register) == before
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0


def test_narrow_and_wide_accesses(bench: Bench) -> None:
    assert bench.mmio.read(PAGE + VERSION, 1) == 0x14
    assert bench.mmio.read(PAGE + VERSION + 2, 1) == 5
    assert bench.mmio.read(PAGE + VERSION, 8) == 0x5_0014
    bench.mmio.write(PAGE + SVR, 1, 0x20)
    assert bench.read(SVR) == 0x120
    bench.write(SVR + 4, 0xFFFF_FFFF)  # between the registers there is nothing
    assert (bench.read(SVR), bench.read(SVR + 4)) == (0x120, 0)


# Priorities


def test_the_highest_vector_first(bench: Bench) -> None:
    bench.accept(0x31, 0x52, 0x41)
    assert bench.vectors(IRR) == [0x31, 0x41, 0x52]
    assert bench.take() == [0x52]  # the others wait for its end
    assert bench.read(PPR) == 0x50
    bench.write(EOI, 0)
    assert bench.take() == [0x41]
    bench.write(EOI, 0)
    assert bench.take() == [0x31]
    bench.write(EOI, 0)
    assert bench.vectors(IRR) == bench.vectors(ISR) == []
    assert bench.read(PPR) == 0


def test_a_higher_class_nests_and_the_same_does_not(bench: Bench) -> None:
    bench.accept(0x41)
    assert bench.take() == [0x41]
    bench.accept(0x4F)
    assert bench.take() == []
    bench.accept(0x50)
    assert bench.take() == [0x50]
    assert bench.vectors(ISR) == [0x41, 0x50]
    bench.write(EOI, 0)
    assert bench.vectors(ISR) == [0x41]


def test_the_task_priority_holds_back(bench: Bench) -> None:
    bench.write(TPR, 0x45)
    assert bench.read(PPR) == 0x45
    bench.accept(0x4F)
    assert bench.take() == []
    bench.accept(0x51)
    assert bench.take() == [0x51]
    assert bench.read(PPR) == 0x50
    bench.write(EOI, 0)
    bench.write(TPR, 0x3F)
    assert bench.take() == [0x4F]
    assert bench.outputs == [1, 0, 1, 0]


def test_raising_the_task_priority_takes_the_request_back(bench: Bench) -> None:
    bench.accept(0x41)
    bench.write(TPR, 0x40)
    assert bench.outputs == [1, 0]
    assert bench.apic.acknowledge() == -1
    assert bench.vectors(IRR) == [0x41]


def test_an_end_with_nothing_in_service(bench: Bench) -> None:
    bench.write(EOI, 0)
    assert bench.outputs == []


def test_the_trigger_mode_register(bench: Bench) -> None:
    bench.accept(0x31, level=True)
    assert bench.vectors(TMR) == [0x31]
    bench.accept(0x31)
    assert bench.vectors(TMR) == []


def test_disabled_by_software_it_takes_nothing_new_and_keeps_what_it_has(bench: Bench) -> None:
    bench.accept(0x41)
    bench.write(SVR, 0xFF)
    bench.accept(0x51)
    assert bench.vectors(IRR) == [0x41]
    assert bench.take() == [0x41]
    assert all(bench.read(lvt) & MASKED for lvt in LVTS)
    bench.write(LVT_LINT0, EXT)
    assert bench.read(LVT_LINT0) == EXT | MASKED
    bench.write(SVR, 0x1FF)
    bench.write(LVT_LINT0, EXT)
    assert bench.read(LVT_LINT0) == EXT


# LINT pins


def test_the_pic_passes_from_reset_on() -> None:
    bench = Bench(enable=False)
    bench.pic_vectors = [0x08]
    bench.apic.set_lint(0, 1)
    assert bench.outputs == [1]
    assert bench.apic.acknowledge() == 0x08
    assert bench.outputs == [1, 0]
    assert bench.vectors(ISR) == []


def test_priorities_do_not_hold_the_pic_back(bench: Bench) -> None:
    bench.write(LVT_LINT0, EXT)
    bench.write(TPR, 0xFF)
    bench.accept(0x41)
    bench.pic_vectors = [0x09, 0x08]
    bench.apic.set_lint(0, 1)
    assert bench.take() == [0x08, 0x09]


def test_masking_lint0_shuts_the_pic_out(bench: Bench) -> None:
    bench.write(LVT_LINT0, EXT)
    bench.apic.set_lint(0, 1)
    bench.write(LVT_LINT0, EXT | MASKED)
    assert bench.outputs == [1, 0]
    assert bench.apic.acknowledge() == -1


def test_lint1_is_the_nmi(bench: Bench) -> None:
    bench.apic.set_lint(1, 1)
    bench.apic.set_lint(1, 0)
    assert bench.told == []
    bench.write(LVT_LINT1, NMI << 8)
    bench.apic.set_lint(1, 1)
    bench.apic.set_lint(1, 1)
    bench.apic.set_lint(1, 0)
    assert bench.told == ["nmi"]


def test_a_fixed_edge_on_a_pin(bench: Bench) -> None:
    bench.write(LVT_LINT1, 0x61)
    bench.apic.set_lint(1, 1)
    bench.apic.set_lint(1, 0)
    assert bench.take() == [0x61]
    assert bench.vectors(TMR) == []


def test_a_fixed_level_on_a_pin(bench: Bench) -> None:
    bench.write(LVT_LINT1, 0x61 | LEVEL)
    bench.apic.set_lint(1, 1)
    assert bench.read(LVT_LINT1) & REMOTE_IRR
    for _ in range(2):
        assert bench.take() == [0x61]
        bench.write(EOI, 0)
    bench.apic.set_lint(1, 0)
    assert bench.take() == [0x61]
    bench.write(EOI, 0)
    assert bench.take() == []
    assert not bench.read(LVT_LINT1) & REMOTE_IRR


# Interprocessor interrupts


def pair() -> tuple[Bench, Bench]:
    bus = ApicBus()
    return Bench(bus, 0), Bench(bus, 1, bootstrap=False)


def takers(value: int, destination: int = 0) -> list[list[int]]:
    """Who takes what, when processor 0 of two sends that."""
    cpus = pair()
    cpus[0].write(ICR_HIGH, destination << 24)
    cpus[0].write(ICR, value)
    return [cpu.take() for cpu in cpus]


def test_shorthands() -> None:
    assert takers(0x41 | SELF) == [[0x41], []]
    assert takers(0x41 | ALL) == [[0x41], [0x41]]
    assert takers(0x41 | OTHERS) == [[], [0x41]]


def test_physical_addresses() -> None:
    assert takers(0x41, 1) == [[], [0x41]]
    assert takers(0x41, 0) == [[0x41], []]
    assert takers(0x41, 7) == [[], []]
    assert takers(0x41, 0xFF) == [[0x41], [0x41]]


def test_an_id_can_be_changed() -> None:
    cpus = pair()
    cpus[1].write(ID, 9 << 24)
    cpus[0].write(ICR_HIGH, 9 << 24)
    cpus[0].write(ICR, 0x41)
    assert cpus[1].take() == [0x41]


@pytest.mark.parametrize(
    ("ldr", "destination", "reached"),
    [(0x21, 0x21, True), (0x21, 0x23, True), (0x21, 0x22, False), (0x21, 0x31, False), (0x21, 0xF1, True)],
)
def test_cluster_addresses(ldr: int, destination: int, reached: bool) -> None:
    cpus = pair()
    cpus[1].write(DFR, 0)
    cpus[1].write(LDR, ldr << 24)
    cpus[0].write(ICR_HIGH, destination << 24)
    cpus[0].write(ICR, 0x41 | 1 << 11)
    assert cpus[1].take() == ([0x41] if reached else [])


def test_the_processor_is_told_of_nmi_init_and_startup() -> None:
    cpus = pair()
    for value in (NMI << 8, INIT << 8 | 1 << 14 | LEVEL, INIT << 8 | LEVEL, STARTUP << 8 | 0x9A, SMI << 8):
        cpus[0].write(ICR, value | OTHERS)
    assert cpus[1].told == ["nmi", "init", 0x9A]  # the de-assertion of INIT means nothing
    assert cpus[0].told == []


def test_init_resets_all_but_the_id() -> None:
    cpus = pair()
    cpus[1].write(ID, 9 << 24)
    cpus[1].write(TPR, 0x20)
    cpus[1].accept(0x41)
    cpus[0].write(ICR, INIT << 8 | 1 << 14 | OTHERS)
    assert [cpus[1].read(r) for r in (ID, TPR, SVR)] == [9 << 24, 0, 0xFF]
    assert cpus[1].outputs == [1, 0]


def test_combinations_that_are_not_valid_send_nothing() -> None:
    cpus = pair()
    for mode in (LOWEST_PRIORITY, NMI, INIT, STARTUP):
        for shorthand in (SELF, ALL):
            cpus[0].write(ICR, shorthand | mode << 8 | 0x41)
    assert [cpu.told for cpu in cpus] == [[], []]
    assert [cpu.take() for cpu in cpus] == [[], []]


# Errors


def test_errors_show_after_a_write_and_interrupt_once_each(bench: Bench) -> None:
    bench.write(LVT_ERROR, 0xE1)
    bench.write(ICR, 0x05 | SELF)
    assert bench.read(ESR) == 0
    assert bench.take() == [0xE1]
    bench.write(EOI, 0)
    bench.accept(0x0F)
    bench.accept(0x0F)
    assert bench.take() == [0xE1]
    bench.write(EOI, 0)
    bench.write(0x400, 0)
    bench.read(0x3F0)
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0xE0  # vector sent, vector received, register
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0


def test_an_error_entry_that_is_itself_wrong(bench: Bench) -> None:
    bench.write(LVT_ERROR, 0x02)
    bench.accept(0x0F)
    assert bench.take() == []
    bench.write(ESR, 0)
    assert bench.read(ESR) == 0x40


# The timer


def test_one_shot(bench: Bench) -> None:
    bench.write(DIVIDE, BY_1)
    bench.write(LVT_TIMER, 0x30)
    bench.write(INITIAL, 1000)
    assert bench.read(CURRENT) == 1000
    bench.clock.step(400)
    assert bench.read(CURRENT) == 600
    bench.clock.step(599)
    assert bench.take() == []
    bench.clock.step(1)
    assert (bench.take(), bench.read(CURRENT)) == ([0x30], 0)
    bench.write(EOI, 0)
    bench.clock.step(1_000_000)
    assert bench.take() == []
    assert bench.clock.next_deadline_ns is None


def test_periodic(bench: Bench) -> None:
    bench.write(DIVIDE, BY_1)
    bench.write(LVT_TIMER, 0x30 | PERIODIC)
    bench.write(INITIAL, 1_000_000)
    for _ in range(5):
        bench.clock.step(999_999)
        assert bench.take() == []
        bench.clock.step(1)
        assert bench.read(CURRENT) == 1_000_000
        assert bench.take() == [0x30]
        bench.write(EOI, 0)


DIVIDERS = [(BY_2, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (BY_128, 128), (BY_1, 1)]


@pytest.mark.parametrize(("code", "by"), DIVIDERS)
def test_dividers(bench: Bench, code: int, by: int) -> None:
    bench.write(DIVIDE, code)
    bench.write(LVT_TIMER, 0x30)
    bench.write(INITIAL, 10)
    bench.clock.step(4 * by)
    assert bench.read(CURRENT) == 6
    bench.clock.step(6 * by - 1)
    assert bench.take() == []
    bench.clock.step(1)
    assert bench.take() == [0x30]


def test_the_divider_can_change_under_way(bench: Bench) -> None:
    bench.write(DIVIDE, BY_2)
    bench.write(LVT_TIMER, 0x30)
    bench.write(INITIAL, 100)
    bench.clock.step(100)
    bench.write(DIVIDE, BY_1)
    assert bench.read(CURRENT) == 50
    bench.clock.step(49)
    assert bench.take() == []
    bench.clock.step(1)
    assert bench.take() == [0x30]


def test_zero_stops(bench: Bench) -> None:
    bench.write(LVT_TIMER, 0x30 | PERIODIC)
    bench.write(INITIAL, 1000)
    bench.write(INITIAL, 0)
    assert bench.read(CURRENT) == 0
    assert bench.clock.next_deadline_ns is None


def test_masked_it_counts_and_is_silent(bench: Bench) -> None:
    bench.write(DIVIDE, BY_1)
    bench.write(LVT_TIMER, 0x30 | PERIODIC | MASKED)
    bench.write(INITIAL, 1_000_000)
    bench.clock.step(1_500_000)
    assert bench.read(CURRENT) == 500_000
    bench.write(LVT_TIMER, 0x30 | PERIODIC)
    assert bench.take() == []
    bench.clock.step(500_000)
    assert bench.take() == [0x30]


def test_a_one_shot_that_ran_out_masked_is_over(bench: Bench) -> None:
    bench.write(LVT_TIMER, 0x30 | MASKED)
    bench.write(INITIAL, 1000)
    bench.clock.step(1_000_000)
    bench.write(LVT_TIMER, 0x30)
    assert (bench.take(), bench.clock.next_deadline_ns) == ([], None)


def test_a_guest_cannot_have_the_host_for_itself(bench: Bench) -> None:
    """A period of one tick: the interrupt comes, but not a billion times a second."""
    bench.write(DIVIDE, BY_1)
    bench.write(LVT_TIMER, 0x30 | PERIODIC)
    bench.write(INITIAL, 1)
    count = 0
    end = bench.clock.now_ns() + 10 * MIN_INTERVAL_NS
    while (due := bench.clock.next_deadline_ns) is not None and due <= end:
        bench.clock.step(due - bench.clock.now_ns())
        count += len(bench.take())
        bench.write(EOI, 0)
        assert count <= 11
    assert count >= 10


class LateClock(VirtualClock):
    """Time passes, and timers are told afterwards, as on a busy host."""

    def pass_by(self, ns: int) -> None:
        self._now_ns += ns


def test_an_interrupt_that_is_due_is_not_lost_to_a_write() -> None:
    bench = Bench()
    clock = LateClock()
    apic = Lapic(bench.bus, clock, 1)
    apic.write(SVR, 4, 0x1FF)
    apic.write(DIVIDE, 4, BY_1)
    for register, value in ((LVT_TIMER, 0x31), (DIVIDE, BY_2), (INITIAL, 500), (SVR, 0xFF)):
        apic.write(LVT_TIMER, 4, 0x30)
        apic.write(INITIAL, 4, 1000)
        clock.pass_by(2000)
        apic.write(register, 4, value)
        assert apic.acknowledge() == 0x30
        apic.write(EOI, 4, 0)
        clock.step(0)
        assert apic.acknowledge() == -1  # once


class BusyClock(VirtualClock):
    """Time passes with every look at it."""

    def now_ns(self) -> int:
        self._now_ns += 1000
        return self._now_ns


@pytest.mark.parametrize("count", range(1, 7000, 500))
@pytest.mark.parametrize(("register", "value"), [(ESR, 0), (LVT_TIMER, 0x30), (DIVIDE, BY_1), (SVR, 0x1FF)])
def test_a_count_that_runs_out_while_registers_are_written(count: int, register: int, value: int) -> None:
    clock = BusyClock()
    apic = Lapic(ApicBus(), clock)
    for where, what in ((SVR, 0x1FF), (DIVIDE, BY_1), (LVT_TIMER, 0x30), (INITIAL, count), (register, value)):
        apic.write(where, 4, what)
    clock.step(10_000)
    assert apic.acknowledge() == 0x30
    apic.write(EOI, 4, 0)
    clock.step(10_000)
    assert apic.acknowledge() == -1


# The processor's own registers


@pytest.fixture
def with_cpu(bench: Bench) -> tuple[Bench, Cpu]:
    cpu = Cpu()
    bench.apic.cpu = cpu
    return bench, cpu


def test_cr8_is_the_task_priority(with_cpu: tuple[Bench, Cpu]) -> None:
    bench, cpu = with_cpu
    bench.write(TPR, 0x45)
    assert (cpu.cr8, bench.read(TPR)) == (4, 0x45)
    cpu.cr8 = 6
    assert bench.read(TPR) == 0x60
    bench.accept(0x5F)
    assert bench.take() == []
    cpu.cr8 = 4
    bench.apic.look_at_cpu()
    assert bench.take() == [0x5F]


def test_cr8_raised_behind_our_back_holds_back_at_the_acknowledge(with_cpu: tuple[Bench, Cpu]) -> None:
    bench, cpu = with_cpu
    bench.accept(0x41)
    cpu.cr8 = 4
    assert bench.apic.acknowledge() == -1
    assert bench.outputs == [1, 0]


def test_without_the_base_msr_there_is_the_pic_alone(with_cpu: tuple[Bench, Cpu]) -> None:
    bench, cpu = with_cpu
    bench.write(LVT_LINT0, EXT | MASKED)
    bench.accept(0x41)
    cpu.apic_base = PAGE
    assert bench.read(ID) == bench.read(SVR) == 0xFFFF_FFFF
    bench.write(SVR, 0x1FF)
    assert not bench.apic.output
    bench.accept(0x41)
    assert not bench.apic.output
    bench.pic_vectors = [0x08]
    bench.apic.set_lint(0, 1)
    assert bench.take() == [0x08]
    cpu.apic_base |= 1 << 11
    assert (bench.read(SVR), bench.read(LVT_LINT0)) == (0xFF, EXT)  # as after a reset


def test_reset_gives_cr8_back(with_cpu: tuple[Bench, Cpu]) -> None:
    bench, cpu = with_cpu
    bench.write(ID, 7 << 24)
    bench.write(TPR, 0x50)
    bench.write(LVT_TIMER, 0x30)
    bench.write(INITIAL, 1000)
    bench.accept(0x61)
    bench.apic.reset()
    assert (cpu.cr8, bench.read(TPR), bench.read(ID), bench.read(SVR)) == (0, 0, 0, 0xFF)
    assert not bench.apic.output
    assert bench.clock.next_deadline_ns is None


# The contract


def test_a_saved_state_goes_on() -> None:
    old = Bench()
    old.write(DIVIDE, BY_2)
    old.write(LVT_TIMER, 0x30 | PERIODIC)
    old.write(INITIAL, 1_000_000)
    old.write(LVT_LINT1, 0x61 | LEVEL)
    old.accept(0x41, 0x71)
    assert old.take() == [0x71]
    old.write(0x400, 0)
    old.clock.step(300_001)
    new = Bench(enable=False)
    new.clock.step(77)
    new.apic.load(old.apic.save())
    new.apic.after_load()
    assert new.apic.save() == old.apic.save()
    assert [new.read(r) for r in (LVT_TIMER, CURRENT, PPR)] == [old.read(r) for r in (LVT_TIMER, CURRENT, PPR)]
    for bench in (old, new):
        bench.write(EOI, 0)
        assert bench.take() == [0x41]
        bench.write(EOI, 0)
        bench.clock.step(2_000_000 - 300_001 - 1)
        assert bench.take() == []
        bench.clock.step(1)
        assert bench.take() == [0x30]
        bench.write(ESR, 0)
        assert bench.read(ESR) == 0x80


registers = st.one_of(
    st.sampled_from([ID, TPR, EOI, LDR, DFR, SVR, ESR, ICR, ICR_HIGH, *LVTS, INITIAL, CURRENT, DIVIDE]),
    st.integers(0, 0xFFF),
)
values = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0x1FF, 0x30, 0x2_0030, EXT, 0x4_0041, 0x8_0041]))
steps = st.one_of(
    st.tuples(st.just("write"), registers, st.sampled_from([1, 2, 4, 8]), values),
    st.tuples(st.just("read"), registers, st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("step"), st.integers(0, 1_000_000)),
    st.tuples(st.just("lint"), st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.just("message"), st.integers(0, 7), st.integers(0, 255), st.booleans()),
    st.tuples(st.just("take")),
    st.tuples(st.just("cpu"), st.integers(0, 15), st.booleans()),
)


@given(st.lists(steps, max_size=40))
def test_whatever_the_guest_does(trace: list[tuple[object, ...]]) -> None:
    bus = ApicBus()
    clock = VirtualClock()
    levels: list[int] = []
    apic = Lapic(bus, clock, on_output=levels.append, acknowledge_pic=lambda: 8)
    other = Lapic(bus, clock, 1, bootstrap=False)
    cpu = Cpu()
    apic.cpu = cpu
    mmio = AddressSpace("mmio", 1 << 52)
    mmio.map(PAGE, 0x1000, apic)
    for verb, *rest in trace:
        a, b, c = (*rest, 0, 0, 0)[:3]
        assert isinstance(a, int)
        assert isinstance(b, int)
        assert isinstance(c, int)
        if verb == "write":
            mmio.write(PAGE + a, b, c & (1 << 8 * b) - 1)
        elif verb == "read":
            assert 0 <= mmio.read(PAGE + a, b) < 1 << 8 * b
        elif verb == "step":
            clock.step(a)
        elif verb == "lint":
            apic.set_lint(a, b)
        elif verb == "message":
            with bus.lock:
                bus.hand_over([apic, other], a, b, bool(c))
        elif verb == "take":
            vector = apic.acknowledge()
            assert vector == -1 or vector == 8 or 16 <= vector < 256
        else:
            cpu.cr8 = a
            cpu.apic_base = PAGE | b << 11
        assert levels == [n % 2 ^ 1 for n in range(len(levels))]  # told on changes only
        assert apic.output == (levels[-1] if levels else 0)
    copy = Lapic(bus, clock, 2)
    copy.load(apic.save())
    copy.after_load()
    assert copy.save() == apic.save()
