"""AddressSpace by the rules of QEMU's docs/devel/memory.rst, and against a byte-wise model of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyvmm.address_space import AddressSpace
from pyvmm.device import Device
from pyvmm.errors import ConfigError, StateError
from pyvmm.region import BufferRegion, EventRegion, FifoRegion, LatchRegion, MemoryRegion, RegisterRegion, SinkRegion

DEADLINE_S = 10
ONES = {size: (1 << (8 * size)) - 1 for size in (1, 2, 4, 8)}


class Ram(Device):
    """Bytes, and a log of what the bus called; it insists on what the bus promises."""

    def __init__(self, size: int, **sizes: Any) -> None:
        self.data = bytearray(size)
        self.log: list[tuple[Any, ...]] = []
        self.valid_sizes = sizes.get("valid", (1, 8))
        self.impl_sizes = sizes.get("impl", (1, 8))
        self.unaligned = sizes.get("unaligned", False)

    def check(self, offset: int, size: int) -> None:
        assert self.impl_sizes[0] <= size <= self.impl_sizes[1]
        assert size in (1, 2, 4, 8)
        assert offset >= 0 and offset + size <= len(self.data)
        assert self.unaligned or offset % size == 0

    def read(self, offset: int, size: int) -> int:
        self.check(offset, size)
        self.log.append(("r", offset, size))
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.check(offset, size)
        assert 0 <= value <= ONES[size]
        self.log.append(("w", offset, size, value))
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class Call(Device):
    """Handlers out of functions."""

    valid_sizes = impl_sizes = (1, 8)

    def __init__(
        self,
        on_read: Callable[[int, int], Any] = lambda offset, size: 0,
        on_write: Callable[[int, int, int], Any] = lambda offset, size, value: None,
    ) -> None:
        self.on_read, self.on_write = on_read, on_write

    def read(self, offset: int, size: int) -> int:
        return self.on_read(offset, size)  # type: ignore[no-any-return]

    def write(self, offset: int, size: int, value: int) -> None:
        self.on_write(offset, size, value)


def space(size: int = 0x1000) -> AddressSpace:
    return AddressSpace("mmio", size)


def ram_at(base: int, size: int, **sizes: Any) -> tuple[AddressSpace, Ram]:
    s, device = space(), Ram(size, **sizes)
    s.map(base, size, device)
    return s, device


# -- sizes and alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_access_of_an_implemented_size_is_one_call_at_its_offset(size: int) -> None:
    s, device = ram_at(0x100, 0x40)
    value = 0x8877_6655_4433_2211 & ONES[size]
    s.write(0x110, size, value)
    assert s.read(0x110, size) == value
    assert device.log == [("w", 0x10, size, value), ("r", 0x10, size)]


def test_unclaimed_addresses_read_all_ones_and_swallow_writes() -> None:
    s, device = ram_at(0x100, 8)
    for addr in (0, 0xFF, 0x108, 0xFFF):
        assert s.read(addr, 1) == 0xFF
        s.write(addr, 1, 0x55)
    assert s.read(0xF0, 8) == ONES[8]
    assert s.read(0x108, 4) == ONES[4]
    assert device.log == []


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_aligned_access_that_nobody_begins_is_nobodys(size: int) -> None:
    """outl to 0xcf8 is no write to 0xcf9. QEMU system/physmem.c, address_space_translate_internal: not clamped."""
    s, device = ram_at(0x101, 1)
    s.write(0x100, size, ONES[size] >> 1)
    assert s.read(0x100, size) == ONES[size]
    assert device.log == []


def test_an_aligned_access_is_whole_of_the_region_that_has_its_first_byte() -> None:
    s, low = ram_at(0x100, 2)
    high = Ram(6)
    s.map(0x102, 6, high)
    s.write(0x100, 4, 0x4433_2211)
    assert s.read(0x100, 8) == 0xFFFF_FFFF_FFFF_2211
    assert low.log == [("w", 0, 2, 0x2211), ("r", 0, 2)]
    assert high.log == []


def test_the_pieces_of_an_unaligned_access_have_owners_of_their_own() -> None:
    s, device = ram_at(0x104, 4)
    s.map(0x109, 1, other := Ram(1))
    s.write(0x102, 4, 0x4433_2211)  # two bytes of nobody's, two of the region's
    assert device.log == [("w", 0, 2, 0x4433)]
    s.write(0x106, 4, 0x8877_6655)  # the second half begins at 0x108, which is nobody's: 0x109 gets nothing
    assert device.log[1:] == [("w", 2, 2, 0x6655)]
    assert other.log == []
    s.write(0x107, 4, 0x0C0B_0A09)  # 0x107 alone, 0x108 with 0x109, 0x10a
    assert device.log[2:] == [("w", 3, 1, 9)]
    assert other.log == []


def test_a_region_that_begins_at_an_odd_address_takes_its_own_bytes_of_an_aligned_access() -> None:
    """Its offsets decide how they are cut; what follows it in that access is nobody's."""
    s, device = ram_at(0x103, 3)
    s.map(0x106, 2, after := Ram(2))
    s.write(0x104, 4, 0x4433_2211)
    assert device.log == [("w", 1, 1, 0x11), ("w", 2, 1, 0x22)]
    assert after.log == []


