"""virtio devices for the state tests (state_benches.py): behind virtio-mmio, with a driver that keeps all in memory.

So whatever is saved is all there is: the memory, the device, its transport, and what its host's end is.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tempfile
from errno import EIO
from pathlib import Path
from random import Random
from typing import Any

from state_benches import Bench, Step

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.coroutine import AioContext
from pyvmm.block.driver import FormatDriver
from pyvmm.chardev import Chardev
from pyvmm.devices.virtio import blk, mmio
from pyvmm.devices.virtio import console_control as control
from pyvmm.devices.virtio.balloon import F_PAGE_REPORTING, F_STATS_VQ, STAT, VirtioBalloon
from pyvmm.devices.virtio.blk import VirtioBlk
from pyvmm.devices.virtio.console import F_MULTIPORT, F_SIZE, VirtioConsole
from pyvmm.devices.virtio.device import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, VirtioDevice
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.net import VirtioNet
from pyvmm.devices.virtio.net_features import F_CTRL_VQ, F_MRG_RXBUF
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_RING_PACKED, F_VERSION_1, Virtqueue
from pyvmm.devices.virtio.rng import VirtioRng
from pyvmm.devices.virtio.vsock import VirtioVsock
from pyvmm.devices.virtio.vsock_packet import HEADER, HOST_CID
from pyvmm.guest_memory import GuestMemory
from pyvmm.net.backend import StreamBackend
from pyvmm.vsock.host import HostEnd

sys.path.insert(0, str(Path(__file__).parent / "net"))
from io_watcher import EdgeWatcher, Watcher

MMIO = 0xD000_0000
MEMORY_BYTES = 0x2_0000
MAC = bytes.fromhex("020000000001")
CID, PORT = 3, 80
NEXT, WRITE = 1, 2
DATA_BYTES = 0x800  # of each chain's two buffers
CHAINS = 4
SIZE = 2 * CHAINS
# Of a queue's memory; the rings have the names of virtio-mmio's registers.
PLACES = {"desc_gpa": 0, "driver_gpa": 0x100, "device_gpa": 0x200, "seen": 0x300, "busy": 0x302, "data": 0x1000}
REGISTERS = tuple(
    MMIO + register
    for register in (
        *(mmio.DEVICE_FEATURES_SEL, mmio.DRIVER_FEATURES_SEL, mmio.DRIVER_FEATURES, mmio.QUEUE_SEL, mmio.QUEUE_SIZE),
        *(mmio.QUEUE_READY, mmio.QUEUE_DESC, mmio.QUEUE_DRIVER + 4, mmio.QUEUE_DEVICE, mmio.QUEUE_RESET, mmio.STATUS),
    )
)
QUEUE_BYTES = 0x1000 + 2 * CHAINS * DATA_BYTES


class Ram:
    """The machine's memory, as a holder of state."""

    STATE_VERSION = 1

    def __init__(self) -> None:
        self.memory = GuestMemory(MEMORY_BYTES)

    def save(self) -> dict[str, Any]:
        return {"bytes": self.memory.read(0, MEMORY_BYTES)}

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import value_of

        self.memory.write(0, value_of(("bytes", MEMORY_BYTES), state["bytes"], "bytes"))

    def after_load(self) -> None:
        pass


