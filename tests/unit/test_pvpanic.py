"""pvpanic, on a bus: which bits say what, and what a guest finds there."""

from __future__ import annotations

import pytest

from pyvmm import Machine
from pyvmm.address_space import AddressSpace
from pyvmm.devices.pvpanic import PvPanic


@pytest.mark.parametrize(
    ("value", "said"), [(0, ""), (1, "panic"), (2, "loaded"), (3, "panic"), (4, ""), (0xFC, ""), (0xFF, "panic")]
)
def test_what_a_bit_says(value: int, said: str) -> None:
    seen: list[str] = []
    pio = AddressSpace("pio", 0x10000)
    pio.map(0x505, 1, PvPanic(lambda: seen.append("panic"), lambda: seen.append("loaded")))
    pio.write(0x505, 1, value)
    assert "".join(seen) == said
    assert pio.read(0x505, 1) == 3


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_it_is_there_where_it_is_asked_for(machine: str) -> None:
    for wanted in (False, True):
        with Machine(accel="qtest", machine=machine, memory_mib=4, pvpanic=wanted) as made:
            assert made.pio.read(0x505, 1) == (3 if wanted else 0xFF)
            assert any(b"QEMU0001" in term for term in made.board.acpi_devices()) == wanted