def test_wider_than_implemented_is_split_lowest_address_first() -> None:
    s, device = ram_at(0, 16, impl=(1, 2))
    s.write(8, 8, 0x8877_6655_4433_2211)
    assert device.log == [
        ("w", 8, 2, 0x2211),
        ("w", 10, 2, 0x4433),
        ("w", 12, 2, 0x6655),
        ("w", 14, 2, 0x8877),
    ]
    assert s.read(8, 8) == 0x8877_6655_4433_2211


def test_narrower_than_implemented_reads_the_container() -> None:
    s, device = ram_at(0x20, 8, impl=(4, 4))
    device.data[:] = bytes(range(0x10, 0x18))
    assert s.read(0x21, 1) == 0x11
    assert s.read(0x26, 2) == 0x1716
    assert device.log == [("r", 0, 4), ("r", 4, 4)]


def test_narrower_than_implemented_writes_read_modify_write() -> None:
    s, device = ram_at(0x20, 8, impl=(4, 4))
    device.data[:] = bytes(range(0x10, 0x18))
    s.write(0x25, 1, 0xAB)
    assert device.log == [("r", 4, 4), ("w", 4, 4, 0x1716_AB14)]
    assert device.data == bytes([0x10, 0x11, 0x12, 0x13, 0x14, 0xAB, 0x16, 0x17])


def test_an_unaligned_access_crossing_two_containers_reaches_both() -> None:
    s, device = ram_at(0, 8, impl=(4, 4), unaligned=True)
    device.data[:] = bytes(range(8))
    assert s.read(3, 2) == 0x0403
    s.write(3, 2, 0xBBAA)
    assert device.data == bytes([0, 1, 2, 0xAA, 0xBB, 5, 6, 7])


def test_larger_than_valid_is_split_to_valid_accesses() -> None:
    s, device = ram_at(0, 8, valid=(1, 2))
    device.data[:] = bytes(range(8))
    assert s.read(0, 8) == 0x0706_0504_0302_0100
    assert device.log == [("r", 0, 2), ("r", 2, 2), ("r", 4, 2), ("r", 6, 2)]


def test_smaller_than_valid_floats() -> None:
    s, device = ram_at(0, 8, valid=(4, 4))
    assert s.read(0, 1) == 0xFF
    assert s.read(0, 2) == 0xFFFF
    s.write(4, 1, 0)
    assert device.log == []
    assert s.read(4, 4) == 0
    assert device.log == [("r", 4, 4)]


def test_an_unaligned_access_is_split_into_aligned_ones() -> None:
    s, device = ram_at(0x100, 16)
    device.data[:] = bytes(range(16))
    assert s.read(0x103, 8) == int.from_bytes(bytes(range(3, 11)), "little")
    assert device.log == [("r", 3, 1), ("r", 4, 4), ("r", 8, 2), ("r", 10, 1)]


def test_an_unaligned_access_of_a_device_that_takes_it_is_one_call() -> None:
    s, device = ram_at(0x100, 16, unaligned=True)
    device.data[:] = bytes(range(16))
    assert s.read(0x103, 8) == int.from_bytes(bytes(range(3, 11)), "little")
    assert device.log == [("r", 3, 8)]


def test_an_unaligned_access_below_the_valid_minimum_floats_in_pieces() -> None:
    # Offset 2, not aligned for 4 bytes: both halves are below what the region calls valid.
    s, device = ram_at(0, 8, valid=(4, 4), impl=(4, 4))
    assert s.read(2, 4) == ONES[4]
    assert device.log == []


def test_alignment_is_that_of_the_offset_not_of_the_address() -> None:
    s, device = ram_at(0x101, 8)
    assert s.read(0x101, 4) == 0
    assert device.log == [("r", 0, 4)]


def test_map_overrides_the_sizes_of_the_device() -> None:
    s, device = space(), Ram(8)
    s.map(0, 8, device, valid_sizes=(1, 4), impl_sizes=(1, 1), unaligned=True)
    s.read(0, 2)
    assert device.log == [("r", 0, 1), ("r", 1, 1)]


def test_map_can_name_other_handlers_for_a_second_region() -> None:
    seen: list[tuple[int, ...]] = []
    device = Ram(4)
    s = space()
    s.map(0, 4, device)
    s.map(
        0x10,
        4,
        device,
        read=lambda offset, size: offset + 0x40,
        write=lambda *access: seen.append(access),
        name="window",
    )
    assert s.read(0x12, 1) == 0x42
    s.write(0x13, 1, 7)
    assert seen == [(3, 1, 7)]
    assert device.log == []


def test_values_wider_than_the_access_are_cut_off() -> None:
    s = space()
    s.map(0, 8, Call(lambda offset, size: -1))
    s.map(8, 8, Call(lambda offset, size: 1 << 100 | 0x1234))
    assert s.read(0, 2) == 0xFFFF
    assert s.read(8, 1) == 0x34
    assert s.read(8, 8) == 0x1234


# -- straddling --------------------------------------------------------------------------------------------


def test_an_access_that_straddles_two_regions_reaches_both() -> None:
    s = space()
    low, high = Ram(4), Ram(4)
    s.map(0x10, 4, low)
    s.map(0x14, 4, high)
    s.write(0x12, 4, 0x4433_2211)
    assert low.data == b"\0\0\x11\x22"
    assert high.data == b"\x33\x44\0\0"
    assert s.read(0x12, 4) == 0x4433_2211