class Ring:
    """The driver of one split queue with an event index: each chain has a buffer to read, one to write, or both."""

    def __init__(self, memory: GuestMemory, index: int) -> None:
        self._memory = memory
        self.at = {name: index * QUEUE_BYTES + offset for name, offset in PLACES.items()}

    def get(self, gpa: int) -> int:
        return int.from_bytes(self._memory.read(gpa, 2), "little")

    def put(self, gpa: int, value: int) -> None:
        self._memory.write(gpa, (value & 0xFFFF).to_bytes(2, "little"))

    def begin(self) -> None:
        self._memory.write(self.at["desc_gpa"], bytes(0x1000))

    @property
    def out(self) -> int:
        """How many chains are the device's."""
        return self.get(self.at["busy"]).bit_count()

    def add(self, readable: bytes, writable: int) -> bool:
        """Whether there was room for one more."""
        busy = self.get(self.at["busy"])
        free = [n for n in range(CHAINS) if not busy >> n & 1]
        if not free:
            return False
        n = free[0]
        data = self.at["data"] + 2 * n * DATA_BYTES
        pieces = [(data, len(readable), 0)] if readable else []
        if writable:
            pieces.append((data + DATA_BYTES, writable, WRITE))
            self._memory.write(data + DATA_BYTES, bytes(writable))
        self._memory.write(data, readable)
        for k, (gpa, size, flags) in enumerate(pieces):
            more = k + 1 < len(pieces)
            desc = struct.pack("<QIHH", gpa, size, flags | (NEXT if more else 0), 2 * n + 1 if more else 0)
            self._memory.write(self.at["desc_gpa"] + 16 * (2 * n + k), desc)
        index = self.get(self.at["driver_gpa"] + 2)
        self.put(self.at["driver_gpa"] + 4 + 2 * (index % SIZE), 2 * n)
        self.put(self.at["driver_gpa"] + 2, index + 1)
        self.put(self.at["busy"], busy | 1 << n)
        return True

    def collect(self) -> list[bytes]:
        """What the device is done with: what it has written of each."""
        found = []
        seen = self.get(self.at["seen"])
        while seen != self.get(self.at["device_gpa"] + 2):
            entry = self._memory.read(self.at["device_gpa"] + 4 + 8 * (seen % SIZE), 8)
            head, written = struct.unpack("<II", entry)
            head %= SIZE
            seen = seen + 1 & 0xFFFF
            self.put(self.at["busy"], self.get(self.at["busy"]) & ~(1 << head // 2))
            found.append(self._memory.read(self.at["data"] + head // 2 * 2 * DATA_BYTES + DATA_BYTES, written))
        self.put(self.at["seen"], seen)
        self.put(self.at["driver_gpa"] + 4 + 2 * SIZE, seen)  # 2.7.7.1: whether to interrupt for what comes
        return found


class VirtioBench(Bench):
    """Steps are whole requests, and now and then what no driver does."""

    features = F_VERSION_1 | F_EVENT_IDX
    ports = tuple(MMIO + n for n in (*range(0, 0x100, 4), *range(0x100, 0x140, 4)))
    sizes = (4,)

    def make(self) -> None:
        ram = Ram()
        self.memory = ram.memory
        self.io: Watcher = Watcher()
        self.device = self.make_device()
        self.device.ring_features &= ~F_RING_PACKED
        self.device.io = self.io
        self.transport = VirtioMmio(self.device, lambda: None)
        self.mmio.add(MMIO, self.transport.region)
        self.rings = [Ring(self.memory, n) for n in range(len(self.device.queues))]
        self.holders.append(("memory", ram))
        self.add("device", self.device)
        self.add("transport", self.transport)

    def make_device(self) -> VirtioDevice:
        raise NotImplementedError

    @classmethod
    def steps(cls, seed: int, count: int) -> list[Step]:
        steps = super().steps(seed, count)
        return [("start",), *steps] if seed % 8 else steps

    @classmethod
    def step(cls, r: Random) -> Step:
        what = r.randrange(40)
        if what == 0:
            return super().step(r)
        if what == 1:
            return ("start",)
        if what < 4:
            return "out", r.choice(REGISTERS), 4, r.choice((0, 1, 2, 3, 8, 0xFFFF_FFFF, r.getrandbits(32)))
        if what < 7:
            return "in", r.choice(cls.ports), 4
        if what < 9:
            return ("interrupted",)
        return cls.own_step(r)

    def put(self, register: int, value: int) -> None:
        self.mmio.write(MMIO + register, 4, value)

    def get(self, register: int) -> int:
        return self.mmio.read(MMIO + register, 4)

    def start(self) -> int:
        """A driver begins, from a reset on."""
        self.put(mmio.STATUS, 0)
        self.put(mmio.STATUS, ACKNOWLEDGE | DRIVER)
        for window in (0, 1):
            self.put(mmio.DRIVER_FEATURES_SEL, window)
            self.put(mmio.DRIVER_FEATURES, self.features >> 32 * window & 0xFFFF_FFFF)
        self.put(mmio.STATUS, FEATURES_OK)
        for n, ring in enumerate(self.rings):
            ring.begin()
            self.put(mmio.QUEUE_SEL, n)
            self.put(mmio.QUEUE_SIZE, SIZE)
            for register, name in mmio.ADDRESSES.items():
                self.put(register, ring.at[name])
                self.put(register + 4, 0)
            self.put(mmio.QUEUE_READY, 1)
        self.put(mmio.STATUS, DRIVER_OK)
        self.settle()
        return self.get(mmio.STATUS)

    def interrupted(self) -> object:
        """What the driver's handler does: it acknowledges, and looks at its rings."""
        status = self.get(mmio.INTERRUPT_STATUS)
        self.put(mmio.INTERRUPT_ACK, status)
        return status, [ring.collect() for ring in self.rings] if status & mmio.USED_BUFFER else []

    @property
    def running(self) -> bool:
        return self.device.live and all(queue.ready for queue in self.device.queues)

    def settle(self) -> None:
        """What the device's thread does."""
        for queue in self.device.queues:
            self.device.serve(queue)
        self.io.settle()

    def ask(self, n: int, readable: bytes, writable: int) -> object:
        if not self.running or not self.rings[n].add(readable, writable):
            return None
        self.settle()
        return self.rings[n].collect()

    def do(self, step: Step) -> object:
        result = super().do(step)
        self.settle()  # a register may have kicked a queue
        return result

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.settle()  # as its thread does as soon as the guest runs


class RngBench(VirtioBench):
    def make_device(self) -> VirtioDevice:
        return VirtioRng(self.memory)

    @classmethod
    def own_step(cls, r: Random) -> Step:
        return "numbers", r.randrange(1, DATA_BYTES)

    def numbers(self, size: int) -> object:
        """How many there were: they themselves are not the same twice."""
        ring = self.rings[0]
        if not self.running or not ring.add(b"", size):
            return None
        self.settle()
        found = [len(data) for data in ring.collect()]
        self.memory.write(ring.at["data"], bytes(2 * CHAINS * DATA_BYTES))
        return found


class Content(FormatDriver):
    """A disk in memory, with sectors that can't be read or written as long as ``bad`` says so. A holder of state."""

    size_bytes = 64 * 512
    STATE = {"data": ("bytes", size_bytes), "bad": "flag"}
    STATE_VERSION = 1

    def __init__(self) -> None:
        self.data = bytearray(self.size_bytes)
        self.bad = False

    async def co_readv(self, offset: int, iov: Any, length: int) -> int:
        if self.bad:
            return -EIO
        for view in iov:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)
        return 0

    async def co_writev(self, offset: int, iov: Any, length: int, fua: bool) -> int:
        if self.bad:
            return -EIO
        for view in iov:
            self.data[offset : offset + len(view)] = view
            offset += len(view)
        return 0

    async def co_flush(self) -> int:
        return 0

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        self.data[offset : offset + length] = bytes(length)
        return 0

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)

    def after_load(self) -> None:
        pass


class BlkBench(VirtioBench):
    """Its errors stop the machine, which then goes on when the host says so."""

    features = VirtioBench.features | blk.F_FLUSH | blk.F_CONFIG_WCE | blk.F_WRITE_ZEROES

    def make_device(self) -> VirtioDevice:
        self.calls: list[Any] = []
        self.call_soon = self.calls.append
        context = AioContext(self)
        self.content = Content()
        options = DriveOptions("none", rerror="stop", werror="stop")
        self.backend = BlockBackend(options, self.content, context)
        disk = VirtioBlk(self.memory, self.backend, serial="state")
        self.holders.append(("content", self.content))
        return disk

    def make(self) -> None:
        super().make()
        self.holders.append(("drive", self.backend))

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what = r.randrange(12)
        if what == 0:
            return "fail", r.randrange(2)
        if what <= 2:
            return ("go_on",)
        if what == 3:
            return "out", MMIO + mmio.CONFIG + blk.WRITEBACK & ~3, 4, r.randrange(2)
        kind = r.choice((blk.T_IN, blk.T_IN, blk.T_OUT, blk.T_OUT, blk.T_FLUSH, blk.T_GET_ID, blk.T_WRITE_ZEROES, 99))
        header = blk.HEADER.pack(kind, 0, r.choice((0, 1, r.randrange(66))))
        if kind == blk.T_WRITE_ZEROES:
            return "request", header + blk.SEGMENT.pack(r.randrange(64), r.randrange(3), 0), 1
        data = r.randbytes(512 * r.randrange(3)) if kind == blk.T_OUT else b""
        return "request", header + data, r.choice((1, 21, 513, 1025)) if kind != blk.T_OUT else 1

    def request(self, readable: bytes, writable: int) -> object:
        if self.backend.stalled:
            return None  # the machine stands
        return self.ask(0, readable, writable)

    def fail(self, bad: int) -> None:
        self.content.bad = bool(bad)

    def go_on(self) -> object:
        """The host has mended it, or thinks so."""
        self.backend.resume()
        self.settle()
        return self.rings[0].collect() if self.running else None

    def start(self) -> int:
        return super().start() if not self.backend.stalled else 0

    def settle(self) -> None:
        super().settle()
        while self.calls:
            self.calls.pop(0)()
        super().settle()


class NetBench(VirtioBench):
    features = VirtioBench.features | F_MRG_RXBUF | F_CTRL_VQ

    def make_device(self) -> VirtioDevice:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self.peer.setblocking(False)
        card = VirtioNet(self.memory, StreamBackend(ours.detach()), mac=MAC)
        for queue in card.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(card, queue))
        self.card = card
        return card

    def rung(self, card: VirtioNet, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        card.serve(queue)

    def __del__(self) -> None:
        for queue in self.card.queues:
            os.close(queue.kick_fd)
        self.card.backend.close()
        self.peer.close()

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what = r.randrange(10)
        if what < 3:
            return "ask", 0, b"", r.choice((500, DATA_BYTES))  # four of them are enough for any frame
        if what < 6:
            return "comes", r.randrange(14, 1500)
        if what < 9:
            return "send", r.randrange(10, 1500)
        return "ask", 2, bytes(r.choice(((0, 0, 1), (1, 1, *MAC), (0, 1, 1), (7, 7)))), 1

    def comes(self, size: int) -> object:
        """A frame for the guest, where it has room for one: what waits at the host is lost with it."""
        if not self.running or self.rings[0].out < CHAINS:
            return None
        frame = MAC + MAC + bytes(size - 12)
        self.peer.sendall(len(frame).to_bytes(4, "big") + frame)
        self.settle()
        return self.rings[0].collect()

    def send(self, size: int) -> object:
        if not self.running or not self.rings[1].add(bytes(12) + MAC * 2 + bytes(size), 0):
            return None
        self.settle()
        self.rings[1].collect()
        try:
            return self.peer.recv(1 << 16)
        except BlockingIOError:  # as from a card whose state was spoiled
            return None


class VsockBench(VirtioBench):
    """One that is loaded does not go on as the saved one does: its connections are gone, and its driver is told so."""

    def make_device(self) -> VirtioDevice:
        self.io = EdgeWatcher()
        self.folder = tempfile.TemporaryDirectory()
        path = f"{self.folder.name}/vm.sock"
        self.program = socket.socket(socket.AF_UNIX)
        self.program.bind(f"{path}_{PORT}")
        self.program.listen()
        self.vsock = VirtioVsock(self.memory, HostEnd(path), cid=CID, connections=4)
        return self.vsock

    def __del__(self) -> None:
        self.vsock.close()
        self.program.close()
        self.folder.cleanup()

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what = r.randrange(10)
        if what < 3:
            return "ask", 0, b"", r.choice((44, 500, DATA_BYTES))
        if what < 9:
            op, data = r.randrange(1, 8), bytes(r.choice((0, 10, 1000)))
            header = HEADER.pack(CID, HOST_CID, r.randrange(3), PORT, len(data), 1, op, r.randrange(4), 1 << 18, 0)
            return "ask", 1, header + data, 0
        return "ask", 2, b"", r.choice((4, 4, 4, 3))


class End(Chardev):
    """The host's end of a console: it takes output while ``can_write``, which the host changes. A holder of state."""

    STATE = {**Chardev.STATE, "can_write": "flag"}

    def __init__(self, say: Any) -> None:
        super().__init__()
        self.write = say

    def hold(self, held: bool) -> None:
        self.can_write = not held
        if self._on_writable is not None:
            self._on_writable()


class ConsoleBench(VirtioBench):
    """A console of the kernel's and a port for a program."""

    features = VirtioBench.features | F_SIZE | F_MULTIPORT

    def make_device(self) -> VirtioDevice:
        self.ends = [End(self.hears(f"said {n}")) for n in range(2)]
        console = VirtioConsole(self.memory, [(0, self.ends[0], None), (1, self.ends[1], "agent")])
        for queue in console.queues:
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            self.io.add_reader(queue.kick_fd, lambda queue=queue: self.rung(console, queue))
        return console

    def rung(self, console: VirtioConsole, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick_fd)
        console.serve(queue)

    def __del__(self) -> None:
        for queue in self.device.queues:
            os.close(queue.kick_fd)

    def make(self) -> None:
        super().make()
        self.holders += [(f"end {n}", end) for n, end in enumerate(self.ends)]

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what, n = r.randrange(10), r.randrange(2)
        if what < 3:
            return "request", 4 * n + 1, r.randbytes(r.randrange(1, DATA_BYTES)), 0
        if what == 3:
            return "request", 4 * n, b"", r.choice((1, 100, DATA_BYTES))
        if what == 4:
            return "feed", n, r.randbytes(r.randrange(1, 3000))
        if what == 5:
            return "hold", n, r.randrange(2)
        if what == 6:
            return "request", 2, b"", r.choice((8, 12, 100))
        event = r.choice((control.DEVICE_READY, control.PORT_READY, control.PORT_OPEN, control.PORT_OPEN))
        return "request", 3, control.MESSAGE.pack(n, event, r.choice((0, 1, 1, 1))), 0

    def request(self, n: int, readable: bytes, writable: int) -> object:
        if self.running:
            self.rings[n].add(readable, writable)
        return self.collected()

    def feed(self, n: int, data: bytes) -> object:
        self.ends[n].feed(data)
        return self.collected()

    def hold(self, n: int, held: int) -> object:
        self.ends[n].hold(bool(held))
        return self.collected()

    def collected(self) -> object:
        """Of all queues: what is done in one leads to something in another."""
        self.settle()
        return [ring.collect() for ring in self.rings] if self.running else None


class BalloonBench(VirtioBench):
    """The last pages of its memory are nobody's: they go and come."""

    features = VirtioBench.features | F_STATS_VQ | F_PAGE_REPORTING

    def make_device(self) -> VirtioDevice:
        balloon = VirtioBalloon(self.memory, free_page_reporting=True)
        balloon.on_actual = self.hears("actual")
        return balloon

    @classmethod
    def own_step(cls, r: Random) -> Step:
        what = r.randrange(8)
        if what < 2:
            pages = [r.choice((26, 27, 28, 31, 32, 1 << 20)) for _ in range(r.randrange(1, 5))]
            return "ask", what, struct.pack(f"<{len(pages)}I", *pages), 0
        if what < 4:
            stats = [STAT.pack(r.randrange(12), r.getrandbits(64)) for _ in range(r.randrange(1, 4))]
            return "ask", 2, b"".join(stats), 0
        if what == 4:
            return "ask", 4, b"", DATA_BYTES
        if what == 5:
            return "touch", r.randrange(26, 32), r.randrange(256)
        return ("poll",) if what == 6 else ("target", r.randrange(100))

    def touch(self, page: int, value: int) -> bytes:
        """What was there, and something else from now on."""
        before = self.memory.read(page * 4096, 1)
        self.memory.write(page * 4096, bytes((value,)))
        return before

    def poll(self) -> object:
        """The host asks for statistics."""
        self.device.ask_stats()  # type: ignore[attr-defined]
        self.settle()
        return self.rings[2].collect() if self.running else None

    def target(self, pages: int) -> None:
        self.device.set_target(pages)  # type: ignore[attr-defined]


VIRTIO_BENCHES: tuple[type[Bench], ...] = (RngBench, BlkBench, NetBench, ConsoleBench, BalloonBench)
