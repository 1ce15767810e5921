"""Where a pc's drives go, what they are called, and what an IDE drive can't say of itself. Nothing is opened."""

from __future__ import annotations

import pytest

from pyvmm.block import DriveOptions
from pyvmm.boards.ide_places import place
from pyvmm.errors import ConfigError


def test_drives_go_to_free_places_and_cds_to_the_second_channel() -> None:
    disk, second, cd = DriveOptions("a"), DriveOptions("b", index=0), DriveOptions("c", media="cdrom")
    assert [(drive.file, drive.index) for drive in place([disk, second, cd])] == [("b", 0), ("a", 1), ("c", 2)]


def test_what_the_caller_has_given_stays_as_it_is() -> None:
    disk, cd = DriveOptions("a"), DriveOptions(None, media="cdrom", bus=1)
    before = disk.plain(), cd.plain()
    place([disk, cd])
    assert (disk.plain(), cd.plain()) == before
    with pytest.raises(AttributeError, match="does not change: make another one, by changed"):
        disk.index = 1


@pytest.mark.parametrize(
    ("text", "index"), [("index=3", 3), ("bus=1,unit=1", 3), ("bus=1", 2), ("unit=1", 1), ("index=0", 0), ("", 0)]
)
def test_a_place_by_index_or_by_bus_and_unit(text: str, index: int) -> None:
    (drive,) = place([DriveOptions.parse(f"file=x,{text}")])
    assert (drive.index, drive.bus, drive.unit) == (index, None, None)


@pytest.mark.parametrize(
    ("text", "name", "serial"),
    [
        ("index=0", "ide0-hd0", "PV00001"),
        ("index=3", "ide1-hd1", "PV00004"),
        ("index=1,media=cdrom", "ide0-cd1", "PV00002"),
        ("id=system,serial=X1", "system", "X1"),
        ("serial=", "ide0-hd0", ""),
    ],
)
def test_names_and_serial_numbers_are_by_the_place(text: str, name: str, serial: str) -> None:
    (drive,) = place([DriveOptions.parse(f"file=x,{text}")])
    assert (drive.id, drive.name, drive.serial) == (name, name, serial)


def test_a_drive_that_has_its_place_keeps_it() -> None:
    placed = place([DriveOptions("a"), DriveOptions("b", media="cdrom")])
    assert place(placed) == placed


@pytest.mark.parametrize(
    ("drives", "message"),
    [
        (["index=1", "index=1"], "x and x both want index=1"),
        (["index=3", "bus=1,unit=1"], "both want index=3"),
        ([""] * 5, "all 4 places"),
        (["index=4"], r"index=4: use 0 or 1 \(primary master"),
        (["unit=2"], r"unit=2: use 0 \(master\) or 1 \(slave\)"),
        (["bus=2"], r"bus=2: use 0 \(the first channel\) or 1"),
        (["id=a", "id=a"], "two drives are called a: give each an id of its own"),
        (["index=0", "index=1,id=ide0-hd0"], "two drives are called ide0-hd0"),
        (["serial=123456789012345678901"], "at most 20 characters"),
        (["model=" + "m" * 41], "at most 40 characters"),
        (["ver=123456789"], "ver='123456789': use at most 8 characters"),
        (["media=cdrom,ver=12345"], "ver='12345': use at most 4 characters"),
        (["cyls=65536,heads=16,secs=63"], "cyls=65536: give a whole number from 1 to 65535"),
        (["cyls=1,heads=17,secs=63"], "heads=17: give a whole number from 1 to 16"),
        (["cyls=1,heads=1,secs=256"], "secs=256: give a whole number from 1 to 255"),
    ],
)
def test_what_can_not_be_placed_is_one_sentence(drives: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        place([DriveOptions.parse(f"file=x,{text}") for text in drives])
    assert "\n" not in str(caught.value)
