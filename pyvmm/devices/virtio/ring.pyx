"""Virtqueue: the rings by which a driver gives buffers to a device, split and packed. OASIS virtio 1.2, 2.6 to 2.8.

A mechanism: it knows no transport, no device and no thread. Whoever serves the queue holds ``lock``, takes chains of
buffers, pushes each with the number of bytes written to it, and flushes, which shows them to the driver and interrupts
it where it wants that.

All of the rings is the guest's memory and may change at any moment. So a descriptor is read once, into a copy; the copy
is checked (direction, length, number, inside of RAM), and from then on only the copy is used. No more chains are out at
a time than the queue has room for. What a driver does wrong is a RingError, which its device turns into
DEVICE_NEEDS_RESET.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove
from posix.unistd cimport write

from pyvmm.devices.virtio.chain cimport Chain, chain_add, chain_empty, chain_init, vq_chain
from pyvmm.guest_memory cimport RamRegion
from pyvmm.trace.tap cimport (TAP_RELEASE, TRACE_BEGIN, TRACE_KICK, TRACE_PUSH, TRACE_SHOW, TRACE_TAKE, pair,
                              tap_of, tap_store, trace, trace_tap_t, unlikely)

from pyvmm.device import DeviceLock as Lock
from pyvmm.errors import StateError

# Feature bits, 6. Reserved Feature Bits
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_IN_ORDER

cdef enum:
    DESC_BYTES = 16
    # Of a descriptor's flags, 2.7.5 and 2.8.1
    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15
    # 2.7.7 (split) and 2.8.14 (packed: of the event suppression structure)
    NO_INTERRUPT = 1
    NO_NOTIFY = 1
    EVENTS_ENABLE = 0
    EVENTS_DISABLE = 1
    EVENTS_DESC = 2
    # As many descriptors a chain may have, in an indirect table too; 2.7.5.3.1 has the queue's size as the limit, which
    # drivers in use go beyond with small queues. QEMU's limit is this.
    LONGEST_CHAIN = 1024
    LARGEST_QUEUE = 32768

cdef enum:
    # What vq_take says of a driver.
    BAD_AVAIL = -1
    BAD_HEAD = -2
    BAD_LOOP = -3
    BAD_ADDRESS = -4
    BAD_ORDER = -5
    BAD_EMPTY = -6
    BAD_TOTAL = -7
    BAD_INDIRECT = -8
    BAD_TABLE = -9
    BAD_NEXT = -10
    NO_MEMORY = -11

_WHY = {
    BAD_AVAIL: "more is available, or was not given back yet, than the queue is long (2.7.6, 2.8.6)",
    BAD_HEAD: "a chain begins at a descriptor that there is none of (2.7.6)",
    BAD_LOOP: "a chain has more descriptors than a queue can have, or goes round in a circle (2.7.5.2)",
    BAD_ADDRESS: "a buffer is not inside of memory (2.7.5)",
    BAD_ORDER: "a buffer for the device to read comes after one to write (2.7.4.2)",
    BAD_EMPTY: "a buffer has no byte",
    BAD_TOTAL: "a chain has more than 2^32 bytes (2.7.5.2)",
    BAD_INDIRECT: "an indirect descriptor where there can be none (2.7.5.3.1)",
    BAD_TABLE: "a table of descriptors is empty, or no multiple of 16 bytes long (2.7.5.3.1)",
    BAD_NEXT: "a chain goes on at a descriptor that there is none of (2.7.5)",
    NO_MEMORY: "the host has no memory for a chain",
}

cdef extern from * nogil:
    uint16_t load_u16 "__atomic_load_n" (uint16_t *, int)
    void store_u16 "__atomic_store_n" (uint16_t *, uint16_t, int)
    uint64_t load_u64 "__atomic_load_n" (uint64_t *, int)
    void fence "__atomic_thread_fence" (int)
    int RELAXED "__ATOMIC_RELAXED"
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"
    int SEQ_CST "__ATOMIC_SEQ_CST"


class RingError(Exception):
    """The driver has done what it must not do; a sentence says what."""


cdef desc_t read_desc(uint8_t *at) noexcept nogil:
    """One look at a descriptor, in two loads that the compiler can't repeat."""
    cdef desc_t desc
    cdef uint64_t rest = load_u64(<uint64_t *>(at + 8), RELAXED)
    desc.addr = load_u64(<uint64_t *>at, RELAXED)
    desc.len = <uint32_t>rest
    desc.third = <uint16_t>(rest >> 32)
    desc.fourth = <uint16_t>(rest >> 48)
    return desc


