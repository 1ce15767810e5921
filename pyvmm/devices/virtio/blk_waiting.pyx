"""WaitingBlk: as FastBlk, for a drive whose lane does nothing at once: that of an NBD server (block/protocols/nbd_line.pyx).

What is adjacent is still asked for as one. Each of these has its chains in memory of its own until it is done: then
statuses are written and chains pushed on the thread that brings the end, without the GIL and with the queue's lock, and
the driver is shown all that came together at once. What comes after the queue was reset is dropped. What could not be
done so is asked of the backend, by blk.py, which is called for that with the queue's lock held.

While the lane has something of its chains it keeps itself, and so the memory that they are in.
"""

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove

from pyvmm.block.lane cimport Lane, iovec, lane_ask, lane_user
from pyvmm.device cimport DeviceLock, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from pyvmm.devices.virtio.blk_fast cimport FastBlk, asked_t, now_ns
from pyvmm.devices.virtio.chain cimport Chain, chain_free, chain_move, vq_chain
from pyvmm.devices.virtio.ring cimport Virtqueue
from pyvmm.trace.tap cimport TRACE_MOVE, pair, trace_now, trace_tap_t

cdef enum:
    BLK_OK = 0
    SECTOR_SHIFT = 9


cdef struct waiting_chain:
    vq_chain chain
    uint8_t *status
    uint64_t at
    uint64_t length


cdef struct waiting_t:
    # One transfer, of chains that are adjacent. ``ask`` is first: the lane gives that back.
    lane_ask ask
    waiting_chain *chains
    int count, room, pieces_room
    uint64_t generation         # the queue's, then
    int64_t since
    uint64_t began              # by the TSC, where somebody traces
    waiting_t *next             # free


