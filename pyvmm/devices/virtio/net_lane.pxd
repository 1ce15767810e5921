from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyvmm.devices.virtio.chain cimport vq_chain
from pyvmm.devices.virtio.ring cimport Virtqueue
from pyvmm.net.port cimport Port, iovec


cdef class Lane:
    cdef readonly Virtqueue queue
    cdef readonly Port port
    cdef readonly bint has_header
    cdef readonly uint64_t dropped
    cdef uint32_t header_bytes
    cdef uint64_t generation        # the queue's, when what is in the hand was taken
    # Chains that were taken and not given back, the oldest first: a ring buffer of ``hand_room``, a power of two.
    cdef vq_chain *hand
    cdef uint32_t hand_room, hand_first, hand_count
    cdef bint calls                 # the driver wants an interrupt, and it is not by an eventfd
    cdef uint32_t unshown_frames    # that were pushed, and the driver does not see it yet
    cdef uint64_t unshown_bytes
    cdef vq_chain *in_hand(self, uint32_t n) noexcept nogil
    cdef int take(self, uint32_t most) noexcept nogil
    cdef void give_back(self, uint32_t count) noexcept nogil
    cdef void moved(self, uint64_t size) noexcept nogil
    cdef void show(self) noexcept nogil
    cdef int turn(self, bint link_up) noexcept nogil


cdef class TxLane(Lane):
    cdef bint checksums
    cdef uint8_t segments[8]
    cdef int segment_count
    cdef uint64_t most_bytes
    cdef int send(self, const vq_chain *chain, bint link_up) noexcept nogil
    cdef bint makes_sense(self, const uint8_t *header, uint64_t size) noexcept nogil


cdef class RxLane(Lane):
    cdef readonly uint64_t filtered
    cdef bint mergeable
    cdef uint64_t target_bytes
    cdef uint64_t looked_for        # how much of it there was to be, when parts were last put together
    cdef iovec *parts
    cdef int part_count
    cdef int modes
    cdef uint8_t mac[6]
    cdef uint8_t unicast[64][6]
    cdef uint8_t multicast[64][6]
    cdef int unicast_count, multicast_count
    cdef uint8_t vlans[512]
    cdef int room(self) noexcept nogil
    cdef Py_ssize_t receive(self) noexcept nogil
    cdef int deliver(self, uint32_t chains, uint64_t size, bint link_up) noexcept nogil
    cdef bint passes(self, const uint8_t *head) noexcept nogil
