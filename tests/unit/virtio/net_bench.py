"""A network card on virtio with a driver at its queues, its peer a socket, and nobody between them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from driver import TestDriver

from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.net_features import F_CTRL_VQ, F_MQ, F_MRG_RXBUF, F_VERSION_1
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, Virtqueue
from pyvmm.guest_memory import GuestMemory
from pyvmm.net.backend import CHECKSUM, TSO4, TSO6, TSO_ECN, USO4, USO6, NetBackend, StreamBackend
from pyvmm.net.port import TapPort

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from io_watcher import Watcher

MEMORY_BYTES = 16 << 20
MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("0200000000fe")
ALL = (1 << 64) - 1
HEADER_BYTES = 12


def frame(n: int = 0, size: int = 100, to: bytes = MAC) -> bytes:
    """One of a protocol that is nobody's."""
    return (to + OTHER + b"\x88\xb5" + n.to_bytes(4, "big") + bytes(k % 251 for k in range(size - 18)))[:size]


class Driver(TestDriver):
    """One of several: its buffers stand before the next one's rings."""

    def __init__(self, memory: GuestMemory, queue: Any, *, base: int, end: int, **options: Any) -> None:
        super().__init__(memory, queue, base=base, **options)
        self._end = end

    def room(self, size: int) -> int:
        if self._buffers + size > self._end:
            self._buffers = self.base + 0x10000
        return super().room(size)


class PlayTap(NetBackend):
    """What a tap does, by a socket with messages: virtio's header in front of frames."""

    has_header = True
    offloads = CHECKSUM | TSO4 | TSO6 | TSO_ECN | USO4 | USO6

    def __init__(self, fds: list[int]) -> None:
        super().__init__([TapPort(fd) for fd in fds])
        self.told: list[tuple[str, int]] = []

    def configure(self, header_bytes: int) -> None:
        self.told.append(("header", header_bytes))

    def set_offloads(self, offloads: int) -> None:
        self.told.append(("offloads", offloads))

    def enable_pairs(self, count: int) -> None:
        self.told.append(("pairs", count))


