"""VirtioRng: entropy for the guest, from the host's own generator. OASIS virtio 1.2, 5.4."""

from __future__ import annotations

import os

from pyvmm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.virtio.ring import Virtqueue

# 5.4.6.2: a device has to give one byte at least. A driver asks for 64 or so; whoever asks for gigabytes gets some, and
# does not hold up the other devices of its thread.
MOST_BYTES = 4096
BATCH = 16


class VirtioRng(VirtioDevice):
    """One queue of buffers to fill."""

    DEVICE_ID = 4
    QUEUES = (64,)

    def handle(self, queue: Virtqueue) -> None:
        chains = queue.take(BATCH)
        for chain in chains:
            # getrandom never waits but in the host's first seconds, and gives up to 256 bytes whole.
            data = os.getrandom(min(chain.writable_bytes, MOST_BYTES))
            queue.push(chain, chain.write(0, data))
        queue.flush()
        if queue.enable_kicks():  # with an event index (2.7.10) the driver rings where it is told to, and nowhere else
            self.kick(queue)  # others of this thread have their turn first
