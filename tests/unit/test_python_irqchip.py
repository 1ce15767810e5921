"""Irqchip with the controllers that are ours: lines, MSIs and irqfds, as KVM's has them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.errors import ConfigError
from pyvmm.event_loop import EventLoop
from pyvmm.guest_memory import GuestMemory
from pyvmm.irqfd import IrqFd
from pyvmm.python_irqchip import PythonIrqchip

IOAPIC, LAPIC = 0xFEC0_0000, 0xFEE0_0000
TPR, EOI, LDR, SVR, IRR, LINT0 = 0x80, 0xB0, 0xD0, 0xF0, 0x200, 0x350
MASKED, LEVEL = 1 << 16, 1 << 15
MSI = 0xFEE0_0000
DEADLINE_S = 10


class Loop(EventLoop):
    """Looks at the descriptors when it is told to, on the thread that does."""

    def __init__(self) -> None:
        self.readers: dict[int, object] = {}

    def add_reader(self, fd: int, callback: object, *, edge: bool = False) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> bool:
        return self.readers.pop(fd, None) is not None

    def turn(self) -> None:
        for fd in select.select(list(self.readers), [], [], 0)[0]:
            self.readers[fd]()  # type: ignore[operator]

    def __del__(self) -> None:
        pass


class Bench:
    def __init__(self) -> None:
        self.loop = Loop()
        self.memory = GuestMemory(2 << 20)
        self.pio = AddressSpace("pio", 1 << 16)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.chip = PythonIrqchip(VirtualClock(), self.loop, self.memory, self.pio, self.mmio)
        for late in self.chip.devices.values():
            for space, address, region in late.regions():
                space.add(address, region)
        self.lapic = self.chip.devices["lapic"].device
        self.apic(SVR, 0x1FF)
        self.apic(LINT0, MASKED)

    def apic(self, register: int, value: int) -> None:
        self.mmio.write(LAPIC + register, 4, value)

    def route(self, pin: int, entry: int) -> None:
        self.mmio.write(IOAPIC, 4, 0x10 + 2 * pin)
        self.mmio.write(IOAPIC + 0x10, 4, entry)

    def program_pic(self, level: int = 0) -> None:
        """Vectors from 0x20, no mask, EOIs by hand; the inputs in ``level`` level triggered; ExtINT at LINT0."""
        for port, words in ((0x20, (0x20, 4, 1, 0)), (0xA0, (0x28, 2, 1, 0))):
            self.pio.write(port, 1, 0x11)
            for word in words:
                self.pio.write(port + 1, 1, word)
        self.pio.write(0x4D0, 1, level & 0xFF)
        self.pio.write(0x4D1, 1, level >> 8)
        self.apic(LINT0, 0x700)

    def take(self) -> list[int]:
        """The vectors that a processor would take now, one after the other, none of them ended."""
        taken = []
        while self.lapic.output:  # type: ignore[attr-defined]
            taken.append(self.lapic.acknowledge())  # type: ignore[attr-defined]
        return taken

    def pending(self) -> set[int]:
        """Vectors in the local APIC's IRR."""
        words = [self.mmio.read(LAPIC + IRR + 0x10 * n, 4) for n in range(8)]
        return {32 * n + bit for n, word in enumerate(words) for bit in range(32) if word >> bit & 1}


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.chip.close()


def signalled(irqfd: IrqFd) -> int:
    """How often the guest's end of interrupt was told since the last look."""
    try:
        return os.eventfd_read(irqfd.resample_fd)
    except BlockingIOError:
        return 0


# -- lines -------------------------------------------------------------------------------------------------------------


def test_lines_to_one_interrupt_are_ored(bench: Bench) -> None:
    bench.route(10, 0x5A | LEVEL)
    first, second = bench.chip.line(10), bench.chip.line(10)
    first.raise_()
    second.raise_()
    first.lower()
    assert bench.take() == [0x5A]
    bench.apic(EOI, 0)
    assert bench.take() == [0x5A]
    second.lower()
    bench.apic(EOI, 0)
    assert bench.take() == []


