"""The entropy device (OASIS virtio 1.2, 5.4) with a driver at its queue, and nobody between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from driver import TestDriver

from pyvmm.devices.virtio.rng import BATCH, MOST_BYTES, VirtioRng
from pyvmm.guest_memory import GuestMemory

RINGS = pytest.mark.parametrize("event_idx", [False, True], ids=["", "event_idx"])
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


Make = Callable[..., tuple[VirtioRng, TestDriver]]


@pytest.fixture
def make() -> Iterator[Make]:
    fds: list[int] = []

    def bench(**ring: bool) -> tuple[VirtioRng, TestDriver]:
        memory = GuestMemory(8 << 20)
        device = VirtioRng(memory)
        driver = TestDriver(memory, device.queues[0], **ring)
        fds.append(os.eventfd(0, os.EFD_NONBLOCK))
        device.queues[0].kick_fd = fds[-1]
        device.live = True
        return device, driver

    yield bench
    for fd in fds:
        os.close(fd)


@RINGS
@LAYOUTS
def test_a_driver_that_rings_when_it_is_to_is_always_answered(make: Make, packed: bool, event_idx: bool) -> None:
    device, driver = make(packed=packed, event_idx=event_idx)
    for n in range(200):
        chain = driver.add([], [8 + n])
        assert driver.is_to_kick()
        device.serve(device.queues[0])
        assert driver.used() == [(chain, 8 + n)]


@LAYOUTS
def test_what_is_asked_for_is_bounded(make: Make, packed: bool) -> None:
    device, driver = make(packed=packed)
    (queue,) = device.queues
    chains = [driver.add([], [MOST_BYTES + 100]) for _ in range(BATCH + 3)]
    device.serve(queue)
    assert driver.used() == [(chain, MOST_BYTES) for chain in chains[:BATCH]]
    assert os.eventfd_read(queue.kick_fd) == 1  # it has asked for another turn
    device.serve(queue)
    assert driver.used() == [(chain, MOST_BYTES) for chain in chains[BATCH:]]