def test_an_access_that_straddles_gaps_reads_ones_there() -> None:
    s = space()
    for base in (0x11, 0x14):
        s.add(base, LatchRegion(1, 0))
    assert s.read(0x11, 8) == 0xFFFF_FFFF_00FF_FF00


def test_an_access_that_begins_below_a_region_and_ends_behind_it() -> None:
    s, device = ram_at(0x103, 2)
    s.write(0x101, 8, 0x8877_6655_4433_2211)  # 0x101, 0x102 with 0x103, 0x104 to 0x107, 0x108
    assert device.data == b"\0\x44"
    assert s.read(0x101, 8) == 0xFFFF_FFFF_44FF_FFFF


def test_an_access_at_the_end_of_the_space() -> None:
    s = AddressSpace("pio", 1 << 16)
    device = Ram(2)
    s.map(0xFFFE, 2, device)
    s.write(0xFFFE, 2, 0x1234)
    assert s.read(0xFFFB, 4) == 0x34FF_FFFF
    assert s.read(0xFFFD, 2) == 0x34FF
    assert s.read(0xFFFC, 4) == 0xFFFF_FFFF
    with pytest.raises(ValueError, match="0xfffe"):
        s.read(0xFFFE, 4)


def test_the_top_of_a_64_bit_space_does_not_wrap() -> None:
    s = AddressSpace("all", (1 << 64) - 1)
    bottom, top = Ram(8), Ram(8)
    s.map(0, 8, bottom)
    s.map((1 << 64) - 9, 8, top)
    s.write((1 << 64) - 9, 8, 0x0102_0304_0506_0708)
    assert top.data == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert s.read((1 << 64) - 5, 4) == 0x0102_0304
    assert bottom.log == []


def test_one_region_over_the_whole_of_a_64_bit_space() -> None:
    size = (1 << 64) - 1
    s = AddressSpace("all", size)
    calls: list[tuple[int, int]] = []

    def read(offset: int, n: int) -> int:
        calls.append((offset, n))
        return 0

    s.map(0, size, Call(read))
    assert s.read(0, 8) == 0
    assert s.read(size - 3, 2) == 0
    assert calls == [(0, 8), (size - 3, 2)]


@pytest.mark.parametrize(
    ("addr", "size"), [(0, 0), (0, 3), (0, 16), (-1, 1), (0x1000, 1), (0xFFF, 2), (1 << 64, 1)]
)
def test_a_host_side_access_outside_of_the_space_is_refused(addr: int, size: int) -> None:
    with pytest.raises(ValueError, match="mmio"):
        space().read(addr, size)
    with pytest.raises(ValueError, match="mmio"):
        space().write(addr, size, 0)


# -- mapping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "size"), [(0x100, 1), (0x10F, 1), (0xF0, 0x11), (0x0, 0x1000), (0x104, 4), (0x10F, 9)]
)
def test_an_overlap_is_refused_and_both_are_named(base: int, size: int) -> None:
    s = space()
    s.map(0x100, 0x10, Ram(16), name="uart")
    with pytest.raises(ConfigError, match=r"timer at .* overlaps uart at 0x100-0x10f in mmio"):
        s.map(base, size, Ram(16), name="timer")
    assert [r.name for r in s.regions] == ["uart"]


def test_regions_may_touch() -> None:
    s = space()
    for base in (0x110, 0xF0, 0x100):
        s.map(base, 0x10, Ram(16))
    assert [r.base for r in s.regions] == [0xF0, 0x100, 0x110]


@pytest.mark.parametrize("base", [-1, 0xFF9, 0x1000, 1 << 64])
def test_a_region_that_leaves_the_space_is_refused(base: int) -> None:
    with pytest.raises(ConfigError, match=r"leaves the mmio space of 0x1000"):
        space().map(base, 8, Ram(8))


@pytest.mark.parametrize("size", [0, -1, (1 << 64) + 1, 1 << 64])
def test_a_region_of_no_possible_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        MemoryRegion(size, Ram(8))


@pytest.mark.parametrize("sizes", [(0, 4), (1, 3), (4, 1), (1, 16), (-1, 8)])
def test_impossible_access_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="valid_sizes"):
        MemoryRegion(8, Ram(8), valid_sizes=sizes)
    with pytest.raises(ConfigError, match="impl_sizes"):
        MemoryRegion(8, Ram(8), impl_sizes=sizes)


def test_a_region_that_would_be_widened_past_its_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        MemoryRegion(6, Ram(6), valid_sizes=(1, 4), impl_sizes=(4, 4))
    s, device = ram_at(0, 6, valid=(4, 4), impl=(4, 4))
    assert s.read(4, 4) == ONES[4]
    assert device.log == []


def test_a_region_is_in_one_place_at_a_time() -> None:
    s, other = space(), AddressSpace("pio", 0x100)
    region = s.map(0, 8, Ram(8))
    with pytest.raises(StateError, match="mapped already"):
        s.add(0x100, region)
    with pytest.raises(StateError, match="mapped already"):
        other.add(0, region)
    with pytest.raises(StateError, match="not mapped in pio"):
        other.unmap(region)
    s.unmap(region)
    with pytest.raises(StateError, match="not mapped"):
        s.unmap(region)
    assert region.base is None
    other.add(0x10, region)
    assert (region.base, region.space) == (0x10, other)