cdef class WaitingBlk(FastBlk):
    """``back(queue, chains)`` is called for those that the lane has given back."""

    cdef lane_user user
    cdef pthread_mutex_t *mutex     # of the queue's lock
    cdef public object back
    cdef waiting_t *spare
    cdef int in_flight
    cdef uint64_t submitted
    cdef bint held                  # it keeps itself

    def __cinit__(self, Virtqueue queue not None, Lane lane not None, uint64_t size_bytes, uint64_t block_bytes):
        self.mutex = &(<DeviceLock?>queue.lock).mutex
        self.user.who = <void *>self
        self.user.ended = ended
        self.user.told = told
        self.user.given_back = given_back
        self.user.rested = rested

    def __dealloc__(self):
        cdef waiting_t *waiting
        while self.spare != NULL:
            waiting = self.spare
            self.spare = waiting.next
            free(waiting.chains)
            free(waiting.ask.iov)
            free(waiting)

    def serve(self, int64_t poll_ns):
        cdef bint fresh = not self.held
        cdef uint64_t submitted = self.submitted
        if fresh:
            Py_INCREF(self)
            self.held = True
        try:
            return FastBlk.serve(self, poll_ns)
        finally:
            if fresh and self.submitted == submitted:
                self.held = False
                Py_DECREF(self)

    # -- to the lane: the queue's lock is held -------------------------------------------------------------------

    cdef void move(self, int first, int end, int64_t since) noexcept nogil:
        """What has been gathered of the requests from ``first`` to ``end`` is the lane's now, and done for ``run``."""
        cdef waiting_t *waiting = self.make(end - first, self.pieces)
        cdef lane_ask *ask
        cdef asked_t *one
        cdef int n
        if waiting != NULL:
            ask = &waiting.ask
            ask.kind = self.kind
            ask.at = self.at
            ask.length = self.length
            ask.pieces = self.pieces
            memcpy(ask.iov, self.iov, self.pieces * sizeof(iovec))
            waiting.generation = self.queue.generation
            waiting.since = since
            waiting.began = trace_now() if self.queue.tap != NULL else 0
            if self.lane.submit(ask) == 0:
                self.submitted += 1
                self.in_flight += 1
                for n in range(first, end):
                    one = &self.asked[n]
                    if one.pieces >= 0:
                        keep(waiting, one)
            else:
                self.put_away(waiting)
        self.pieces = 0
        self.length = 0

    cdef void show(self) noexcept nogil:
        self.lane.send()

    cdef waiting_t *make(self, int chains, int pieces) noexcept nogil:
        """With room for so many, and nothing in it; NULL without memory."""
        cdef waiting_t *waiting = self.spare
        cdef void *more
        if waiting != NULL:
            self.spare = waiting.next
        else:
            waiting = <waiting_t *>calloc(1, sizeof(waiting_t))
            if waiting == NULL:
                return NULL
            waiting.ask.user = &self.user
        waiting.count = 0
        if waiting.room < chains:
            more = realloc(waiting.chains, chains * sizeof(waiting_chain))
            if more == NULL:
                self.put_away(waiting)
                return NULL
            waiting.chains = <waiting_chain *>more
            waiting.room = chains
        if waiting.pieces_room < pieces:
            more = realloc(waiting.ask.iov, pieces * sizeof(iovec))
            if more == NULL:
                self.put_away(waiting)
                return NULL
            waiting.ask.iov = <iovec *>more
            waiting.pieces_room = pieces
        return waiting

    cdef void put_away(self, waiting_t *waiting) noexcept nogil:
        waiting.next = self.spare
        self.spare = waiting

    # -- from the lane, on its thread --------------------------------------------------------------------------

    cdef bint owned(self, waiting_t *waiting) noexcept nogil:
        """Whether its chains are still the device's; the queue's lock is held."""
        return self.queue.ready and self.queue.generation == waiting.generation

    cdef bint answer(self, waiting_t *waiting) noexcept nogil:
        """Its chains are done, and given back to the driver. False without memory for that: those that are left are not.
        """
        cdef trace_tap_t *tap = self.queue.tap
        cdef waiting_chain *one
        cdef int n
        for n in range(waiting.count):
            one = &waiting.chains[n]
            if self.queue.vq_push(&one.chain, one.chain.writable_bytes) < 0:
                waiting.count -= n
                memmove(waiting.chains, one, waiting.count * sizeof(waiting_chain))
                return False
            one.status[0] = BLK_OK
            if waiting.began and tap != NULL:
                tap.record(tap, TRACE_MOVE, waiting.began, trace_now() - waiting.began,
                           one.at >> SECTOR_SHIFT | <uint64_t>waiting.ask.kind << 48,
                           pair(<uint32_t>one.chain.sequence, one.length))
        self.lane.count(waiting.ask.kind, waiting.count, 1, waiting.ask.length,
                        waiting.count * (now_ns() - waiting.since))
        return True

    cdef void end(self, waiting_t *waiting) noexcept nogil:
        """The lane has done it."""
        pthread_mutex_lock(self.mutex)
        if not self.owned(waiting) or self.answer(waiting):
            self.finish(waiting)
            waiting = NULL
        pthread_mutex_unlock(self.mutex)
        if waiting != NULL:
            again(self, waiting)

    cdef void tell(self) noexcept nogil:
        """So is what it has said so before: the driver sees it."""
        pthread_mutex_lock(self.mutex)
        if self.queue.ready and self.queue.vq_flush():
            if self.queue.call_fd >= 0:
                self.queue.vq_call()
            else:
                call(self.queue)
        pthread_mutex_unlock(self.mutex)

    cdef void finish(self, waiting_t *waiting) noexcept nogil:
        cdef int n
        for n in range(waiting.count):
            chain_free(&waiting.chains[n].chain)
        self.in_flight -= 1
        self.put_away(waiting)

    cdef take_back(self, waiting_t *waiting):
        cdef list chains = []
        cdef Chain chain
        cdef int n
        with self.queue.lock:
            if self.owned(waiting):
                for n in range(waiting.count):
                    chain = Chain.__new__(Chain)
                    chain_move(&chain.c, &waiting.chains[n].chain)
                    chain.queue = self.queue
                    chain.generation = waiting.generation
                    chains.append(chain)
            self.finish(waiting)
            if chains:
                self.back(self.queue, chains)

    cdef rest(self):
        """Nothing has to be kept any more, where nothing is under way."""
        cdef bint over
        with self.queue.lock:
            over = self.held and not self.in_flight
            if over:
                self.held = False
        if over:
            Py_DECREF(self)


cdef void keep(waiting_t *waiting, asked_t *one) noexcept nogil:
    """One more chain of it; it is no longer in ``asked``."""
    cdef waiting_chain *kept = &waiting.chains[waiting.count]
    kept.status = one.status
    kept.at = one.at
    kept.length = one.length
    chain_move(&kept.chain, &one.chain)
    waiting.count += 1
    one.done = True


cdef void ended(lane_ask *ask) noexcept nogil:
    (<WaitingBlk>ask.user.who).end(<waiting_t *>ask)


cdef void told(lane_user *user) noexcept nogil:
    (<WaitingBlk>user.who).tell()


cdef void again(WaitingBlk blk, waiting_t *waiting) noexcept with gil:
    blk.take_back(waiting)


cdef void call(Virtqueue queue) noexcept with gil:
    queue.call()


cdef int given_back(lane_ask *ask) except -1:
    (<WaitingBlk>ask.user.who).take_back(<waiting_t *>ask)
    return 0


cdef int rested(lane_user *user) except -1:
    (<WaitingBlk>user.who).rest()
    return 0
