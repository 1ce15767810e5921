"""What KVM is told of what is mapped: each ioctl, in order, and each descriptor given back. No KVM."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.address_space import AddressSpace
from pyvmm.device import Device
from pyvmm.errors import ConfigError, KindError, KvmError, StateError
from pyvmm.guest_memory import GuestMemory
from pyvmm.kvm.vm import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from pyvmm.kvm_listener import KvmListener, joined
from pyvmm.memory_map import RAM, RAM_READONLY, MemoryMap
from pyvmm.region import BufferRegion, EventRegion, FifoRegion

MIB = 1 << 20


class FakeKvm:
    def __init__(self, **capabilities: int) -> None:
        self.capabilities = {"COALESCED_PIO": 1, "COALESCED_MMIO": 2, "MANUAL_DIRTY_LOG_PROTECT2": 3}
        self.capabilities |= {"NR_MEMSLOTS": 509, **capabilities}

    def check_extension(self, name: str) -> int:
        return self.capabilities[name.removeprefix("KVM_CAP_")]


class FakeVm:
    """Every ioctl as a line; refuses what KVM refuses."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.eventfds: set[tuple[Any, ...]] = set()
        self.written: dict[int, bytes] = {}
        self.fails: int | None = None

    def ioeventfd(
        self, fd: int, address: int, size: int, *, pio: bool, datamatch: int | None, deassign: bool
    ) -> None:
        os.fstat(fd)
        event = (pio, address, size, datamatch)
        if self.fails is not None:
            raise KvmError("KVM_IOEVENTFD", self.fails)
        assert (event in self.eventfds) == deassign
        (self.eventfds.remove if deassign else self.eventfds.add)(event)
        self.calls.append(f"{'-' if deassign else '+'}{'pio' if pio else 'mmio'} {address:#x} {size} {datamatch}")

    def coalesce(self, address: int, size: int, *, pio: bool, unregister: bool = False) -> None:
        self.calls.append(f"{'-' if unregister else '+'}zone {'pio' if pio else 'mmio'} {address:#x} {size}")

    def set_memory_slot(self, slot: int, gpa: int, size: int, host: int, flags: int = 0) -> None:
        self.calls.append(f"slot {slot} {gpa:#x} {size:#x} {flags}")

    def enable_cap(self, number: int, *args: int) -> None:
        self.calls.append(f"enable {args}")

    def dirty_log(self, slot: int, size: int) -> bytes:
        return self.written.get(slot, bytes(size // 4096 // 8))

    def clear_dirty_log(self, slot: int, first: int, pages: int, bitmap: bytes) -> None:
        assert bitmap == self.written.pop(slot)
        self.calls.append(f"clear {slot} {first} {pages}")


class FakeLoop:
    def __init__(self) -> None:
        self.rings: list[int] = []

    def coalesced_ring(self, page: int, lock: object) -> None:
        self.rings.append(page)


class Board:
    def __init__(self, **capabilities: int) -> None:
        self.vm = FakeVm()
        self.pio, self.mmio = AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)
        self.loop = FakeLoop()
        self.listener = KvmListener(FakeKvm(**capabilities), self.vm, self.pio)  # type: ignore[arg-type]
        self.pio.listen(self.listener)
        self.mmio.listen(self.listener)

    def attach(self) -> None:
        self.listener.attach([self.loop])  # type: ignore[list-item]

    def taken(self) -> list[str]:
        calls, self.vm.calls = self.vm.calls, []
        return calls


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.listener.close()


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield made
    os.close(made)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_told_before_it_goes_live(board: Board, fd: int) -> None:
    """What waits for grace periods is not to hold up the start."""
    region = BufferRegion(bytearray(8))
    region.add_coalesced()
    board.mmio.add(0x1000, region)
    board.pio.add(0x70, EventRegion(1, fd))
    board.attach()
    assert board.listener.waits
    assert board.taken() == []
    assert board.loop.rings == [2]  # drained from the first exit on
    board.listener.go_live()
    assert board.taken() == ["+pio 0x70 0 None", "+zone mmio 0x1000 8"]


def test_a_machine_with_nothing_to_wait_for_is_live_at_once(board: Board, fd: int) -> None:
    board.attach()
    assert not board.listener.waits
    assert board.loop.rings == []  # looking at the ring costs a page on every exit
    board.pio.add(0x70, EventRegion(1, fd))
    assert board.taken() == ["+pio 0x70 0 None"]


def test_a_doorbell_that_moves(board: Board, fd: int) -> None:
    board.attach()
    before = open_descriptors()
    bell = board.mmio.add(0x1000, EventRegion(4, fd, write_size=4, datamatch=3))
    board.mmio.unmap(bell)
    board.mmio.add(0x2000, bell)
    assert board.taken() == ["+mmio 0x1000 4 3", "-mmio 0x1000 4 3", "+mmio 0x2000 4 3"]
    assert open_descriptors() == before + 1
    board.mmio.unmap(bell)
    assert open_descriptors() == before


def test_what_comes_back_while_held_is_told_anew(board: Board, fd: int) -> None:
    """The number of a descriptor says nothing: it may be another eventfd by now."""
    board.attach()
    before = open_descriptors()
    bell = board.mmio.add(0x1000, EventRegion(4, fd))
    board.taken()
    with board.mmio.held:
        board.mmio.unmap(bell)
        board.mmio.add(0x1000, bell)
        assert board.taken() == []
    assert board.taken() == ["-mmio 0x1000 0 None", "+mmio 0x1000 0 None"]
    with board.mmio.held:
        board.mmio.unmap(bell)
        board.mmio.add(0x2000, bell)
        board.mmio.unmap(bell)
    assert board.taken() == ["-mmio 0x1000 0 None"]
    assert open_descriptors() == before


def test_a_descriptor_that_its_owner_has_closed(board: Board) -> None:
    board.attach()
    mine = os.eventfd(0, os.EFD_CLOEXEC)
    bell = board.mmio.add(0x1000, EventRegion(4, mine))
    os.close(mine)
    board.mmio.unmap(bell)
    assert board.taken() == ["+mmio 0x1000 0 None", "-mmio 0x1000 0 None"]
    with pytest.raises(KindError, match="mmio 0x1000: what should be signalled there is no open eventfd"):
        board.mmio.add(0x1000, bell)
    assert board.mmio.regions == []


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EINVAL, KindError), (errno.ENOSPC, KvmError)], ids=["no eventfd", "too many"]
)
def test_what_kvm_refuses_is_not_mapped(board: Board, fd: int, number: int, error: type[Exception]) -> None:
    board.attach()
    before = open_descriptors()
    board.vm.fails = number
    with pytest.raises(error):
        board.mmio.add(0x1000, EventRegion(4, fd))
    board.vm.fails = None
    assert board.mmio.regions == []
    assert open_descriptors() == before
    board.mmio.add(0x1000, EventRegion(4, fd))
    assert board.taken() == ["+mmio 0x1000 0 None"]