def test_what_is_no_device_is_no_region() -> None:
    with pytest.raises(TypeError, match="no device"):
        space().map(0, 8, object())  # type: ignore[arg-type]
    for what in (None, Ram(8)):
        with pytest.raises(TypeError):
            space().add(0, what)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            space().unmap(what)  # type: ignore[arg-type]


def test_find() -> None:
    s = space()
    region = s.map(0x10, 4, Ram(4), name="it")
    assert [s.find(addr) for addr in (0xF, 0x10, 0x13, 0x14)] == [None, region, region, None]
    assert "it" in repr(region)
    assert "0x10-0x13" in repr(region)


# -- handlers that raise, or answer nonsense -----------------------------------------------------------------


class Boom(Exception):
    pass


def boom(*_: object) -> int:
    raise Boom


@pytest.mark.parametrize("impl", [(1, 8), (1, 1), (8, 8)])
def test_what_a_handler_raises_reaches_the_caller_and_the_lock_is_free(impl: tuple[int, int]) -> None:
    s, device = space(), Call(boom, boom)
    s.map(0, 8, device, impl_sizes=impl)
    with pytest.raises(Boom):
        s.read(0, 4)
    with pytest.raises(Boom):
        s.write(0, 4, 0)
    free_from_another_thread(device)


@pytest.mark.parametrize("value", [None, "7", 1.5, b"\x07", object()])
def test_a_read_that_gives_no_int_is_the_devices_type_error(value: object) -> None:
    s, device = space(), Call(lambda offset, size: value)
    s.map(0, 8, device)
    with pytest.raises(TypeError):
        s.read(0, 4)
    with pytest.raises(TypeError):
        s.read(3, 4)
    free_from_another_thread(device)


def test_a_handler_of_the_wrong_signature_is_a_type_error() -> None:
    s = space()
    s.map(0, 8, Ram(8), read=lambda: 0, write=lambda: 0)  # type: ignore[arg-type,misc]
    with pytest.raises(TypeError):
        s.read(0, 1)
    with pytest.raises(TypeError):
        s.write(0, 1, 0)


def free_from_another_thread(device: Device) -> None:
    """The device's lock can be had: a handler that failed let go of it."""
    took = threading.Event()

    def take() -> None:
        with device.lock:
            took.set()

    threading.Thread(target=take, daemon=True).start()
    assert took.wait(DEADLINE_S)


# -- mapping while others run --------------------------------------------------------------------------------


