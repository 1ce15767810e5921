"""isa-debug-exit, on a bus: each size and offset a guest may use."""

from __future__ import annotations

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.devices.debug_exit import DebugExit


@pytest.mark.parametrize(
    ("port", "size", "value"), [(0xF4, 1, 0x10), (0xF4, 2, 0x1234), (0xF4, 4, 0x12345678), (0xF6, 1, 0xFF)]
)
def test_a_write_of_any_size_exits_with_its_value(port: int, size: int, value: int) -> None:
    seen: list[int] = []
    pio = AddressSpace("pio", 0x10000)
    pio.map(0xF4, 4, DebugExit(seen.append))
    pio.write(port, size, value)
    assert seen == [value]


def test_it_reads_as_zero() -> None:
    pio = AddressSpace("pio", 0x10000)
    pio.map(0xF4, 4, DebugExit(lambda value: pytest.fail("a read is no exit")))
    assert [pio.read(0xF4, size) for size in (1, 2, 4)] == [0, 0, 0]
