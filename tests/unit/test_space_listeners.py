"""Who listens to an address space: what is told, in which order, under no lock of a device, and what raising does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from pyvmm.address_space import AddressSpace, SpaceListener
from pyvmm.device import Device
from pyvmm.devices.pci.device import PciDevice
from pyvmm.errors import ConfigError, KindError, KvmError, StateError
from pyvmm.region import BufferRegion, EventRegion, FifoRegion, MemoryRegion

DEADLINE_S = 10


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield made
    os.close(made)


def signals(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Recorder(SpaceListener):
    """Every call as a line; ``raises`` for those that begin with it. Whether the region is mapped meanwhile."""

    def __init__(self, lines: list[str] | None = None, name: str = "") -> None:
        self.lines = [] if lines is None else lines
        self.name = name
        self.raises = "nothing"

    def _note(self, line: str) -> None:
        self.lines.append(self.name + line)
        if line.startswith(self.raises):
            raise RuntimeError(f"told to: {line}")

    def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
        assert space.find(region.base or 0) is region
        self._note(f"+{region.name} {region.base:#x}")

    def region_del(self, space: AddressSpace, region: MemoryRegion) -> None:
        assert space.find(region.base or 0) is region
        self._note(f"-{region.name} {region.base:#x}")

    def eventfd_add(self, space: AddressSpace, address: int, size: int, datamatch: int | None, fd: int) -> None:
        self._note(f"+eventfd {address:#x} {size} {datamatch} {fd}")

    def eventfd_del(self, space: AddressSpace, address: int, size: int, datamatch: int | None, fd: int) -> None:
        self._note(f"-eventfd {address:#x} {size} {datamatch} {fd}")

    def coalesced_add(self, space: AddressSpace, address: int, size: int) -> None:
        self._note(f"+coalesced {address:#x} {size}")

    def coalesced_del(self, space: AddressSpace, address: int, size: int) -> None:
        self._note(f"-coalesced {address:#x} {size}")

    def commit(self) -> None:
        self._note("commit")


def taken(lines: list[str]) -> list[str]:
    """What was told since the last look."""
    result = lines[:]
    lines.clear()
    return result


def mmio() -> AddressSpace:
    return AddressSpace("mmio", 1 << 32)


def test_a_listener_is_told_what_is_there_and_what_changes(fd: int) -> None:
    space, ear = mmio(), Recorder()
    space.add(0x2000, BufferRegion(bytearray(16), name="first"))
    space.listen(ear)
    assert taken(ear.lines) == ["+first 0x2000", "commit"]
    bell = space.add(0x1000, EventRegion(4, fd, write_size=2, datamatch=7, name="bell"))
    assert taken(ear.lines) == ["+bell 0x1000", f"+eventfd 0x1000 2 7 {fd}", "commit"]
    space.unmap(bell)
    assert taken(ear.lines) == [f"-eventfd 0x1000 2 7 {fd}", "-bell 0x1000", "commit"]
    space.add(0x3000, bell)
    assert taken(ear.lines)[1] == f"+eventfd 0x3000 2 7 {fd}"
    space.unlisten(ear)
    assert taken(ear.lines) == [f"-eventfd 0x3000 2 7 {fd}", "-bell 0x3000", "-first 0x2000", "commit"]
    space.unmap(bell)
    assert ear.lines == []
    with pytest.raises(StateError, match="does not listen to mmio"):
        space.unlisten(ear)


def test_all_of_it_goes_in_one_change(fd: int) -> None:
    space, ear = mmio(), Recorder()
    regions = [
        space.add(0x2000, BufferRegion(bytearray(16), name="second")),
        space.add(0x1000, EventRegion(4, fd, write_size=2, datamatch=7, name="first")),
    ]
    space.listen(ear)
    taken(ear.lines)
    space.unmap_all()
    assert taken(ear.lines) == ["-second 0x2000", f"-eventfd 0x1000 2 7 {fd}", "-first 0x1000", "commit"]
    assert space.regions == []
    assert [region.base for region in regions] == [None, None]
    space.unmap_all()
    # They can be mapped again.
    space.add(0x5000, regions[0])
    ear.raises = "-second"
    with pytest.raises(RuntimeError, match="told to: -second"):
        space.unmap_all()
    assert space.regions == []


def test_what_comes_is_told_first_to_the_first_and_what_goes_last() -> None:
    space = mmio()
    lines: list[str] = []
    for name in ("a ", "b "):
        space.listen(Recorder(lines, name))
    region = BufferRegion(bytearray(16), name="x")
    region.add_coalesced(4, 8)
    space.add(0, region)
    assert taken(lines) == ["a +x 0x0", "a +coalesced 0x4 8", "b +x 0x0", "b +coalesced 0x4 8", "a commit", "b commit"]
    space.unmap(region)
    assert taken(lines)[:4] == ["b -coalesced 0x4 8", "b -x 0x0", "a -coalesced 0x4 8", "a -x 0x0"]


def test_only_what_a_listener_has_of_its_own_is_called(fd: int) -> None:
    class Bells(SpaceListener):
        def __init__(self) -> None:
            self.bells = self.commits = 0

        def eventfd_add(self, *_: object) -> None:
            self.bells += 1

        def commit(self) -> None:
            self.commits += 1

    space, ear = mmio(), Bells()
    space.listen(ear)
    space.add(0, BufferRegion(bytearray(16)))
    assert (ear.bells, ear.commits) == (0, 0)  # nothing was told: nothing to commit
    space.add(0x100, EventRegion(4, fd))
    assert (ear.bells, ear.commits) == (1, 1)


def test_a_move_while_held_is_committed_once(fd: int) -> None:
    space, ear = mmio(), Recorder()
    space.listen(ear)
    bell = space.add(0, EventRegion(4, fd, name="bell"))
    taken(ear.lines)
    with space.held:
        space.unmap(bell)
        with space.held:
            space.add(0x10, bell)
        assert "commit" not in ear.lines
    assert taken(ear.lines) == [
        *(f"-eventfd 0x0 0 None {fd}", "-bell 0x0", "+bell 0x10", f"+eventfd 0x10 0 None {fd}", "commit")
    ]


def test_a_device_with_an_eventfd_in_a_moving_bar(fd: int) -> None:
    """The doorbell goes where the BAR goes, and is nowhere while the BAR is nowhere."""
    space, ear = mmio(), Recorder()

    class Bell(PciDevice):
        def __init__(self) -> None:
            super().__init__(device_id=1, class_code=0xFF0000)
            self.add_memory_bar(0, 0x1000, space, [(0x10, lambda: EventRegion(4, fd, write_size=4, name="bell"))])

    device = Bell()
    space.listen(ear)
    device.config_write(0x10, 4, 0xE000_0000)
    assert taken(ear.lines) == []
    device.config_write(0x04, 2, 2)
    assert taken(ear.lines) == ["+bell 0xe0000010", f"+eventfd 0xe0000010 4 None {fd}", "commit"]
    device.config_write(0x10, 4, 0xE100_0000)
    assert taken(ear.lines) == [
        *(f"-eventfd 0xe0000010 4 None {fd}", "-bell 0xe0000010", "commit"),
        *("+bell 0xe1000010", f"+eventfd 0xe1000010 4 None {fd}", "commit"),
    ]
    space.write(0xE100_0010, 4, 5)
    assert signals(fd) == 1
    device.reset()
    assert taken(ear.lines) == [f"-eventfd 0xe1000010 4 None {fd}", "-bell 0xe1000010", "commit"]


def test_a_bar_over_another_device_stays_untold_until_there_is_room(fd: int) -> None:
    space, ear = mmio(), Recorder()
    there = space.add(0xE000_0000, BufferRegion(bytearray(0x1000), name="there"))

    class Bell(PciDevice):
        def __init__(self) -> None:
            super().__init__(device_id=1, class_code=0xFF0000)
            self.add_memory_bar(0, 0x1000, space, [(0, lambda: EventRegion(4, fd, name="bell"))])

    device = Bell()
    space.listen(ear)
    taken(ear.lines)
    device.config_write(0x10, 4, 0xE000_0000)
    device.config_write(0x04, 2, 2)
    assert taken(ear.lines) == []
    space.unmap(there)
    device.retry_blocked()
    assert taken(ear.lines)[-2:] == [f"+eventfd 0xe0000000 0 None {fd}", "commit"]


def test_a_bar_that_a_listener_refuses_is_mapped_in_no_part(fd: int) -> None:
    space = mmio()

    class Refusing(SpaceListener):
        def eventfd_add(self, *_: object) -> None:
            raise KvmError("KVM_IOEVENTFD", errno.ENOSPC)

    class Bell(PciDevice):
        def __init__(self) -> None:
            super().__init__(device_id=1, class_code=0xFF0000)
            register = (0, lambda: MemoryRegion(4, self))
            self.add_memory_bar(0, 0x1000, space, [register, (0x10, lambda: EventRegion(4, fd))])

    device, listener = Bell(), Refusing()
    space.listen(listener)
    device.config_write(0x10, 4, 0xE000_0000)
    with pytest.raises(KvmError):
        device.config_write(0x04, 2, 2)
    assert space.regions == []
    space.unlisten(listener)
    device.config_write(0x10, 4, 0xE100_0000)
    assert [region.base for region in space.regions] == [0xE100_0000, 0xE100_0010]


@pytest.mark.parametrize("raises", ["+x", "+eventfd", "commit"])
def test_a_listener_that_raises_undoes_the_mapping(fd: int, raises: str) -> None:
    """Nobody is left with a region that is not there, and the next change is told as ever."""
    space = mmio()
    lines: list[str] = []
    before, failing, after = (Recorder(lines, name) for name in ("a ", "b ", "c "))
    for ear in (before, failing, after):
        space.listen(ear)
    failing.raises = raises
    region = EventRegion(4, fd, name="x")
    with pytest.raises(RuntimeError, match="told to"):
        space.add(0x10, region)
    told = taken(lines)
    for name in ("a ", "b ", "c "):
        mine = [line[2:] for line in told if line.startswith(name)]
        came = [line[1:] for line in mine if line.startswith("+")]
        if name == "b ":
            came = [line for line in came if not f"+{line}".startswith(raises)]  # it did not take that one
        assert sorted(line[1:] for line in mine if line.startswith("-")) == sorted(came)
    assert space.regions == []
    assert region.base is None
    failing.raises = "nothing"
    space.add(0x10, region)
    assert [line for line in taken(lines) if "+x" in line] == ["a +x 0x10", "b +x 0x10", "c +x 0x10"]


@pytest.mark.parametrize("raises", ["-x", "-eventfd", "commit"])
def test_a_listener_that_raises_does_not_keep_a_region(fd: int, raises: str) -> None:
    space = mmio()
    lines: list[str] = []
    before, failing, after = (Recorder(lines, name) for name in ("a ", "b ", "c "))
    for ear in (before, failing, after):
        space.listen(ear)
    region = space.add(0x10, EventRegion(4, fd, name="x"))
    taken(lines)
    failing.raises = raises
    with pytest.raises(RuntimeError, match="told to"):
        space.unmap(region)
    told = taken(lines)
    assert {"a -x 0x10", "c -x 0x10", "a commit", "c commit"} <= set(told)
    assert space.regions == []
    assert region.base is None


def test_a_listener_that_raises_as_it_comes_does_not_listen() -> None:
    space, ear = mmio(), Recorder()
    space.add(0, BufferRegion(bytearray(16), name="x"))
    space.add(0x100, BufferRegion(bytearray(16), name="y"))
    ear.raises = "+y"
    with pytest.raises(RuntimeError):
        space.listen(ear)
    assert taken(ear.lines) == ["+x 0x0", "+y 0x100", "commit", "-x 0x0", "commit"]
    space.add(0x200, BufferRegion(bytearray(16)))
    assert ear.lines == []


def test_no_device_is_locked_while_listeners_are_told() -> None:
    """Another thread can take the device's lock: its handler may be waiting to map something itself."""
    space = mmio()
    device = Device()
    free: list[bool] = []

    class Ear(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            def take() -> None:
                with device.lock:
                    free.append(True)

            thread = threading.Thread(target=take, daemon=True)
            thread.start()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

        region_del = region_add

    space.listen(Ear())
    region = space.map(0, 4, device)
    space.unmap(region)
    assert free == [True, True]


def test_a_listener_that_changes_the_space_is_told_so() -> None:
    space = mmio()

    class Ear(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            space.add(0x1000, BufferRegion(bytearray(16)))

    space.listen(Ear())
    with pytest.raises(StateError, match="a listener of mmio changes it while it is told of a change"):
        space.add(0, BufferRegion(bytearray(16)))
    assert space.regions == []


def test_changes_by_several_threads_are_told_one_after_another(fd: int) -> None:
    """What is told adds up to what is mapped, at each moment."""
    space = mmio()
    there: set[int] = set()
    inside = threading.Lock()

    class Ear(SpaceListener):
        def region_add(self, space: AddressSpace, region: MemoryRegion) -> None:
            assert inside.acquire(blocking=False)
            assert region.base is not None and region.base not in there
            there.add(region.base)

        def region_del(self, space: AddressSpace, region: MemoryRegion) -> None:
            assert inside.acquire(blocking=False)
            there.remove(region.base or 0)

        def commit(self) -> None:
            inside.release()

    space.listen(Ear())
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            region = BufferRegion(bytearray(16))
            for _ in range(200):
                space.add(16 * n, region)
                space.unmap(region)
            space.add(16 * n, region)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * DEADLINE_S)
    assert failures == []
    assert there == {0, 16, 32, 48}


# -- what regions state ------------------------------------------------------------------------------------------------


def test_an_event_region_takes_what_kvm_would(fd: int) -> None:
    space = mmio()
    space.add(0, EventRegion(8, fd))
    space.add(0x10, EventRegion(8, fd, write_size=2))
    space.add(0x20, EventRegion(8, fd, write_size=2, datamatch=0))
    for address, size, value, expected in (
        *((0, 1, 9, 1), (3, 1, 9, 1), (0, 8, 9, 1)),
        *((0x10, 2, 9, 1), (0x10, 1, 9, 0), (0x10, 4, 9, 0), (0x12, 2, 9, 0)),
        *((0x20, 2, 0, 1), (0x20, 2, 1, 0), (0x20, 4, 0, 0), (0x24, 2, 0, 0)),
    ):
        space.write(address, size, value)
        assert signals(fd) == expected, (hex(address), size, value)
    assert space.read(0x20, 2) == 0


def test_a_device_may_have_several_doorbells_at_one_address(fd: int) -> None:
    """As a virtio-mmio device has: the value says which queue."""
    region = MemoryRegion(0x100, Device())
    for queue in range(3):
        region.add_eventfd(fd, offset=0x50, size=4, datamatch=queue)
    space, ear = mmio(), Recorder()
    space.listen(ear)
    space.add(0x1000, region)
    assert ear.lines[1:-1] == [f"+eventfd 0x1050 4 {queue} {fd}" for queue in range(3)]
    with pytest.raises(StateError, match="is mapped"):
        region.add_eventfd(fd, offset=0x60)
    with pytest.raises(StateError, match="is mapped"):
        region.add_coalesced()


def test_eventfds_that_want_the_same_write_are_refused(fd: int) -> None:
    region = MemoryRegion(0x100, Device(), name="x")
    region.add_eventfd(fd, offset=4, size=4, datamatch=1)
    for size, match in ((4, 1), (4, None), (0, None)):
        with pytest.raises(ConfigError, match=r"x: eventfds \d+ and \d+ at offset 0x4 want the same writes"):
            region.add_eventfd(fd, offset=4, size=size, datamatch=match)
    region.add_eventfd(fd, offset=4, size=2)
    region.add_eventfd(fd, offset=8, size=4, datamatch=1)
    assert len(region.eventfds) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"offset": 16}, "an eventfd at offset 16"),
        ({"offset": -1}, "an eventfd at offset -1"),
        ({"size": 3}, "an eventfd for writes of 3 bytes"),
        ({"datamatch": 1}, "an eventfd for writes of 0 bytes"),
        ({"size": 2, "datamatch": 1 << 16}, "datamatch=65536"),
        ({"size": 2, "datamatch": "x"}, "datamatch='x'"),
    ],
)
def test_eventfds_that_can_not_be(fd: int, options: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BufferRegion(bytearray(16)).add_eventfd(fd, **options)


def test_what_is_gathered_begins_in_the_region() -> None:
    device = Device()
    port = FifoRegion(1, device, lambda: None, wide=True)
    port.add_coalesced(0, 4)  # its accesses reach over the next ports
    assert port.coalesced == ((0, 4),)
    for offset, size in ((1, 1), (-1, 1), (0, 0)):
        with pytest.raises(ConfigError, match="can't be gathered"):
            port.add_coalesced(offset, size)


def test_what_is_no_listener_is_refused() -> None:
    with pytest.raises(KindError, match="is no listener"):
        mmio().listen(object())  # type: ignore[arg-type]
