"""A memory balloon with a driver at its queues, and nobody between them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from struct import pack
from typing import Any

from driver import TestDriver

from pyvmm.devices.virtio.balloon import (
    DEFLATE,
    F_PAGE_POISON,
    F_PAGE_REPORTING,
    INFLATE,
    POISON,
    REPORT,
    STAT,
    STATS,
    VirtioBalloon,
)
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, Virtqueue
from pyvmm.guest_memory import GuestMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from io_watcher import Watcher

MIB = 1 << 20
MEMORY_BYTES = 64 * MIB
PAGE = 4096
LAYOUTS: dict[str, dict[str, bool]] = {
    "split": {},
    "packed": {"packed": True},
    "split-event": {"event_idx": True, "indirect": True},
    "packed-event": {"packed": True, "event_idx": True},
}


class BalloonBench:
    """``take``: which of its kind's features the driver takes; ``poison``: what it fills free pages with. Rings and
    buffers stand below 16 MiB; what is above is for the balloon.
    """

    def __init__(
        self,
        *,
        ring: dict[str, bool] | None = None,
        take: int = (1 << 24) - 1,
        poison: int | None = None,
        memory: GuestMemory | None = None,
        **options: Any,
    ) -> None:
        self.ring, self.take, self.poison, self.options = ring or {}, take, poison, options
        self.memory = memory or GuestMemory(MEMORY_BYTES)
        self.io = Watcher()
        self.kick_fds: list[int] = []
        self.config_interrupts = 0
        self.actual: list[int] = []
        self.came = 0
        self.device = self.make()
        self.start()

    def make(self) -> VirtioBalloon:
        device = VirtioBalloon(self.memory, **self.options)
        device.io = self.io
        device.transport = self
        device.on_actual = self.actual.append
        device.on_stats = self._stats_came
        device.ring_features |= F_RING_PACKED
        for queue in device.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.kick_fds.append(queue.kick_fd)
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(device, queue))
        return device

    def rung(self, device: VirtioBalloon, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        device.serve(queue)

    def config_interrupt(self) -> None:
        self.config_interrupts += 1

    def _stats_came(self) -> None:
        self.came += 1

    def start(self) -> None:
        """As a driver does: features, queues, DRIVER_OK."""
        device, ring = self.device, self.ring
        features = device.offered & self.take | F_VERSION_1
        if self.poison is None:
            features &= ~F_PAGE_POISON
        features |= F_INDIRECT_DESC if ring.get("indirect") else 0
        features |= F_EVENT_IDX if ring.get("event_idx") else 0
        features |= F_RING_PACKED if ring.get("packed") else 0
        with device.lock:
            for window in (0, 1):
                device.write_features(window, features >> 32 * window & 0xFFFF_FFFF)
            for status in (ACKNOWLEDGE, DRIVER, FEATURES_OK):
                device.write_status(device.status | status)
            assert device.status & FEATURES_OK
            if self.poison is not None:
                device.write_config(POISON, 4, self.poison)
        self.drivers = [
            TestDriver(self.memory, queue, base=MIB * (2 + 2 * n), size=64, **ring)
            for n, queue in enumerate(device.queues)
            if n < REPORT or features & F_PAGE_REPORTING
        ]
        with device.lock:
            device.write_status(device.status | DRIVER_OK)
        self.io.settle()

    def close(self) -> None:
        for fd in self.kick_fds:
            self.io.remove_reader(fd)
            os.close(fd)

    # -- the driver's side -------------------------------------------------------------------------------------------

    def ring_for(self, n: int) -> None:
        driver = self.drivers[n]
        if driver.is_to_kick():
            self.device.kick(driver.queue)
        self.io.settle()

    def ask(self, n: int, *readable: bytes) -> None:
        """One request, and its acknowledgement."""
        chain = self.drivers[n].add(list(readable))
        self.ring_for(n)
        assert self.drivers[n].used() == [(chain, 0)]

    def inflate(self, *pages: int) -> None:
        self.ask(INFLATE, pack(f"<{len(pages)}I", *pages))

    def deflate(self, *pages: int) -> None:
        self.ask(DEFLATE, pack(f"<{len(pages)}I", *pages))

    def report(self, *ranges: tuple[int, int], queue: int = REPORT) -> None:
        """Free memory, each range a buffer that the device may write."""
        driver = self.drivers[queue]
        pieces = [(gpa, size, 2) for gpa, size in ranges]
        chain = driver._add_packed(pieces) if driver.packed else driver._add_split(pieces)
        driver._writable[chain] = list(ranges)
        driver.show()
        self.device.kick(driver.queue)
        self.io.settle()
        assert driver.used() == [(chain, 0)]

    def tell_stats(self, *stats: tuple[int, int]) -> int:
        """A buffer for statistics, which the device keeps."""
        chain = self.drivers[STATS].add([b"".join(STAT.pack(*stat) for stat in stats)])
        self.ring_for(STATS)
        return chain

    def config(self, offset: int) -> int:
        with self.device.lock:
            return self.device.read_config(offset, 4)

    def write_config(self, offset: int, value: int, size: int = 4) -> None:
        with self.device.lock:
            self.device.write_config(offset, size, value)
