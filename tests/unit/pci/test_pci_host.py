"""Configuration mechanism 1: who answers at which of the eight ports, and what the reset register gets of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pci_bench import ADDRESS, DATA, HEADER, HOST, IDE, ISA, PM, Board, Bus

from pyvmm.address_space import AddressSpace
from pyvmm.devices.pci.device import PciDevice
from pyvmm.devices.pci.host import PciHost
from pyvmm.errors import ConfigError

ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


class Scratch(PciDevice):
    """All its device-specific registers are memory."""

    def __init__(self) -> None:
        super().__init__(device_id=0x1234, class_code=0xFF0000)
        self.define(0x40, 0xC0, 0, (1 << 8 * 0xC0) - 1)


class Bench(Bus):
    def __init__(self) -> None:
        super().__init__(AddressSpace("pio", 0x10000))
        self.host = PciHost()
        self.pio.map(ADDRESS, 8, self.host)
        self.device = Scratch()
        self.host.add(self.device, 3, 2)


def test_the_address_register_is_a_dword_only() -> None:
    pio = Bench().pio
    pio.write(ADDRESS, 4, 0x8000_1234)
    assert pio.read(ADDRESS, 4) == 0x8000_1234
    for offset in range(4):
        pio.write(ADDRESS + offset, 1, 0x01)
        assert pio.read(ADDRESS + offset, 1) == 0xFF
    for offset in (0, 2):
        pio.write(ADDRESS + offset, 2, 0x0101)
        assert pio.read(ADDRESS + offset, 2) == 0xFFFF
    assert pio.read(ADDRESS, 4) == 0x8000_1234


def test_linux_finds_the_mechanism() -> None:
    # What pci_check_type1 looks for, with its byte write that must go nowhere.
    pio = Board().pio
    pio.write(0xCFB, 1, 0x01)
    before = pio.read(ADDRESS, 4)
    pio.write(ADDRESS, 4, 0x8000_0000)
    assert pio.read(ADDRESS, 4) == 0x8000_0000
    assert pio.read(DATA, 4) == 0x1237_8086
    pio.write(ADDRESS, 4, before)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nobody_is_all_ones(size: int) -> None:
    bench = Bench()
    pio = bench.pio
    pio.write(ADDRESS, 4, 0x8000_0000 | 3 << 11 | 2 << 8 | 0x40)
    pio.write(DATA, 4, 0x1234_5678)
    for address in (
        0x0000_0000 | 3 << 11 | 2 << 8 | 0x40,  # not enabled
        0x8001_0000 | 3 << 11 | 2 << 8 | 0x40,  # another bus
        0x80FF_0000 | 3 << 11 | 2 << 8 | 0x40,
        0x8000_0000 | 3 << 11 | 0 << 8 | 0x40,  # another function
        0x8000_0000 | 4 << 11 | 2 << 8 | 0x40,  # another slot
        0x8000_0000 | 31 << 11 | 7 << 8,  # a special cycle's address
    ):
        pio.write(ADDRESS, 4, address)
        assert pio.read(DATA, size) == ONES[size], hex(address)
        pio.write(DATA, size, 0)
    assert bench.device.get(0x40, 4) == 0x1234_5678


@given(st.lists(st.tuples(st.integers(0x40, 0xFF), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF_FFFF))))
def test_every_size_at_every_byte_of_the_window(accesses: list[tuple[int, int, int]]) -> None:
    bench, model = Bench(), bytearray(256)
    for register, size, value in accesses:
        value &= ONES[size]
        bench.set((3, 2), register, value, size)
        # An access that leaves the window leaves the register too: those bytes go to port 0xd00 and on.
        size = min(size, 4 - register % 4)
        model[register : register + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    assert bench.device.config[0x40:] == model[0x40:]
    for register in range(0x40, 0x100):
        assert bench.get((3, 2), register, 1) == model[register]


def test_the_low_bits_of_the_address_select_a_byte_as_in_qemu() -> None:
    bench = Bench()
    bench.set((3, 2), 0x40, 0x4433_2211)
    for low in range(4):
        bench.pio.write(ADDRESS, 4, 0x8000_0000 | 3 << 11 | 2 << 8 | 0x40 | low)
        assert bench.pio.read(DATA, 1) == 0x11 * (low + 1)
    bench.pio.write(ADDRESS, 4, 0x8000_0000 | 3 << 11 | 2 << 8 | 0xFF)
    bench.pio.write(DATA, 4, 0xDDCC_BBAA)  # only one byte of it is inside
    assert bench.pio.read(DATA, 4) == 0xAA


def test_a_byte_at_0xcf9_is_the_reset_register() -> None:
    board = Board()
    board.pio.write(0xCF9, 1, 0x02)
    assert board.pio.read(0xCF9, 1) == 0x02
    assert board.resets == 0
    board.pio.write(0xCF9, 1, 0x06)
    assert board.resets == 1
    board.pio.write(ADDRESS, 4, 0x0000_0000)
    board.pio.write(ADDRESS, 4, 0x8000_0600)  # the same bits as part of a dword are an address
    assert board.resets == 1


def test_only_function_0_of_a_shared_slot_says_multifunction() -> None:
    board = Board()
    assert [board.get(where, HEADER, 1) for where in (HOST, ISA, IDE, PM)] == [0, 0x80, 0, 0]
    host = PciHost()
    zero, one = Scratch(), Scratch()
    host.add(one, 5, 1)  # in any order
    host.add(zero, 5, 0)
    assert (zero.get(HEADER), one.get(HEADER)) == (0x80, 0)
    zero.reset()
    assert zero.get(HEADER) == 0x80


def test_a_place_is_given_once() -> None:
    host = PciHost()
    host.add(Scratch(), 31, 7)
    with pytest.raises(ConfigError, match=r"^Scratch is at PCI 1f\.7 already: give Scratch another slot$"):
        host.add(Scratch(), 31, 7)
    for slot, function in ((32, 0), (0, 8), (-1, 0)):
        with pytest.raises(ConfigError, match="slots 0 to 31"):
            host.add(Scratch(), slot, function)
    assert [(slot, function) for slot, function, _ in host.devices] == [(31, 7)]


def test_reset_and_save() -> None:
    bench = Bench()
    bench.select((3, 2), 0x40)
    state = bench.host.save()
    bench.host.reset()
    assert bench.pio.read(ADDRESS, 4) == 0
    bench.host.load(state)
    bench.host.after_load()
    assert bench.pio.read(ADDRESS, 4) == 0x8000_1A40