def run_thread(target: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(DEADLINE_S)
    return not thread.is_alive()


def test_unmap_waits_for_a_handler_on_another_thread() -> None:
    entered, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def read(offset: int, size: int) -> int:
        entered.set()
        assert go_on.wait(DEADLINE_S)
        order.append("handler")
        return 7

    s = space()
    region = s.map(0, 4, Call(read))
    result: list[int] = []
    reader = run_thread(lambda: result.append(s.read(0, 4)))
    assert entered.wait(DEADLINE_S)

    def unmap() -> None:
        s.unmap(region)
        order.append("unmapped")

    unmapper = run_thread(unmap)
    while s.find(0) is not None:  # already gone for every new access
        assert unmapper.is_alive()
    unmapper.join(0.05)
    assert unmapper.is_alive()
    assert s.read(0, 4) == ONES[4]
    go_on.set()
    assert ended(reader)
    assert ended(unmapper)
    assert order == ["handler", "unmapped"]
    assert result == [7]


def test_no_handler_runs_once_unmap_has_returned() -> None:
    s, gone, stop = space(), set(), threading.Event()
    late: list[int] = []

    def device(generation: int) -> Call:
        def read(offset: int, size: int) -> int:
            if generation in gone:
                late.append(generation)
            return generation & 0xFF

        return Call(read)

    def reader() -> None:
        while not stop.is_set():
            s.read(0x10, 1)
            s.read(0xE, 8)

    threads = [run_thread(reader) for _ in range(3)]
    for generation in range(300):
        region = s.map(0x10, 4, device(generation))
        s.read(0x10, 1)
        s.unmap(region)
        gone.add(generation)
    stop.set()
    assert all(ended(t) for t in threads)
    assert late == []


def test_readers_see_whole_views_while_regions_come_and_go() -> None:
    s, stop = space(), threading.Event()
    wrong: list[int] = []
    s.add(0x0, LatchRegion(0x10, 0x11))
    s.add(0x800, LatchRegion(0x10, 0x22))

    def reader() -> None:
        while not stop.is_set():
            values = s.read(0x8, 1), s.read(0x808, 1), s.read(0x400, 1)
            if values[:2] != (0x11, 0x22) or values[2] not in (0x33, 0xFF):
                wrong.append(values[2])
            region = s.find(0x400)
            if region is not None and region.name != "moving":
                wrong.append(-1)

    def changer(base: int) -> None:
        region = LatchRegion(0x10, 0x33, name="moving")
        for _ in range(300):
            s.add(base, region)
            s.unmap(region)

    readers = [run_thread(reader) for _ in range(2)]
    changers = [run_thread(lambda base=base: changer(base)) for base in (0x3F8, 0x500, 0x600)]  # type: ignore[misc]
    assert all(ended(t) for t in changers)
    stop.set()
    assert all(ended(t) for t in readers)
    assert wrong == []
    assert [r.base for r in s.regions] == [0x0, 0x800]


def test_a_handler_may_unmap_and_map_its_own_region() -> None:
    s = space()
    offsets: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        offsets.append(offset)
        s.unmap(region)
        s.add(value, region)

    region = MemoryRegion(4, Call(on_write=write))
    s.add(0x10, region)
    s.write(0x10, 4, 0x200)
    s.write(0x10, 4, 0x300)  # nobody there any more
    s.write(0x201, 1, 0x40)
    assert region.base == 0x40
    assert offsets == [0, 1]


def test_a_handler_that_unmaps_its_region_gets_no_further_piece() -> None:
    s = space()
    device = Call(on_write=lambda offset, size, value: s.unmap(region))
    region = s.map(0x10, 4, device, impl_sizes=(1, 1))
    s.write(0x10, 4, 0)  # a second unmap would raise
    assert s.find(0x10) is None


@pytest.mark.parametrize("to", [0x800, 0x15, 0x0])
def test_a_straddling_access_whose_first_piece_moves_the_second_region(to: int) -> None:
    # The view at hand is the old one; the moved region must never be entered at an offset outside of it.
    s = space()
    memory = bytearray(b"\x55" * 16)
    moving = BufferRegion(memory)

    def write(offset: int, size: int, value: int) -> None:
        s.unmap(moving)
        s.add(to, moving)

    s.map(0x10, 4, Call(on_write=write), impl_sizes=(1, 4))
    s.add(0x14, moving)
    s.write(0x12, 4, 0x0102_0304)
    assert moving.base == to
    assert memory.count(0x55) >= 14
    assert s.read(to, 1) in (0x55, 1, 2)


def test_a_straddling_read_whose_first_piece_moves_the_second_region() -> None:
    s = space()
    calls: list[int] = []

    def second(offset: int, size: int) -> int:
        calls.append(offset)
        return 0

    moving = MemoryRegion(4, Call(second))

    def first(offset: int, size: int) -> int:
        if moving.base == 0x14:
            s.unmap(moving)
            s.add(0x800, moving)
        return 0

    s.map(0x10, 4, Call(first))
    s.add(0x14, moving)
    assert s.read(0x12, 4) == 0xFFFF_0000
    assert calls == []


def test_two_threads_never_run_one_device_at_once() -> None:
    inside, overlaps = [0], [0]

    def handler(*_: int) -> int:
        inside[0] += 1
        if inside[0] != 1:
            overlaps[0] += 1
        for _i in range(20):
            pass
        inside[0] -= 1
        return 0

    s, device = space(), Call(handler, handler)
    s.map(0, 4, device)
    s.map(0x100, 4, device, impl_sizes=(1, 1))

    def hammer() -> None:
        for _ in range(500):
            s.read(0, 4)
            s.write(0x100, 4, 1)

    threads = [run_thread(hammer) for _ in range(4)]
    assert all(ended(t) for t in threads)
    assert overlaps == [0]


def test_a_split_access_is_not_interleaved_with_another() -> None:
    log: list[tuple[int, int]] = []

    def write(offset: int, size: int, value: int) -> None:
        log.append((threading.get_ident(), offset))

    s = space()
    s.map(0, 8, Call(on_write=write), impl_sizes=(1, 1))
    threads = [run_thread(lambda: [s.write(0, 8, 0) for _ in range(200)]) for _ in range(3)]
    assert all(ended(t) for t in threads)
    for i in range(0, len(log), 8):
        assert len({thread for thread, _ in log[i : i + 8]}) == 1
        assert [offset for _, offset in log[i : i + 8]] == list(range(8))


# -- compiled regions ----------------------------------------------------------------------------------------


def test_latch_keeps_what_is_written() -> None:
    s = space()
    latch = LatchRegion(4, 0x1234_5678)
    s.add(0, latch)
    assert s.read(0, 4) == 0x1234_5678
    assert s.read(1, 1) == 0x78
    s.write(0, 2, 0xBEEF)
    assert (latch.value, s.read(0, 4), latch.count) == (0xBEEF, 0xBEEF, 4)


def test_a_constant_swallows_writes() -> None:
    s = space()
    s.add(0, LatchRegion(8, 0xA5A5, writable=False))
    s.write(0, 8, 0)
    assert s.read(0, 8) == 0xA5A5


class Registers(Device):
    """Eight byte registers; what was kept for it stands in the log before what was written."""

    impl_sizes = (1, 1)

    def __init__(self, capacity: int = 4) -> None:
        self.region = RegisterRegion(8, self, capacity=capacity)
        self.log: list[Any] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset))
        return 0x10 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append((self.region.take(), offset, value))


def test_a_latched_register_answers_without_the_device() -> None:
    s, device = space(), Registers()
    s.add(0x3F8, device.region)
    assert s.read(0x3FD, 1) == 0x15
    device.region.latch(5, 0x60)
    assert [s.read(0x3FD, 1), s.read(0x3FE, 1)] == [0x60, 0x16]
    s.write(0x3FD, 1, 1)  # writes are the device's
    device.region.latch(5, 0x61)
    assert s.read(0x3FD, 1) == 0x61
    assert s.read(0x3FC, 4) == 0x17_16_61_14  # a wide access byte by byte
    device.region.unlatch(5)
    assert s.read(0x3FD, 1) == 0x15
    assert device.log == [("r", 5), ("r", 6), (b"", 5, 1), ("r", 4), ("r", 6), ("r", 7), ("r", 5)]
    assert device.region.count == 3


