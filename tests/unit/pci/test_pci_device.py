"""A function's registers, its BARs as the guest sizes and moves them, and its interrupt pin."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from pci_bench import COMMAND, IO, MASTER, MEMORY, STATUS, Bus, Registers

from pyvmm.address_space import AddressSpace
from pyvmm.devices.pci.device import PciDevice
from pyvmm.devices.pci.host import PciHost
from pyvmm.errors import ConfigError
from pyvmm.irq import IrqLine
from pyvmm.region import MemoryRegion

BAR0, BAR1 = 0x10, 0x14
INTX_DISABLE, INTX_STATUS = 0x400, 0x08
DEADLINE_S = 10


class Card(PciDevice):
    """16 ports in two parts with a gap, and 4 KiB of memory addresses."""

    def __init__(self, pio: AddressSpace, mmio: AddressSpace) -> None:
        super().__init__(device_id=0x1234, class_code=0x020000, revision=7, interrupt_pin=1)
        self.low, self.high, self.memory = Registers(4), Registers(4), Registers(0x1000)
        parts = (
            (0, lambda: MemoryRegion(4, self.low, name="low")),
            (12, lambda: MemoryRegion(4, self.high, name="high")),
        )
        self.io = self.add_io_bar(0, 16, pio, parts)
        self.mem = self.add_memory_bar(1, 0x1000, mmio, ((0, lambda: MemoryRegion(0x1000, self.memory)),))
        self.define(0x40, 1, 0x0F, 0xF0, 0x01)
        self.mastering: list[bool] = []

    def bus_master_changed(self, enabled: bool) -> None:
        self.mastering.append(enabled)


class Bench(Bus):
    def __init__(self, cards: int = 1) -> None:
        super().__init__(AddressSpace("pio", 0x10000))
        self.mmio = AddressSpace("mmio", 1 << 40)
        self.intx: list[tuple[int, int, int]] = []
        self.host = PciHost(intx=self._line)
        self.pio.map(0xCF8, 8, self.host)
        self.cards = [Card(self.pio, self.mmio) for _ in range(cards)]
        for slot, card in enumerate(self.cards):
            self.host.add(card, slot)
        self.card = self.cards[0]

    def _line(self, slot: int, pin: int) -> IrqLine:
        return IrqLine(lambda level: self.intx.append((slot, pin, level)))

    def place(self, slot: int, base: int) -> None:
        self.set((slot, 0), BAR0, base)
        self.set((slot, 0), COMMAND, IO, 2)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_identity_cannot_be_changed(bench: Bench) -> None:
    before = bench.get((0, 0), 0), bench.get((0, 0), 8), bench.get((0, 0), 0x2C)
    assert before == (0x1234_8086, 0x0200_0007, 0x1100_1AF4)
    for register in (0, 8, 0x2C):
        bench.set((0, 0), register, 0)
    assert before == (bench.get((0, 0), 0), bench.get((0, 0), 8), bench.get((0, 0), 0x2C))


def test_writable_fixed_and_clear_on_one(bench: Bench) -> None:
    bench.set((0, 0), 0x40, 0xA0, 1)
    assert bench.get((0, 0), 0x40, 1) == 0xAF
    bench.set((0, 0), 0x40, 0x51, 1)
    assert bench.get((0, 0), 0x40, 1) == 0x5E
    bench.set((0, 0), 0x40, 0x00, 1)
    assert bench.get((0, 0), 0x40, 1) == 0x0E


def test_sizing(bench: Bench) -> None:
    # PCI 3.0, 6.2.5.1: ones written, what comes back tells size and kind.
    for command in (0, IO | MEMORY):
        bench.set((0, 0), COMMAND, command, 2)
        for register, answer in ((BAR0, 0xFFFF_FFF1), (BAR1, 0xFFFF_F000), (0x18, 0), (0x30, 0)):
            old = bench.get((0, 0), register)
            bench.set((0, 0), register, 0xFFFF_FFFF)
            assert bench.get((0, 0), register) == answer
            bench.set((0, 0), register, old)
            assert bench.get((0, 0), register) == old
    assert [r.name for r in bench.pio.regions] == ["PciHost"]
    assert bench.mmio.regions == []


def test_a_bar_decodes_when_it_is_enabled_and_has_an_address(bench: Bench) -> None:
    bench.set((0, 0), BAR0, 0xC000)
    bench.pio.write(0xC000, 4, 0x1234_5678)
    assert bench.pio.read(0xC000, 4) == 0xFFFF_FFFF
    bench.set((0, 0), COMMAND, IO, 2)
    bench.pio.write(0xC000, 4, 0x1234_5678)
    bench.pio.write(0xC00C, 2, 0xABCD)
    assert bench.card.low.data == bytes.fromhex("78563412")
    assert bench.card.high.data[:2] == bytes.fromhex("cdab")
    assert bench.pio.read(0xC004, 4) == 0xFFFF_FFFF  # of the BAR, but nothing is there
    bench.set((0, 0), COMMAND, MEMORY, 2)
    assert bench.pio.read(0xC000, 4) == 0xFFFF_FFFF
    bench.set((0, 0), COMMAND, IO | MEMORY, 2)
    assert bench.pio.read(0xC000, 4) == 0x1234_5678
    bench.set((0, 0), BAR0, 0)
    assert bench.pio.read(0, 4) == 0xFFFF_FFFF
    assert bench.card.io.window.base is None


def test_a_memory_bar(bench: Bench) -> None:
    bench.set((0, 0), BAR1, 0xFEBF_0FFF)
    bench.set((0, 0), COMMAND, MEMORY, 2)
    assert bench.get((0, 0), BAR1) == 0xFEBF_0000
    bench.mmio.write(0xFEBF_0FFC, 4, 0xCAFE_F00D)
    assert bench.card.memory.data[0xFFC:] == bytes.fromhex("0df0feca")
    for base in (0, 0xFFFF_F000):
        bench.set((0, 0), BAR1, base)
        assert bench.card.mem.window.base is None
    bench.set((0, 0), BAR1, 0xFFFF_E000)
    assert bench.card.mem.window.base == 0xFFFF_E000


def test_a_bar_moves_byte_by_byte(bench: Bench) -> None:
    bench.place(0, 0xC000)
    bench.set((0, 0), BAR0 + 1, 0xD1, 1)
    assert bench.card.io.window.base == 0xD100
    bench.set((0, 0), BAR0 + 2, 0x0001, 2)  # beyond the last port
    assert bench.card.io.window.base is None
    assert bench.card.io.window.blocked
    bench.set((0, 0), BAR0 + 2, 0x0000, 2)
    assert bench.card.io.window.base == 0xD100


def test_what_was_there_first_stays_and_the_bar_waits() -> None:
    bench = Bench(2)
    other = Registers(2, 0x55)
    region = bench.pio.map(0xC00E, 2, other)
    bench.place(0, 0xC000)
    assert bench.card.io.window.blocked
    assert bench.pio.read(0xC000, 4) == 0xFFFF_FFFF  # not by halves either
    assert bench.pio.read(0xC00E, 2) == 0x5555
    bench.pio.unmap(region)
    bench.set((0, 0), 0x3C, 0x0B, 1)  # nothing has changed that could have to do with it
    assert bench.card.io.window.blocked
    bench.place(0, 0xC000)
    bench.set((0, 0), COMMAND, IO | MASTER, 2)
    assert bench.card.io.window.base == 0xC000


@pytest.mark.parametrize("leave", ["move", "disable", "reset"])
def test_a_blocked_bar_takes_the_place_that_another_leaves(leave: str) -> None:
    bench = Bench(2)
    first, second = bench.cards
    bench.place(0, 0xC000)
    bench.place(1, 0xC000)
    assert (first.io.window.base, second.io.window.base) == (0xC000, None)
    if leave == "move":
        bench.set((0, 0), BAR0, 0xC010)
    elif leave == "disable":
        bench.set((0, 0), COMMAND, 0, 2)
    else:
        first.reset()
    assert second.io.window.base == 0xC000
    assert first.io.window.base == (0xC010 if leave == "move" else None)


def test_the_host_bridge_s_own_ports_cannot_be_taken(bench: Bench) -> None:
    bench.place(0, 0xCF0)
    assert bench.card.io.window.blocked
    assert bench.get((0, 0), 0) == 0x1234_8086


def test_bus_master_is_told(bench: Bench) -> None:
    bench.card.mastering.clear()
    bench.set((0, 0), COMMAND, MASTER, 2)
    assert bench.card.mastering[-1] is True
    bench.set((0, 0), COMMAND, 0, 1)
    assert bench.card.mastering[-1] is False
    bench.set((0, 0), COMMAND, MASTER, 2)
    bench.card.reset()
    assert bench.card.mastering[-1] is False


def test_interrupt_pin(bench: Bench) -> None:
    card = bench.card
    card.set_interrupt(1)
    card.set_interrupt(1)
    assert bench.intx == [(0, 0, 1)]
    assert bench.get((0, 0), STATUS, 2) & INTX_STATUS
    bench.set((0, 0), COMMAND, INTX_DISABLE, 2)
    assert bench.intx == [(0, 0, 1), (0, 0, 0)]
    assert bench.get((0, 0), STATUS, 2) & INTX_STATUS  # the wish is still there
    bench.set((0, 0), COMMAND, 0, 2)
    assert bench.intx[2:] == [(0, 0, 1)]
    card.set_interrupt(0)
    assert bench.intx[3:] == [(0, 0, 0)]
    assert not bench.get((0, 0), STATUS, 2) & INTX_STATUS


def test_reset_lets_go_of_everything(bench: Bench) -> None:
    power_on = bench.config((0, 0))
    bench.place(0, 0xC000)
    bench.set((0, 0), BAR1, 0xE000_0000)
    bench.set((0, 0), COMMAND, IO | MEMORY | MASTER, 2)
    bench.set((0, 0), 0x3C, 0x55, 1)
    bench.card.set_interrupt(1)
    bench.card.reset()
    assert bench.config((0, 0)) == power_on
    assert bench.card.io.window.base is bench.card.mem.window.base is None
    assert bench.intx[-1] == (0, 0, 0)


def test_save_and_load() -> None:
    bench, other = Bench(), Bench()
    bench.place(0, 0xC000)
    bench.set((0, 0), COMMAND, IO | MASTER, 2)
    bench.card.set_interrupt(1)
    other.card.load(bench.card.save())
    other.card.after_load()
    other.host.after_load()
    assert other.config((0, 0)) == bench.config((0, 0))
    assert other.card.io.window.base == 0xC000
    assert other.card.mastering[-1] is True
    assert other.intx == [(0, 0, 1)]


def test_loading_in_any_order_ends_with_every_bar_in_its_place() -> None:
    bench, other = Bench(2), Bench(2)
    bench.place(0, 0xC000)
    bench.place(1, 0xD000)
    other.place(0, 0xD000)
    other.place(1, 0xC000)
    for card, was in zip(other.cards, bench.cards, strict=True):
        card.load(was.save())
    for device in (*other.cards, other.host):
        device.after_load()
    assert [card.io.window.base for card in other.cards] == [0xC000, 0xD000]


@pytest.mark.parametrize("size", [0, 2, 24, 1 << 32])
def test_a_bar_is_a_power_of_two(size: int) -> None:
    bench = Bench()
    with pytest.raises(ConfigError, match="power of two"):
        bench.card.add_io_bar(2, size, bench.pio, ())
    with pytest.raises(ConfigError, match="BAR 6"):
        bench.card.add_io_bar(6, 16, bench.pio, ())


def test_a_move_while_another_processor_is_at_it() -> None:
    """Neither the one that moves nor the one that reads sees more than the device or nobody."""
    bench = Bench()
    bench.place(0, 0xC000)
    bench.card.low.data[:] = b"\x5a" * 4
    stop = threading.Event()
    seen: set[int] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(bench.pio.read(0xC000, 4))
            seen.add(bench.pio.read(0xD000, 4))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for n in range(2000):
            bench.set((0, 0), BAR0, 0xD000 if n & 1 else 0xC000)
    finally:
        stop.set()
        reader.join(DEADLINE_S)
    assert not reader.is_alive()
    assert seen <= {0x5A5A_5A5A, 0xFFFF_FFFF}


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        (5, "give a list"),
        (None, "give a list"),
        ([5], "is no part"),
        ([(0,)], "is no part"),
        ((0, print), "is no part"),
        ([("0", print)], "a part at '0'"),
        ([(-1, print)], "a part at -1"),
        ([(True, print)], "a part at True"),
        ([(0, MemoryRegion(4, Registers(4)))], "makes no region"),
        ([(16, print)], "has no room at 0x10"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_parts_of_the_wrong_shape_are_refused_at_the_call(bench: Bench, parts: Any, wanted: str) -> None:
    before = bytes(bench.card.config)
    with pytest.raises(ConfigError) as caught:
        bench.card.add_io_bar(2, 16, bench.pio, parts)
    assert wanted in str(caught.value)
    assert bytes(bench.card.config) == before
    with pytest.raises(ConfigError, match="give the machine's pio or mmio"):
        bench.card.add_memory_bar(2, 16, [], bench.mmio)  # type: ignore[arg-type]  # the two in the other order


def test_a_part_that_makes_no_region_is_the_cards_error_and_no_taken_address(bench: Bench) -> None:
    bench.card.add_io_bar(2, 16, bench.pio, [(0, lambda: bench.card.low)])  # type: ignore[list-item,return-value]
    bench.set((0, 0), 0x18, 0xD000)
    with pytest.raises(ConfigError, match="is no region"):
        bench.set((0, 0), COMMAND, IO, 2)
