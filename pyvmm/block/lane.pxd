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


# A transfer that is waited for. Whoever asks for it leaves it and its memory as they are until one of its user's
# functions has it back.
cdef struct lane_ask:
    lane_user *user
    int kind
    int pieces
    iovec *iov
    uint64_t at                     # in the disk
    uint64_t length
    lane_ask *next                  # the lane's own


# Who asks. It is there as long as the lane has something of its, and until ``rested`` has been called after that.
cdef struct lane_user:
    void *who
    void (*ended)(lane_ask *ask) noexcept nogil         # all of it is done
    void (*told)(lane_user *user) noexcept nogil        # so are those that ``ended`` was called for: no more just now
    int (*given_back)(lane_ask *ask) except -1          # it is not, or not whole: it is asked of the backend
    int (*rested)(lane_user *user) except -1            # after these; with the GIL, as given_back
    bint touched                    # the lane's own
    lane_user *next


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
    cdef readonly bint waits        # it does nothing at once, and is for ``submit``
    cdef lane_counts[2] counts
    cdef ssize_t transfer(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil
    cdef int submit(self, lane_ask *ask) noexcept nogil
    cdef void send(self) noexcept nogil
    cdef bint enter(self, int kind, uint64_t at, int count, uint64_t length) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef void count(self, int kind, int64_t requests, int64_t calls, int64_t size, int64_t time_ns) noexcept nogil
    cdef object _move(self, int kind, uint64_t at, iov)
