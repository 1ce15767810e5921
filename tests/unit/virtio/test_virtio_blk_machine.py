"""A disk on virtio in a whole microvm without a vCPU: registers, doorbell, the queue's thread, the image."""

from __future__ import annotations

from pathlib import Path

import pytest
from blk_bench import SECTOR, header
from driver import TestDriver
from waiting import wait_for

import pyvmm
from pyvmm.boards.pc_firmware import boot_paths
from pyvmm.devices.virtio import blk, mmio
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK
from pyvmm.x86 import firmware_files, layout


class Guest:
    """Drives the first disk of a machine."""

    def __init__(self, machine: pyvmm.Machine) -> None:
        self.machine = machine
        self.write(mmio.STATUS, ACKNOWLEDGE)
        self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
        for window, value in ((0, blk.F_FLUSH), (1, F_VERSION_1 >> 32)):
            self.write(mmio.DRIVER_FEATURES_SEL, window)
            self.write(mmio.DRIVER_FEATURES, value)
        self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.disk = machine.devices["blk0"]
        assert isinstance(self.disk, blk.VirtioBlk)
        self.driver = TestDriver(machine.memory, self.disk.queues[0], enable=False)
        self.write(mmio.QUEUE_READY, 1)
        self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def write(self, offset: int, value: int) -> None:
        self.machine.mmio.write(layout.VIRTIO_MMIO + offset, 4, value)

    def read(self, offset: int) -> int:
        return self.machine.mmio.read(layout.VIRTIO_MMIO + offset, 4)

    def ask(self, readable: list[bytes], writable: list[int]) -> bytes:
        number = self.driver.add(readable, writable)
        self.write(mmio.QUEUE_NOTIFY, 0)
        came: list[tuple[int, int]] = []
        wait_for(lambda: came.extend(self.driver.used()) or came)
        assert came == [(number, sum(writable))]
        return self.driver.data(number)


def machine(*drives: str, **options: object) -> pyvmm.Machine:
    return pyvmm.Machine(machine="microvm", accel="qtest", memory_mib=16, drives=drives, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("doorbell", ["on", "off"])
def test_a_disk_on_a_microvm(tmp_path: Path, doorbell: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(n.to_bytes(4, "little") * 128 for n in range(64)))
    with machine(f"file={image},serial=S1", virtio_ioeventfd=doorbell) as m:
        guest = Guest(m)
        assert guest.read(mmio.MAGIC_VALUE) == mmio.MAGIC
        assert guest.read(mmio.DEVICE_ID) == blk.VirtioBlk.DEVICE_ID == 2
        assert guest.read(mmio.CONFIG) == 64
        assert guest.ask([header(blk.T_IN, 5)], [SECTOR, 1]) == image.read_bytes()[5 * SECTOR : 6 * SECTOR] + b"\0"
        assert guest.ask([header(blk.T_OUT, 7), b"x" * SECTOR], [1]) == b"\0"
        assert guest.ask([header(blk.T_FLUSH)], [1]) == b"\0"
        assert image.read_bytes()[7 * SECTOR : 8 * SECTOR] == b"x" * SECTOR
        assert guest.ask([header(blk.T_GET_ID)], [20, 1]) == b"S1".ljust(20, b"\0") + b"\0"
        assert guest.ask([header(99)], [1]) == b"\2"
        assert m.backends["virtio0"].stats.read.operations == 1
        guest.write(mmio.STATUS, 0)
        assert guest.read(mmio.STATUS) == 0


def test_two_disks_and_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(SECTOR))
    with machine(f"file={tmp_path / 'a'},index=1", f"file={tmp_path / 'b'},id=root,index=0") as m:
        assert list(m.backends) == ["root", "virtio1"]
        assert {"blk0", "blk1"} <= set(m.devices)


def test_a_pc_names_its_disks_to_the_firmware(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(SECTOR))
    drives = [f"file={tmp_path / 'a'},if=virtio", f"file={tmp_path / 'b'}"]
    with pyvmm.Machine(machine="pc", accel="qtest", drives=drives) as m:
        slots = [slot for slot, _, function in m.devices["pci"].devices if function is m.devices["blk0.pci"]]  # type: ignore[attr-defined]
        paths = boot_paths(m.board, "c", None)  # type: ignore[arg-type]
        assert paths == [firmware_files.ide_path(0), firmware_files.virtio_path(slots[0])]
