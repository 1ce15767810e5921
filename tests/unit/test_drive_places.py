"""Where drives go, what they are called, and what a drive on IDE or on virtio can't be asked. Nothing is opened."""

from __future__ import annotations

import pytest

from pyvmm.block import DriveOptions
from pyvmm.boards.drive_places import place
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


# -- virtio ------------------------------------------------------------------------------------------------------------


def parsed(*texts: str) -> list[DriveOptions]:
    return [DriveOptions.parse(f"file={chr(97 + n)},{text}") for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("machine", "texts", "places"),
    [
        ("pc", ["", "if=virtio", "media=cdrom"], ["ide 0 a", "ide 2 c", "virtio 0 b"]),
        ("microvm", ["", "if=virtio"], ["virtio 0 a", "virtio 1 b"]),
        ("microvm", ["", "index=0", "index=7"], ["virtio 0 b", "virtio 1 a", "virtio 7 c"]),
        ("pc", ["if=ide", "if=virtio,index=0"], ["ide 0 a", "virtio 0 b"]),
    ],
)
def test_a_drive_goes_to_the_boards_bus_or_to_the_one_it_names(
    machine: str, texts: list[str], places: list[str]
) -> None:
    placed = place(parsed(*texts), machine)
    assert [f"{drive.interface} {drive.index} {drive.file}" for drive in placed] == places
    assert place(placed, machine) == placed


def test_names_serial_numbers_and_queues_on_virtio() -> None:
    plain, told = place(parsed("if=virtio", "if=virtio,id=data,serial=X,num-queues=3"), "pc", cpus=4)
    assert (plain.id, plain.serial, plain.num_queues) == ("virtio0", "PVV00001", 4)
    assert (told.id, told.serial, told.num_queues) == ("data", "X", 3)
    assert place(parsed("if=virtio"), "pc", cpus=64)[0].num_queues == 8
    assert place(parsed(""), "microvm", cpus=64)[0].num_queues == 1
    assert place(parsed(""), "pc", cpus=4)[0].num_queues is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["index=3", "index=3"], "drives a and b both want index=3 of virtio"),
        (["index=256"], "index=256: use 0 to 255"),
        (["media=cdrom"], "virtio has no CD-ROM drive: use if=ide, or media=disk,read-only=on"),
        (["bus=0"], "bus=0 with if=virtio: leave it out"),
        (["unit=0"], "unit=0 with if=virtio"),
        (["model=M"], "model='M' with if=virtio"),
        (["ver=1"], "ver='1' with if=virtio"),
        (["trans=lba"], "trans=lba with if=virtio"),
        (["serial=123456789012345678901"], "at most 20 characters"),
        (["cyls=1,heads=256,secs=63"], "heads=256: give a whole number from 1 to 255"),
        (["id=a", "id=a"], "two drives are called a"),
    ],
)
def test_what_virtio_can_not_be_asked_is_one_sentence(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        place(parsed(*(f"if=virtio,{text}" for text in texts)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["logical-block-size=4096", "physical_block_size=4096", "num-queues=2"])
def test_what_ide_can_not_be_asked_names_the_bus_that_can(text: str) -> None:
    with pytest.raises(ConfigError, match="with if=ide: use if=virtio, or leave it out"):
        place(parsed(text))
