"""The controllers wired up: ISA interrupts to both, the PIC through LINT0 or the I/O APIC, pins that are watched."""

from __future__ import annotations

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.i8254 import I8254
from pyvmm.devices.user_irqchip import UserIrqchip
from pyvmm.irq import IrqLine

IOAPIC, LAPIC = 0xFEC0_0000, 0xFEE0_0000
EOI, SVR, LINT0 = 0xB0, 0xF0, 0x350
MASKED, LEVEL = 1 << 16, 1 << 15


class Bench:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.outputs: list[int] = []
        self.irqchip = chip = UserIrqchip(self.clock, self.outputs.append)
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.pio.map(0x20, 2, chip.pic.master)
        self.pio.map(0xA0, 2, chip.pic.slave)
        self.mmio.map(IOAPIC, 0x1000, chip.ioapic)
        self.mmio.map(LAPIC, 0x1000, chip.lapic)

    def program_pic(self) -> None:
        for port, words in ((0x20, (0x20, 4, 1)), (0xA0, (0x28, 2, 1))):
            self.pio.write(port, 1, 0x11)
            for word in words:
                self.pio.write(port + 1, 1, word)

    def program_apics(self, **pins: int) -> None:
        """Symmetric I/O mode: the PIC shut out, pins to processor 0."""
        self.mmio.write(LAPIC + SVR, 4, 0x1FF)
        self.mmio.write(LAPIC + LINT0, 4, MASKED)
        for name, entry in pins.items():
            self.mmio.write(IOAPIC, 4, 0x10 + 2 * int(name[3:]))
            self.mmio.write(IOAPIC + 0x10, 4, entry)

    def take(self) -> list[int]:
        taken = []
        while self.irqchip.output:
            taken.append(self.irqchip.acknowledge())
        return taken


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_pic_interrupts_a_guest_that_knows_no_apic(bench: Bench) -> None:
    bench.program_pic()
    bench.irqchip.set(4, 1)
    assert bench.outputs == [1]
    assert bench.irqchip.acknowledge() == 0x24
    assert bench.outputs == [1, 0]
    bench.irqchip.set(4, 0)
    bench.pio.write(0x20, 1, 0x20)
    bench.irqchip.set(14, 1)
    assert bench.take() == [0x2E]


def test_an_interrupt_that_is_gone_by_the_acknowledge(bench: Bench) -> None:
    """Its own processor never sees that; another one's thread may."""
    assert bench.irqchip.acknowledge() == -1


def test_in_symmetric_mode_the_ioapic_has_it(bench: Bench) -> None:
    bench.program_pic()
    bench.program_apics(pin4=0x44, pin10=0x5A | LEVEL, pin20=0x64 | LEVEL)
    for gsi in (4, 10, 20):
        bench.irqchip.set(gsi, 1)
    taken = []
    for gsi in (20, 10, 4):
        taken += bench.take()
        bench.irqchip.set(gsi, 0)
        bench.mmio.write(LAPIC + EOI, 4, 0)
    assert taken == [0x64, 0x5A, 0x44]


def test_the_timer_is_on_pin_2_and_nothing_else_is(bench: Bench) -> None:
    bench.program_apics(pin0=0x40, pin2=0x42)
    bench.irqchip.set(2, 1)
    assert bench.take() == []
    bench.irqchip.set(0, 1)
    assert bench.take() == [0x42]


def test_a_pit_ticks_through_both(bench: Bench) -> None:
    pit = I8254(bench.clock, IrqLine(lambda level: bench.irqchip.set(0, level)))
    bench.pio.map(0x40, 4, pit)
    bench.program_pic()
    for value in (0x34, 0xA9, 0x04):  # counter 0 in mode 2, 1193 pulses: a millisecond
        bench.pio.write(0x43 if value == 0x34 else 0x40, 1, value)
    bench.clock.step(1_000_000)
    assert bench.take() == [0x20]
    bench.pio.write(0x20, 1, 0x20)
    bench.program_apics(pin2=0x42)
    bench.clock.step(1_000_000)
    assert bench.take() == [0x42]


def test_watched_pins(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    controllers = bench.irqchip.controllers
    controllers["ioapic"].inputs.watch = lambda n, level: seen.append(("ioapic", n, level))
    controllers["pic"].inputs.watch = lambda n, level: seen.append(("pic", n, level))
    bench.irqchip.set(0, 1)
    bench.irqchip.set(17, 1)
    assert seen == [("pic", 0, 1), ("ioapic", 0, 1), ("ioapic", 17, 1)]
    controllers["ioapic"].inputs.watch = controllers["pic"].inputs.watch = None
    bench.irqchip.set(0, 0)
    assert len(seen) == 3
    outputs = controllers["pic"].outputs
    assert outputs is not None
    bench.program_pic()
    outputs.watch = lambda n, level: seen.append(("intr", n, level))
    bench.irqchip.set(3, 1)
    bench.irqchip.acknowledge()
    assert seen[3:] == [("intr", 0, 1), ("intr", 0, 0)]


def test_pins_can_be_driven_by_hand(bench: Bench) -> None:
    bench.program_apics(pin5=0x45)
    pins = bench.irqchip.controllers["ioapic"].inputs
    assert pins.count == 24
    pins.set(5, 1)
    assert bench.take() == [0x45]


def test_reset_of_each_leaves_the_pins_where_they_are(bench: Bench) -> None:
    bench.program_pic()
    bench.irqchip.set(4, 1)
    for device in (bench.irqchip.pic, bench.irqchip.ioapic, bench.irqchip.lapic):
        device.reset()
    assert bench.outputs == [1, 0]
    bench.program_pic()
    bench.irqchip.set(4, 0)
    bench.irqchip.set(4, 1)
    assert bench.take() == [0x24]