cdef inline bint need_event(uint16_t event, uint16_t new, uint16_t old) noexcept nogil:
    """Whether ``event`` was passed on the way from ``old`` to ``new`` (2.7.7.1, vring_need_event)."""
    return <uint16_t>(new - event - 1) < <uint16_t>(new - old)


cdef class Virtqueue:
    """Queue ``index`` of a device, of at most ``max_size`` buffers.

    A transport sets ``size`` and the three addresses while the queue is not ready, then calls ``enable``. ``kick_fd`` is
    the eventfd that the guest's notifications signal. Where the guest wants an interrupt, ``call_fd`` is signalled; -1:
    ``on_call()`` is called.
    """

    def __cinit__(self, GuestMemory memory not None, int index, int max_size, *, str name=""):
        if not 1 <= max_size <= LARGEST_QUEUE or max_size & (max_size - 1):
            raise ValueError(f"a queue of {max_size}: give a power of two up to {LARGEST_QUEUE}")
        self._memory = memory
        self.index = index
        self.max_size = max_size
        self.name = name
        self.lock = Lock()
        self.kick_fd = self.call_fd = -1
        self._regions = []
        self.forget()

    def __dealloc__(self):
        free(self._ram)
        free(self._pending)

    def forget(self):
        """As at power-on: not ready, no address, the largest size."""
        self.disable()
        self.size = self.max_size
        self.desc_gpa = self.driver_gpa = self.device_gpa = 0
        self._start_again()

    def _start_again(self):
        self._avail = self._used = 0
        self._avail_wrap = self._used_wrap = True
        self._kicks = True
        self._pending_count = 0
        self._sequence = self._next_pushed = 0

    # -- tracing -----------------------------------------------------------------------------------------------------

    def trace_to(self, tap):
        """Record there (trace/recorder.pyx Tap) what becomes of each chain; None: no more. From any thread."""
        tap_store(&self.tap, tap_of(tap), TAP_RELEASE)
        self.traced = tap
        if tap is not None:
            self._tap = tap

    def trace_kick(self):
        """It was rung, and is about to be served."""
        cdef trace_tap_t *tap = self.tap
        if tap != NULL:
            trace(tap, TRACE_KICK, 0, 0)

    def trace_begin(self, Chain chain not None):
        """What this thread asks of a drive from now on is for this chain."""
        cdef trace_tap_t *tap = self.tap
        if tap != NULL:
            trace(tap, TRACE_BEGIN, chain.c.sequence, 0)

    # -- set-up ------------------------------------------------------------------------------------------------------

    cdef _map_ram(self):
        """What of guest memory there is. It does not change while a machine lives; the regions are kept."""
        cdef RamRegion region
        cdef int n
        regions = list(self._memory.ram)
        free(self._ram)
        self._ram = NULL
        self._ram_count = 0
        self._regions = regions
        self._ram = <vq_ram *>calloc(max(1, len(regions)), sizeof(vq_ram))
        if self._ram == NULL:
            raise MemoryError
        for n, region in enumerate(regions):
            self._ram[n].gpa = region.gpa
            self._ram[n].size = region.length
            self._ram[n].hva = region.hva
            self._ram[n].readonly = region.readonly
        self._ram_count = len(regions)

    cdef uint8_t *_host(self, uint64_t gpa, uint64_t size, bint write) noexcept nogil:
        """Where a range of guest memory stands, wholly inside one region; NULL. Written so that no sum can wrap."""
        cdef vq_ram *ram
        cdef int n
        for n in range(self._ram_count):
            ram = &self._ram[n]
            if gpa >= ram.gpa and gpa - ram.gpa < ram.size:
                if size > ram.size - (gpa - ram.gpa) or write and ram.readonly:
                    return NULL
                return ram.hva + (gpa - ram.gpa)
        return NULL

    def enable(self, uint64_t features):
        """The driver has said that the queue is set up. RingError where it can't be as it says."""
        self._bind(features)
        self._start_again()
        if self._packed:
            self._want_kicks(True)
        self.ready = True

    def _bind(self, uint64_t features):
        """Find the rings. ``features`` are the ones that were negotiated."""
        cdef bint packed = (features & F_RING_PACKED) != 0
        cdef uint64_t size = self.size
        if not 0 < size <= self.max_size or not packed and size & (size - 1):
            raise RingError(f"queue {self.index} has the size {size} (2.7: a power of two, at most {self.max_size})")
        # 2.7: alignment of the split ring's parts; 2.8: of the packed one's.
        parts = ((self.desc_gpa, 16, DESC_BYTES * size, packed),
                 (self.driver_gpa, 4 if packed else 2, 4 if packed else 6 + 2 * size, False),
                 (self.device_gpa, 4, 4 if packed else 6 + 8 * size, True))
        self._map_ram()
        cdef uint8_t *found[3]
        cdef int n
        for n, (gpa, alignment, length, written) in enumerate(parts):
            found[n] = self._host(gpa, length, written)
            if gpa % alignment or found[n] == NULL:
                raise RingError(f"queue {self.index}: {length} bytes of its ring at {gpa:#x} can't be there (2.7, 2.8)")
        self._desc, self._driver, self._device = found[0], found[1], found[2]
        self._packed = packed
        self._event_idx = (features & F_EVENT_IDX) != 0
        self._indirect = (features & F_INDIRECT_DESC) != 0
        self._in_order = (features & F_IN_ORDER) != 0

    def disable(self):
        """Nothing is taken any more, and chains that were taken before can't be pushed."""
        self.ready = self.owes_call = False
        self.generation += 1
        self._pending_count = 0

    # -- taking ------------------------------------------------------------------------------------------------------

    def take(self, int limit=64):
        """The chains that the driver has made available, ``limit`` of them at most. RingError where one can't be."""
        cdef Chain chain
        cdef int got
        cdef list chains = []
        while self.ready and len(chains) < limit:
            chain = Chain.__new__(Chain)
            got = self.vq_take(&chain.c)
            if got == VQ_NONE:
                break
            if got < 0:
                raise RingError(f"queue {self.index}: {_WHY[got]}")
            chain.queue = self
            chain.generation = self.generation
            chains.append(chain)
        return chains

    def pending(self):
        """Whether there is a chain to take."""
        return bool(self.ready and self.vq_pending())

    cdef bint vq_pending(self) noexcept nogil:
        cdef uint16_t flags
        if not self._packed:
            return load_u16(<uint16_t *>(self._driver + 2), ACQUIRE) != self._avail
        flags = load_u16(<uint16_t *>(self._desc + DESC_BYTES * self._avail + 14), ACQUIRE)
        # 2.8.1: available where the one bit is the ring's wrap counter and the other is not.
        return ((flags & AVAIL) != 0) == self._avail_wrap and ((flags & USED) != 0) != self._avail_wrap

    cdef int vq_take(self, vq_chain *chain) noexcept nogil:
        """One chain into ``chain``. VQ_TAKEN, VQ_NONE, or what the driver has done wrong."""
        cdef int rc
        cdef trace_tap_t *tap
        chain_empty(chain)
        rc = self._take_packed(chain) if self._packed else self._take_split(chain)
        if rc == VQ_TAKEN:
            chain.sequence = self._sequence
            self._sequence += 1
            self.taken += 1
            tap = self.tap
            if unlikely(tap != NULL):
                trace(tap, TRACE_TAKE, chain.sequence, pair(chain.readable_bytes, chain.writable_bytes))
        return rc

    cdef int _take_split(self, vq_chain *chain) noexcept nogil:
        cdef uint16_t index = load_u16(<uint16_t *>(self._driver + 2), ACQUIRE)
        cdef uint32_t mask = self.size - 1
        cdef uint32_t steps = 0
        cdef uint32_t at
        cdef desc_t desc
        cdef int rc
        if index == self._avail:
            return VQ_NONE
        # A buffer is the device's until it is in the used ring: so all that there can be are between the two.
        if <uint16_t>(index - self._avail) > self.size or <uint16_t>(index - self._used) > self.size:
            return BAD_AVAIL
        at = load_u16(<uint16_t *>(self._driver + 4 + 2 * (self._avail & mask)), RELAXED)
        if at >= self.size:
            return BAD_HEAD
        chain.id = at
        chain.slots = 1
        while True:
            desc = read_desc(self._desc + DESC_BYTES * at)
            rc = self._add_desc(chain, &desc, desc.third)
            if rc < 0:
                return rc
            steps += 1
            if not desc.third & NEXT:
                break
            if steps >= self.size:
                return BAD_LOOP
            at = desc.fourth
            if at >= self.size:
                return BAD_NEXT
        self._avail += 1
        return VQ_TAKEN

    cdef int _take_packed(self, vq_chain *chain) noexcept nogil:
        cdef uint32_t steps = 0
        cdef uint32_t at = self._avail
        cdef uint32_t out = self._avail - self._used    # slots of chains that were not given back yet
        cdef desc_t desc
        cdef int rc
        if not self.vq_pending():
            return VQ_NONE
        if self._avail_wrap != self._used_wrap:
            out += self.size
        while True:
            desc = read_desc(self._desc + DESC_BYTES * at)
            rc = self._add_desc(chain, &desc, desc.fourth)
            if rc < 0:
                return rc
            steps += 1
            at += 1
            if at == self.size:
                at = 0
            if not desc.fourth & NEXT:
                break
            if steps >= self.size:
                return BAD_LOOP
        if out > self.size or out + steps > self.size:
            return BAD_AVAIL
        chain.id = desc.third   # 2.8.6: the last one's
        chain.slots = <uint16_t>steps
        if self._avail + steps >= self.size:
            self._avail_wrap = not self._avail_wrap
        self._avail = <uint16_t>at
        return VQ_TAKEN

    cdef int _add_desc(self, vq_chain *chain, const desc_t *desc, uint16_t flags) noexcept nogil:
        """A descriptor of the ring itself: a buffer, or a table of them."""
        if not flags & INDIRECT:
            return self._add(chain, desc.addr, desc.len, (flags & WRITE) != 0)
        # 2.7.5.3.2: normal descriptors may come before one that is indirect, and none after it.
        if not self._indirect or flags & NEXT:
            return BAD_INDIRECT
        return self._add_table(chain, desc.addr, desc.len)

    cdef int _add_table(self, vq_chain *chain, uint64_t gpa, uint32_t size) noexcept nogil:
        """The descriptors of an indirect table: split, chained by ``next``; packed, one after the other (2.8.9)."""
        cdef uint32_t count = size // DESC_BYTES
        cdef uint32_t steps = 0
        cdef uint32_t at = 0
        cdef uint8_t *table
        cdef desc_t desc
        cdef uint16_t flags
        cdef int rc
        if size == 0 or size % DESC_BYTES:
            return BAD_TABLE
        if gpa % 8:
            return BAD_ADDRESS  # loads of a descriptor must not tear; drivers align to 16 (2.7.5.3.1)
        table = self._host(gpa, size, False)
        if table == NULL:
            return BAD_ADDRESS
        while True:
            desc = read_desc(table + DESC_BYTES * at)
            flags = desc.fourth if self._packed else desc.third
            if flags & INDIRECT:
                return BAD_INDIRECT
            rc = self._add(chain, desc.addr, desc.len, (flags & WRITE) != 0)
            if rc < 0:
                return rc
            steps += 1
            if self._packed:
                at += 1
                if at == count:
                    return VQ_TAKEN
            else:
                if not flags & NEXT:
                    return VQ_TAKEN
                at = desc.fourth
                if at >= count:
                    return BAD_NEXT
                if steps >= count:
                    return BAD_LOOP

    cdef int _add(self, vq_chain *chain, uint64_t gpa, uint32_t size, bint write) noexcept nogil:
        cdef uint8_t *hva
        if size == 0:
            return BAD_EMPTY
        if chain.n_total == LONGEST_CHAIN:
            return BAD_LOOP
        if not write and chain.n_total != chain.n_readable:
            return BAD_ORDER
        hva = self._host(gpa, size, write)
        if hva == NULL:
            return BAD_ADDRESS
        if chain.readable_bytes + chain.writable_bytes + size >= <uint64_t>1 << 32:
            return BAD_TOTAL
        if chain_add(chain, hva, gpa, size, write) < 0:
            return NO_MEMORY
        return VQ_TAKEN

    # -- giving back -------------------------------------------------------------------------------------------------

    def push(self, Chain chain not None, uint64_t written):
        """The device is done with ``chain``, and has written ``written`` bytes. The driver sees it at the next ``flush``.

        One that was taken before the queue was last disabled is no longer the driver's: nothing happens.
        """
        if chain.queue is not self or chain.generation != self.generation or not self.ready:
            return
        chain.generation = 0    # once only
        if self.vq_push(&chain.c, written) < 0:
            raise MemoryError

    cdef int vq_push(self, vq_chain *chain, uint64_t written) noexcept nogil:
        cdef vq_used *more
        cdef uint32_t room
        cdef trace_tap_t *tap = self.tap
        if self._pending_count == self._pending_room:
            room = max(16, 2 * self._pending_room)
            more = <vq_used *>realloc(self._pending, room * sizeof(vq_used))
            if more == NULL:
                return -1
            self._pending = more
            self._pending_room = room
        cdef vq_used *used = &self._pending[self._pending_count]
        used.sequence = chain.sequence
        used.id = chain.id
        used.slots = chain.slots
        used.written = <uint32_t>min(written, chain.writable_bytes)
        self._pending_count += 1
        if unlikely(tap != NULL):
            trace(tap, TRACE_PUSH, chain.sequence, used.written)
        return 0

    def flush(self):
        """Show the driver what was pushed, and interrupt it where it wants that: True."""
        if not self.ready or not self.vq_flush():
            return False
        self.call()
        return True

    def call(self):
        """Interrupt the driver, by ``call_fd`` or ``on_call``."""
        if self.call_fd >= 0:
            self.vq_call()
            return
        self.notified += 1
        if self.on_call is not None:
            self.on_call()

    def call_again(self):
        """What was shown before a state was saved may have been told by an irqfd that had not interrupted yet, and no
        saved controller knows of it then. So once more, where the driver wanted to hear of what it has not seen.
        """
        self.owes_call = False
        if self.ready and self._wants_call(self.size):
            self.call()

    cdef void vq_call(self) noexcept nogil:
        """Interrupt the driver by ``call_fd``."""
        cdef uint64_t one = 1
        self.notified += 1
        # A full counter means that an interrupt is on its way anyway.
        write(self.call_fd, &one, 8)

    cdef bint vq_flush(self) noexcept nogil:
        """The same without the interrupt: whether there is to be one."""
        cdef uint32_t count = self._in_order_count() if self._in_order else self._pending_count
        cdef uint32_t passed
        cdef bint wanted
        cdef trace_tap_t *tap
        if count == 0:
            return False
        passed = self._show_packed(count) if self._packed else self._show_split(count)
        self._pending_count -= count
        if self._pending_count:
            memmove(self._pending, self._pending + count, self._pending_count * sizeof(vq_used))
        wanted = self._wants_call(passed)
        tap = self.tap
        if unlikely(tap != NULL):
            trace(tap, TRACE_SHOW, count, wanted)
        return wanted

    cdef uint32_t _in_order_count(self) noexcept nogil:
        """VIRTIO_F_IN_ORDER (2.7.9, 2.8.11): sort what is pushed; how many of it may be shown by now."""
        cdef uint32_t n, at
        cdef vq_used one
        cdef uint32_t count = 0
        for n in range(1, self._pending_count):
            one = self._pending[n]
            at = n
            while at > 0 and self._pending[at - 1].sequence > one.sequence:
                self._pending[at] = self._pending[at - 1]
                at -= 1
            self._pending[at] = one
        while count < self._pending_count and self._pending[count].sequence == self._next_pushed:
            count += 1
            self._next_pushed += 1
        return count

    cdef uint32_t _show_split(self, uint32_t count) noexcept nogil:
        """Into the used ring (2.7.8); how far the index went."""
        cdef uint32_t n, at
        cdef uint32_t *entry
        for n in range(count):
            at = <uint16_t>(self._used + n) & (self.size - 1)
            entry = <uint32_t *>(self._device + 4 + 8 * at)
            entry[0] = self._pending[n].id
            entry[1] = self._pending[n].written
        self._used += <uint16_t>count
        store_u16(<uint16_t *>(self._device + 2), self._used, RELEASE)
        return count

    cdef uint32_t _show_packed(self, uint32_t count) noexcept nogil:
        """Into the descriptor ring (2.8.6): the first one's flags last, so that the driver sees all of them or none."""
        cdef uint32_t n
        cdef uint32_t passed = 0
        cdef uint16_t flags, first_flags = 0
        cdef uint8_t *at
        cdef uint8_t *first = NULL
        for n in range(count):
            at = self._desc + DESC_BYTES * self._used
            (<uint32_t *>(at + 8))[0] = self._pending[n].written
            (<uint16_t *>(at + 12))[0] = self._pending[n].id
            flags = (AVAIL | USED) if self._used_wrap else 0
            if self._pending[n].written:
                flags |= WRITE
            if first == NULL:
                first, first_flags = at, flags
            else:
                store_u16(<uint16_t *>(at + 14), flags, RELEASE)
            passed += self._pending[n].slots
            if self._used + <uint32_t>self._pending[n].slots >= self.size:
                self._used = <uint16_t>(self._used + self._pending[n].slots - self.size)
                self._used_wrap = not self._used_wrap
            else:
                self._used += self._pending[n].slots
        store_u16(<uint16_t *>(first + 14), first_flags, RELEASE)
        return passed

    cdef bint _wants_call(self, uint32_t passed) noexcept nogil:
        """Whether the driver wants to hear of it: ``passed`` entries were shown."""
        cdef uint16_t flags, place
        cdef int event
        # What was shown must be seen by whoever asks for no interrupt now and looks once more (2.7.7.2).
        fence(SEQ_CST)
        if not self._packed:
            if self._event_idx:
                place = load_u16(<uint16_t *>(self._driver + 4 + 2 * self.size), RELAXED)
                return need_event(place, self._used, <uint16_t>(self._used - passed))
            return not load_u16(<uint16_t *>self._driver, RELAXED) & NO_INTERRUPT
        flags = load_u16(<uint16_t *>(self._driver + 2), ACQUIRE)
        if flags == EVENTS_DISABLE:
            return False
        if flags != EVENTS_DESC or not self._event_idx:
            return True
        # 2.8.14: a place in the ring, and in its highest bit the wrap counter it goes with.
        place = load_u16(<uint16_t *>self._driver, RELAXED)
        event = place & 0x7fff
        if (place >> 15) != self._used_wrap:
            event -= self.size
        return need_event(<uint16_t>event, self._used, <uint16_t>(self._used - passed))

    def complete(self, Chain chain not None, uint64_t written):
        """``push`` and ``flush``, from any thread."""
        with self.lock:
            self.push(chain, written)
            self.flush()

    # -- being rung --------------------------------------------------------------------------------------------------

    def disable_kicks(self):
        """The driver need not ring: whoever serves the queue looks by itself. A hint, it may ring all the same."""
        if self.ready:
            self._want_kicks(False)

    def enable_kicks(self):
        """The driver is to ring again. True where it has made something available meanwhile: take it."""
        if not self.ready:
            return False
        self._want_kicks(True)
        fence(SEQ_CST)
        return self.vq_pending()

    cdef void _want_kicks(self, bint wanted) noexcept nogil:
        self._kicks = wanted
        if self._packed:
            if wanted and self._event_idx:
                store_u16(<uint16_t *>self._device, <uint16_t>(self._avail | self._avail_wrap << 15), RELEASE)
                store_u16(<uint16_t *>(self._device + 2), EVENTS_DESC, RELEASE)
            else:
                store_u16(<uint16_t *>(self._device + 2), EVENTS_ENABLE if wanted else EVENTS_DISABLE, RELEASE)
        elif self._event_idx:
            # Not wanted: the index that it rings at stays behind.
            if wanted:
                store_u16(<uint16_t *>(self._device + 4 + 8 * self.size), self._avail, RELEASE)
        else:
            store_u16(<uint16_t *>self._device, 0 if wanted else NO_NOTIFY, RELEASE)

    # -- state (state.pyx has the contract) ---------------------------------------------------------------------------

    STATE_VERSION = 1

    def save(self):
        """Chains that were taken and not pushed are their device's to save (Chain.token)."""
        return {
            "size": self.size, "desc": self.desc_gpa, "driver": self.driver_gpa, "device": self.device_gpa,
            "ready": bool(self.ready), "avail": self._avail, "used": self._used,
            "avail_wrap": bool(self._avail_wrap), "used_wrap": bool(self._used_wrap), "kicks": bool(self._kicks),
            "sequence": self._sequence, "next_pushed": self._next_pushed,
            "pushed": [[self._pending[n].sequence, self._pending[n].written, self._pending[n].id, self._pending[n].slots]
                       for n in range(self._pending_count)],
        }

    def load(self, state):
        """Numbers only; ``after_load`` finds the rings."""
        from pyvmm.state import check_names, value_of

        kinds = {"size": 16, "desc": 64, "driver": 64, "device": 64, "ready": "flag", "avail": 16, "used": 16,
                 "avail_wrap": "flag", "used_wrap": "flag", "kicks": "flag", "sequence": 63, "next_pushed": 63,
                 "pushed": ("list", ("list", 63, 4), 0, LARGEST_QUEUE)}
        check_names(state, list(kinds))
        values = {name: value_of(kind, state[name], name) for name, kind in kinds.items()}
        if len(values["pushed"]) > values["size"]:
            raise StateError(f"pushed has {len(values['pushed'])} entries, of a queue of {values['size']}")
        for number in values["pushed"]:
            if number[1] >> 32 or number[2] >> 16 or not 0 < number[3] <= values["size"]:
                raise StateError(f"pushed is {number}, which no driver was given")
        self.disable()
        self._start_again()
        self.size = values["size"]
        self.desc_gpa, self.driver_gpa, self.device_gpa = values["desc"], values["driver"], values["device"]
        self._avail, self._used = values["avail"], values["used"]
        self._avail_wrap, self._used_wrap = values["avail_wrap"], values["used_wrap"]
        self._kicks = values["kicks"]
        self._sequence, self._next_pushed = values["sequence"], values["next_pushed"]
        cdef vq_chain chain
        chain_init(&chain)
        chain.writable_bytes = 1 << 32
        for sequence, written, chain.id, chain.slots in values["pushed"]:
            chain.sequence = sequence
            if self.vq_push(&chain, written) < 0:
                raise MemoryError
        self.ready = values["ready"]

    def after_load(self, uint64_t features):
        """Go on with the rings where they are. RingError where they can't be there; the queue is not ready then."""
        if not self.ready:
            return
        try:
            self._bind(features)
            if self._packed and (self._avail >= self.size or self._used >= self.size):
                raise RingError(f"queue {self.index}: a place in it is past its end (2.8)")
        except RingError:
            self.ready = False
            raise
        self.owes_call = True

    def retake(self, token):
        """The chain whose ``token`` was saved with this queue's state. RingError where its buffers are not in memory."""
        from pyvmm.state import value_of

        identity, readable, writable = value_of(("list", ("list", 64, 0, 2 * LONGEST_CHAIN), 3), token, "token")
        if len(identity) != 3 or len(readable) % 2 or len(writable) % 2:
            raise StateError("token is that of no chain")
        cdef Chain chain = Chain.__new__(Chain)
        chain.c.id, chain.c.slots = identity[0] & 0xffff, identity[1] & 0xffff
        chain.c.sequence = identity[2]
        if not 0 < chain.c.slots <= self.size or not self._packed and chain.c.id >= self.size:
            raise StateError("token is that of no chain of this queue")
        cdef int rc
        for pairs, write in ((readable, False), (writable, True)):
            for n in range(0, len(pairs), 2):
                rc = BAD_TOTAL if pairs[n + 1] >> 32 else self._add(&chain.c, pairs[n], pairs[n + 1], write)
                if rc < 0:
                    raise RingError(f"queue {self.index}: {_WHY[rc]}")
        chain.queue = self
        chain.generation = self.generation
        return chain