def test_ioeventfds_can_be_turned_off_and_on(board: Board, fd: int) -> None:
    board.attach()
    board.pio.add(0x70, EventRegion(1, fd))
    board.listener.ioeventfds = False
    board.pio.add(0x71, EventRegion(1, fd))
    assert board.taken() == ["+pio 0x70 0 None", "-pio 0x70 0 None"]
    board.listener.ioeventfds = True
    assert board.taken() == ["+pio 0x70 0 None", "+pio 0x71 0 None"]


def test_zones_that_touch_are_one(board: Board) -> None:
    """As the ports of an IDE channel: the data port is one wide, its accesses are not."""
    device = Device()
    data = FifoRegion(1, device, lambda: None, wide=True)
    data.add_coalesced(0, 4)
    registers = BufferRegion(bytearray(7))
    registers.add_coalesced(0, 6)
    board.pio.add(0x1F0, data)
    board.pio.add(0x1F1, registers)
    board.attach()
    board.listener.go_live()
    assert board.taken() == ["+zone pio 0x1f0 7"]
    board.pio.unmap(registers)
    assert board.taken() == ["-zone pio 0x1f0 7", "+zone pio 0x1f0 4"]
    assert board.loop.rings == [2]


def test_joined() -> None:
    assert joined([(True, 4, 2), (False, 0, 4), (True, 0, 4), (False, 8, 1), (False, 1, 1)]) == [
        *((False, 0, 4), (False, 8, 1), (True, 0, 6))
    ]


def test_a_range_of_the_embedders(board: Board) -> None:
    board.attach()
    board.listener.coalesce(board.pio, 0x80, 1)
    assert board.taken() == ["+zone pio 0x80 1"]
    assert board.loop.rings == [2]


