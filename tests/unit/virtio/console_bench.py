"""A virtio console with a driver at its queues, host ends that are slow when told to, and nobody between them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driver import TestDriver

from pyvmm.chardev import Chardev
from pyvmm.devices.virtio import console_control as control
from pyvmm.devices.virtio.console import F_EMERG_WRITE, F_MULTIPORT, F_SIZE, VirtioConsole, first_queue
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, Virtqueue
from pyvmm.guest_memory import GuestMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from io_watcher import Watcher

MEMORY_BYTES = 16 << 20
LAYOUTS: dict[str, dict[str, bool]] = {
    "split": {},
    "packed": {"packed": True},
    "split-event": {"event_idx": True, "indirect": True},
    "packed-event": {"packed": True, "event_idx": True},
}


class SlowEnd(Chardev):
    """Takes ``room`` bytes and then no more, as a reader that is slow; ``read`` takes them away."""

    def __init__(self, room: int = 1 << 60) -> None:
        super().__init__()
        self.limit = room
        self.data = bytearray()
        self.writes = 0
        self.said = bytearray()

    def write(self, data: bytes) -> None:
        assert self.can_write, "written to while it takes nothing"
        self.writes += 1
        self.data += data
        self.can_write = len(self.data) < self.limit

    def read(self) -> bytes:
        data = bytes(self.data)
        self.data.clear()
        self.said += data
        if not self.can_write:
            self.can_write = True
            if self._on_writable is not None:
                self._on_writable()
        return data


class Driver(TestDriver):
    """One of several: its buffers stand before the next one's rings."""

    def __init__(self, memory: GuestMemory, queue: Virtqueue, *, base: int, end: int, **options: Any) -> None:
        super().__init__(memory, queue, base=base, **options)
        self._end = end

    def room(self, size: int) -> int:
        if self._buffers + size > self._end:
            self._buffers = self.base + 0x10000
        return super().room(size)


