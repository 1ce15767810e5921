"""The waking vector: which one counts, and in what state it is entered (ACPI 6.5, table 5.13)."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.guest_memory import GuestMemory
from pyvmm.x86 import acpi, layout, wake

MIB = 1 << 20


def waking(vector: int, x_vector: int = 0) -> wake.WakingState | None:
    memory = GuestMemory(2 * MIB)
    acpi.build(1).write(memory)
    memory.write(layout.FACS + 12, vector.to_bytes(4, "little"))
    memory.write(layout.FACS + 24, x_vector.to_bytes(8, "little"))
    return wake.waking_state(memory)


def registers(state: wake.WakingState) -> tuple[dict[str, Any], dict[str, Any]]:
    regs: dict[str, Any] = {}
    sregs: dict[str, Any] = {}
    state.apply(regs, sregs)
    return regs, sregs


@pytest.mark.parametrize(
    ("vector", "cs", "ip"),
    [(0x12345, 0x1234, 5), (0x1000, 0x100, 0), (0xFFFFF, 0xFFFF, 15), (1, 0, 1), (0x9E000, 0x9E00, 0)],
)
def test_real_mode(vector: int, cs: int, ip: int) -> None:
    """0x12345 is the specification's own example: 0x1234:0x0005."""
    state = waking(vector)
    assert state is not None
    regs, sregs = registers(state)
    assert (sregs["cs"]["selector"], sregs["cs"]["base"], regs["rip"]) == (cs, cs << 4, ip)
    assert all(sregs[name]["base"] == 0 for name in ("ds", "es", "ss", "fs", "gs"))
    assert sregs["cr0"] & 0x8000_0001 == 0
    assert not regs["rflags"] & 0x200


@pytest.mark.parametrize("vector", [0, 0x1000])
@pytest.mark.parametrize("x_vector", [1, 0x10_0000, 0xFFFF_FFFF])
def test_the_longer_one_wins(vector: int, x_vector: int) -> None:
    state = waking(vector, x_vector)
    assert state is not None
    regs, sregs = registers(state)
    assert regs["rip"] == x_vector
    assert sregs["cr0"] & 0x8000_0001 == 1
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        segment = sregs[name]
        assert (segment["base"], segment["limit"], segment["db"]) == (0, 0xFFFF_FFFF, 1)
    assert not regs["rflags"] & 0x200


@pytest.mark.parametrize(("vector", "x_vector"), [(0, 0), (0x10_0000, 0), (0xFFFF_FFFF, 0), (0x1000, 1 << 32)])
def test_what_can_not_be_entered(vector: int, x_vector: int) -> None:
    assert waking(vector, x_vector) is None


def test_without_a_facs() -> None:
    assert wake.waking_state(GuestMemory(2 * MIB)) is None
    memory = GuestMemory(2 * MIB)
    acpi.build(1).write(memory)
    assert wake.waking_state(memory, 2 * MIB - 8) is None  # not all of it in memory
