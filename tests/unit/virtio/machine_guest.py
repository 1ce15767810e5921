"""A driver of a virtio device in a whole machine without a vCPU: through its registers, on either transport."""

from __future__ import annotations

from driver import TestDriver
from waiting import wait_for

import pyvmm
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, VirtioDevice
from pyvmm.x86 import layout

LIMIT_S = 20.0
READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
BAR4 = 0xFE00_4000
DRIVER_FEATURE_SELECT, DRIVER_FEATURE, STATUS, QUEUE_SELECT, QUEUE_ENABLE = 8, 12, 20, 22, 28
CONFIG, NOTIFY = 0x2000, 0x3000


class MachineGuest:
    """Drives the device ``name``, the only one on virtio. ``drivers`` are those of its queues."""

    def __init__(self, machine: pyvmm.Machine, name: str) -> None:
        self.machine = machine
        device = machine.devices[name]
        assert isinstance(device, VirtioDevice)
        self.device = device
        self.on_pci = f"{name}.pci" in machine.devices
        if self.on_pci:
            pci = machine.devices["pci"]
            function = machine.devices[f"{name}.pci"]
            slot = next(slot for slot, _, each in pci.devices if each is function)  # type: ignore[attr-defined]
            for register, value in ((0x20, BAR4), (0x24, 0), (0x04, 7)):
                machine.pio.write(0xCF8, 4, 0x8000_0000 | slot << 11 | register)
                machine.pio.write(0xCFC, 4, value)

    def _put(self, on_mmio: int, on_pci: tuple[int, int], value: int) -> None:
        if self.on_pci:
            offset, size = on_pci
            self.machine.mmio.write(BAR4 + offset, size, value)
        else:
            self.machine.mmio.write(layout.VIRTIO_MMIO + on_mmio, 4, value)

    def set_status(self, value: int) -> None:
        self._put(mmio.STATUS, (STATUS, 1), value)

    @property
    def _config(self) -> int:
        return BAR4 + CONFIG if self.on_pci else layout.VIRTIO_MMIO + mmio.CONFIG

    def config(self, offset: int, size: int) -> int:
        return self.machine.mmio.read(self._config + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.machine.mmio.write(self._config + offset, size, value)

    def notify(self, queue: int) -> None:
        self._put(mmio.QUEUE_NOTIFY, (NOTIFY + 4 * queue, 2), queue)

    def start(self, features: int, *queues: int, **ring: bool) -> None:
        """Up to DRIVER_OK, with these of its queues."""
        self.set_status(ACKNOWLEDGE)
        self.set_status(ACKNOWLEDGE | DRIVER)
        for window in (0, 1):
            self._put(mmio.DRIVER_FEATURES_SEL, (DRIVER_FEATURE_SELECT, 4), window)
            value = (features | F_VERSION_1) >> 32 * window & 0xFFFF_FFFF
            self._put(mmio.DRIVER_FEATURES, (DRIVER_FEATURE, 4), value)
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.device.status & FEATURES_OK
        self.drivers = {}
        for n in queues:
            base = 0x10_0000 * (n + 1)
            driver = TestDriver(
                self.machine.memory, self.device.queues[n], base=base, size=32, enable=False, **ring
            )
            self.drivers[n] = driver
            self._put(mmio.QUEUE_SEL, (QUEUE_SELECT, 2), n)
            self._put(mmio.QUEUE_READY, (QUEUE_ENABLE, 2), 1)
        self.set_status(READY)
        assert self.device.live

    def used(self, n: int, count: int = 1) -> list[tuple[int, int]]:
        """Of queue ``n``, once there are so many."""
        found: list[tuple[int, int]] = []
        wait_for(lambda: found.extend(self.drivers[n].used()) or len(found) >= count)
        return found
