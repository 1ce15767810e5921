"""VirtioBalloon: memory that a guest lends to the host (OASIS virtio 1.2, 5.5).

The device says how many pages it wants (``num_pages``); the driver names pages that it gives up, takes some back, and
says how many it has given (``actual``). What is named goes back to the host at once, neighbours in one call; a page
that is taken back is there again when it is touched, so nothing has to be done for it. A driver that uses pages before
it has told us does no harm. Nothing holds it to what it was asked for.

What a page holds that was given up is nobody's (5.5.6): zeros, or on a machine that came from a snapshot what the
snapshot has. Pages that are reported as free (5.5.6.7) are not to change where the driver has negotiated PAGE_POISON,
but to the value that it fills them with: so they go back only where they read as zeros then and that is this value.

Statistics are a buffer of the driver's, filled, which waits here until somebody asks; it comes back filled anew.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.page_ranges import PAGE_BYTES, joined, pages, within
from pyvmm.devices.virtio.ring import RingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.page_ranges import Range
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory

# Queues (5.5.2). There is no hinting (queue 3). Linux before 6.11, as QEMU, counts only those that it uses: so where a
# driver reports free pages, any that has no other use is the one it does that by.
INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
QUEUE_SIZE = 128

# Features (5.5.3)
F_MUST_TELL_HOST = 1 << 0
F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_PAGE_POISON = 1 << 4
F_PAGE_REPORTING = 1 << 5

# struct virtio_balloon_config (5.5.4)
NUM_PAGES, ACTUAL, POISON, CONFIG_BYTES = 0, 4, 12, 16
FIELD_BYTES = 4

BATCH = 8  # requests before somebody else has his turn
# Of one request; Linux names 256 at a time. More of them are acknowledged, and stay where they are.
MOST_PAGES = 1 << 14
MOST_STATS = 64  # entries that are looked at

STAT = Struct("<HQ")  # struct virtio_balloon_stat (5.5.6.3)
# By their tags (5.5.6.4).
STATS_NAMES = (
    *("swap_in_bytes", "swap_out_bytes", "major_faults", "minor_faults", "free_bytes", "total_bytes"),
    *("available_bytes", "cache_bytes", "hugetlb_allocations", "hugetlb_failures"),
)


class VirtioBalloon(VirtioDevice):
    """``target_pages``, of 4 KiB, is what it is to take at first; ``set_target`` changes that.

    ``on_actual(pages)`` hears what the driver says to have given, on the vCPU's thread with the device's lock held;
    ``on_stats()`` that new statistics are there, with a queue's.
    """

    DEVICE_ID = 5
    QUEUES = (QUEUE_SIZE,) * 5
    own_thread = True  # giving back gigabytes takes its time

    def __init__(
        self,
        memory: GuestMemory,
        *,
        target_pages: int = 0,
        deflate_on_oom: bool = False,
        free_page_reporting: bool = False,
    ) -> None:
        features = F_MUST_TELL_HOST | F_STATS_VQ
        features |= F_DEFLATE_ON_OOM if deflate_on_oom else 0
        features |= F_PAGE_REPORTING | F_PAGE_POISON if free_page_reporting else 0
        super().__init__(memory, config_bytes=CONFIG_BYTES, features=features)
        self.on_actual: Callable[[int], object] | None = None
        self.on_stats: Callable[[], object] | None = None
        self.given_bytes = 0
        """How much has gone back to the host since the machine was made."""
        self.bad_pages = 0
        """How often a driver has named a page that is none of RAM's."""
        self._target = target_pages
        self._values: list[int | None] = [None] * len(STATS_NAMES)
        self._held: Chain | None = None  # the driver's buffer for statistics
        self._told = False  # there was a buffer since the last reset
        self._token: Any = None

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def target_pages(self) -> int:
        """What the driver is asked for."""
        return self._target

    def set_target(self, pages: int) -> None:
        """Ask for so many. From any thread, with any lock."""
        with self.notice:
            self._target = pages
        self.config_changed()

    @property
    def actual_pages(self) -> int:
        """What the driver says to have given."""
        return self._field(ACTUAL)

    @property
    def stats(self) -> dict[str, int]:
        """What the driver said last of its memory; only what it knows."""
        named = zip(STATS_NAMES, self._values, strict=True)
        return {name: value for name, value in named if value is not None}

    def ask_stats(self) -> None:
        """Have the driver say it anew. From any thread."""
        assert self.io is not None  # the board has given it
        self.io.call_soon(self._ask)

    def _ask(self) -> None:
        """On the device's thread. Without a buffer the driver has been asked already, or is not there yet."""
        queue = self.queues[STATS]
        with queue.lock:
            held, self._held = self._held, None
            if held is not None and self.live:
                queue.push(held, 0)
                queue.flush()

    # -- configuration space -----------------------------------------------------------------------------------------

    def _field(self, offset: int) -> int:
        return int.from_bytes(self.config[offset : offset + FIELD_BYTES], "little")

    def config_reading(self) -> None:
        self.config[NUM_PAGES : NUM_PAGES + FIELD_BYTES] = self._target.to_bytes(FIELD_BYTES, "little")

    def config_write(self, offset: int, size: int, value: int) -> None:
        end = offset + size
        if offset >= ACTUAL and end <= ACTUAL + FIELD_BYTES:
            self.config[offset:end] = value.to_bytes(size, "little")
            if end == ACTUAL + FIELD_BYTES:  # 5.5.6.1: with the last byte, where they come one by one
                self._actual_changed()
        elif offset >= POISON and not self.live:  # 5.5.6.6: it does not change afterwards
            self.config[offset:end] = value.to_bytes(size, "little")

    def _actual_changed(self) -> None:
        if self.on_actual is not None:
            self.on_actual(self.actual_pages)

    # -- the queues --------------------------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue) -> None:
        if queue.index == STATS and self.features & F_STATS_VQ:
            work = self._take_stats
        elif queue.index == INFLATE:
            work = self._inflate
        elif queue.index == DEFLATE:
            work = self._deflate
        elif self.features & F_PAGE_REPORTING:
            work = self._report
        else:
            return
        chains = queue.take(BATCH)
        work(chains)
        for chain in chains:
            if chain is not self._held:
                queue.push(chain, 0)
        queue.flush()
        if queue.enable_kicks():
            self.kick(queue)

    def _inflate(self, chains: list[Chain]) -> None:
        numbers = {number for chain in chains for number in page_numbers(chain)}
        inside = list(within(pages(numbers), self.memory.regions))
        self.bad_pages += len(numbers) - sum(size for _, size in inside) // PAGE_BYTES
        self._give(inside)

    def _deflate(self, chains: list[Chain]) -> None:
        """They are there when they are touched."""

    def _report(self, chains: list[Chain]) -> None:
        named = [pair for chain in chains for pair in written_ranges(chain)]
        poisoned = bool(self.features & F_PAGE_POISON)
        if not (poisoned and self._field(POISON)):
            self._give(within(joined(named), self.memory.regions), zeros=poisoned)

    def _give(self, ranges: Iterable[Range], *, zeros: bool = False) -> None:
        """Back to the host."""
        for gpa, size in ranges:
            self.given_bytes += self.memory.discard(gpa, size, zeros=zeros)

    def _take_stats(self, chains: list[Chain]) -> None:
        """The last one is kept; a driver that follows the specification has given one only."""
        for chain in chains:
            if not (self.legacy and not self._told):  # 5.5.6.3.3: the first one of a legacy driver has nothing in it
                self._read_stats(chain)
            self._told = True
        if not chains:
            return
        if self._held is not None:
            self.queues[STATS].push(self._held, 0)
        self._held = chains[-1]
        if self.on_stats is not None:
            self.on_stats()

    def _read_stats(self, chain: Chain) -> None:
        data = chain.read(0, MOST_STATS * STAT.size)
        for tag, value in STAT.iter_unpack(data[: len(data) // STAT.size * STAT.size]):
            if tag < len(STATS_NAMES):  # 5.5.6.3.2: what is not known means nothing
                self._values[tag] = value

    # -- coming to rest ----------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        with self.queues[STATS].lock:
            self._held = None

    def stop_queue(self, queue: Virtqueue) -> None:
        if queue.index == STATS:
            self.quiesce()

    def reset_device(self) -> None:
        """What the driver had given is its own again."""
        given = self.actual_pages
        self.config[ACTUAL:] = bytes(CONFIG_BYTES - ACTUAL)
        self._values[:] = [None] * len(STATS_NAMES)
        self._told = False
        if given:
            self._actual_changed()

    # -- state -------------------------------------------------------------------------------------------------------

    STATE = {
        "_target": 32,
        "_told": "flag",
        "_values": ("list", ("or none", 64), len(STATS_NAMES)),
    }

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = super().save()
        state["held"] = None if self._held is None else self._held.token
        return state

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.errors import StateError

        own = dict(state) if isinstance(state, dict) else {}
        if "held" not in own:
            raise StateError("held is missing: this is the state of something else, or of another version")
        token = own.pop("held")
        super().load(own)
        self._held, self._token = None, token

    def after_load(self) -> None:
        super().after_load()
        token, self._token = self._token, None
        queue = self.queues[STATS]
        with queue.lock:
            try:
                self._held = None if token is None else queue.retake(token)
            except RingError as error:
                self.broken(str(error))


def page_numbers(chain: Chain) -> list[int]:
    """What a request names: 32 bits each, little endian."""
    if chain.writable_bytes:
        raise RingError("page numbers in a buffer that is to be written to (5.5.6)")
    data = chain.read(0, MOST_PAGES * 4)
    return memoryview(data[: len(data) & ~3]).cast("I").tolist()


def written_ranges(chain: Chain) -> list[Range]:
    """Where the buffers of a report stand."""
    if chain.readable_bytes:
        raise RingError("a report of free pages that is to be read (5.5.6.7)")
    _, _, pairs = chain.token
    return list(zip(pairs[::2], pairs[1::2], strict=True))
