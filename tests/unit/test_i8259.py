"""The pair of 8259As: requests, priorities, every EOI and rotation, polling, the cascade, edge and level."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.devices.i8259 import I8259Pair
from pyvmm.irq import IrqLine

MASTER_BASE, SLAVE_BASE = 0x20, 0x28

EOI = 0x20
EOI_SPECIFIC = 0x60
EOI_ROTATE = 0xA0
EOI_ROTATE_SPECIFIC = 0xE0
SET_PRIORITY = 0xC0
ROTATE_AEOI_SET = 0x80
ROTATE_AEOI_CLEAR = 0x00
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SPECIAL_MASK_SET, SPECIAL_MASK_CLEAR = 0x68, 0x48


class Bench:
    """The pair on a port bus, and the history of INTR."""

    def __init__(self) -> None:
        self.intr: list[int] = []
        self.pair = I8259Pair(self.intr.append)
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(0x20, 2, self.pair.master)
        self.pio.map(0xA0, 2, self.pair.slave)
        self.pio.map(0x4D0, 2, self.pair.elcr)

    def initialise(self, master_icw4: int = 0x01, slave_icw4: int = 0x01, icw1: int = 0x11) -> Bench:
        for port, words in ((0x20, (MASTER_BASE, 4, master_icw4)), (0xA0, (SLAVE_BASE, 2, slave_icw4))):
            self.out(port, icw1)
            for word in words:
                self.out(port + 1, word)
        return self

    def out(self, port: int, value: int) -> None:
        self.pio.write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.pio.read(port, 1)

    def irr(self, port: int = 0x20) -> int:
        self.out(port, READ_IRR)
        return self.inb(port)

    def isr(self, port: int = 0x20) -> int:
        self.out(port, READ_ISR)
        return self.inb(port)

    def line(self, n: int) -> IrqLine:
        return IrqLine(lambda level: self.pair.set(n, level), n)

    def raise_(self, *lines: int) -> None:
        for n in lines:
            self.pair.set(n, 1)

    def take(self) -> int | None:
        """The IRQ (by vector) the CPU would be given now, None with INTR low."""
        if not self.pair.intr:
            return None
        vector = self.pair.acknowledge()
        return vector - MASTER_BASE


@pytest.fixture
def bench() -> Bench:
    return Bench().initialise()


# Initialisation


def test_power_on_is_silent_and_masks_nothing() -> None:
    bench = Bench()
    assert [bench.inb(port) for port in (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)] == [0] * 6
    assert bench.intr == []


def test_icw2_takes_the_upper_five_bits_of_the_vector() -> None:
    bench = Bench()
    for value in (0x11, 0x7F, 0x04, 0x01):
        bench.out(0x20 if value == 0x11 else 0x21, value)
    bench.raise_(3)
    assert bench.pair.acknowledge() == 0x7B


def test_icw1_without_icw4_ends_after_icw3_and_clears_what_icw4_had_set(bench: Bench) -> None:
    bench.initialise(master_icw4=0x03)
    for port, value in ((0x20, 0x10), (0x21, 0x40), (0x21, 0x04)):
        bench.out(port, value)
    bench.out(0x21, 0xFE)  # OCW1 already
    assert bench.inb(0x21) == 0xFE
    bench.raise_(0)
    assert bench.pair.acknowledge() == 0x40
    assert bench.isr() == 1, "no automatic EOI any more"


def test_single_mode_leaves_icw3_out() -> None:
    bench = Bench()
    for port, value in ((0x20, 0x13), (0x21, 0x50), (0x21, 0x03), (0x21, 0xAA)):
        bench.out(port, value)
    assert bench.inb(0x21) == 0xAA
    bench.out(0x21, 0)
    bench.raise_(1)
    assert bench.pair.acknowledge() == 0x51
    assert bench.isr() == 0, "the byte after ICW2 was ICW4 with AEOI"


def test_icw1_clears_mask_service_and_edges(bench: Bench) -> None:
    bench.raise_(1, 4)
    bench.take()
    bench.out(0x21, 0x55)
    bench.out(0x20, SET_PRIORITY | 3)
    bench.initialise()
    assert (bench.irr(), bench.isr(), bench.inb(0x21)) == (0, 0, 0)
    assert bench.pair.intr == 0
    # A line that stayed high must fall and rise before it requests again.
    bench.raise_(4)
    assert bench.pair.intr == 0
    bench.pair.set(4, 0)
    bench.raise_(4, 5)
    assert bench.take() == 4, "and the order of priorities starts at IR0 again"


# Requests


def test_an_edge_requests_once_and_intr_follows(bench: Bench) -> None:
    line = bench.line(4)
    line.raise_()
    assert bench.intr == [1]
    assert bench.irr() == 0x10
    assert bench.take() == 4
    assert bench.intr == [1, 0]
    assert (bench.irr(), bench.isr()) == (0, 0x10)
    bench.out(0x20, EOI)
    assert bench.isr() == 0
    assert bench.intr == [1, 0], "the line is still high, but there was one edge"
    line.lower()
    line.raise_()
    assert bench.take() == 4


def test_a_pulse_is_kept_until_it_is_served(bench: Bench) -> None:
    bench.line(3).pulse()
    assert bench.irr() == 0x08
    assert bench.take() == 3


def test_a_level_line_requests_for_as_long_as_it_is_high(bench: Bench) -> None:
    bench.out(0x4D0, 0x20)
    line = bench.line(5)
    line.raise_()
    assert bench.take() == 5
    assert bench.irr() == 0x20
    assert bench.take() is None
    bench.out(0x20, EOI)
    assert bench.take() == 5
    line.lower()
    assert bench.irr() == 0
    bench.out(0x20, EOI)
    assert bench.take() is None


def test_a_level_request_taken_back_in_time_is_spurious_irq7(bench: Bench) -> None:
    bench.out(0x4D0, 0x20)
    bench.raise_(5)
    bench.pair.set(5, 0)
    assert bench.intr == [1, 0]
    assert bench.pair.acknowledge() == MASTER_BASE + 7
    assert bench.isr() == 0


def test_spurious_irq15_where_only_the_cascade_pin_asks(bench: Bench) -> None:
    bench.raise_(2)
    assert bench.pair.acknowledge() == SLAVE_BASE + 7
    assert (bench.isr(), bench.isr(0xA0)) == (0x04, 0)


def test_elcr_bits_of_fixed_edge_lines_cannot_be_set(bench: Bench) -> None:
    bench.out(0x4D0, 0xFF)
    bench.out(0x4D1, 0xFF)
    assert (bench.inb(0x4D0), bench.inb(0x4D1)) == (0xF8, 0xDE)
    bench.initialise()
    assert bench.inb(0x4D0) == 0xF8, "ICW1 is no reset of the ELCR"
    bench.pair.reset()
    assert (bench.inb(0x4D0), bench.inb(0x4D1)) == (0, 0)


def test_elcr_turns_a_high_line_into_a_request_and_drops_a_stale_one(bench: Bench) -> None:
    bench.raise_(3)
    bench.take()
    bench.out(0x20, EOI)
    assert bench.take() is None
    bench.out(0x4D0, 0x08)
    assert bench.take() == 3
    bench.out(0x20, EOI)
    bench.line(6).pulse()
    bench.out(0x4D0, 0x48)
    assert bench.irr() == 0x08


def test_ltim_makes_all_inputs_of_a_chip_level_triggered() -> None:
    bench = Bench().initialise(icw1=0x19)
    bench.raise_(0)
    assert bench.take() == 0
    bench.out(0x20, EOI)
    assert bench.take() == 0
    bench.out(0x20, EOI)
    bench.pair.set(0, 0)
    assert bench.take() is None
    # Through two level-triggered chips in cascade too.
    bench.raise_(8)
    for _ in range(2):
        assert bench.take() == 8
        bench.out(0xA0, EOI)
        bench.out(0x20, EOI)
    bench.pair.set(8, 0)
    assert bench.take() is None


# Masks and priorities


def test_a_masked_request_waits(bench: Bench) -> None:
    bench.out(0x21, 0x10)
    bench.raise_(4)
    assert bench.take() is None
    assert bench.irr() == 0x10
    bench.out(0x21, 0)
    assert bench.take() == 4


def test_fully_nested_only_a_higher_priority_interrupts_a_handler(bench: Bench) -> None:
    bench.raise_(4)
    assert bench.take() == 4
    bench.raise_(5)
    assert bench.take() is None
    bench.raise_(1)
    assert bench.take() == 1
    assert bench.isr() == 0x12
    bench.out(0x20, EOI)
    assert bench.isr() == 0x10, "a non-specific EOI ends the highest in service"
    assert bench.take() is None
    bench.out(0x20, EOI)
    assert bench.take() == 5


def test_specific_eoi_ends_the_one_it_names(bench: Bench) -> None:
    bench.raise_(4)
    bench.take()
    bench.raise_(1)
    bench.take()
    bench.out(0x20, EOI_SPECIFIC | 4)
    assert bench.isr() == 0x02


def test_eoi_with_nothing_in_service_changes_nothing(bench: Bench) -> None:
    before = bench.pair.save()
    bench.out(0x20, EOI)
    bench.out(0x20, EOI_ROTATE)
    bench.out(0x20, 0x40)  # OCW2 "no operation"
    assert bench.pair.save() == before


def test_rotate_on_non_specific_eoi_puts_the_served_one_last(bench: Bench) -> None:
    bench.raise_(3)
    bench.take()
    bench.out(0x20, EOI_ROTATE)
    bench.pair.set(3, 0)
    bench.raise_(3, 0, 4)
    order = []
    while (n := bench.take()) is not None:
        order.append(n)
        bench.out(0x20, EOI)
    assert order == [4, 0, 3]


def test_set_priority_and_rotate_on_specific_eoi(bench: Bench) -> None:
    bench.out(0x20, SET_PRIORITY | 5)  # 5 the lowest, 6 the highest
    bench.raise_(5, 6, 0)
    assert bench.take() == 6
    bench.out(0x20, EOI_ROTATE_SPECIFIC | 6)  # 6 the lowest, 7 the highest
    assert bench.isr() == 0
    bench.pair.set(6, 0)
    bench.raise_(6)
    order = []
    while (n := bench.take()) is not None:
        order.append(n)
        bench.out(0x20, EOI)
    assert order == [0, 5, 6]


def test_automatic_eoi_leaves_nothing_in_service() -> None:
    bench = Bench().initialise(master_icw4=0x03)
    bench.raise_(1, 2 + 1)
    assert [bench.take(), bench.take(), bench.take()] == [1, 3, None]
    assert bench.isr() == 0


def test_rotation_in_automatic_eoi_mode() -> None:
    bench = Bench().initialise(master_icw4=0x03)
    bench.out(0x20, ROTATE_AEOI_SET)
    bench.raise_(1)
    assert bench.take() == 1
    bench.pair.set(1, 0)
    bench.raise_(0, 1, 3)
    assert [bench.take(), bench.take(), bench.take()] == [3, 0, 1]
    bench.out(0x20, ROTATE_AEOI_CLEAR)
    for n in (0, 1, 3):
        bench.pair.set(n, 0)
    bench.raise_(0, 3)
    assert [bench.take(), bench.take()] == [3, 0], "the order stays where it was: 1 the lowest"
    bench.pair.set(3, 0)
    bench.pair.set(0, 0)
    bench.raise_(0, 3)
    assert [bench.take(), bench.take()] == [3, 0], "and turns no more"


def test_special_mask_mode_lets_lower_priorities_in(bench: Bench) -> None:
    bench.raise_(3)
    bench.take()
    bench.raise_(6)
    assert bench.take() is None
    bench.out(0x21, 0x08)
    assert bench.take() is None
    bench.out(0x20, SPECIAL_MASK_SET)
    assert bench.take() == 6
    assert bench.isr() == 0x48
    bench.out(0x20, EOI)
    assert bench.isr() == 0x08, "a non-specific EOI passes over what is masked"
    bench.out(0x20, EOI)
    assert bench.isr() == 0x08
    bench.out(0x20, SPECIAL_MASK_CLEAR)
    bench.raise_(7)
    assert bench.take() is None
    bench.out(0x20, EOI)
    assert bench.isr() == 0
    assert bench.take() == 7


def test_an_ocw3_without_esmm_leaves_the_special_mask_alone(bench: Bench) -> None:
    bench.out(0x20, SPECIAL_MASK_SET)
    bench.out(0x20, 0x28)  # SMM without ESMM
    bench.out(0x20, 0x08)
    assert bench.pair.save()["master"]["special_mask"]


# Polling and the read register


def test_poll_acknowledges_the_highest_and_reads_zero_without_one(bench: Bench) -> None:
    bench.out(0x20, POLL)
    assert bench.inb(0x20) == 0
    bench.raise_(5, 3)
    bench.out(0x20, POLL)
    assert bench.inb(0x20) == 0x83
    assert bench.isr() == 0x08
    bench.out(0x20, EOI)
    bench.out(0x20, POLL)
    assert bench.inb(0x21) == 0x85, "the next read is the acknowledge, from either port"
    assert bench.inb(0x21) == 0, "and only the next"


def test_polling_the_slave_leaves_no_request_behind_in_the_master(bench: Bench) -> None:
    bench.raise_(12)
    assert bench.irr() == 0x04
    bench.out(0xA0, POLL)
    assert bench.inb(0xA0) == 0x84
    assert bench.irr() == 0
    assert bench.take() is None


def test_the_read_register_choice_lasts(bench: Bench) -> None:
    bench.raise_(3)
    bench.take()
    bench.raise_(6)
    bench.out(0x20, READ_ISR)
    assert [bench.inb(0x20), bench.inb(0x20)] == [0x08, 0x08]
    bench.out(0x20, READ_IRR)
    assert [bench.inb(0x20), bench.inb(0x20)] == [0x40, 0x40]
    bench.out(0x20, READ_ISR)
    bench.out(0x20, 0x08)  # an OCW3 that says nothing of it
    assert bench.inb(0x20) == 0x08


# The cascade


def test_a_slave_interrupt_goes_into_service_in_both(bench: Bench) -> None:
    bench.raise_(12)
    assert (bench.irr(), bench.irr(0xA0)) == (0x04, 0x10)
    assert bench.take() == 12
    assert (bench.isr(), bench.isr(0xA0)) == (0x04, 0x10)
    bench.out(0xA0, EOI)
    bench.out(0x20, EOI)
    assert (bench.isr(), bench.isr(0xA0)) == (0, 0)


def test_slave_lines_rank_where_the_cascade_does(bench: Bench) -> None:
    bench.raise_(3, 15, 8, 1)
    order = []
    while (n := bench.take()) is not None:
        order.append(n)
        if n >= 8:
            bench.out(0xA0, EOI)
        bench.out(0x20, EOI)
    assert order == [1, 8, 15, 3]


def test_a_slave_request_masked_in_time_is_gone_from_the_master(bench: Bench) -> None:
    bench.raise_(14)
    bench.out(0xA1, 0x40)
    assert bench.intr == [1, 0]
    assert bench.irr() == 0
    bench.out(0xA1, 0)
    assert bench.take() == 14


def test_a_higher_slave_request_waits_unless_specially_fully_nested(bench: Bench) -> None:
    bench.raise_(12)
    bench.take()
    bench.raise_(9)
    assert bench.take() is None
    bench = Bench().initialise(master_icw4=0x11)
    bench.raise_(12)
    bench.take()
    bench.raise_(13)
    assert bench.take() is None, "lower than the one in service"
    bench.raise_(9)
    assert bench.take() == 9
    assert bench.isr(0xA0) == 0x12


def test_two_slave_requests_with_automatic_eoi_are_both_served() -> None:
    bench = Bench().initialise(master_icw4=0x03, slave_icw4=0x03)
    bench.raise_(10, 11)
    assert [bench.take(), bench.take(), bench.take()] == [10, 11, None]


def test_irq2_does_not_disturb_a_slave_request(bench: Bench) -> None:
    bench.raise_(12)
    bench.line(2).pulse()
    assert bench.take() == 12


# State


def test_save_and_load_in_the_middle_of_everything(bench: Bench) -> None:
    bench.out(0x4D0, 0x20)
    bench.out(0x20, SET_PRIORITY | 4)
    bench.out(0x21, 0x02)
    bench.raise_(5, 1, 9, 14)
    bench.take()
    bench.out(0xA0, 0x11)  # the slave expects ICW2 now
    other = Bench()
    other.pair.load(bench.pair.save())
    other.pair.after_load()
    assert other.pair.save() == bench.pair.save()
    assert other.intr == [bench.pair.intr]
    for b in (bench, other):
        for value in (0x70, 0x02, 0x01):
            b.out(0xA1, value)
        b.out(0x21, 0)
        b.raise_(8)
    results = []
    for b in (bench, other):
        seen = []
        for _ in range(6):
            if not b.pair.intr:
                b.out(0xA0, EOI)
                b.out(0x20, EOI)
            if b.pair.intr:
                seen.append(b.pair.acknowledge())
        results.append((seen, b.pair.save()))
    assert results[0] == results[1]
    assert results[0][0]


def test_reset_lowers_intr_and_keeps_the_levels_of_the_lines(bench: Bench) -> None:
    bench.raise_(1, 10)
    bench.pair.reset()
    assert bench.intr == [1, 0]
    bench.initialise()
    bench.out(0x4D1, 0x04)
    assert bench.take() == 10


# Priorities, against the data sheet's rule written down plainly


@settings(deadline=None)
@given(
    irr=st.integers(0, 255),
    imr=st.integers(0, 255),
    in_service=st.lists(st.integers(0, 7), max_size=3),
    lowest=st.integers(0, 7),
    special=st.booleans(),
)
def test_the_winner_is_the_first_unmasked_request_above_all_in_service(
    irr: int, imr: int, in_service: list[int], lowest: int, special: bool
) -> None:
    bench = Bench().initialise()
    pic = bench.pair.chips[0]
    bench.out(0x20, SET_PRIORITY | lowest)
    pic.isr = sum({1 << n for n in in_service})
    bench.out(0x21, imr)
    if special:
        bench.out(0x20, SPECIAL_MASK_SET)
    for n in range(8):
        if irr >> n & 1:
            pic.set_input(n, 1)

    expected = -1
    for step in range(1, 9):
        n = (lowest + step) % 8
        blocked_by = pic.isr & ~imr if special else pic.isr
        if blocked_by >> n & 1:
            break
        if irr >> n & 1 and not imr >> n & 1:
            expected = n
            break
    assert pic.pending() == expected
    assert pic.intr == (expected >= 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["out", "line", "ack"]), st.integers(0, 5), st.integers(0, 255))))
def test_no_sequence_of_accesses_raises_or_leaves_intr_wrong(ops: list[tuple[str, int, int]]) -> None:
    bench = Bench().initialise()
    for kind, which, value in ops:
        if kind == "out":
            bench.out((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)[which], value)
        elif kind == "line":
            bench.pair.set(value & 15, which & 1)
        else:
            assert 0 <= bench.pair.acknowledge() <= 255
        master, slave = bench.pair.chips
        assert bench.pair.intr == (master.pending() >= 0)
        assert (bench.intr or [0])[-1] == bench.pair.intr
        assert slave.intr == (slave.pending() >= 0)
        assert not slave.intr or master.lines & 4