@pytest.mark.parametrize("gsi", [-1, 24, True, "4", 1.0, None])
def test_there_are_24_of_them(bench: Bench, gsi: int) -> None:
    with pytest.raises(ConfigError, match="give a whole number from 0 to 23"):
        bench.chip.line(gsi)


def test_an_interrupt_that_makes_edges_is_for_one(bench: Bench) -> None:
    bench.chip.line(5, "serial")
    with pytest.raises(ConfigError, match="GSI 5 has serial: net may share it by an irqfd with resample"):
        bench.chip.irqfd(5, name="net")
    bench.chip.irqfd(5, name="net", resample=True)
    edges = bench.chip.irqfd(6, name="disk")
    for ask in (bench.chip.line, bench.chip.wire):
        with pytest.raises(ConfigError, match="GSI 6 is for disk alone, whose irqfd makes edges: net needs another"):
            ask(6, "net")
    with pytest.raises(ConfigError, match="GSI 6 is for disk alone"):
        bench.chip.irqfd(6, name="net", resample=True)
    edges.close()
    bench.chip.irqfd(6, name="net", resample=True).close()
    bench.chip.irqfd(6, name="disk").close()


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_message_goes_to_the_local_apic(bench: Bench) -> None:
    msi = bench.chip.msi(MSI, 0x41)
    assert msi.fire()
    assert bench.take() == [0x41]
    bench.apic(EOI, 0)
    msi.change(MSI, 0x42)
    assert msi.fire()
    assert bench.take() == [0x42]


@pytest.mark.parametrize(
    ("address", "data", "reaches"),
    [
        (MSI | 0xFF << 12, 0x41, True),  # everybody
        (MSI | 1 << 12, 0x41, False),  # another processor
        (MSI | 4 | 8 << 12, 0x41, True),  # logical, this one
        (MSI | 4 | 4 << 12, 0x41, False),  # logical, another
        (MSI | 8, 0x41, True),  # lowest priority of those addressed
        (MSI, 0x141, True),  # the same by the delivery mode
        (MSI, 0xC041, True),  # level, asserted
        (MSI, 0x8041, False),  # level, let go
        (0xFED0_0000, 0x41, False),  # no message at all
        (1 << 40 | MSI, 0x41, False),
        (0, 0, False),
    ],
)
def test_addresses_and_data(bench: Bench, address: int, data: int, reaches: bool) -> None:
    bench.apic(LDR, 8 << 24)
    assert bench.chip.msi(address, data).fire() is reaches
    assert bench.pending() == ({0x41} if reaches else set())


def test_a_message_elsewhere_is_a_write(bench: Bench) -> None:
    """PCI 3.0, 6.8.1: an MSI is a write of 32 bits; only the address makes it an interrupt (SDM vol. 3, 11.11.1)."""
    assert not bench.chip.msi(0x1000, 0x1234_5678).fire()
    assert bench.memory.read(0xFFF, 6) == bytes.fromhex("007856341200")
    for nowhere in (2 << 20, (2 << 20) - 2, 0xFFFF_FFFF_FFFF_FFFC):
        assert not bench.chip.msi(nowhere, 0xFFFF_FFFF).fire()


def test_a_vector_of_an_exception_is_an_error_of_the_message(bench: Bench) -> None:
    assert bench.chip.msi(MSI, 0x0F).fire()
    assert bench.take() == []


def test_nobody_takes_it_while_the_apic_is_off(bench: Bench) -> None:
    bench.apic(SVR, 0xFF)
    assert not bench.chip.msi(MSI, 0x41).fire()


# -- irqfds ------------------------------------------------------------------------------------------------------------


def test_an_irqfd_of_a_message(bench: Bench) -> None:
    msi = bench.chip.msi(MSI, 0x41)
    irqfd = bench.chip.irqfd(msi)
    irqfd.signal()
    assert bench.take() == []
    bench.loop.turn()
    assert bench.take() == [0x41]
    bench.apic(EOI, 0)
    msi.change(MSI, 0x42)
    os.eventfd_write(irqfd.fd, 3)
    bench.loop.turn()
    assert bench.take() == [0x42]
    with pytest.raises(ConfigError, match="a message has no level"):
        bench.chip.irqfd(msi, resample=True)


