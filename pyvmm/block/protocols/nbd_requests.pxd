from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pyvmm.block.lane cimport Lane, iovec, lane_ask
from pyvmm.device cimport pthread_mutex_t


cdef enum:
    NBD_READ = 0
    NBD_WRITE = 1
    NBD_HEADER_BYTES = 28
    NBD_MOST_PIECES = 1024      # IOV_MAX

cdef extern from * nogil:
    """
    #define pyvmm_big16(x) __builtin_bswap16(x)
    #define pyvmm_big32(x) __builtin_bswap32(x)
    #define pyvmm_big64(x) __builtin_bswap64(x)
    """
    int big16 "pyvmm_big16" (int)
    uint32_t big32 "pyvmm_big32" (uint32_t)
    uint64_t big64 "pyvmm_big64" (uint64_t)


cdef struct nbd_span:
    uint64_t begin
    uint64_t end


# One request, from when it is asked to its end. Its memory is ``iov``; a lane's is the ask's own.
cdef struct nbd_slot:
    uint32_t index
    uint64_t cookie             # 0: no answer is waited for
    int command
    int flags
    uint64_t offset             # in the export
    uint64_t length
    int pieces
    iovec *iov
    Py_buffer *held             # the views of a request in Python, one a piece
    lane_ask *ask
    int64_t since_ns
    uint64_t put_upto           # how much has to go out until all of it has
    uint64_t got                # of a read's data
    nbd_span *spans             # what of it has come, in order, where it came in pieces
    int span_count
    int span_room
    int error
    int64_t result
    nbd_slot *next
    uint8_t[NBD_HEADER_BYTES] header


cdef class NbdRequests(Lane):
    cdef int socket_fd
    cdef public int wake_fd
    cdef bint connected
    cdef readonly bint awake
    cdef uint64_t most_bytes        # of a payload
    cdef uint64_t block_mask
    cdef dict requests              # those in Python, by their slot's index
    cdef pthread_mutex_t mutex      # of all that follows
    cdef nbd_slot **slots
    cdef uint32_t slot_count, slot_room
    cdef nbd_slot *free_slots
    cdef uint64_t serial
    cdef iovec *out                 # what the socket did not take, from ``out_first`` on
    cdef int out_first, out_count, out_room
    cdef uint8_t *rest              # memory of ours that it is in, where it is in such
    cdef uint64_t put, gone         # bytes that came into it, and that left it
    cdef int plugs, plugged

    cdef nbd_slot *slot_make(self) noexcept nogil
    cdef void slot_free(self, nbd_slot *slot) noexcept nogil
    cdef nbd_slot *slot_of(self, uint64_t cookie) noexcept nogil
    cdef void slot_end(self, nbd_slot *slot) noexcept nogil
    cdef hold(self, nbd_slot *slot, iov)
    cdef let_go(self, nbd_slot *slot)
    cdef int put_out(self, nbd_slot *slot, bint gather) noexcept nogil
    cdef bint room_out(self, int pieces) noexcept nogil
    cdef void send_now(self) noexcept nogil
    cdef int flush_out(self) noexcept nogil
    cdef void gone_out(self, uint64_t sent) noexcept nogil
    cdef int own_rest(self) noexcept nogil
    cdef void drop_out(self) noexcept nogil
