"""Places are given out once: an overlap is refused by a sentence that names both, in each of a board's allocators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import ConfigError, Device, Machine
from pyvmm.boards.pc import Pc
from pyvmm.devices.pci.device import PciDevice
from pyvmm.places import Places
from pyvmm.x86 import layout


@pytest.fixture
def pc() -> Iterator[Pc]:
    with Machine(accel="qtest", machine="pc", memory_mib=16) as machine:
        assert isinstance(machine.board, Pc)
        yield machine.board


def test_ports(pc: Pc) -> None:
    with pytest.raises(ConfigError, match=r"^mine at port 0x3fc-0x403 overlaps serial at 0x3f8-0x3ff: give another"):
        pc.map_ports(0x3FC, 8, Device(), "mine")
    assert (pc.ports.owner(0x600), pc.ports.owner(0x20)) == ("acpi_pm", "PIC")
    pc.map_ports(0x300, 4, Device(), "mine")
    assert pc.ports.owner(0x303) == "mine" and pc.ports.owner(0x304) is None


def test_windows(pc: Pc) -> None:
    first = pc.windows.give(0x200, "first", first=layout.VIRTIO_MMIO, end=layout.VIRTIO_MMIO_END)
    second = pc.windows.give(0x200, "second", first=layout.VIRTIO_MMIO, end=layout.VIRTIO_MMIO_END)
    assert (first, second) == (0xFEB0_0000, 0xFEB0_0200)
    with pytest.raises(ConfigError, match=r"^third at address 0xfeb00100-0xfeb00107 overlaps first at 0xfeb00000-"):
        pc.windows.take(first + 0x100, 8, "third")
    with pytest.raises(ConfigError, match="overlaps local APIC at"):
        pc.windows.take(layout.LAPIC + 0x80, 4, "mine")
    with pytest.raises(ConfigError, match="overlaps ram at"):
        pc.windows.take(0x20_0000, 4096, "mine")


def test_pci_slots(pc: Pc) -> None:
    slot = pc.pci_slots.give(1, "network")
    assert slot == 2
    with pytest.raises(ConfigError, match=r"^disk at PCI slot 2 overlaps network at 2: give another place$"):
        pc.pci_slots.take(2, 1, "disk")
    pc.pci.add(PciDevice(device_id=1, class_code=0x020000), slot)
    with pytest.raises(ConfigError, match=r"^PciDevice is at PCI 02\.0 already: give PciDevice another slot$"):
        pc.pci.add(PciDevice(device_id=2, class_code=0x010000), slot)


def test_none_is_left() -> None:
    slots = Places("PCI slot", 0, 2, numbered=True)
    slots.take(0, 1, "bridge")
    assert slots.give(1, "disk") == 1
    with pytest.raises(ConfigError, match=r"^no PCI slot of 0-1 is left for sound: bridge, disk have them, leave one"):
        slots.give(1, "sound")
    slots.free(0)
    assert slots.give(1, "sound") == 0
    with pytest.raises(ConfigError, match=r"^sound at 2 is no PCI slot: they go from 0-1$"):
        slots.take(2, 1, "sound")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8), st.booleans()), max_size=40))
def test_against_a_list_of_owners(steps: list[tuple[int, int, bool]]) -> None:
    places = Places("port", 0, 64)
    model: dict[int, str] = {}
    for n, (at, size, fixed) in enumerate(steps):
        wanted = range(at, at + size)
        free = [start for start in range(0, 64 - size + 1, size) if not model.keys() & set(range(start, start + size))]
        fits = at + size <= 64 and not model.keys() & set(wanted) if fixed else bool(free)
        try:
            where = places.take(at, size, f"{n}") if fixed else places.give(size, f"{n}")
        except ConfigError:
            assert not fits
        else:
            assert fits and where == (at if fixed else free[0])
            model.update(dict.fromkeys(range(where, where + size), f"{n}"))
    assert [places.owner(at) for at in range(64)] == [model.get(at) for at in range(64)]