class NetBench:
    """``card`` is the device, ``peers`` its ports' other ends, ``rx``, ``tx`` and ``control`` the driver's."""

    def __init__(
        self,
        kind: str = "stream",
        *,
        pairs: int = 1,
        take: int = ALL & ~F_MQ,
        ring: dict[str, Any] | None = None,
        sizes: tuple[int, int] = (256, 256),
        **options: Any,
    ) -> None:
        self.kind = kind
        self.ring = ring or {}
        self.sizes = sizes
        self.take = take
        self.options = {"queue_size": max(sizes), **options}
        self.memory = GuestMemory(MEMORY_BYTES)
        self.card = self.make(pairs)
        self.start()

    def make(self, pairs: int) -> VirtioNet:
        """A card with a peer of its own."""
        self.peers = []
        fds = []
        for _ in range(pairs):
            ours, theirs = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_STREAM if self.kind == "stream" else socket.SOCK_SEQPACKET
            )
            ours.setblocking(False)
            theirs.setblocking(False)
            self.peers.append(theirs)
            fds.append(ours.detach())
        self.backend: Any = StreamBackend(fds[0]) if self.kind == "stream" else PlayTap(fds)
        card = VirtioNet(self.memory, self.backend, mac=MAC, **self.options)
        self.io = Watcher()
        card.io = self.io
        for queue in card.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(queue))
        return card

    def rung(self, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        self.card.serve(queue)

    def start(self) -> None:
        """As a driver does: features, queues, DRIVER_OK."""
        card = self.card
        features = (card.offered & self.take | F_VERSION_1) & ~(F_INDIRECT_DESC | F_EVENT_IDX)
        features |= F_INDIRECT_DESC if self.ring.get("indirect") else 0
        features |= F_EVENT_IDX if self.ring.get("event_idx") else 0
        features |= F_RING_PACKED if self.ring.get("packed") else 0
        card.ring_features |= F_RING_PACKED
        with card.lock:
            for window in (0, 1):
                card.write_features(window, features >> 32 * window & 0xFFFF_FFFF)
            for status in (ACKNOWLEDGE, DRIVER, FEATURES_OK):
                card.write_status(card.status | status)
            assert card.status & FEATURES_OK
        pairs = self.pairs
        each = (MEMORY_BYTES - 0x10_0000) // (2 * pairs + 1) & ~0xFFF

        def driver(n: int, **size: int) -> Driver:
            base = 0x10_0000 + n * each
            return Driver(self.memory, card.queues[n], base=base, end=base + each, **size, **self.ring)

        self.drivers = [driver(n, size=self.sizes[n & 1]) for n in range(2 * pairs)]
        self.rx, self.tx = self.drivers[::2], self.drivers[1::2]
        if card.features & F_CTRL_VQ:
            self.control = driver(2 * pairs)
        with card.lock:
            card.write_status(card.status | DRIVER_OK)
        assert card.live
        self.given: list[dict[int, None]] = [{} for _ in range(pairs)]
        self.io.settle()

    @property
    def pairs(self) -> int:
        return len(self.backend.ports) if self.card.features & F_MQ else 1

    # -- the driver's side -----------------------------------------------------------------------------------------

    def serve(self, driver: TestDriver) -> None:
        """What the device's thread does at a kick, and at all that follows."""
        queue = driver.queue
        self.card.kick(queue)
        self.io.settle()

    def send(self, *frames: bytes, header: bytes = bytes(HEADER_BYTES), pair: int = 0, kick: bool = True) -> list[int]:
        sent = [self.tx[pair].add([header, data]) for data in frames]
        if kick:
            self.serve(self.tx[pair])
        return sent

    def give(self, *sizes: int, pair: int = 0, kick: bool = True) -> None:
        """Buffers for frames that come."""
        for size in sizes:
            self.given[pair][self.rx[pair].add([], [size])] = None
        if kick:
            self.serve(self.rx[pair])

    def received(self, pair: int = 0) -> list[tuple[bytes, bytes]]:
        """(header, frame) of each that has come."""
        found, used = [], self.rx[pair].used()
        while used:
            data, left = b"", 1
            count = 1
            while left:
                chain, written = used.pop(0)
                del self.given[pair][chain]
                data += self.rx[pair].data(chain)[:written]
                if count == 1 and self.card.features & (F_MRG_RXBUF | F_VERSION_1):
                    left = int.from_bytes(data[10:12], "little")
                    assert left
                count, left = count + 1, left - 1
            found.append((data[:HEADER_BYTES], data[HEADER_BYTES:]))
        return found

    def command(self, kind: int, what: int, data: bytes = b"", room: int = 1) -> int | None:
        """The answer, where there is one."""
        number = self.control.add([bytes([kind, what]), data] if data else [bytes([kind, what])], [room])
        self.serve(self.control)
        for chain, written in self.control.used():
            assert (chain, written) == (number, 1)
            return self.control.data(chain)[0]
        return None

    # -- the peer's side -------------------------------------------------------------------------------------------

    def comes(self, *frames: bytes, header: bytes = bytes(HEADER_BYTES), pair: int = 0) -> None:
        """Frames for the guest."""
        for data in frames:
            if self.kind == "stream":
                self.peers[pair].sendall(len(data).to_bytes(4, "big") + data)
            else:
                self.peers[pair].send(header + data)
        self.io.settle()

    def close(self) -> None:
        """The card is thrown away."""
        for queue in self.card.queues:
            self.io.remove_reader(queue.kick_fd)
            os.close(queue.kick_fd)
        self.backend.close()
        for peer in self.peers:
            peer.close()

    def went(self, pair: int = 0) -> list[bytes]:
        """What the guest has sent; of a tap with headers."""
        found: list[bytes] = []
        stream = b""
        while True:
            try:
                data = self.peers[pair].recv(1 << 20)
            except BlockingIOError:
                break
            if not data:
                break
            if self.kind == "stream":
                stream += data
                self.io.settle()
            else:
                found.append(data)
        while stream:
            size = int.from_bytes(stream[:4], "big")
            assert len(stream) >= 4 + size, "a frame that is cut short"
            found.append(stream[4 : 4 + size])
            stream = stream[4 + size :]
        return found
