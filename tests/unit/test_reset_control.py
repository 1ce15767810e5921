"""Port 0xcf9."""

from __future__ import annotations

from pyvmm.address_space import AddressSpace
from pyvmm.devices.reset_control import ResetControl


def make() -> tuple[AddressSpace, ResetControl, list[int]]:
    resets: list[int] = []
    device = ResetControl(lambda: resets.append(1))
    pio = AddressSpace("pio", 0x10000)
    pio.map(0xCF9, 1, device)
    return pio, device, resets


def test_the_rising_edge_of_the_cpu_bit_resets() -> None:
    pio, device, resets = make()
    pio.write(0xCF9, 1, 0x02)
    assert resets == []
    pio.write(0xCF9, 1, 0x06)
    assert len(resets) == 1
    pio.write(0xCF9, 1, 0x0E)
    assert len(resets) == 1, "no edge"
    pio.write(0xCF9, 1, 0x00)
    pio.write(0xCF9, 1, 0x04)
    assert len(resets) == 2
    device.reset()
    pio.write(0xCF9, 1, 0x06)
    assert len(resets) == 3, "the machine that comes back can be reset again"


def test_what_is_written_reads_back() -> None:
    pio, device, _ = make()
    assert pio.read(0xCF9, 1) == 0
    pio.write(0xCF9, 1, 0xFA)
    assert pio.read(0xCF9, 1) == 0x0A
    other_pio, other, resets = make()
    other.load(device.save())
    assert other_pio.read(0xCF9, 1) == 0x0A
    assert resets == []
    device.reset()
    assert pio.read(0xCF9, 1) == 0