def test_latched_registers_are_independent() -> None:
    s, device = space(), Registers()
    s.add(0x3F8, device.region)
    for offset, value in ((7, 0xFF), (0, 1), (2, 0x80)):
        device.region.latch(offset, value)
    assert [s.read(0x3F8 + n, 1) for n in range(8)] == [1, 0x11, 0x80, 0x13, 0x14, 0x15, 0x16, 0xFF]
    device.region.latch(7, 0x7E)
    device.region.unlatch(2)
    assert [s.read(0x3F8 + n, 1) for n in (0, 2, 7)] == [1, 0x12, 0x7E]
    device.region.unlatch(0)
    device.region.unlatch(7)
    assert [s.read(0x3F8 + n, 1) for n in (0, 2, 7)] == [0x10, 0x12, 0x17]


def test_a_gathered_register_keeps_bytes_until_a_newline_or_there_is_no_room() -> None:
    s, device = space(), Registers(capacity=4)
    s.add(0x3F8, device.region)
    s.write(0x3F8, 1, ord("a"))
    device.region.gather(0)
    assert device.region.gathering
    for byte in b"bc\ndefgh":
        s.write(0x3F8, 1, byte)
    s.write(0x3F9, 1, 7)  # another register: the device finds what came before
    assert device.log == [(b"", 0, ord("a")), (b"bc", 0, 10), (b"defg", 0, ord("h")), (b"", 1, 7)]
    s.write(0x3F8, 1, ord("i"))
    device.region.release()
    assert not device.region.gathering
    s.write(0x3F8, 1, ord("j"))
    assert device.log[-1] == (b"i", 0, ord("j"))
    assert s.read(0x3F8, 1) == 0x10  # reads were the device's all along


def test_registers_that_are_not_mapped_any_more_answer_nobody() -> None:
    s, device = space(), Registers()
    device.region.latch(5, 0x60)
    device.region.gather(0)
    s.add(0x3F8, device.region)
    s.unmap(device.region)
    s.write(0x3F8, 1, 65)
    assert s.read(0x3FD, 1) == 0xFF
    assert device.region.take() == b"" and device.log == []


def test_what_registers_can_not_be() -> None:
    for size, capacity in ((0, 1), (257, 1), (8, 0)):
        with pytest.raises(ConfigError):
            RegisterRegion(size, Ram(8), capacity=capacity)
    with pytest.raises(OverflowError):
        Registers().region.latch(256, 0)
    with pytest.raises(ValueError, match="only the first 8"):
        Registers().region.latch(8, 0)


def test_sink_gathers_lines() -> None:
    s, lines = space(), []
    sink = SinkRegion(1, lines.append, capacity=8, read_value=0xE9)
    s.add(0x402, sink)
    for byte in b"one\nlonger than eight\nend":
        s.write(0x402, 1, byte)
    assert lines == [b"one\n", b"longer t", b"han eigh", b"t\n"]
    sink.flush()
    sink.flush()
    assert lines[-1] == b"end"
    assert len(lines) == 5
    assert s.read(0x402, 1) == 0xE9


def test_sink_takes_wide_writes_byte_by_byte() -> None:
    s, lines = space(), []
    s.add(0, SinkRegion(4, lines.append, capacity=2))
    s.write(0, 4, int.from_bytes(b"ab\nc", "little"))
    assert lines == [b"ab", b"\n"]


def test_a_sink_without_room_is_refused() -> None:
    for capacity in (0, -1):
        with pytest.raises(ConfigError, match="capacity"):
            SinkRegion(1, print, capacity=capacity)


def test_a_sink_whose_callback_raises() -> None:
    s, calls = space(), []

    def callback(data: bytes) -> None:
        calls.append(data)
        if len(calls) == 1:
            raise Boom

    sink = SinkRegion(4, callback)
    s.add(0, sink)
    # The second newline must not be handed over with the first one's exception pending.
    with pytest.raises(Boom):
        s.write(0, 4, int.from_bytes(b"\n\n\n\n", "little"))
    assert calls == [b"\n"]
    s.write(0, 1, 10)
    assert calls[1].endswith(b"\n")
    s.write(0, 1, 65)
    calls.clear()
    with pytest.raises(Boom):
        sink.flush()


def test_sink_callback_may_write_to_the_sink() -> None:
    s, lines = space(), []

    def callback(data: bytes) -> None:
        lines.append(data)
        if len(lines) == 1:
            s.write(0, 1, ord("x"))

    s.add(0, SinkRegion(1, callback, capacity=4))
    for byte in b"a\nbcd":
        s.write(0, 1, byte)
    assert lines == [b"a\n", b"xbcd"]


def test_buffer_is_memory() -> None:
    memory = bytearray(range(16))
    s = space()
    s.add(0x20, BufferRegion(memory))
    assert s.read(0x23, 4) == 0x0605_0403
    s.write(0x2D, 2, 0xBBAA)
    assert memory[13:] == b"\xaa\xbb\x0f"
    s.write(0x2E, 4, 0x4433_2211)  # two bytes past the end are nobody's
    assert memory[12:] == b"\x0c\xaa\x11\x22"
    assert s.read(0x2E, 4) == 0xFFFF_2211
    with pytest.raises(BufferError):  # the region holds it still
        memory.append(0)