def test_a_kvm_that_gathers_no_ports(fd: int) -> None:
    board = Board(COALESCED_PIO=0)
    region = BufferRegion(bytearray(8))
    region.add_coalesced()
    board.pio.add(0x70, region)
    board.attach()
    assert not board.listener.waits
    with pytest.raises(ConfigError, match="this host's KVM does not coalesce pio writes"):
        board.listener.coalesce(board.pio, 0x80, 1)
    board.listener.coalesce(board.mmio, 0x80, 4)
    assert board.taken() == ["+zone mmio 0x80 4"]


def test_closed_it_tells_nothing_and_has_nothing_open(fd: int) -> None:
    board = Board()
    board.attach()
    before = open_descriptors()
    bell = board.pio.add(0x70, EventRegion(1, fd))
    board.taken()
    board.listener.close()
    board.pio.unmap(bell)
    board.pio.add(0x70, bell)
    assert board.taken() == []
    assert open_descriptors() == before
    board.listener.close()


def test_slots_and_their_dirty_log(board: Board) -> None:
    memory = GuestMemory(4 * MIB)
    memory_map = MemoryMap(memory, board.mmio)
    memory_map.open_window(None)
    memory_map.set_window([(0xC_0000, 0x8000, RAM)])
    memory_map.listen(board.listener)
    assert board.taken() == ["slot 0 0x0 0xa0000 0", "slot 1 0x100000 0x300000 0", "slot 2 0xc0000 0x8000 0"]
    memory_map.set_window([(0xC_0000, 0x8000, RAM_READONLY)])
    assert board.taken() == ["slot 2 0xc0000 0x0 0", f"slot 2 0xc0000 0x8000 {MEM_READONLY}"]
    with pytest.raises(StateError, match="the dirty log is off"):
        board.listener.take_dirty()
    board.listener.log_dirty(True)
    on = MEM_LOG_DIRTY_PAGES
    assert board.taken() == ["enable (1,)", f"slot 0 0x0 0xa0000 {on}", f"slot 1 0x100000 0x300000 {on}"]
    memory_map.set_window([(0xC_0000, 0x8000, RAM)])
    assert board.taken() == ["slot 2 0xc0000 0x0 0", f"slot 2 0xc0000 0x8000 {on}"]
    board.vm.written = {1: b"\5" + bytes(95)}
    memory_map.set_window([])
    found = [(section.gpa, bitmap) for section, bitmap in board.listener.take_dirty()]
    assert found == [(0xC_0000, b"\xff" + bytes(7)), (0x10_0000, b"\5" + bytes(95))]
    assert board.taken() == ["slot 2 0xc0000 0x0 0", "clear 1 0 768"]
    assert board.listener.take_dirty() == []
    board.listener.log_dirty(False)
    assert board.taken() == ["slot 0 0x0 0xa0000 0", "slot 1 0x100000 0x300000 0"]


def test_a_dirty_log_that_forgets_as_it_is_read() -> None:
    """KVM without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
    board = Board(MANUAL_DIRTY_LOG_PROTECT2=0)
    memory_map = MemoryMap(GuestMemory(MIB), board.mmio)
    memory_map.listen(board.listener)
    board.listener.log_dirty(True)
    board.vm.written = {0: b"\1" + bytes(31)}
    assert [bitmap[0] for _, bitmap in board.listener.take_dirty()] == [1]
    assert not any(call.startswith(("enable", "clear")) for call in board.taken())


def test_memory_slots_are_given_out_and_come_back() -> None:
    board, memory = Board(NR_MEMSLOTS=3), GuestMemory(4 * MIB)
    shown = MemoryMap(memory, board.mmio)
    slots = board.listener.slots
    shown.listen(board.listener)
    assert list(slots) == [(0, 1, "ram")]
    with pytest.raises(ConfigError, match=r"^mine at memory slot 0 overlaps ram at 0: give another place$"):
        slots.take(0, 1, "mine")
    assert slots.give(1, "mine") == 1
    shown.open_window(None)  # what is below and what is above it
    assert [name for _, _, name in slots] == ["ram", "mine", "ram"]
    with pytest.raises(ConfigError, match=r"^no memory slot of 0-2 is left for ram: ram, mine have them, leave one"):
        shown.set_window([(0xC_0000, 0x8000, RAM)])
    board.listener.close()
