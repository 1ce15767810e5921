"""An image that grows while its guest runs (QEMU's block_resize; OASIS virtio 1.2, 5.2.4): the guest is told of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blk_bench import SECTOR, header
from test_virtio_blk_machine import Guest, machine

import pyvmm
from pyvmm.devices.virtio import blk, mmio
from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

MIB = 1 << 20


def capacity(guest: Guest) -> int:
    low, high = (guest.machine.mmio.read(layout.VIRTIO_MMIO + mmio.CONFIG + n, 4) for n in (0, 4))
    return (low | high << 32) * SECTOR


def write(guest: Guest, at: int, data: bytes) -> int:
    return guest.ask([header(blk.T_OUT, at // SECTOR), data], [1])[-1]


def read(guest: Guest, at: int, size: int) -> bytes:
    data = guest.ask([header(blk.T_IN, at // SECTOR)], [size, 1])
    assert data[-1] == 0
    return data[:-1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.parametrize("options", ["", ",cache=none", ",aio=io_uring", ",werror=stop,throttling.iops-total=99999"])
def test_a_guest_has_what_the_image_has_grown_by(image: Path, options: str) -> None:
    with machine(f"file={image},id=d{options}") as m:
        guest = Guest(m)
        assert capacity(guest) == MIB
        assert write(guest, MIB, b"x" * SECTOR) == 1  # past its end
        generation, status = guest.read(mmio.CONFIG_GENERATION), guest.read(mmio.INTERRUPT_STATUS)
        guest.write(mmio.INTERRUPT_ACK, status)
        with image.open("r+b") as file:
            file.truncate(3 * MIB)
        assert m.block_resize("d") == 3 * MIB
        assert guest.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
        assert guest.read(mmio.CONFIG_GENERATION) != generation
        assert capacity(guest) == 3 * MIB
        for at in (MIB - SECTOR, MIB, 3 * MIB - SECTOR):
            assert write(guest, at, at.to_bytes(8, "little") * 64) == 0
            assert read(guest, at, SECTOR) == at.to_bytes(8, "little") * 64
        assert write(guest, 3 * MIB, b"x" * SECTOR) == 1
    assert image.stat().st_size == 3 * MIB
    assert image.read_bytes()[MIB : MIB + 8] == MIB.to_bytes(8, "little")


def test_a_disk_is_made_larger(image: Path) -> None:
    with machine(f"file={image},id=d") as m:
        guest = Guest(m)
        assert m.block_resize("d", 2 * MIB) == 2 * MIB
        assert (capacity(guest), image.stat().st_size) == (2 * MIB, 2 * MIB)
        assert write(guest, 2 * MIB - SECTOR, b"x" * SECTOR) == 0
        generation = guest.read(mmio.CONFIG_GENERATION)
        assert m.block_resize("d", 2 * MIB) == m.block_resize("d") == 2 * MIB
        assert guest.read(mmio.CONFIG_GENERATION) == generation  # nothing has changed
        os.truncate(image, MIB)  # behind our back: what is missing reads as zeros
        assert m.block_resize("d") == 2 * MIB
        assert read(guest, MIB, SECTOR) == bytes(SECTOR)


def test_a_window_with_an_offset_grows_by_its_file(image: Path) -> None:
    with machine(f"file={image},id=d,offset={MIB // 2}") as m:
        guest = Guest(m)
        assert capacity(guest) == MIB // 2
        assert m.block_resize("d", MIB) == MIB
        assert image.stat().st_size == MIB + MIB // 2


@pytest.mark.parametrize(
    ("options", "size", "sentence"),
    [
        ("", MIB - SECTOR, f"drive d: size_bytes={MIB - SECTOR}: it has {MIB} bytes, and a guest that may use them"),
        ("", MIB + 1, "give as many or more, whole sectors of 512"),
        (",size=4096", None, "drive d has its size for good, by size=, snapshot=on or read-only=on"),
        (",snapshot=on", None, "has its size for good"),
        (",read-only=on", 2 * MIB, "has its size for good"),
        ("", 1 << 62, "drive d can't grow: File too large"),
    ],
)
def test_what_can_not_grow(image: Path, options: str, size: int | None, sentence: str) -> None:
    with machine(f"file={image},id=d{options}") as m:
        with pytest.raises(ConfigError) as caught:
            m.block_resize("d", size)
        assert sentence in str(caught.value)
    assert image.stat().st_size == MIB


def test_what_is_no_such_drive(image: Path) -> None:
    with pyvmm.Machine(accel="qtest", machine="pc", drives=[f"file={image},id=ide"]) as m:
        with pytest.raises(ConfigError, match=r"there is no such drive: did you mean ide\?"):
            m.block_resize("idf")
        with pytest.raises(ConfigError, match="does not hear of it on IDE: give the drive if=virtio"):
            m.block_resize("ide")
    with machine(f"file={image},id=d") as m, pytest.raises(ConfigError, match="give a number of bytes"):
        m.block_resize("d", "2G")  # type: ignore[arg-type]
