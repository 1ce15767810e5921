"""A disk on virtio with a driver at its queues and nobody between them: what the tests of it ask by."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

from driver import TestDriver

from pyvmm.block import BlockBackend
from pyvmm.devices.virtio import blk
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.devices.virtio.ring import F_RING_PACKED
from pyvmm.guest_memory import GuestMemory

SECTOR = 512
OK, IOERR, UNSUPP = 0, 1, 2
MEMORY_BYTES = 4 << 20
LIMIT_S = 20.0


def header(kind: int, sector: int = 0, reserved: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, reserved, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes (5.2.6)."""
    return struct.pack("<QII", sector, count, flags)


class BlkBench:
    """``take``: the features that the driver wants, of those offered. ``disk`` is the device."""

    def __init__(
        self,
        backend: BlockBackend,
        *,
        take: int = (1 << 28) - 1,
        queues: int = 1,
        ring: dict[str, bool] | None = None,
        **options: Any,
    ) -> None:
        self.memory = GuestMemory(MEMORY_BYTES)
        self.backend = backend
        self.disk = VirtioBlk(self.memory, backend, queues=queues, **options)
        self._came = threading.Condition()
        for queue in self.disk.queues:
            queue.on_call = self.interrupt
        self.drivers = self.start(take, **(ring or {}))
        self._used: list[dict[int, int]] = [{} for _ in self.drivers]

    def start(self, take: int, **ring: bool) -> list[TestDriver]:
        """As a driver does it (3.1.1)."""
        disk = self.disk
        disk.ring_features |= F_RING_PACKED
        drivers = [
            TestDriver(self.memory, queue, base=0x10_0000 * (n + 1), enable=False, **ring)
            for n, queue in enumerate(disk.queues)
        ]
        with disk.lock:
            disk.write_status(ACKNOWLEDGE)
            disk.write_status(ACKNOWLEDGE | DRIVER)
            features = disk.own_features & take | drivers[0].features
            for window in range(2):
                disk.write_features(window, features >> 32 * window & 0xFFFF_FFFF)
            disk.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
            assert disk.status & FEATURES_OK
            for queue in disk.queues:
                disk.enable_queue(queue)
            disk.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        assert disk.live
        return drivers

    # -- asking ------------------------------------------------------------------------------------------------

    def add(self, readable: Sequence[bytes], writable: Sequence[int], queue: int = 0) -> int:
        """Make a chain available, of those pieces that are not empty; nobody looks yet."""
        used = self.used(queue)
        number = self.drivers[queue].add([data for data in readable if data], [size for size in writable if size])
        used.pop(number, None)  # an earlier chain's
        return number

    def serve(self, queue: int = 0) -> None:
        """What the queue's thread does at a kick."""
        self.disk.serve(self.disk.queues[queue])

    def used(self, queue: int = 0) -> dict[int, int]:
        """How many bytes were written of each chain that has come back so far."""
        self._used[queue].update(self.drivers[queue].used())
        return self._used[queue]

    def interrupt(self) -> None:
        """What a transport does: whoever waits looks again."""
        with self._came:
            self._came.notify_all()

    def wait(self, number: int, queue: int = 0) -> int:
        """Its status, when it has come back."""
        with self._came:
            assert self._came.wait_for(lambda: number in self.used(queue), LIMIT_S), f"chain {number} never came back"
        return self.data(number, queue)[-1]

    def data(self, number: int, queue: int = 0) -> bytes:
        """All of the chain that the device may write."""
        found: bytes = self.drivers[queue].data(number)
        return found

    def ask(self, readable: Sequence[bytes], writable: Sequence[int]) -> tuple[int, bytes]:
        """(status, what stands before it) of one request."""
        number = self.add(readable, writable)
        self.serve()
        status = self.wait(number)
        assert self.used()[number] == sum(writable)
        return status, self.data(number)[:-1]

    def read(self, sector: int, count: int) -> bytes | int:
        status, data = self.ask([header(blk.T_IN, sector)], [count * SECTOR, 1])
        return data if status == OK else status

    def write(self, sector: int, data: bytes) -> int:
        return self.ask([header(blk.T_OUT, sector), data], [1])[0]

    def flush(self) -> int:
        return self.ask([header(blk.T_FLUSH)], [1])[0]

    def ranges(self, kind: int, *segments: bytes) -> int:
        return self.ask([header(kind), b"".join(segments)], [1])[0]
