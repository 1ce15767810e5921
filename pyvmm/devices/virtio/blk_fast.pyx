"""FastBlk: the reads and writes of one queue of a disk on virtio, as far as the drive's lane does them (virtio 1.2, 5.2.6).

From the available ring to the used one nothing here needs Python, and none of it the GIL: headers are read once, into a
copy, and looked at; what is adjacent, and asked for one after the other, is one system call from or to guest memory;
statuses are written, chains pushed, the guest interrupted where it wants that. Whatever is not plainly a read or a write
inside the disk, or was not done whole, is given back for blk.py to answer: it knows all other requests, and every error.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pyvmm.block.lane cimport LANE_READ, LANE_WRITE, Lane, iovec
from pyvmm.devices.virtio.chain cimport Chain, chain_free, chain_init, chain_move, vq_chain, vq_seg
from pyvmm.devices.virtio.ring cimport VQ_NONE, Virtqueue
from pyvmm.trace.tap cimport TRACE_MOVE, pair, trace_now, trace_tap_t, unlikely

cdef extern from * nogil:
    void pause "__builtin_ia32_pause" ()

cdef enum:
    MOST_JOINED_BYTES = 1 << 18 # in one call, unless one request alone is more
    SHOWN_BYTES = 1 << 17       # after so many bytes what is done is shown, while more is moved
    ROUNDS = 64                 # of taking what is there, before other queues of the thread have their turn
    PAUSES = 32                 # between two looks at the clock
    HEADER_BYTES = 16
    SECTOR_SHIFT = 9
    BLK_IN = 0                  # types of requests
    BLK_OUT = 1
    BLK_OK = 0

# What ``work`` came to.
cdef enum:
    EMPTY                       # nothing is there any more
    LEFT                        # there are chains for Python
    WRONG                       # the driver has done something wrong: taking a chain says what
    CALL                        # the guest is to be interrupted by Python
    MORE                        # it is others' turn


cdef struct header_t:
    uint32_t kind
    uint32_t reserved
    uint64_t sector


cdef class FastBlk:
    """Of ``queue``, through ``lane``. ``size_bytes``: of the disk as the guest knows it; requests are multiples of
    ``block_bytes``. All calls are made with the queue's lock held.
    """

    def __cinit__(self, Virtqueue queue not None, Lane lane not None, uint64_t size_bytes, uint64_t block_bytes):
        cdef int n
        self.queue = queue
        self.lane = lane
        self.size = size_bytes
        self.block_mask = block_bytes - 1
        for n in range(MOST_ASKED):
            chain_init(&self.asked[n].chain)

    def __dealloc__(self):
        cdef int n
        for n in range(MOST_ASKED):
            chain_free(&self.asked[n].chain)

    def resize(self, uint64_t size_bytes):
        """The disk has so many bytes now."""
        self.size = size_bytes

    def serve(self, int64_t poll_ns):
        """Answer what is there as far as that goes at once. ``poll_ns``: look for more for so long after the last.

        (The chains that are left, in their order; whether there may be more of them.) RingError as Virtqueue.take.
        """
        cdef int n, came
        if not self.queue.ready:
            return [], False
        with nogil:
            came = self.work(poll_ns)
        if self.call:
            self.call = False
            self.queue.call()
        if came == LEFT:
            return [self.chain_of(n) for n in range(self.count) if not self.asked[n].done], True
        if came == WRONG:
            return self.queue.take(1), True
        return [], came != EMPTY

    cdef Chain chain_of(self, int n):
        """What ``vq_take`` has made, as an object."""
        cdef Chain chain = Chain.__new__(Chain)
        chain_move(&chain.c, &self.asked[n].chain)
        chain.queue = self.queue
        chain.generation = self.queue.generation
        return chain

    cdef int work(self, int64_t poll_ns) noexcept nogil:
        cdef int rounds, n, rc
        for rounds in range(ROUNDS):
            self.count = 0
            rc = VQ_NONE
            while self.count < MOST_ASKED:
                rc = self.queue.vq_take(&self.asked[self.count].chain)
                if rc <= VQ_NONE:
                    break
                self.count += 1
            if self.count:
                self.run()
                self.show()
            for n in range(self.count):
                if not self.asked[n].done:
                    return LEFT
            if rc < 0:
                return WRONG
            if self.call:
                return CALL
            if not self.count and not self.wait(poll_ns):
                return EMPTY
        return MORE

    cdef bint wait(self, int64_t poll_ns) noexcept nogil:
        """Whether something comes within that time."""
        cdef int n
        cdef int64_t end
        if self.queue.vq_pending():
            return True
        if poll_ns <= 0:
            return False
        end = now_ns() + poll_ns
        while now_ns() < end:
            for n in range(PAUSES):
                pause()
                if self.queue.vq_pending():
                    return True
        return False

    cdef void run(self) noexcept nogil:
        """All that is in ``asked``: its ``done`` says what became of each."""
        cdef int64_t since = now_ns()
        cdef int n, first = 0
        cdef asked_t *one
        self.pieces = 0
        self.length = 0
        for n in range(self.count):
            one = &self.asked[n]
            one.done = False
            if not self.read_header(one):
                one.pieces = -1
                continue
            if self.pieces and (one.kind != self.kind or one.at != self.at + self.length
                                or self.pieces + one.pieces > MOST_PIECES
                                or self.length + one.length > MOST_JOINED_BYTES):
                self.move(first, n, since)
            if not self.pieces:
                first = n
                self.kind = one.kind
                self.at = one.at
            self.gather(one)
        if self.pieces:
            self.move(first, self.count, since)

    cdef bint read_header(self, asked_t *one) noexcept nogil:
        """Whether it is a read or a write of whole blocks inside the disk, with a status byte, in no more pieces than one
        call takes; ``one`` says where and how much then.
        """
        cdef header_t header
        cdef vq_chain *chain = &one.chain
        cdef uint32_t n, part, used = 0
        cdef vq_seg *seg
        if chain.readable_bytes < HEADER_BYTES or not chain.writable_bytes or chain.n_total > MOST_PIECES:
            return False
        for n in range(chain.n_readable):
            seg = &chain.segs[n]
            part = min(seg.len, HEADER_BYTES - used)
            memcpy(<uint8_t *>&header + used, seg.hva, part)
            used += part
            if used == HEADER_BYTES:
                break
        if header.kind == BLK_IN:
            one.kind = LANE_READ
            one.length = chain.writable_bytes - 1
        elif header.kind == BLK_OUT:
            one.kind = LANE_WRITE
            one.length = chain.readable_bytes - HEADER_BYTES
        else:
            return False
        if header.sector > self.size >> SECTOR_SHIFT:
            return False
        seg = &chain.segs[chain.n_total - 1]
        one.status = seg.hva + seg.len - 1
        one.at = header.sector << SECTOR_SHIFT
        one.pieces = chain.n_total
        return one.length != 0 and not (one.at | one.length) & self.block_mask and one.length <= self.size - one.at

    cdef void gather(self, asked_t *one) noexcept nogil:
        """Its data behind that of the requests which are to be moved with it."""
        cdef vq_chain *chain = &one.chain
        cdef bint read = one.kind == LANE_READ
        cdef uint32_t n
        cdef uint64_t length, left = one.length
        cdef uint64_t skip = 0 if read else HEADER_BYTES
        cdef vq_seg *seg
        for n in range(chain.n_readable if read else 0, chain.n_total if read else chain.n_readable):
            seg = &chain.segs[n]
            if skip >= seg.len:
                skip -= seg.len
                continue
            length = min(seg.len - skip, left)
            if length:          # behind the data of a read is its status
                self.iov[self.pieces].iov_base = seg.hva + skip
                self.iov[self.pieces].iov_len = length
                self.pieces += 1
                left -= length
            skip = 0
        self.length += one.length

    cdef void move(self, int first, int end, int64_t since) noexcept nogil:
        """One call for what has been gathered of the requests from ``first`` to ``end``. Those that it did whole are done:
        the driver finds them at the next ``show``.
        """
        cdef trace_tap_t *tap = self.queue.tap
        cdef uint64_t began = trace_now() if unlikely(tap != NULL) else 0
        cdef ssize_t moved = self.lane.transfer(self.kind, self.at, self.iov, self.pieces, self.length)
        cdef uint64_t ticks = trace_now() - began if began else 0
        cdef int n
        cdef int64_t count = 0, size = 0
        cdef asked_t *one
        self.pieces = 0
        self.length = 0
        for n in range(first, end):
            one = &self.asked[n]
            if one.pieces < 0:
                continue                # of another kind, and in between
            if moved < <ssize_t>one.length:
                break
            moved -= one.length
            if began:
                tap.record(tap, TRACE_MOVE, began, ticks, one.at >> SECTOR_SHIFT | <uint64_t>one.kind << 48,
                           pair(<uint32_t>one.chain.sequence, one.length))
            one.status[0] = BLK_OK
            if self.queue.vq_push(&one.chain, one.chain.writable_bytes) < 0:
                break                   # no memory: it is done once more, by Python
            one.done = True
            count += 1
            size += one.length
        if count:
            self.lane.count(self.kind, count, 1, size, count * (now_ns() - since))
            self.unshown += size
            if self.unshown >= SHOWN_BYTES:
                self.show()

    cdef void show(self) noexcept nogil:
        self.unshown = 0
        if self.queue.vq_flush():
            if self.queue.call_fd >= 0:
                self.queue.vq_call()
            else:
                self.call = True