def test_an_irqfd_of_a_pin_makes_edges(bench: Bench) -> None:
    bench.route(5, 0x45)
    irqfd = bench.chip.irqfd(5)
    assert irqfd.resample_fd == -1
    for _ in range(3):
        irqfd.signal()
        bench.loop.turn()
        assert bench.take() == [0x45]
        bench.apic(EOI, 0)


@pytest.mark.parametrize(("gsi", "pin"), [(10, 10), (17, 17), (0, 2)])
def test_a_level_until_the_end_of_interrupt_at_the_ioapic(bench: Bench, gsi: int, pin: int) -> None:
    bench.route(pin, 0x4A | LEVEL)
    irqfd = bench.chip.irqfd(gsi, resample=True)
    irqfd.signal()
    bench.loop.turn()
    assert bench.take() == [0x4A]
    assert signalled(irqfd) == 0
    bench.apic(EOI, 0)
    assert signalled(irqfd) == 1
    assert bench.take() == [], "it is low again, before the pin is looked at"
    # The device still wants it, and says so.
    irqfd.signal()
    bench.loop.turn()
    assert bench.take() == [0x4A]
    bench.apic(EOI, 0)
    assert signalled(irqfd) == 1


@pytest.mark.parametrize(("irq", "vector"), [(5, 0x25), (11, 0x2B)])
def test_a_level_until_the_end_of_interrupt_at_the_pic(bench: Bench, irq: int, vector: int) -> None:
    bench.program_pic(level=1 << irq)
    irqfd = bench.chip.irqfd(irq, resample=True)
    for _ in range(3):
        irqfd.signal()
        bench.loop.turn()
        assert bench.take() == [vector]
        assert signalled(irqfd) == 0
        if irq >= 8:
            bench.pio.write(0xA0, 1, 0x20)
        bench.pio.write(0x20, 1, 0x60 | (irq if irq < 8 else 2))
        assert signalled(irqfd) == 1
        assert bench.take() == []


def test_automatic_ends_of_interrupt_count_too(bench: Bench) -> None:
    bench.program_pic(level=1 << 5)
    for port, word in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, 0)):
        bench.pio.write(port, 1, word)
    irqfd = bench.chip.irqfd(5, resample=True)
    irqfd.signal()
    bench.loop.turn()
    assert bench.take() == [0x25]
    assert signalled(irqfd) == 1


def test_a_level_is_shared_with_lines_and_others(bench: Bench) -> None:
    bench.route(10, 0x4A | LEVEL)
    line = bench.chip.line(10)
    irqfds = [bench.chip.irqfd(10, resample=True) for _ in range(2)]
    line.raise_()
    for irqfd in irqfds:
        irqfd.signal()
    bench.loop.turn()
    assert bench.take() == [0x4A]
    bench.apic(EOI, 0)
    assert [signalled(irqfd) for irqfd in irqfds] == [1, 1]
    assert bench.take() == [0x4A], "the line is still up"
    irqfds[0].close()
    line.lower()
    bench.apic(EOI, 0)
    assert signalled(irqfds[1]) == 1
    assert bench.take() == []


def test_closing_gives_everything_back(bench: Bench) -> None:
    before = set(os.listdir("/proc/self/fd"))
    bench.route(10, 0x4A | LEVEL)
    irqfds = [
        bench.chip.irqfd(10, resample=True),
        bench.chip.irqfd(11),
        bench.chip.irqfd(bench.chip.msi(MSI, 0x41)),
    ]
    irqfds[0].signal()
    bench.loop.turn()
    assert bench.take() == [0x4A]
    irqfds[0].close()
    irqfds[0].close()
    assert irqfds[0].fd == irqfds[0].resample_fd == -1
    bench.apic(EOI, 0)
    assert bench.take() == [], "what it drove is low"
    bench.chip.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert bench.loop.readers == {}


def test_a_signal_that_comes_late_finds_nothing(bench: Bench) -> None:
    irqfd = bench.chip.irqfd(bench.chip.msi(MSI, 0x41))
    irqfd.signal()
    (late,) = bench.loop.readers.values()
    irqfd.close()
    late()  # type: ignore[operator]
    assert bench.pending() == set()
