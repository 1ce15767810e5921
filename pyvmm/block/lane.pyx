"""Lane: leave to move a drive's bytes at once, from compiled code, without a coroutine and without the GIL.

A backend gives it for a disk whose bytes are a file's as they are (formats/raw.py over protocols/file_posix.py, no
O_DIRECT, no throttle), and takes it back, all of it or for writes, whenever a request has to come by ``aio_readv`` and
``aio_writev`` instead: while an error policy keeps some aside or a state is loaded, where each write must be on stable
storage, where zeros are looked for, at the end (``BlockBackend.lane``). Whoever has a lane asks for each transfer
anew. What it does not do, or not whole, is asked of the backend, all of it: there it waits where it has to, and there
an error has its policy. A transfer done twice does no harm.

A lane that ``waits`` (protocols/nbd_line.pyx) is one of another kind: ``submit`` begins a transfer, and who asked for it
is told on the thread that brings its end.

It makes the call only where that waits for no device: RWF_NOWAIT (preadv2(2)), or a file system that lives in memory.
It keeps no order: among requests in flight that overlap, its users may not need any (a virtio driver may not,
virtio 1.2, 2.7.13).

``granted`` and ``busy`` are the two flags of Dekker's algorithm: who enters counts itself in and then looks whether it
may, who takes leave back stores that and then waits until nobody is inside. So after ``settle`` nothing moves any
more. It is the same with ``size``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EIO, EOPNOTSUPP, errno

from pyvmm.atomic cimport ATOMIC_RELAXED, ATOMIC_SEQ_CST, atomic_load, atomic_store

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int, const iovec *, int, long, int)
    ssize_t pwritev2(int, const iovec *, int, long, int)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef extern from * nogil:
    int atomic_add "__atomic_add_fetch" (int *, int, int)
    int atomic_and "__atomic_and_fetch" (int *, int, int)
    int64_t atomic_add_64 "__atomic_add_fetch" (int64_t *, int64_t, int)
    uint64_t atomic_load_size "__atomic_load_n" (uint64_t *, int)
    int64_t atomic_load_64 "__atomic_load_n" (int64_t *, int)
    void atomic_store_64 "__atomic_store_n" (uint64_t *, uint64_t, int)
    int64_t atomic_exchange_64 "__atomic_exchange_n" (int64_t *, int64_t, int)

READS = 1 << LANE_READ
WRITES = 1 << LANE_WRITE

cdef enum:
    SETTLE_US = 20          # at first between two looks
    MOST_SETTLE_US = 2000
    MOST_PIECES = 1024      # IOV_MAX


cdef class Lane:
    """``size`` bytes of the file ``fd`` from ``offset`` on, with ``flags`` of preadv2. Nothing is granted at first."""

    def __cinit__(self, int fd, int flags, uint64_t offset, uint64_t size):
        self.fd = fd
        self.flags = flags
        self.offset = offset
        self.size = size
        self.able = (1 << LANE_READ) | (1 << LANE_WRITE)

    def resize(self, uint64_t size):
        """The disk has so many bytes now. From any thread. Where they are fewer, nothing moves behind them any more when
        ``settle`` has returned.
        """
        atomic_store_64(&self.size, size, ATOMIC_SEQ_CST)

    def guard(self, uint64_t first):
        """Writes to what is before the disk's byte ``first`` are looked at, and so not for a lane."""
        self.guarded = first

    # -- for its users -----------------------------------------------------------------------------------------

    cdef ssize_t transfer(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil:
        """``length`` bytes, those of ``count`` pieces, from or to the disk's byte ``at``: how many were moved, or a
        negative errno; -EAGAIN where it may not, or would have to wait.
        """
        cdef ssize_t done = -EAGAIN
        if self.enter(kind, at, count, length):
            if kind == LANE_READ:
                done = preadv2(self.fd, iov, count, <long>(self.offset + at), self.flags)
            else:
                done = pwritev2(self.fd, iov, count, <long>(self.offset + at), self.flags)
            if done < 0:
                done = -errno if errno else -EIO
                if done == -EOPNOTSUPP:
                    atomic_and(&self.able, ~(1 << kind), ATOMIC_RELAXED)
            elif kind == LANE_WRITE:
                # Now, when the bytes are there and nobody knows of it: a flush that comes after sees that it has to be.
                atomic_add_64(&self._writes, 1, ATOMIC_SEQ_CST)
            self.leave()
        return done

    cdef bint enter(self, int kind, uint64_t at, int count, uint64_t length) noexcept nogil:
        """Whether it may be done. Then ``leave`` says when it is over."""
        cdef int busy = atomic_add(&self.busy, 1, ATOMIC_SEQ_CST)
        cdef uint64_t size = atomic_load_size(&self.size, ATOMIC_SEQ_CST)
        if (atomic_load(&self.granted, ATOMIC_SEQ_CST) & atomic_load(&self.able, ATOMIC_RELAXED)) >> kind & 1 \
                and at <= size and length <= size - at and count <= MOST_PIECES \
                and (at >= self.guarded or kind == LANE_READ):
            if busy > self.most_busy:
                self.most_busy = busy
            return True
        self.leave()
        return False

    cdef void leave(self) noexcept nogil:
        atomic_add(&self.busy, -1, ATOMIC_SEQ_CST)

    cdef int submit(self, lane_ask *ask) noexcept nogil:
        """0: it has been begun, of a lane that ``waits``, and comes back by its user's functions, on another thread.
        -EAGAIN where it may not, or can't be just now.
        """
        return -EAGAIN

    cdef void send(self) noexcept nogil:
        """What has been submitted is not to wait for more."""

    cdef void count(self, int kind, int64_t requests, int64_t calls, int64_t size, int64_t time_ns) noexcept nogil:
        """So many requests of ``size`` bytes in all are done, by so many calls; ``time_ns`` is the sum of their times."""
        cdef lane_counts *counts = &self.counts[kind]
        atomic_add_64(&counts.operations, requests, ATOMIC_RELAXED)
        atomic_add_64(&counts.bytes, size, ATOMIC_RELAXED)
        atomic_add_64(&counts.merged, requests - calls, ATOMIC_RELAXED)
        atomic_add_64(&counts.time_ns, time_ns, ATOMIC_RELAXED)

    def readv(self, at, iov):
        """``transfer`` of the views ``iov``, one request: bytes, or a negative errno."""
        return self._move(LANE_READ, at, iov)

    def writev(self, at, iov):
        """``transfer`` of the views ``iov``, one request: bytes, or a negative errno."""
        return self._move(LANE_WRITE, at, iov)

    cdef object _move(self, int kind, uint64_t at, iov):
        cdef Py_buffer[MOST_PIECES] buffers
        cdef iovec[MOST_PIECES] pieces
        cdef int held = 0
        cdef uint64_t length = 0
        cdef ssize_t done
        if len(iov) > MOST_PIECES:
            return -EAGAIN
        try:
            for view in iov:
                PyObject_GetBuffer(view, &buffers[held], PyBUF_WRITABLE if kind == LANE_READ else PyBUF_SIMPLE)
                pieces[held].iov_base = buffers[held].buf
                pieces[held].iov_len = buffers[held].len
                length += buffers[held].len
                held += 1
            with nogil:
                done = self.transfer(kind, at, pieces, held, length)
            if done == <ssize_t>length:
                self.count(kind, 1, 1, length, 0)
            return done
        finally:
            while held:
                held -= 1
                PyBuffer_Release(&buffers[held])

    # -- for the backend that gives it -------------------------------------------------------------------------

    def grant(self, int kinds):
        """What may be done from now on: READS, WRITES, both or nothing. It does not wait for what is under way."""
        atomic_store(&self.granted, kinds, ATOMIC_SEQ_CST)

    @property
    def kinds(self):
        """What may be done, and can be."""
        return atomic_load(&self.granted, ATOMIC_SEQ_CST) & atomic_load(&self.able, ATOMIC_SEQ_CST)

    @property
    def writes(self):
        """How many writes are done; it only grows."""
        return atomic_load_64(&self._writes, ATOMIC_SEQ_CST)

    def settle(self):
        """Return when nothing is under way. That is a matter of microseconds, for none of it waits for a device; but for
        a lane that ``waits``.
        """
        cdef int pause_us = SETTLE_US
        with nogil:
            while atomic_load(&self.busy, ATOMIC_SEQ_CST):
                usleep(pause_us)
                pause_us = min(2 * pause_us, MOST_SETTLE_US)

    def fold(self, stats):
        """Add to a drive's counters (stats.py) what was done since the last time. The caller holds their lock."""
        cdef int kind
        for kind, total in ((LANE_READ, stats.read), (LANE_WRITE, stats.write)):
            total.operations += atomic_exchange_64(&self.counts[kind].operations, 0, ATOMIC_RELAXED)
            total.bytes += atomic_exchange_64(&self.counts[kind].bytes, 0, ATOMIC_RELAXED)
            total.merged += atomic_exchange_64(&self.counts[kind].merged, 0, ATOMIC_RELAXED)
            total.time_ns += atomic_exchange_64(&self.counts[kind].time_ns, 0, ATOMIC_RELAXED)
        stats.max_in_flight = max(stats.max_in_flight, self.most_busy)

    def close(self):
        """Nothing moves from now on: the descriptor is about to be closed."""
        self.grant(0)
        self.settle()