def test_a_buffer_must_be_writable_and_of_some_size() -> None:
    with pytest.raises(TypeError, match="writable"):
        BufferRegion(b"constant")
    with pytest.raises(ConfigError):
        BufferRegion(bytearray())


def test_event_region_signals_the_eventfd() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        s = space()
        s.add(0, EventRegion(4, fd))
        for size in (1, 2, 4):
            s.write(0, size, 0xFF)
        assert os.eventfd_read(fd) == 3
        assert s.read(0, 4) == 0
        os.eventfd_write(fd, (1 << 64) - 2)
        s.write(0, 4, 0)  # a full counter blocks nobody
        assert os.eventfd_read(fd) == (1 << 64) - 2
    finally:
        os.close(fd)


class Fifo:
    """A FifoRegion of 4 ports at 0 and what its device saw."""

    def __init__(self) -> None:
        self.device = Ram(1)
        self.ends = 0
        self.on_end: Callable[[], None] = lambda: None
        self.region = FifoRegion(4, self.device, self.end)
        self.space = space()
        self.space.add(0, self.region)

    def end(self) -> None:
        self.ends += 1
        self.on_end()

    def read(self, size: int) -> int:
        return self.space.read(0, size)


def wide_fifo() -> tuple[FifoRegion, AddressSpace, Ram]:
    """A data port at 0 with registers behind it, as an ATA channel has them."""
    registers = Ram(7)
    region = FifoRegion(1, registers, lambda: None, wide=True)
    ports = space()
    ports.add(0, region)
    ports.map(1, 7, registers)
    return region, ports, registers


def test_a_wide_fifo_takes_words_whole_at_its_one_address() -> None:
    region, ports, registers = wide_fifo()
    region.open_read(bytes(range(8)))
    assert ports.read(0, 2) == 0x0100
    assert ports.read(0, 4) == 0x0504_0302
    window = bytearray(6)
    region.open_write(window)
    assert region.writing
    ports.write(0, 2, 0x2211)
    ports.write(0, 4, 0x6655_4433)
    assert window == bytes([0x11, 0x22, 0x33, 0x44, 0x55, 0x66])
    assert not region.writing
    assert registers.log == []


def test_a_wide_fifo_takes_no_bytes_and_leaves_the_ports_behind_alone() -> None:
    region, ports, registers = wide_fifo()
    region.open_read(b"abcd")
    assert ports.read(0, 1) == 0xFF
    ports.write(0, 1, 0)
    assert region.position == 0
    ports.write(1, 1, 0x5A)
    assert registers.data[0] == 0x5A
    assert ports.read(1, 2) == 0x5A


def test_a_window_over_a_part_of_a_buffer() -> None:
    f = Fifo()
    data = bytearray(range(16))
    for start in (4, 8):  # the second time the view of the buffer is there already
        f.region.open_read(data, start, 4)
        assert f.read(4) == int.from_bytes(data[start : start + 4], "little")
    f.region.open_write(data, 14, 2)
    f.space.write(0, 4, 0x4433_2211)
    assert data[14:] == b"\x11\x22"
    for start, size in ((-1, 4), (14, 4), (4, -1), (17, 0)):
        with pytest.raises(ValueError, match="leaves a buffer of 16"):
            f.region.open_read(data, start, size)
    constant = bytes(4)
    f.region.open_read(constant)
    with pytest.raises(TypeError, match="writable"):
        f.region.open_write(constant)


def test_fifo_closed_floats() -> None:
    f = Fifo()
    f.space.write(0, 2, 0x1234)
    assert f.read(2) == 0xFFFF
    assert f.ends == 0


def test_fifo_reads_through_the_window_and_calls_once_at_its_end() -> None:
    f = Fifo()
    sector = bytes(range(256)) * 2
    f.region.open_read(sector)
    got = b"".join(f.read(2).to_bytes(2, "little") for _ in range(255))
    assert (f.ends, f.region.position) == (0, 510)
    got += f.read(2).to_bytes(2, "little")
    assert got == sector
    assert f.ends == 1
    assert f.read(2) == 0xFFFF
    assert f.ends == 1
    assert f.region.count == 257


def test_fifo_writes_fill_the_window() -> None:
    f = Fifo()
    sector = bytearray(8)
    f.region.open_write(sector)
    assert f.read(4) == ONES[4]  # the wrong direction moves nothing
    f.space.write(0, 4, 0x4433_2211)
    f.space.write(0, 2, 0x6655)
    f.space.write(0, 1, 0x77)
    assert f.ends == 0
    f.space.write(0, 4, 0x99AA_BB88)  # one byte fits, the rest is lost
    assert sector == bytes([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88])
    assert f.ends == 1
    f.space.write(0, 1, 0)
    assert sector[7] == 0x88


def test_a_fifo_read_past_the_end_of_the_window_gives_ones_there() -> None:
    f = Fifo()
    f.region.open_read(b"\x01\x02\x03")
    assert f.read(4) == 0xFF03_0201
    assert f.ends == 1


def test_fifo_next_window_may_be_opened_at_the_end_of_the_last() -> None:
    f = Fifo()
    f.on_end = lambda: f.region.open_read(b"\x03\x04") if f.ends == 1 else f.region.close()
    f.region.open_read(b"\x01\x02")
    assert [f.read(1) for _ in range(5)] == [1, 2, 3, 4, 0xFF]
    assert f.ends == 2


