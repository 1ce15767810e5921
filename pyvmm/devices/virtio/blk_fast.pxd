from libc.stdint cimport int64_t, uint8_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from pyvmm.block.lane cimport Lane, iovec
from pyvmm.devices.virtio.chain cimport Chain, vq_chain
from pyvmm.devices.virtio.ring cimport Virtqueue


cdef enum:
    MOST_ASKED = 64             # chains at a time
    MOST_PIECES = 1024          # IOV_MAX


cdef struct asked_t:
    vq_chain chain
    bint done
    int kind
    int pieces                  # -1: not ours
    uint64_t at
    uint64_t length
    uint8_t *status


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class FastBlk:
    cdef Virtqueue queue
    cdef Lane lane
    cdef uint64_t size, block_mask
    cdef asked_t[MOST_ASKED] asked
    cdef int count
    # What is to be moved by one call: so many pieces, from or to the disk's byte ``at``.
    cdef iovec[MOST_PIECES] iov
    cdef int pieces, kind
    cdef uint64_t at, length
    cdef uint64_t unshown       # bytes that were moved since the driver was last shown what is done
    cdef bint call              # it wants an interrupt, and there is no eventfd for that

    cdef Chain chain_of(self, int n)
    cdef int work(self, int64_t poll_ns) noexcept nogil
    cdef bint wait(self, int64_t poll_ns) noexcept nogil
    cdef void run(self) noexcept nogil
    cdef bint read_header(self, asked_t *one) noexcept nogil
    cdef void gather(self, asked_t *one) noexcept nogil
    cdef void move(self, int first, int end, int64_t since) noexcept nogil
    cdef void show(self) noexcept nogil
