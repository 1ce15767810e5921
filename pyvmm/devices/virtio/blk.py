"""VirtioBlk: a disk by virtio (OASIS virtio 1.2, 5.2).

A request is a chain: 16 bytes that say what is wanted and where, data, and a byte for the status, the last that the
device may write (5.2.6). How the driver has cut it into descriptors means nothing (2.7.4). What the drive's lane can do
at once, reads and writes of what the page cache has, is answered in compiled code (blk_fast.pyx), without the GIL, many
requests at a time, and so is what a lane waits for (blk_waiting.pyx); all else comes here, and goes to the backend,
which calls back: on this thread where nothing had to be waited for, else on whatever thread has the result.

A request that is under way is in ``_asked``. At a reset it is cancelled, and waited for: the driver gets its memory
back. In a saved state there are those that an error policy has put aside, by the token of their chain; where the state
is loaded they are read from the ring anew and asked again.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.ring import RingError
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.block import BlockBackend, Request
    from pyvmm.block.lane import Lane
    from pyvmm.devices.virtio.blk_fast import FastBlk
    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory

SECTOR_BYTES = 512  # the protocol's unit, whatever the block size (5.2.5)
QUEUE_SIZE = 256

# Features (5.2.3)
F_SEG_MAX = 1 << 2
F_GEOMETRY = 1 << 4
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

# struct virtio_blk_config (5.2.4), as far as write_zeroes_may_unmap and its padding
CONFIG = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
WRITEBACK = 32
CAPACITY = Struct("<Q")  # its first field

# Requests (5.2.6)
HEADER = Struct("<IIQ")
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = b"\0", b"\1", b"\2"
ID_BYTES = 20
SEGMENT = Struct("<QII")  # struct virtio_blk_discard_write_zeroes
UNMAP = 1
MOST_SEGMENTS = 32
MOST_SECTORS = 0x3FFFFF  # a segment's; what is below 2 GiB, as in QEMU

POLL_NS = 0  # how long a queue's thread looks for more, after the last request
# Of taking what is there, before other queues of the thread have their turn, and whoever waits for this one's lock: a
# vCPU that changes a vector, or resets. blk_fast.pyx has as many chains in one of them as fit into some milliseconds.
ROUNDS = 4


class Asked:
    """A request of the guest's, from the ring until its status. ``left``: how many of its requests to the backend last.
    """

    __slots__ = ("chain", "device", "dropped", "failed", "left", "queue", "requests")

    def __init__(self, device: VirtioBlk, queue: Virtqueue, chain: Chain) -> None:
        self.device = device
        self.queue = queue
        self.chain = chain
        self.left = 1
        self.failed = False
        self.dropped = False
        self.requests: list[Request] = []

    def done(self, ret: int) -> None:
        """A backend's callback, on any thread, which holds no lock or this queue's."""
        with self.queue.lock:
            self.failed |= ret < 0
            self.left -= 1
            if not self.left:
                self.device.end(self, S_IOERR if self.failed else S_OK)

    def drop(self) -> None:
        """The driver wants its memory back: the sooner it is over the better, and nobody hears of it."""
        self.dropped = True
        for request in self.requests:
            request.cancel()


class VirtioBlk(VirtioDevice):
    """``backend`` is the disk's content, ``serial`` its name of up to 20 characters; ``geometry``: (cylinders, heads,
    sectors a track), for those who ask. Blocks are in bytes: requests are whole logical ones, and a guest does best
    with whole physical ones.
    """

    DEVICE_ID = 2
    own_thread = True

    def __init__(
        self,
        memory: GuestMemory,
        backend: BlockBackend,
        *,
        serial: str = "",
        queues: int = 1,
        queue_size: int = QUEUE_SIZE,
        logical_block_bytes: int = SECTOR_BYTES,
        physical_block_bytes: int | None = None,
        geometry: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self.backend = backend
        self.serial = serial.encode("ascii")[:ID_BYTES]
        self._block = logical_block_bytes
        self._physical = physical_block_bytes or logical_block_bytes
        self._geometry = geometry
        self._queue_size = queue_size
        self._sectors = backend.sectors - backend.sectors % (self._block // SECTOR_BYTES)
        self._cache_at_power_on = backend.write_cache
        self._fast: list[FastBlk] = []
        self._asked: list[dict[Asked, None]] = [{} for _ in range(queues)]
        self._serving = [False] * queues
        self._quiet = False
        self._tokens: list[list[Any]] = [[] for _ in range(queues)]  # from ``load`` to ``after_load``
        self.thread_per_queue = queues > 1
        super().__init__(
            memory, queues=[queue_size] * queues, config_bytes=CONFIG.size, features=self._offered(queues)
        )
        self.config[:] = self._first_config(queues)
        lane = backend.lane()
        if lane is not None:
            self._fast = [self._fast_for(queue, lane) for queue in self.queues]

    def _fast_for(self, queue: Virtqueue, lane: Lane) -> FastBlk:
        size_bytes = self._sectors * SECTOR_BYTES
        if lane.waits:
            from pyvmm.devices.virtio.blk_waiting import WaitingBlk

            fast = WaitingBlk(queue, lane, size_bytes, self._block)
            fast.back = self._take_back
            return fast
        from pyvmm.devices.virtio.blk_fast import FastBlk

        return FastBlk(queue, lane, size_bytes, self._block)

    def _offered(self, queues: int) -> int:
        """All that is not here is refused by negotiation: SCSI commands, barriers, zones, secure erase, lifetime."""
        features = F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        if queues > 1:
            features |= F_MQ
        if self.backend.read_only:
            return features | F_RO
        if self._unmaps:
            features |= F_DISCARD
        return features | F_WRITE_ZEROES

    @property
    def _unmaps(self) -> bool:
        return self.backend.options.discard == "unmap"

    def _first_config(self, queues: int) -> bytes:
        blocks = self._physical // self._block
        return CONFIG.pack(
            self._sectors,
            0,
            self._queue_size - 2,  # seg_max: beside header and status
            *self._geometry,
            self._block,
            *(blocks.bit_length() - 1, 0, 0, 0),
            *(self.backend.write_cache, 0, queues),
            *(MOST_SECTORS, MOST_SEGMENTS, self._physical // SECTOR_BYTES),
            *(MOST_SECTORS, MOST_SEGMENTS, self._unmaps),
        )

    # -- configuration -----------------------------------------------------------------------------------------

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Only ``writeback`` can be written (5.2.5), by who has negotiated it."""
        if offset <= WRITEBACK < offset + size and self.features & F_CONFIG_WCE:
            self._set_write_cache(bool(value >> 8 * (WRITEBACK - offset) & 0xFF))

    def _set_write_cache(self, on: bool) -> None:
        self.backend.write_cache = on
        self.config[WRITEBACK] = on

    def check_features(self, features: int) -> bool:
        if features & F_CONFIG_WCE and not features & F_FLUSH:
            self._set_write_cache(False)  # 5.2.5.2
        return True

    def driver_ok(self) -> None:
        """A driver that can't flush needs every write to be stable (5.2.6.2)."""
        if not self.features & F_CONFIG_WCE:
            self._set_write_cache(self._cache_at_power_on and bool(self.features & F_FLUSH))

    def resized(self) -> None:
        """The backend has more sectors, or fewer: the driver is told (5.2.4: capacity; 5.2.6.1), and what it asks for
        behind the end is S_IOERR. From any thread, without a lock.
        """
        with self.lock:
            self._sectors = self.backend.sectors - self.backend.sectors % (self._block // SECTOR_BYTES)
            for queue, fast in zip(self.queues, self._fast, strict=False):
                with queue.lock:
                    fast.resize(self._sectors * SECTOR_BYTES)
            self.config[: CAPACITY.size] = CAPACITY.pack(self._sectors)
        self.config_changed()

    def reset_device(self) -> None:
        self._forget()
        self._set_write_cache(self._cache_at_power_on)

    # -- the queues --------------------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue) -> None:
        if self._quiet:
            return
        index = queue.index
        serve = self._fast[index].serve if self._fast else None
        asked = self._asked[index]
        self._serving[index] = True
        try:
            for _ in range(ROUNDS):
                queue.disable_kicks()
                # While others of its requests are under way nobody waits here: their ends want the queue's lock.
                chains, more = (queue.take(), False) if serve is None else serve(0 if asked else POLL_NS)
                if chains:
                    self._start_all(queue, chains)
                queue.flush()
                if not self.live:
                    return
                if not more and not chains and not queue.enable_kicks():
                    return
        finally:
            self._serving[index] = False
        self.kick(queue)

    def _start_all(self, queue: Virtqueue, chains: list[Chain]) -> None:
        backend = self.backend
        backend.plug()
        try:
            for chain in chains:
                self._start(queue, chain)
                if not self.live:  # broken, by this one or at another queue: the rest is not served (2.1.2)
                    break
        finally:
            backend.unplug()

    def _take_back(self, queue: Virtqueue, chains: list[Chain]) -> None:
        """The lane could not do these: the queue's lock is held, on the lane's thread."""
        if self.live:
            self._start_all(queue, chains)

    def _start(self, queue: Virtqueue, chain: Chain) -> None:
        header = chain.read(0, HEADER.size)
        if len(header) < HEADER.size or not chain.writable_bytes:
            self.broken(
                f"a request with {len(header)} bytes of header and {chain.writable_bytes} that may be written: it has"
                " neither 16 nor a status byte"
            )
            return
        kind, _, sector = HEADER.unpack(header)
        if queue.traced is not None:
            queue.trace_begin(chain)
        asked = Asked(self, queue, chain)
        self._asked[queue.index][asked] = None
        REQUESTS.get(kind, VirtioBlk._unknown)(self, asked, sector)

    def end(self, asked: Asked, status: bytes, data: bytes = b"") -> None:
        """It is over, with ``status``: the queue's lock is held. What the driver may read of it is all that it lent:
        the status is the last byte, and nobody could find it otherwise.
        """
        queue, chain = asked.queue, asked.chain
        del self._asked[queue.index][asked]
        if asked.dropped:
            return
        room = chain.writable_bytes - 1
        if data:
            chain.write(0, data[:room])
        chain.write(room, status)
        queue.push(chain, room + 1)
        if not self._serving[queue.index]:
            queue.flush()

    # -- requests ----------------------------------------------------------------------------------------------

    def _unknown(self, asked: Asked, sector: int) -> None:
        self.end(asked, S_UNSUPP)

    def _inside(self, sector: int, size: int) -> bool:
        """Whether these are whole blocks of the disk."""
        first = sector * SECTOR_BYTES
        return not (first | size) % self._block and first + size <= self._sectors * SECTOR_BYTES

    def _in(self, asked: Asked, sector: int) -> None:
        size = asked.chain.writable_bytes - 1
        if self._inside(sector, size):
            iov = part(asked.chain.writable, 0, size)
            asked.requests.append(self.backend.aio_readv(sector, iov, asked.done))
        else:
            self.end(asked, S_IOERR)

    def _out(self, asked: Asked, sector: int) -> None:
        size = asked.chain.readable_bytes - HEADER.size
        if self._inside(sector, size) and not self.backend.read_only:
            iov = part(asked.chain.readable, HEADER.size, size)
            asked.requests.append(self.backend.aio_writev(sector, iov, asked.done))
        else:
            self.end(asked, S_IOERR)

    def _flush(self, asked: Asked, sector: int) -> None:
        asked.requests.append(self.backend.aio_flush(asked.done))

    def _get_id(self, asked: Asked, sector: int) -> None:
        self.end(asked, S_OK, self.serial.ljust(ID_BYTES, b"\0"))

    def _discard(self, asked: Asked, sector: int) -> None:
        if not self.features & F_DISCARD:
            self.end(asked, S_UNSUPP)
            return
        self._ranges(asked, 0, lambda first, count, flags: self.backend.aio_discard(first, count, asked.done))

    def _write_zeroes(self, asked: Asked, sector: int) -> None:
        if not self.features & F_WRITE_ZEROES:
            self.end(asked, S_UNSUPP)
            return
        self._ranges(
            asked,
            UNMAP,
            lambda first, count, flags: self.backend.aio_write_zeroes(
                first, count, asked.done, may_unmap=bool(flags & UNMAP)
            ),
        )

    def _ranges(self, asked: Asked, known: int, ask: Callable[[int, int, int], Request]) -> None:
        """Each of the request's segments. All of them are looked at before the first is begun."""
        size = asked.chain.readable_bytes - HEADER.size
        if not size or size % SEGMENT.size or size > MOST_SEGMENTS * SEGMENT.size:
            self.end(asked, S_IOERR)
            return
        segments = list(SEGMENT.iter_unpack(asked.chain.read(HEADER.size, size)))
        if any(flags & ~known for _, _, flags in segments):
            self.end(asked, S_UNSUPP)  # 5.2.6.2
        elif all(count <= MOST_SECTORS and self._inside(first, count * SECTOR_BYTES) for first, count, _ in segments):
            asked.left = len(segments)
            for segment in segments:
                asked.requests.append(ask(*segment))
        else:
            self.end(asked, S_IOERR)

    # -- coming to rest ----------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        self._stop(self.queues)

    def stop_queue(self, queue: Virtqueue) -> None:
        self._stop([queue])

    def _stop(self, queues: list[Virtqueue]) -> None:
        """Nothing of these queues is under way any more; the others' requests are done, and they go on afterwards."""
        self._quiet = True
        try:
            for queue in self.queues:
                with queue.lock:  # whoever was serving it is done, and nobody begins
                    dropped = [*self._asked[queue.index]] if queue in queues else []
                for asked in dropped:
                    asked.drop()
            self.backend.drain()
        finally:
            self._quiet = False
        for queue in queues:
            self._asked[queue.index].clear()
        for queue in self.queues:
            if queue not in queues and queue.ready:
                self.kick(queue)

    def _forget(self) -> None:
        """Those that an error policy had put aside have been dropped with it."""
        for asked in self._asked:
            asked.clear()

    # -- state -------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = super().save()
        state["asked"] = [[asked.chain.token for asked in each] for each in self._asked]
        return state

    def load(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or not isinstance(state.get("asked"), list):
            raise StateError("asked is missing: this is the state of something else, or of another version")
        tokens = state["asked"]
        if len(tokens) != len(self.queues) or not all(isinstance(each, list) for each in tokens):
            raise StateError(f"asked has {len(tokens)} entries, not a list for each of {len(self.queues)} queues")
        super().load({name: value for name, value in state.items() if name != "asked"})
        self._tokens = tokens

    def after_load(self) -> None:
        """Whatever was under way is asked again, and waits at the backend until the machine goes on."""
        super().after_load()
        self.config[WRITEBACK] = self.backend.write_cache
        tokens, self._tokens = self._tokens, [[] for _ in self.queues]
        for queue, each in zip(self.queues, tokens, strict=True):
            with queue.lock:
                try:
                    for token in each:
                        self._start(queue, queue.retake(token))
                except RingError as error:
                    self.broken(str(error))


REQUESTS: dict[int, Callable[[VirtioBlk, Asked, int], None]] = {
    T_IN: VirtioBlk._in,
    T_OUT: VirtioBlk._out,
    T_FLUSH: VirtioBlk._flush,
    T_GET_ID: VirtioBlk._get_id,
    T_DISCARD: VirtioBlk._discard,
    T_WRITE_ZEROES: VirtioBlk._write_zeroes,
}


def part(views: list[memoryview], start: int, size: int) -> list[memoryview]:
    """``size`` bytes of them from ``start`` on."""
    # As most drivers cut a request: the data is one buffer, behind the header or before the status.
    if len(views) == 2 and len(views[1 if start else 0]) == size and (not start or len(views[0]) == start):
        return views[1:] if start else views[:1]
    found = []
    for view in views:
        length = len(view)
        if start < length and size:
            piece = view[start : start + size] if start or size < length else view
            found.append(piece)
            size -= len(piece)
        start = max(0, start - length)
    return found
