"""A driver's first steps over virtio-mmio registers (OASIS virtio 1.2, 3.1.1 and 4.2), by an address space."""

from __future__ import annotations

from driver import TestDriver

from pyvmm.address_space import AddressSpace
from pyvmm.devices.virtio import mmio
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK, VirtioDevice
from pyvmm.guest_memory import GuestMemory


class MmioDriver:
    """``edges`` counts the interrupts. ``start`` goes as far as DRIVER_OK, with queue ``n`` set up by ``driver(n)``."""

    def __init__(self, memory: GuestMemory, device: VirtioDevice) -> None:
        self.memory, self.device = memory, device
        self.edges = 0
        self.transport = mmio.VirtioMmio(device, self._edge)
        self.space = AddressSpace("mmio", 1 << 32)
        self.space.add(0, self.transport.region)

    def _edge(self) -> None:
        self.edges += 1

    def read(self, offset: int, size: int = 4) -> int:
        return self.space.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.space.write(offset, size, value)

    @property
    def status(self) -> int:
        return self.read(mmio.STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.write(mmio.STATUS, value)

    def accept(self, features: int) -> None:
        for window in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, window)
            self.write(mmio.DRIVER_FEATURES, features >> 32 * window & 0xFFFF_FFFF)

    def offered(self) -> int:
        features = 0
        for window in (0, 1):
            self.write(mmio.DEVICE_FEATURES_SEL, window)
            features |= self.read(mmio.DEVICE_FEATURES) << 32 * window
        return features

    def negotiate(self, features: int = 0) -> None:
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        self.accept(features | F_VERSION_1)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK

    def driver(self, n: int = 0, *, size: int = 8, base: int = 0x10_0000, ready: bool = True) -> TestDriver:
        """Queue ``n``, set up through the registers."""
        queue = self.device.queues[n]
        driver = TestDriver(self.memory, queue, size=size, base=base, enable=False)
        queue.forget()
        self.write(mmio.QUEUE_SEL, n)
        self.write(mmio.QUEUE_SIZE, size)
        for register, gpa in (
            (mmio.QUEUE_DESC, driver.desc), (mmio.QUEUE_DRIVER, driver.driver), (mmio.QUEUE_DEVICE, driver.device)
        ):  # fmt: skip
            self.write(register, gpa & 0xFFFF_FFFF)
            self.write(register + 4, gpa >> 32)
        if ready:
            self.write(mmio.QUEUE_READY, 1)
        return driver

    def start(self, features: int = 0) -> TestDriver:
        """Up to DRIVER_OK, with queue 0."""
        self.negotiate(features)
        driver = self.driver()
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        return driver
