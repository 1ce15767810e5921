"""The processor's view of memory: the window below 1 MiB, KVM's slots, reads and writes from the host."""

from __future__ import annotations

import pytest

from pyvmm.address_space import AddressSpace, SpaceListener
from pyvmm.device import Device
from pyvmm.errors import BusError
from pyvmm.guest_memory import GuestMemory, RamRegion
from pyvmm.memory_map import BUS, RAM, RAM_READONLY, ROM, ROM_OVER_RAM, MemoryMap, Section

MIB = 1 << 20


class Slots(SpaceListener):
    """KVM's side: refuses what KVM refuses."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int, int, bool]] = []
        self.calls = 0
        self.commits = 0

    def section_add(self, section: Section) -> None:
        self.calls += 1
        for other, length, _host, _readonly in self.slots:
            assert section.gpa + section.size <= other or other + length <= section.gpa
        assert section.gpa % 4096 == section.size % 4096 == section.host_address % 4096 == 0
        self.slots.append(section.key)

    def section_del(self, section: Section) -> None:
        self.calls += 1
        self.slots.remove(section.key)

    def commit(self) -> None:
        self.commits += 1

    def at(self, gpa: int) -> tuple[int, bool] | None:
        """Host address and readonly of the byte that shows at ``gpa``."""
        for start, size, host, readonly in self.slots:
            if start <= gpa < start + size:
                return host + gpa - start, readonly
        return None


class Ports(Device):
    """Reads give the offset's low byte in each byte; writes are kept."""

    valid_sizes = impl_sizes = (1, 8)

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes((offset + i) & 0xFF for i in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class Pc:
    def __init__(self, size: int = 4 * MIB) -> None:
        self.memory = GuestMemory(size)
        self.mmio = AddressSpace("mmio", 1 << 52)
        self.rom = RamRegion(0xE_0000, 0x2_0000, readonly=True, name="isa-bios")
        memoryview(self.rom)[:] = b"R" * 0x2_0000
        self.map = MemoryMap(self.memory, self.mmio)
        self.map.open_window(self.rom)
        self.slots = Slots()
        self.ram_host = self.memory.ram[0].host_address


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_without_a_window_every_region_shows_at_its_own_address() -> None:
    memory = GuestMemory(4 * MIB)
    rom = RamRegion(0xFFFF_0000, 0x1_0000, readonly=True, name="bios")
    memory.add(rom)
    slots = Slots()
    MemoryMap(memory, AddressSpace("mmio", 1 << 52)).listen(slots)
    assert sorted(slots.slots) == [
        (0, 4 * MIB, memory.ram[0].host_address, False),
        (0xFFFF_0000, 0x1_0000, rom.host_address, True),
    ]


def test_the_window_is_the_bus_until_it_is_set(pc: Pc) -> None:
    pc.map.listen(pc.slots)
    assert pc.slots.at(0x9_FFFF) == (pc.ram_host + 0x9_FFFF, False)
    assert pc.slots.at(0xA_0000) is None
    assert pc.slots.at(0xF_FFFF) is None
    assert pc.slots.at(MIB) == (pc.ram_host + MIB, False)
    assert pc.map.read(0xA_0000, 3) == b"\xff\xff\xff"


def test_segments_show_ram_and_rom(pc: Pc) -> None:
    pc.map.listen(pc.slots)
    pc.map.set_window([(0xC_0000, 0x4000, RAM), (0xC_4000, 0x4000, RAM_READONLY), (0xC_8000, 0x3_8000, ROM)])
    assert pc.slots.at(0xC_0000) == (pc.ram_host + 0xC_0000, False)
    assert pc.slots.at(0xC_4000) == (pc.ram_host + 0xC_4000, True)
    assert pc.slots.at(0xC_8000) is None  # there is no ROM that low
    assert pc.slots.at(0xE_0000) == (pc.rom.host_address, True)
    assert pc.slots.at(0xF_FFFF) == (pc.rom.host_address + 0x1_FFFF, True)


def test_a_change_touches_only_what_differs(pc: Pc) -> None:
    pc.map.set_window([(0xC_0000, 0x4_0000, ROM)])
    pc.map.listen(pc.slots)
    for end in range(0xC_8000, 0xF_8000, 0x8000):  # the way SeaBIOS makes its shadow writable
        before = pc.slots.calls
        pc.map.set_window([(0xC_0000, end - 0xC_0000, RAM), (end, 0x10_0000 - end, ROM)])
        assert pc.slots.calls - before == (1 if end <= 0xE_0000 else 2)
    pc.map.set_window([(0xC_0000, 0x4_0000, RAM)])
    assert all(pc.slots.at(a) == (pc.ram_host + a, False) for a in range(0xC_0000, 0x10_0000, 0x1000))
    before = pc.slots.calls
    pc.map.set_window([(0xC_0000, 0x2_0000, RAM), (0xE_0000, 0x2_0000, RAM)])
    assert pc.slots.calls == before


def test_what_is_held_reaches_kvm_as_its_last_state_only(pc: Pc) -> None:
    pc.map.set_window([(0xC_0000, 0x4_0000, RAM)])
    pc.map.listen(pc.slots)
    before = pc.slots.calls
    with pc.map.held:
        pc.map.set_window([(0xC_0000, 0x4_0000, ROM)])
        with pc.map.held:
            pc.map.set_window([(0xC_0000, 0x3_0000, RAM), (0xF_0000, 0x1_0000, RAM_READONLY)])
        assert pc.slots.calls == before
    assert pc.slots.calls == before + 2
    assert pc.slots.at(0xF_0000) == (pc.ram_host + 0xF_0000, True)


def test_listeners_hear_of_a_change_in_order_with_a_commit_at_its_end(pc: Pc) -> None:
    heard: list[str] = []

    class Ear(SpaceListener):
        def __init__(self, name: str) -> None:
            self.name = name

        def section_add(self, section: Section) -> None:
            heard.append(f"{self.name} +{section.gpa:x}")

        def section_del(self, section: Section) -> None:
            heard.append(f"{self.name} -{section.gpa:x}")

        def commit(self) -> None:
            heard.append(f"{self.name} commit")

    pc.map.listen(Ear("a"))
    pc.map.listen(Ear("b"))
    assert heard == ["a +0", "a +100000", "a commit", "b +0", "b +100000", "b commit"]
    heard.clear()
    pc.map.set_window([(0xC_0000, 0x8000, RAM)])
    assert heard == ["a +c0000", "b +c0000", "a commit", "b commit"]
    heard.clear()
    pc.map.set_window([(0xC_0000, 0x8000, RAM_READONLY)])
    assert heard == ["b -c0000", "a -c0000", "a +c0000", "b +c0000", "a commit", "b commit"]
    heard.clear()
    pc.map.set_window([(0xC_0000, 0x8000, RAM_READONLY)])
    assert heard == []


def test_reads_and_writes_as_a_processor_does(pc: Pc) -> None:
    pc.memory.write(0xE_0000, b"shadow")
    pc.map.set_window([(0xE_0000, 0x8000, RAM_READONLY), (0xE_8000, 0x1_8000, ROM)])
    pc.map.write(0x9_FFFE, b"abcd")  # two bytes reach RAM, two the bus
    assert pc.memory.read(0x9_FFFE, 2) == b"ab"
    assert pc.map.read(0x9_FFFE, 4) == b"ab\xff\xff"
    pc.map.write(0xE_0000, b"SHADOW")
    assert pc.map.read(0xE_0000, 6) == b"shadow"
    pc.map.write(0xE_8000, b"x")
    assert pc.map.read(0xE_7FFF, 3) == b"\0RR"
    assert pc.memory.read(0xE_8000, 1) == b"\0"


def test_writes_under_rom_reach_the_ram_behind(pc: Pc) -> None:
    pc.map.listen(pc.slots)
    pc.map.set_window([(0xF_0000, 0x1_0000, ROM_OVER_RAM)])
    assert pc.slots.at(0xF_0000) == (pc.rom.host_address + 0x1_0000, True)
    pc.mmio.write(0xF_1234, 2, 0xBEEF)  # how a guest's write leaves KVM
    pc.map.write(0xF_0000, b"copy")
    assert pc.map.read(0xF_0000, 4) == b"RRRR"
    pc.map.set_window([(0xF_0000, 0x1_0000, RAM)])
    assert pc.map.read(0xF_0000, 4) == b"copy"
    assert pc.map.read(0xF_1234, 2) == b"\xef\xbe"
    assert pc.mmio.regions == []


def test_the_bus_gets_aligned_accesses(pc: Pc) -> None:
    device = Ports()
    pc.mmio.map(0xFEB0_0000, 0x100, device)
    assert pc.map.read(0xFEB0_0001, 0x10) == bytes(range(1, 0x11))
    pc.map.write(0xFEB0_0003, bytes(range(6)))
    assert device.writes == [(3, 1, 0), (4, 4, 0x0403_0201), (8, 1, 5)]


def test_nothing_is_beyond_the_space(pc: Pc) -> None:
    with pytest.raises(BusError):
        pc.map.read((1 << 52) - 1, 2)
    with pytest.raises(BusError):
        pc.map.write(-1, b"x")
    assert pc.map.read(8, 0) == b""


def test_a_machine_with_less_ram_than_the_window(pc: Pc) -> None:
    small = Pc(640 << 10)
    small.map.listen(small.slots)
    small.map.set_window([(0xA_0000, 0x6_0000, RAM)])
    assert small.slots.at(0x9_FFFF) is not None
    assert small.slots.at(0xC_0000) is None
    small.map.set_window([(0xC_0000, 0x4_0000, BUS)])
    assert small.slots.at(0xF_0000) is None


def test_bytes_as_they_lie_in_memory() -> None:
    """What a debugger changes: also where a guest could not write, and nothing that is on the bus."""
    memory = GuestMemory(2 * MIB)
    rom = RamRegion(0xFFFE_0000, 0x2_0000, readonly=True, name="bios")
    memory.add(rom)
    shown = MemoryMap(memory, AddressSpace("mmio", 1 << 52))
    shown.open_window(rom)
    shown.set_window([(0xF0000, 0x10000, ROM)])
    place = shown.in_memory(0xF0010, 4)
    assert place is not None
    place[:] = b"abcd"
    assert memory.read(0xFFFF_0010, 4) == b"abcd"
    assert shown.read(0xF0010, 4) == b"abcd"
    low = shown.in_memory(0x9FFFE, 16)
    assert low is not None
    assert len(low) == 2  # what follows is on the bus
    assert shown.in_memory(0xA0000, 1) is None
    assert shown.in_memory(1 << 40, 1) is None