def test_fifo_windows_hold_and_release_their_buffers() -> None:
    f = Fifo()
    buffer = bytearray(4)
    f.region.open_write(buffer)
    with pytest.raises(BufferError):
        buffer.append(0)
    f.region.close()
    buffer.append(0)
    f.space.write(0, 1, 0xFF)
    assert not any(buffer)
    with pytest.raises(TypeError, match="writable"):
        f.region.open_write(b"constant")
    f.region.open_read(b"")
    assert f.read(1) == 0xFF


def test_fifo_end_that_raises() -> None:
    f = Fifo()
    f.on_end = lambda: boom()  # type: ignore[assignment,return-value]
    f.region.open_read(b"\x01")
    with pytest.raises(Boom):
        f.read(1)
    free_from_another_thread(f.device)


def test_fifo_end_runs_under_the_devices_lock() -> None:
    f = Fifo()
    tried, took = threading.Event(), threading.Event()

    def take() -> None:
        tried.set()
        with f.device.lock:
            took.set()

    def on_end() -> None:
        run_thread(take)
        assert tried.wait(DEADLINE_S)
        assert not took.wait(0.05)

    f.on_end = on_end
    f.region.open_read(b"\x01")
    assert f.read(1) == 1
    assert took.wait(DEADLINE_S)


def test_a_fifo_needs_a_device() -> None:
    with pytest.raises(TypeError):
        FifoRegion(4, object(), print)  # type: ignore[arg-type]


def test_compiled_regions_can_be_unmapped_and_float_then() -> None:
    s = space()
    for region in (LatchRegion(4), SinkRegion(4, print), BufferRegion(bytearray(4)), Fifo().region):
        if region.space is not None:
            region.space.unmap(region)
        s.add(0, region)
        s.unmap(region)
        assert s.read(0, 4) == ONES[4]


# -- against a model -----------------------------------------------------------------------------------------

SIZE_PAIRS = [(low, high) for low in (1, 2, 4, 8) for high in (1, 2, 4, 8) if low <= high]
SPACE_BYTES = 64


class ModelRegion:
    def __init__(self, base: int, device: Ram) -> None:
        self.base, self.device = base, device
        self.data = bytearray(len(device.data))

    def holds(self, addr: int, size: int) -> bool:
        return self.base <= addr and addr + size <= self.base + len(self.data)

    def takes(self, addr: int, size: int) -> bool:
        """Whether one bus access may be this one: inside, not too wide, aligned where it must be."""
        return (
            self.holds(addr, size)
            and size <= self.device.valid_sizes[1]
            and (self.device.unaligned or (addr - self.base) % size == 0)
        )


def model_pieces(
    regions: list[ModelRegion], addr: int, size: int
) -> list[tuple[int, int, ModelRegion | None]]:
    """An access as the bus should cut it: (address, size, region or None)."""
    pieces: list[tuple[int, int, ModelRegion | None]] = []
    end = addr + size
    while addr < end:
        # What begins aligned here is one access, and all of it is of whoever has its first byte.
        stop = addr + max(n for n in (1, 2, 4, 8) if n <= end - addr and addr % n == 0)
        owner = next((r for r in regions if r.holds(addr, 1)), None)
        while addr < stop:
            taker = owner
            n = stop - addr
            if owner is not None and owner.holds(addr, 1):
                n = max(n for n in (1, 2, 4, 8) if n <= end - addr and owner.takes(addr, n))
                if n < owner.device.valid_sizes[0]:
                    taker = None
            else:
                taker = None
            pieces.append((addr, n, taker))
            addr += n
    return pieces


region_strategy = st.tuples(
    st.integers(0, SPACE_BYTES - 1),
    st.integers(1, 24),
    st.sampled_from(SIZE_PAIRS),
    st.sampled_from(SIZE_PAIRS),
    st.booleans(),
)
access_strategy = st.tuples(
    st.booleans(),
    st.integers(0, SPACE_BYTES - 1),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(region_strategy, max_size=6), st.lists(access_strategy, min_size=1, max_size=12))
@example([(0, 8, (1, 8), (4, 4), True)], [(True, 3, 2, 0xFFFF), (False, 1, 8, 0)])
def test_against_the_model(
    regions: list[tuple[int, int, tuple[int, int], tuple[int, int], bool]],
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    s = AddressSpace("model", SPACE_BYTES)
    model: list[ModelRegion] = []
    for base, size, valid, impl, unaligned in regions:
        device = Ram(size, valid=valid, impl=impl, unaligned=unaligned)
        with contextlib.suppress(ConfigError):  # overlaps and impossible ones are another test's
            s.map(base, size, device)
            model.append(ModelRegion(base, device))
    for is_write, addr, size, value in accesses:
        if addr + size > SPACE_BYTES:
            continue
        if is_write:
            s.write(addr, size, value)
            data = (value & ONES[size]).to_bytes(size, "little")
            for at, n, region in model_pieces(model, addr, size):
                if region is not None:
                    region.data[at - region.base : at - region.base + n] = data[at - addr : at - addr + n]
        else:
            expected = b"".join(
                b"\xff" * n if region is None else region.data[at - region.base : at - region.base + n]
                for at, n, region in model_pieces(model, addr, size)
            )
            assert s.read(addr, size).to_bytes(size, "little") == expected
        for region in model:
            assert region.device.data == region.data
