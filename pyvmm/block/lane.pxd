from libc.stdint cimport int64_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef enum:
    LANE_READ = 0
    LANE_WRITE = 1


cdef struct lane_counts:
    int64_t operations
    int64_t bytes
    int64_t merged
    int64_t time_ns


cdef class Lane:
    cdef int fd
    cdef int flags
    cdef int granted                # bits of 1 << LANE_READ, 1 << LANE_WRITE; atomic
    cdef int able                   # those that the file system takes so; atomic
    cdef int busy                   # threads inside of ``transfer``; atomic
    cdef int most_busy
    cdef uint64_t offset            # in the image, of the disk's first byte
    cdef uint64_t size
    cdef uint64_t guarded           # bytes from the beginning that it does not write
    cdef int64_t _writes
    cdef lane_counts[2] counts
    cdef ssize_t transfer(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil
    cdef void count(self, int kind, int64_t requests, int64_t calls, int64_t size, int64_t time_ns) noexcept nogil
    cdef object _move(self, int kind, uint64_t at, iov)
