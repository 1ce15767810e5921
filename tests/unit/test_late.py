"""Devices that are made when somebody first wants them: nobody can tell."""

from __future__ import annotations

import threading
import time

import pytest

from pyvmm import Machine
from pyvmm.address_space import AddressSpace, SpaceListener
from pyvmm.clock import VirtualClock
from pyvmm.device import Device
from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.late import Late, LateSpaces
from pyvmm.region import LateRegion, MemoryRegion

PORT, BYTES, SECOND = 0x70, 2, 0x90
SECOND_NS = 1_000_000_000


class Words(Device):
    """Two bytes to be written and read one by one; ``other`` answers at its second place."""

    impl_sizes = (1, 1)

    def __init__(self) -> None:
        self.cells = [0x11, 0x22]
        self.seen: list[tuple[int, int]] = []
        self.other = Other()

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.cells[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        self.cells[offset] = value


class Other(Device):
    def read(self, offset: int, size: int) -> int:
        raise ValueError("other")


class Bench:
    def __init__(self) -> None:
        self.pio = AddressSpace("pio", 1 << 16)
        self.made: list[Words] = []
        self.late = Late(self.make, (self.pio, PORT, BYTES, "words", ""), (self.pio, SECOND, 4, "other", "other"))
        self.pio.add_all([(address, region) for _space, address, region in self.late.regions()])

    def make(self) -> Words:
        self.made.append(Words())
        return self.made[-1]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_access_makes_it_and_is_answered_by_it(bench: Bench) -> None:
    assert bench.pio.read(PORT + 1, 1) == 0x22
    bench.pio.write(PORT, 1, 0x33)
    assert bench.pio.read(PORT, 2) == 0x2233
    assert len(bench.made) == 1 and bench.late.device is bench.made[0]
    assert bench.made[0].seen == [(1, 1), (0, 1), (1, 1)]


def test_the_first_access_is_split_as_every_later_one(bench: Bench) -> None:
    """Past its end, and in pieces of the size that it implements."""
    first = bench.pio.read(PORT, 4), bench.pio.read(PORT - 1, 4)
    assert first == (bench.pio.read(PORT, 4), bench.pio.read(PORT - 1, 4)) == (0xFFFF2211, 0xFF2211FF)


def test_a_write_makes_it(bench: Bench) -> None:
    bench.pio.write(PORT, 2, 0x5544)
    assert bench.made[0].cells == [0x44, 0x55]


def test_who_looks_at_the_bus_finds_it(bench: Bench) -> None:
    assert bench.made == []
    found = bench.pio.find(PORT)
    assert found is not None and found.device is bench.late.device
    assert [(region.base, region.size, region.name) for region in bench.pio.regions] == [
        *((PORT, BYTES, "words"), (SECOND, 4, "other"))
    ]
    assert not any(isinstance(region, LateRegion) for region in bench.pio.regions)


def test_an_overlap_names_it_although_there_is_none_yet(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"mine at 0x71-0x71 overlaps words at 0x70-0x71 in pio"):
        bench.pio.map(PORT + 1, 1, Words(), name="mine")
    assert bench.made == []


def test_what_its_handler_raises_is_told_of_the_handler(bench: Bench) -> None:
    with pytest.raises(ValueError, match="other") as raised:
        bench.pio.read(SECOND, 4)
    assert [str(note) for note in raised.value.__notes__] == [
        "Other.read (port 0x90, 4 bytes, region other)"
    ] and len(bench.made) == 1


def test_many_threads_find_one(bench: Bench) -> None:
    ready, found = threading.Barrier(8), []

    def look() -> None:
        ready.wait()
        found.append(bench.pio.read(PORT, 1))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [0x11] * 8 and len(bench.made) == 1


def test_an_access_on_its_way_to_the_place_finds_the_device(bench: Bench) -> None:
    """A vCPU has the view of before, and the place in its hand."""
    place = next(region for region in bench.pio.view.regions if region.name == "words")
    assert isinstance(place, LateRegion)
    assert bench.pio.read(PORT, 1) == 0x11
    assert place._pass_read(1, 1) == 0x22
    place._pass_write(0, 1, 7)
    assert bench.pio.read(PORT, 1) == 7


def test_what_can_not_be_made_is_an_error_of_whoever_wanted_it() -> None:
    pio = AddressSpace("pio", 1 << 16)

    def make() -> Device:
        raise OSError(24, "Too many open files")

    late = Late(make, (pio, PORT, BYTES, "words", ""))
    pio.add_all([(address, region) for _space, address, region in late.regions()])
    with pytest.raises(OSError, match="Too many") as raised:
        pio.read(PORT, 1)
    assert "region words" in str(raised.value.__notes__[0])
    with pytest.raises(OSError, match="Too many"):
        _ = late.device


def test_a_listener_may_look_in_the_middle_of_a_change(bench: Bench) -> None:
    class Looks(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            seen.append((region.name, len(space.regions)))

    seen: list[tuple[str, int]] = []
    bench.pio.listen(Looks())
    bench.pio.map(0x10, 1, Words(), name="mine")
    assert seen == [("words", 2), ("other", 2), ("mine", 3)] and bench.made == []
    assert bench.pio.read(PORT, 1) == 0x11
    assert seen[3:] == [("words", 3), ("other", 3)]


def test_one_that_a_listener_wants_in_the_middle_of_a_change_comes_to_its_places_afterwards(bench: Bench) -> None:
    class Wants(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            if region.name == "mine":
                assert bench.late.device

    bench.pio.listen(Wants())
    with pytest.raises(StateError, match="do it afterwards"):
        bench.pio.map(0x10, 1, Words(), name="mine")
    bench.pio.map(0x10, 1, Words(), name="mine")
    found = bench.pio.find(PORT)
    assert found is not None and found.device is bench.late.device
    assert bench.pio.read(PORT, 1) == 0x11 and len(bench.made) == 1
    assert not any(isinstance(region, LateRegion) for region in bench.pio.view.regions)


def test_what_a_listener_raises_of_its_coming_leaves_it_there(bench: Bench) -> None:
    class Refuses(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            if bench.made:
                raise ValueError("not here")

    bench.pio.listen(Refuses())
    with pytest.raises(ValueError, match="not here"):
        bench.pio.read(PORT, 1)
    assert (bench.pio.read(PORT, 1), bench.late.device) == (0x11, bench.made[0]) and len(bench.made) == 1


# -- on a machine ------------------------------------------------------------------------------------------------------


def unmade(machine: Machine) -> set[str]:
    return {region.name for space in (machine.pio, machine.mmio) for region in space.view.regions
            if isinstance(region, LateRegion)}  # fmt: skip


def test_a_board_makes_what_is_touched() -> None:
    with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
        before = unmade(machine)
        assert {"rtc", "acpi_pm", "fw_cfg", "lapic", "pit", "pic.master", "i8042.data"} < before
        machine.pio.write(0x70, 1, 0x0D)
        assert machine.pio.read(0x71, 1) == 0x80
        assert before - unmade(machine) == {"rtc"}
        machine.irq_line(9).raise_()
        assert machine.irqchip.controllers["pic"].inputs.count == 16
        assert machine.pio.read(0x20, 1) == 1 << 2  # the IRR: the slave, whose is IRQ 9
        assert machine.pio.read(0xA0, 1) == 1 << 1
        assert machine.board.pm.press() is None
        assert "acpi_pm" not in unmade(machine)


def test_who_asks_for_the_parts_has_all_of_them_in_their_order() -> None:
    names = "pic ioapic lapic pit serial acpi_pm gpe0 vmgenid reset_control fw_cfg rtc i8042 port92 port80"
    with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
        machine.pio.read(0x71, 1)
        assert list(machine.devices) == [*names.split(), "debugcon", "debug_exit"]
        assert unmade(machine) == set()
        assert all(isinstance(device, Device) for device in machine.devices.values())


def test_made_late_it_is_as_made_at_power_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that shows: whether a device was there from the beginning or came just now, guest and save find the same."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000 * SECOND_NS + 123)
    states = []
    for early in (True, False):
        with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
            if early:
                assert machine.devices
            assert isinstance(machine.clock, VirtualClock)
            machine.clock.step(700 * SECOND_NS)
            for port, value in ((0x70, 0x0B), (0x71, 0x02), (0x70, 0x0C), (0x600, 0)):
                machine.pio.write(port, 1, value)
            shown = machine.pio.read(0x71, 1), machine.pio.read(0x600, 2), machine.pio.read(0x608, 4)
            parts = machine.save_state(memory=False)["parts"]
            del parts["vmgenid"]  # a number drawn
            states.append((shown, parts))
    assert states[0][0][0] & 0x10 and states[0][0][1] == 1  # the update's flag, the PM timer's
    assert states[0][0] == states[1][0]
    assert [name for name, part in states[0][1].items() if states[1][1][name] != part] == []


def test_a_generation_is_told_of_by_devices_that_nobody_has_touched() -> None:
    with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
        machine.board.new_generation()
        assert {"vmgenid", "gpe0"}.isdisjoint(unmade(machine))
        assert "acpi_pm" in unmade(machine)  # there is nothing to tell it yet
        assert machine.pio.read(0xAFE0, 2) == 1 << 5
        machine.pio.write(0xAFE2, 2, 1 << 5)
        assert "acpi_pm" not in unmade(machine) and machine.board.irqchip.wires[-1][:2] == (9, 1)


def test_input_for_a_port_that_nobody_has_looked_at_makes_it() -> None:
    """As the line has it: one byte is in the receiver, what follows waits at the console."""
    with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
        assert "serial" in unmade(machine)
        machine.consoles["serial"].feed(b"root")
        assert "serial" not in unmade(machine) and machine.consoles["serial"].fed_bytes == 3
        assert [machine.pio.read(0x3F8, 1) for _ in range(4)] == list(b"root")
    with Machine(machine="microvm", accel="qtest", memory_mib=2) as machine:
        machine.consoles["serial"].send_break()
        assert machine.pio.read(0x3FD, 1) & 0x10  # LSR: BI


def test_a_line_of_the_debug_console_that_has_no_end_comes_out_at_the_end() -> None:
    said: list[bytes] = []
    with Machine(machine="microvm", accel="qtest", memory_mib=2, debugcon=said.append) as machine:
        assert "debugcon" in unmade(machine)
        machine.pio.write(0x402, 1, ord("x"))
        assert said == []
    assert said == [b"x"]


def test_files_that_can_not_be_are_told_of_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="etc/e820"):
        Machine(machine="microvm", accel="qtest", memory_mib=2, fw_cfg={"etc/e820": b"mine"})


# -- all of them at once


class Board:
    def __init__(self, fails: Exception | None = None) -> None:
        self.pio, self.mmio = AddressSpace("pio", 1 << 16), AddressSpace("mmio", 1 << 52)
        self.words = Words()
        self.made = 0
        self.fails = fails
        self.mmio.reserve(0, 1 << 20, "RAM")
        self.late = LateSpaces((self.pio, self.mmio), self.make)

    def make(self) -> None:
        self.made += 1
        # Whoever makes them finds what is there so far, and no stand-in.
        assert self.pio.regions == []
        self.pio.map(PORT, BYTES, self.words)
        assert self.pio.read(PORT, 1) == 0x11
        late = Late(Other, (self.pio, SECOND, 4, "other", ""))
        self.pio.add_all([(address, region) for _space, address, region in late.regions()])
        if self.fails is not None:
            raise self.fails
        self.mmio.map(1 << 20, 4, Other())


def test_a_look_at_any_address_brings_all() -> None:
    for look in (
        lambda b: b.pio.read(0xFFFE, 2),  # nobody's
        lambda b: b.mmio.write(0xFEE00000, 4, 1),
        lambda b: b.pio.find(SECOND),
        lambda b: b.mmio.regions,
        lambda b: [region.device for region in b.pio.regions],
        lambda b: b.mmio.map(0x200000, 1, Other()),
        lambda b: b.pio.listen(SpaceListener()),
        lambda b: b.late.arrive(),
    ):
        board = Board()
        assert board.made == 0
        look(board)
        assert board.made == 1
        assert board.pio.read(PORT + 1, 1) == 0x22
        assert board.pio.read(0x1234, 2) == 0xFFFF
        names = [region.name for region in board.pio.regions]
        assert names == ["Words", "other"]
        assert not any(isinstance(region, LateRegion) for region in board.pio.regions)
        assert board.made == 1


def test_many_threads_that_look_find_one_board() -> None:
    board = Board()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(board.pio.read(PORT, 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, board.made) == ([0x11] * 8, 1)


def test_half_of_them_is_never_taken_for_all() -> None:
    board = Board(ValueError("no room"))
    with pytest.raises(ValueError, match="no room"):
        board.pio.read(PORT, 1)
    for look in (lambda: board.pio.read(PORT, 1), lambda: board.mmio.regions, board.late.arrive):
        with pytest.raises(HostError, match="devices could not be made: ValueError: no room: make another machine"):
            look()
    assert board.made == 1
    board.late.forget()
    board.pio.unmap_all()
    assert board.pio.read(PORT, 1) == 0xFF


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(24, "Too many open files"), "open files: raise `ulimit -n`"), (MemoryError(), "no memory")],
)
def test_no_room_on_the_host_is_told_in_a_sentence(error: Exception, said: str) -> None:
    with pytest.raises(HostError, match=said):
        Board(error).pio.read(PORT, 1)


def test_what_is_forgotten_never_comes() -> None:
    board = Board()
    board.late.forget()
    board.pio.unmap_all()
    assert board.pio.read(PORT, 1) == 0xFF
    assert board.made == 0


class Neighbours:
    """A device is there before the others, which come on both sides of it."""

    def __init__(self, at: int) -> None:
        self.pio = AddressSpace("pio", 1 << 16)
        self.first = self.pio.map(at, BYTES, Words(), name="first")
        self.made = 0
        self.late = LateSpaces((self.pio,), self.make)

    def make(self) -> None:
        self.made += 1
        assert self.pio.find(self.first.base) is self.first
        with pytest.raises(ConfigError, match="overlaps first"):
            self.pio.map(self.first.base + 1, 1, Other())
        for at in (PORT - 2, PORT + BYTES):
            if at != self.first.base:
                self.pio.map(at, BYTES, Words(), name=f"{at:#x}")

    @property
    def stand_ins(self) -> list[tuple[int, int]]:
        return [(r.base, r.size) for r in self.pio.view.regions if isinstance(r, LateRegion)]


@pytest.mark.parametrize(
    ("at", "stand_ins"),
    [
        (PORT, [(0, PORT), (PORT + BYTES, (1 << 16) - PORT - BYTES)]),
        (0, [(BYTES, (1 << 16) - BYTES)]),
        ((1 << 16) - BYTES, [(0, (1 << 16) - BYTES)]),
    ],
)
def test_what_is_there_answers_and_brings_nobody(at: int, stand_ins: list[tuple[int, int]]) -> None:
    both = Neighbours(at)
    assert both.stand_ins == stand_ins
    assert both.pio.read(at, 1) == 0x11
    assert both.pio.find(at + 1) is both.first
    assert both.made == 0
    assert both.pio.read(PORT - 1, 1) == 0x22
    assert (both.made, both.stand_ins) == (1, [])
    assert both.pio.read(at, 1) == 0x11


def test_an_access_over_both_is_split_when_all_is_there() -> None:
    for address, size, wanted in (
        (PORT - 1, 2, 0x1122),  # ends in it, and begins in what is not there yet
        (PORT + 1, 2, 0x1122),  # the other way round
        (PORT + 1, 4, 0xFF22_1122),
        (0xFFFE, 2, 0xFFFF),
    ):
        both = Neighbours(PORT)
        assert both.pio.read(address, size) == wanted
        assert both.made == 1


def test_one_that_is_taken_out_meanwhile_stays_out() -> None:
    both = Neighbours(PORT)
    both.pio.unmap(both.first)
    assert both.pio.read(PORT, 1) == 0xFF
    with pytest.raises(AssertionError):  # what ``make`` finds
        both.pio.read(PORT - 1, 1)


def test_nobody_stands_in_for_another() -> None:
    both = Neighbours(PORT)
    with pytest.raises(StateError, match="something else does already"):
        LateSpaces((both.pio,), lambda: None)
