"""ACPI's general-purpose events: their registers, and the SCI that they share with the fixed ones."""

from __future__ import annotations

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.devices.acpi_gpe import GpeBlock
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.irq import IrqLine

PM, STATUS, ENABLE = 0x600, 0xAFE0, 0xAFE2


class Bench:
    """A PM block in ACPI mode, and the events beside it."""

    def __init__(self) -> None:
        self.sci = 0
        self.pm = AcpiPm(VirtualClock(), IrqLine(self._drive), lambda: None, s5_type=5)
        self.gpe = GpeBlock(self.pm.general_event)
        self.pio = AddressSpace("pio", 0x10000)
        self.pio.map(PM, 12, self.pm)
        self.pio.map(STATUS, 4, self.gpe)

    def _drive(self, level: int) -> None:
        self.sci = level


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_registers(bench: Bench) -> None:
    pio = bench.pio
    assert pio.read(STATUS, 4) == 0
    pio.write(STATUS, 4, 0x1234_FFFF)
    assert pio.read(STATUS, 4) == 0x1234_0000
    pio.write(ENABLE, 1, 0x56)
    assert [pio.read(STATUS + n, 1) for n in range(4)] == [0, 0, 0x56, 0x12]
    bench.gpe.happen(3)
    bench.gpe.happen(9)
    assert pio.read(STATUS, 2) == 0x0208
    pio.write(STATUS + 1, 1, 0xFF)
    assert pio.read(STATUS, 4) == 0x1256_0008
    bench.gpe.reset()
    assert pio.read(STATUS, 4) == 0


def test_an_enabled_event_makes_an_sci_until_it_is_cleared(bench: Bench) -> None:
    bench.gpe.happen(5)
    assert bench.sci == 0
    bench.pio.write(ENABLE, 2, 1 << 5)
    assert bench.sci == 1
    bench.pio.write(STATUS, 2, 1 << 4)
    assert bench.sci == 1
    bench.pio.write(STATUS, 2, 1 << 5)
    assert bench.sci == 0
    bench.gpe.happen(5)
    assert bench.sci == 1
    bench.pio.write(ENABLE, 2, 0)
    assert bench.sci == 0


def test_the_sci_is_both_blocks(bench: Bench) -> None:
    bench.pio.write(ENABLE, 2, 1 << 5)
    bench.pio.write(PM + 2, 2, 0x0100)
    bench.gpe.happen(5)
    bench.pm.press()
    assert bench.sci == 1
    bench.pio.write(STATUS, 2, 1 << 5)
    assert bench.sci == 1
    bench.pio.write(PM, 2, 0x0100)
    assert bench.sci == 0


def test_outside_of_acpi_mode_there_is_none(bench: Bench) -> None:
    bench.pio.write(ENABLE, 2, 1 << 5)
    bench.pm.set_acpi_mode(False)
    bench.gpe.happen(5)
    assert bench.sci == 0
    bench.pm.set_acpi_mode(True)
    assert bench.sci == 1


@pytest.mark.parametrize("first", ["pm", "gpe"])
def test_save_and_load(bench: Bench, first: str) -> None:
    """Whichever of the two blocks goes on first."""
    bench.pio.write(ENABLE, 2, 1 << 5)
    bench.gpe.happen(5)
    other = Bench()
    other.gpe.load(bench.gpe.save())
    other.pm.load(bench.pm.save())
    assert other.sci == 0
    for block in (other.pm, other.gpe) if first == "pm" else (other.gpe, other.pm):
        block.after_load()
    assert other.sci == 1
    assert other.gpe.save() == bench.gpe.save()
