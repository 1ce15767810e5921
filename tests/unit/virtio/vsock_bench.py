"""A vsock device with a driver at its queues, the host's Unix sockets behind it, and nobody between them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

from driver import TestDriver
from net_bench import Driver

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, F_VERSION_1, FEATURES_OK
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, Virtqueue
from pyvmm.devices.virtio.vsock import EVENT, RX, TX, VirtioVsock
from pyvmm.guest_memory import GuestMemory
from pyvmm.vsock.host import HostEnd

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from io_watcher import EdgeWatcher

MEMORY_BYTES = 16 << 20
CID = 3
ROOM = 256 << 10  # the guest's of each connection
BUFFER = 4096


class Packet(NamedTuple):
    """One that the guest has got."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int
    kind: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes = b""


def header(
    op: int,
    port: int,
    guest_port: int,
    *,
    size: int = 0,
    flags: int = 0,
    room: int = ROOM,
    forwarded: int = 0,
    kind: int = p.STREAM,
    cid: int = CID,
    to_cid: int = p.HOST_CID,
) -> bytes:
    """Of the guest's."""
    return p.HEADER.pack(cid, to_cid, guest_port, port, size, kind, op, flags, room, forwarded & 0xFFFF_FFFF)


class VsockBench:
    """``device`` is it, ``rx``, ``tx`` and ``events`` the driver's; ``path`` the host's socket."""

    def __init__(self, path: Path, *, ring: dict[str, Any] | None = None, **options: Any) -> None:
        self.path = path
        self.ring = ring or {}
        self.options = options
        self.memory = GuestMemory(MEMORY_BYTES)
        self.device = self.make()
        self.start()

    def make(self) -> VirtioVsock:
        self.host = HostEnd(str(self.path))
        options = {"cid": CID, **self.options}
        messages = HostEnd(str(self.path), messages=True) if options.pop("seqpacket", False) else None
        device = VirtioVsock(self.memory, self.host, messages=messages, **options)
        self.io = EdgeWatcher()
        device.io = self.io
        device.ring_features |= F_RING_PACKED
        for queue in device.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            queue.on_call = lambda: None
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(device, queue))
        return device

    def rung(self, device: VirtioVsock, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        device.serve(queue)

    def start(self, buffers: int = 100) -> None:
        """As a driver does: features, queues, DRIVER_OK, buffers."""
        device = self.device
        features = F_VERSION_1 | device.own_features
        features |= F_INDIRECT_DESC if self.ring.get("indirect") else 0
        features |= F_EVENT_IDX if self.ring.get("event_idx") else 0
        features |= F_RING_PACKED if self.ring.get("packed") else 0
        with device.lock:
            for window in (0, 1):
                device.write_features(window, features >> 32 * window & 0xFFFF_FFFF)
            for status in (ACKNOWLEDGE, DRIVER, FEATURES_OK):
                device.write_status(device.status | status)
            assert device.status & FEATURES_OK
        each = (MEMORY_BYTES - 0x10_0000) // 3 & ~0xFFF

        def driver(n: int) -> Driver:
            base = 0x10_0000 + n * each
            return Driver(self.memory, device.queues[n], base=base, end=base + each, **self.ring)

        self.rx, self.tx, self.events = driver(RX), driver(TX), driver(EVENT)
        with device.lock:
            device.write_status(device.status | DRIVER_OK)
        assert device.live
        self.given: dict[int, None] = {}
        self.give(*[BUFFER] * buffers)
        self.give_events(4)

    # -- the driver's side -------------------------------------------------------------------------------------------

    def kick(self, driver: TestDriver) -> None:
        self.device.kick(driver.queue)
        self.io.settle()

    def give(self, *sizes: int, kick: bool = True) -> None:
        """Buffers for packets."""
        for size in sizes:
            self.given[self.rx.add([], [size])] = None
        if kick:
            self.kick(self.rx)

    def give_events(self, count: int) -> None:
        for _ in range(count):
            self.events.add([], [4])
        self.kick(self.events)

    def event_ids(self) -> list[bytes]:
        return [self.events.data(chain)[:written] for chain, written in self.events.used()]

    def add(self, op: int, port: int, guest_port: int, data: bytes = b"", **fields: Any) -> None:
        """A packet for the device, which it does not hear of yet."""
        fields = {"size": len(data), **fields}
        pieces = [header(op, port, guest_port, **fields), data]
        self.tx.add([piece for piece in pieces if piece])

    def send(self, op: int, port: int, guest_port: int, data: bytes = b"", **fields: Any) -> list[Packet]:
        """A packet, and what comes for the guest then."""
        self.add(op, port, guest_port, data, **fields)
        return self.go()

    def go(self) -> list[Packet]:
        """The device hears of what was added; what comes for the guest then."""
        self.kick(self.tx)
        self.tx.used()
        return self.packets()

    def packets(self, *, refill: bool = True) -> list[Packet]:
        """What has come; each of the buffers is given again."""
        self.io.settle()
        found = []
        used = self.rx.used()
        for chain, written in used:
            del self.given[chain]
            data = self.rx.data(chain)[:written]
            packet = Packet(*p.HEADER.unpack(data[: p.HEADER_BYTES]), data[p.HEADER_BYTES :])
            assert packet.size == len(packet.data)
            found.append(packet)
        if refill and used:
            self.give(*[BUFFER] * len(used))
        return found

    def connect(self, port: int, guest_port: int = 5000, **fields: Any) -> Packet:
        """The guest's connection to the host's ``port``: the answer."""
        (answer,) = self.send(p.OP_REQUEST, port, guest_port, **fields)
        assert (answer.src_port, answer.dst_port) == (port, guest_port)
        return answer

    # -- the host's side ---------------------------------------------------------------------------------------------

    def listen(self, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A program that listens for the guest."""
        end = socket.socket(socket.AF_UNIX, kind)
        end.bind(f"{self.path}_{port}")
        end.listen(200)
        end.settimeout(10)
        return end

    def call(self, guest_port: int | str) -> socket.socket:
        """A client of the host's that has asked for a port of the guest's."""
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(10)
        end.connect(str(self.path))
        end.sendall(f"CONNECT {guest_port}\n".encode())
        return end

    def called(self, guest_port: int) -> tuple[socket.socket, int]:
        """A client that the guest has accepted, and the host's port."""
        end = self.call(guest_port)
        (request,) = self.packets()
        assert (request.op, request.dst_port, request.dst_cid) == (p.OP_REQUEST, guest_port, self.device.cid)
        self.send(p.OP_RESPONSE, request.src_port, guest_port)
        assert end.recv(100) == b"OK %d\n" % request.src_port
        return end, request.src_port

    # -- the machine's side ------------------------------------------------------------------------------------------

    def move(self, path: Path, cid: int = CID) -> None:
        """It is saved, and goes on in another device with a socket and an address of its own."""
        state = self.device.save()
        assert state == self.device.save()
        old, old_io = self.device, self.io
        self.path = path
        self.options["cid"] = cid
        self.device = self.make()
        self.device.load(state)
        self.device.after_load()
        for driver, queue in zip((self.rx, self.tx, self.events), self.device.queues, strict=True):
            driver.queue = queue
        self.io.settle()
        self.end(old, old_io)

    def close(self) -> None:
        self.end(self.device, self.io)

    @staticmethod
    def end(device: VirtioVsock, io: EdgeWatcher) -> None:
        device.close()
        for queue in device.queues:
            io.remove_reader(queue.kick_fd)
            os.close(queue.kick_fd)
        io.epoll.close()