class ConsoleBench:
    """``device`` with ``ends``, each a Chardev and a name, port by port; ``driver(n)`` is that of queue ``n``."""

    def __init__(
        self, *ends: tuple[Chardev, str | None], ring: dict[str, bool] | None = None, take: int = F_SIZE | F_MULTIPORT
    ) -> None:
        self.ring = ring or {}
        self.take = take
        self.memory = GuestMemory(MEMORY_BYTES)
        self.io = Watcher()
        self.kick_fds: list[int] = []
        self.config_interrupts = 0
        self.device = self.make(ends)
        self.start()

    def make(self, ends: Sequence[tuple[Chardev, str | None]]) -> VirtioConsole:
        first = 0 if any(name is None for _, name in ends) else 1
        device = VirtioConsole(self.memory, [(n + first, end, name) for n, (end, name) in enumerate(ends)])
        device.io = self.io
        device.ring_features |= F_RING_PACKED
        device.transport = self
        for queue in device.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.kick_fds.append(queue.kick_fd)
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(device, queue))
        return device

    def rung(self, device: VirtioConsole, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        device.serve(queue)

    def config_interrupt(self) -> None:
        self.config_interrupts += 1

    @property
    def wanted(self) -> int:
        """What the driver takes of the features."""
        device, ring = self.device, self.ring
        features = device.offered & (self.take | F_EMERG_WRITE) | F_VERSION_1
        features |= F_INDIRECT_DESC if ring.get("indirect") else 0
        features |= F_EVENT_IDX if ring.get("event_idx") else 0
        return features | (F_RING_PACKED if ring.get("packed") else 0)

    def start(self) -> None:
        """As a driver does: features, queues, DRIVER_OK."""
        device = self.device
        features = self.wanted
        with device.lock:
            for window in (0, 1):
                device.write_features(window, features >> 32 * window & 0xFFFF_FFFF)
            for status in (ACKNOWLEDGE, DRIVER, FEATURES_OK):
                device.write_status(device.status | status)
            assert device.status & FEATURES_OK
        each = (MEMORY_BYTES - 0x10_0000) // len(device.queues) & ~0xFFF
        count = len(device.queues) if features & F_MULTIPORT else 2
        bases = [0x10_0000 + n * each for n in range(count)]
        self.drivers = [
            Driver(self.memory, device.queues[n], base=base, end=base + each, size=64, **self.ring)
            for n, base in enumerate(bases)
        ]
        with device.lock:
            device.write_status(device.status | DRIVER_OK)
        assert device.live
        self.io.settle()

    def move(self, ends: Sequence[SlowEnd]) -> list[SlowEnd]:
        """The same guest with another device, whose ends have room again: those."""
        state = self.device.save()
        assert self.device.save() == state
        saved = [end.save() for end in ends]
        others = [SlowEnd(end.limit) for end in ends]
        for end, other in zip(ends, others, strict=True):
            other.said += end.said + end.data
        self.close()
        self.kick_fds.clear()
        self.io.calls.clear()
        names = [port.name for port in self.device.ports if port.announced]
        device = self.make(list(zip(others, names, strict=True)))
        device.load(state)
        for other, what in zip(others, saved, strict=True):
            other.load(what)
        device.after_load()
        assert device.save() == state
        for other in others:
            other.after_load()
        self.device = device
        for driver, queue in zip(self.drivers, device.queues, strict=False):
            driver.queue = queue
        return others

    def close(self) -> None:
        for fd in self.kick_fds:
            self.io.remove_reader(fd)
            os.close(fd)

    # -- the driver's side -------------------------------------------------------------------------------------------

    def ring_for(self, driver: TestDriver) -> None:
        """As a driver does: only where the device wants it."""
        if driver.is_to_kick():
            self.device.kick(driver.queue)
        self.io.settle()

    def receiving(self, port: int = 0) -> TestDriver:
        return self.drivers[first_queue(port)]

    def sending(self, port: int = 0) -> TestDriver:
        return self.drivers[first_queue(port) + 1]

    def say(self, *texts: bytes, port: int = 0, ring: bool = True) -> None:
        """Output, each text a buffer."""
        driver = self.sending(port)
        for text in texts:
            driver.add([text])
            if ring:
                self.ring_for(driver)

    def give(self, *sizes: int, port: int = 0) -> None:
        """Room for input."""
        driver = self.receiving(port)
        for size in sizes:
            driver.add([], [size])
            self.ring_for(driver)

    def heard(self, port: int = 0) -> bytes:
        """Input that has come."""
        driver = self.receiving(port)
        return b"".join(driver.data(chain)[:written] for chain, written in driver.used())

    # -- control messages --------------------------------------------------------------------------------------------

    def tell(self, port: int, event: int, value: int = 1) -> None:
        driver = self.drivers[3]
        driver.add([control.MESSAGE.pack(port, event, value)])
        self.ring_for(driver)
        driver.used()

    def listen(self, count: int = 1, size: int = 128) -> None:
        """Buffers for messages."""
        driver = self.drivers[2]
        for _ in range(count):
            driver.add([], [size])
            self.ring_for(driver)

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """(port, event, value, what follows) of each message that has come."""
        driver = self.drivers[2]
        found = []
        for chain, written in driver.used():
            data = driver.data(chain)[:written]
            found.append((*control.MESSAGE.unpack(data[: control.MESSAGE.size]), data[control.MESSAGE.size :]))
        return found

    def set_up(self, *opened: int) -> None:
        """All that a driver says, with every port that is announced ready, and those open."""
        self.listen(32)
        self.tell(0, control.DEVICE_READY)
        for number, event, _, _ in self.told():
            if event == control.DEVICE_ADD:
                self.tell(number, control.PORT_READY)
        self.told()
        self.listen(16)
        for number in opened:
            self.tell(number, control.PORT_OPEN)
