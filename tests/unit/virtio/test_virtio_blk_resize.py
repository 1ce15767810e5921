"""An image that grows or shrinks while its guest runs (QEMU's block_resize; virtio 1.2, 5.2.4): the guest is told."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest
from blk_bench import SECTOR, header
from machine_guest import LIMIT_S
from test_virtio_blk_machine import Guest, machine
from waiting import wait_for

import pyvmm
from pyvmm.block.image_tool import check, create, info
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
        ("", MIB + 1, f"drive d: size_bytes={MIB + 1}: give whole sectors of 512 bytes, at least one"),
        ("", 0, "give whole sectors of 512 bytes, at least one"),
        (",snapshot=on", SECTOR, "has its size for good"),
        (",size=4096", None, "drive d has its size for good, by size=, snapshot=on or read-only=on"),
        (",snapshot=on", None, "has its size for good"),
        (",read-only=on", 2 * MIB, "has its size for good"),
        ("", 1 << 62, "drive d can't grow: File too large"),
    ],
)
def test_what_keeps_its_size(image: Path, options: str, size: int | None, sentence: str) -> None:
    with machine(f"file={image},id=d{options}") as m:
        with pytest.raises(ConfigError) as caught:
            m.block_resize("d", size)
        assert sentence in str(caught.value)
    assert image.stat().st_size == MIB


@pytest.mark.parametrize("options", ["", ",cache=none", ",aio=io_uring", ",format=qcow2"])
def test_a_disk_is_made_smaller(image: Path, options: str) -> None:
    if "qcow2" in options:
        image.unlink()
        create(str(image), "qcow2", MIB)
    end = 300 * SECTOR
    with machine(f"file={image},id=d{options}") as m:
        guest = Guest(m)
        assert write(guest, 0, b"".join(n.to_bytes(4, "little") * 128 for n in range(MIB // SECTOR))) == 0
        generation = guest.read(mmio.CONFIG_GENERATION)
        guest.write(mmio.INTERRUPT_ACK, guest.read(mmio.INTERRUPT_STATUS))
        assert m.block_resize("d", end) == end
        assert guest.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
        assert guest.read(mmio.CONFIG_GENERATION) != generation
        assert capacity(guest) == end
        for at, size in ((end, SECTOR), (end - SECTOR, 2 * SECTOR), (MIB - SECTOR, SECTOR), (MIB, SECTOR)):
            assert guest.ask([header(blk.T_IN, at // SECTOR)], [size, 1])[-1] == 1
            assert write(guest, at, bytes(size)) == 1
        assert read(guest, 0, end) == b"".join(n.to_bytes(4, "little") * 128 for n in range(300))
        assert write(guest, end - SECTOR, b"x" * SECTOR) == 0
        assert m.block_resize("d", MIB) == MIB
        assert read(guest, end - SECTOR, 3 * SECTOR) == b"x" * SECTOR + bytes(2 * SECTOR)
        assert read(guest, MIB - SECTOR, SECTOR) == bytes(SECTOR)  # nothing of before shows again
        assert m.block_resize("d", end) == end
    if "qcow2" in options:
        assert info(str(image), None)["virtual-size"] == end
        found = check(str(image), None)
        assert (found.errors, found.leaks) == (0, 0)
    else:
        assert image.stat().st_size == end


def test_a_smaller_disk_behind_an_offset(image: Path) -> None:
    image.write_bytes(b"o" * MIB)
    with machine(f"file={image},id=d,offset={MIB // 2}") as m:
        guest = Guest(m)
        assert m.block_resize("d", 4096) == 4096
        assert read(guest, 0, 4096) == b"o" * 4096
    assert image.read_bytes() == b"o" * (MIB // 2 + 4096)


def test_a_disk_becomes_smaller_and_larger_under_load(image: Path) -> None:
    """Each request is done or refused, whole; what stands before the shortest end is never lost."""
    least, stop, wrong = 64 * SECTOR, threading.Event(), []
    with machine(f"file={image},id=d") as m:
        guest = Guest(m)
        assert write(guest, 0, b"k" * least) == 0

        def sizes() -> None:
            while not stop.is_set():
                for size in (least, MIB, 2 * least):
                    if m.block_resize("d", size) != size:
                        wrong.append(size)

        thread = threading.Thread(target=sizes, daemon=True)
        thread.start()
        try:
            for n in range(150):
                assert read(guest, 0, least) == b"k" * least
                assert write(guest, (64 + n) * SECTOR, b"z" * SECTOR) in (0, 1)
                assert guest.ask([header(blk.T_IN, 64 + n)], [SECTOR, 1])[-1] in (0, 1)
        finally:
            stop.set()
            thread.join(LIMIT_S)
        assert not thread.is_alive()
        assert not wrong
        assert m.block_resize("d", least) == least
        assert read(guest, 0, least) == b"k" * least
    assert image.read_bytes() == b"k" * least


def test_a_state_in_which_a_request_waits_for_what_is_no_more(image: Path, tmp_path: Path) -> None:
    """Put aside by werror=stop on a disk that is smaller when it is asked again: S_IOERR, and no policy is asked."""
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\niotype = "write"\nonce = "on"\n')
    with machine(f"file=blkdebug:{rules}:{image},format=raw,id=d,werror=stop") as m:
        guest = Guest(m)
        backend = m.backends["d"]
        number = guest.driver.add([header(blk.T_OUT, 1000), b"x" * SECTOR], [1])
        guest.write(mmio.QUEUE_NOTIFY, 0)
        wait_for(lambda: backend.stalled == 1)
        assert m.block_resize("d", 999 * SECTOR) == 999 * SECTOR
        assert backend.stalled == 1
        backend.resume()
        wait_for(lambda: guest.driver.used() == [(number, 1)])
        assert guest.driver.data(number) == b"\1"
        assert backend.stalled == 0
    assert image.stat().st_size == 999 * SECTOR


def test_a_disk_that_can_not_become_smaller(tmp_path: Path) -> None:
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, MIB)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with machine(f"file=/proc/self/fd/{fd},id=d") as m:
            with pytest.raises(ConfigError, match="drive d can't become smaller: Operation not permitted"):
                m.block_resize("d", SECTOR)
            guest = Guest(m)
            assert capacity(guest) == MIB
            assert write(guest, MIB - SECTOR, b"x" * SECTOR) == 0
    finally:
        os.close(fd)


def test_what_is_no_such_drive(image: Path) -> None:
    with pyvmm.Machine(accel="qtest", machine="pc", drives=[f"file={image},id=ide"]) as m:
        with pytest.raises(ConfigError, match=r"there is no such drive: did you mean ide\?"):
            m.block_resize("idf")
        with pytest.raises(ConfigError, match="does not hear of it on IDE: give the drive if=virtio"):
            m.block_resize("ide")
    with machine(f"file={image},id=d") as m, pytest.raises(ConfigError, match="give a number of bytes"):
        m.block_resize("d", "2G")  # type: ignore[arg-type]
