"""A guest's driver for one queue, as the specification has it (2.7, 2.8), in guest memory and without a machine."""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, Virtqueue
from pyvmm.guest_memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
DESC_BYTES = 16


class TestDriver:
    """TestDriver(memory, queue) sets the queue up at ``base`` and enables it. ``add`` makes buffers available, ``used``
    gives back what the device is done with: ids, and how many bytes it has written.

    ``size`` may be smaller than the queue's. Rings take up 64 KiB from ``base`` on, buffers stand behind.
    """

    __test__ = False  # no test of pytest's

    def __init__(
        self,
        memory: GuestMemory,
        queue: Virtqueue,
        *,
        base: int = 0x10_0000,
        size: int | None = None,
        packed: bool = False,
        event_idx: bool = False,
        indirect: bool = False,
        in_order: bool = False,
        enable: bool = True,
    ) -> None:
        self.memory, self.queue, self.base = memory, queue, base
        self.size = size or min(queue.max_size, 256)
        self.packed, self.event_idx, self.indirect = packed, event_idx, indirect
        self.features = F_VERSION_1 | (F_RING_PACKED if packed else 0) | (F_EVENT_IDX if event_idx else 0)
        self.features |= (F_INDIRECT_DESC if indirect else 0) | (F_IN_ORDER if in_order else 0)
        self.desc, self.driver, self.device = base, base + 0x8000, base + 0xC000
        memory.write(base, bytes(0x10000))
        self._buffers = base + 0x10000
        self._tables: dict[int, int] = {}
        self._writable: dict[int, list[tuple[int, int]]] = {}
        self._slots: dict[int, list[int]] = {}
        self._free = list(range(self.size))
        self._avail = self._seen = 0
        self._avail_wrap = self._seen_wrap = True
        self._next_id = 0
        queue.size = self.size
        queue.desc_gpa, queue.driver_gpa, queue.device_gpa = self.desc, self.driver, self.device
        if enable:
            queue.enable(self.features)

    # -- memory ----------------------------------------------------------------------------------------------------

    def put(self, gpa: int, size: int, value: int) -> None:
        self.memory.write(gpa, value.to_bytes(size, "little"))

    def get(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.memory.read(gpa, size), "little")

    def room(self, size: int) -> int:
        """Memory for a buffer: one after the other, and from the start again where there is no more."""
        if self._buffers + size > self.memory.size_bytes:
            self._buffers = self.base + 0x10000
        at = self._buffers
        self._buffers += (size + 63) // 64 * 64
        return at

    # -- giving ----------------------------------------------------------------------------------------------------

    def add(self, readable: list[bytes], writable: list[int] | None = None, *, show: bool = True) -> int:
        """Make buffers available; the id of the chain. Without ``show`` the device does not see them yet (``kick``)."""
        pieces: list[tuple[int, int, int]] = []
        for data in readable:
            at = self.room(len(data))
            self.memory.write(at, data)
            pieces.append((at, len(data), 0))
        targets = []
        for size in writable or []:
            at = self.room(size)
            self.memory.write(at, bytes(size))
            pieces.append((at, size, WRITE))
            targets.append((at, size))
        chain = self._add_packed(pieces) if self.packed else self._add_split(pieces)
        self._writable[chain] = targets
        if show:
            self.show()
        return chain

    def _table(self, pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """One indirect descriptor in the place of all."""
        table = self.room(DESC_BYTES * len(pieces))
        for n, (at, size, flags) in enumerate(pieces):
            more = n + 1 < len(pieces)
            if self.packed:
                data = at | size << 64 | flags << 112
            else:
                data = at | size << 64 | (flags | (NEXT if more else 0)) << 96 | (n + 1 if more else 0) << 112
            self.put(table + DESC_BYTES * n, DESC_BYTES, data)
        return [(table, DESC_BYTES * len(pieces), INDIRECT)]

    def _add_split(self, pieces: list[tuple[int, int, int]]) -> int:
        if self.indirect:
            pieces = self._table(pieces)
        slots = [self._free.pop(0) for _ in pieces]
        for n, (slot, (at, size, flags)) in enumerate(zip(slots, pieces, strict=True)):
            more = n + 1 < len(slots)
            following = slots[n + 1] if more else 0
            data = at | size << 64 | (flags | (NEXT if more else 0)) << 96 | following << 112
            self.put(self.desc + DESC_BYTES * slot, DESC_BYTES, data)
        self.put(self.driver + 4 + 2 * (self._avail % self.size), 2, slots[0])
        self._avail = (self._avail + 1) & 0xFFFF
        self._slots[slots[0]] = slots
        return slots[0]

    def _add_packed(self, pieces: list[tuple[int, int, int]]) -> int:
        if self.indirect:
            pieces = self._table(pieces)
        chain = self._next_id
        while chain in self._slots:
            chain = (chain + 1) % self.size
        self._next_id = (chain + 1) % self.size
        assert len(self._free) >= len(pieces), "no room in the ring"
        slots = []
        first: tuple[int, int] | None = None
        for n, (at, size, flags) in enumerate(pieces):
            slots.append(self._free.pop())
            flags |= NEXT if n + 1 < len(pieces) else 0
            flags |= AVAIL if self._avail_wrap else USED
            place = self.desc + DESC_BYTES * self._avail
            self.put(place, 8, at)
            self.put(place + 8, 4, size)
            self.put(place + 12, 2, chain)
            if first is None:
                first = place + 14, flags
            else:
                self.put(place + 14, 2, flags)
            self._avail += 1
            if self._avail == self.size:
                self._avail, self._avail_wrap = 0, not self._avail_wrap
        assert first is not None
        self.put(first[0], 2, first[1])
        self._slots[chain] = slots
        return chain

    def show(self) -> None:
        """The available index says what was added; a packed ring's descriptors say so themselves."""
        if not self.packed:
            self.put(self.driver + 2, 2, self._avail)

    # -- taking ----------------------------------------------------------------------------------------------------

    def used(self) -> list[tuple[int, int]]:
        """(id, bytes written) of each chain that the device is done with, in its order."""
        return list(self._used_packed() if self.packed else self._used_split())

    def _used_split(self) -> Iterator[tuple[int, int]]:
        while self._seen != self.get(self.device + 2, 2):
            at = self.device + 4 + 8 * (self._seen % self.size)
            chain, written = self.get(at, 4), self.get(at + 4, 4)
            self._seen = (self._seen + 1) & 0xFFFF
            self._free += self._slots.pop(chain)
            yield chain, written

    def _used_packed(self) -> Iterator[tuple[int, int]]:
        while True:
            at = self.desc + DESC_BYTES * self._seen
            flags = self.get(at + 14, 2)
            if bool(flags & AVAIL) != self._seen_wrap or bool(flags & USED) != self._seen_wrap:
                return
            chain, written = self.get(at + 12, 2), self.get(at + 8, 4)
            assert bool(flags & WRITE) == bool(written)
            slots = self._slots.pop(chain)
            self._seen += len(slots)
            if self._seen >= self.size:
                self._seen, self._seen_wrap = self._seen - self.size, not self._seen_wrap
            self._free += slots
            yield chain, written

    def data(self, chain: int) -> bytes:
        """What stands in the buffers that the device may write."""
        return b"".join(self.memory.read(at, size) for at, size in self._writable[chain])

    @property
    def free(self) -> int:
        """Descriptors that no chain has."""
        return len(self._free)

    # -- suppression -----------------------------------------------------------------------------------------------

    def want_interrupts(self, wanted: bool, after: int = 0) -> None:
        """By flags; with an event index, when ``after`` more chains than were seen have been used."""
        if self.packed:
            place = self._seen + after
            wrap = self._seen_wrap
            if place >= self.size:
                place, wrap = place - self.size, not wrap
            self.put(self.driver, 2, place | wrap << 15)
            self.put(self.driver + 2, 2, (2 if self.event_idx else 0) if wanted else 1)
        elif self.event_idx:
            far = (self._seen + after if wanted else self._seen - 1) & 0xFFFF
            self.put(self.driver + 4 + 2 * self.size, 2, far)
        else:
            self.put(self.driver, 2, 0 if wanted else 1)

    def is_to_kick(self) -> bool:
        """Whether the device wants to be told of what was added last."""
        if self.packed:
            flags = self.get(self.device + 2, 2)
            if flags != 2:
                return flags == 0
            place = self.get(self.device, 2)
            at, wrap = place & 0x7FFF, bool(place >> 15)
            last = (self._avail - 1) % self.size
            last_wrap = self._avail_wrap if self._avail else not self._avail_wrap
            return (at, wrap) == (last, last_wrap)
        if self.event_idx:
            return self.get(self.device + 4 + 8 * self.size, 2) == (self._avail - 1) & 0xFFFF
        return not self.get(self.device, 2) & 1
