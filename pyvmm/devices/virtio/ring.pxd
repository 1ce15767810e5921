from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pyvmm.guest_memory cimport GuestMemory


cdef struct vq_seg:
    # A piece of a chain: guest memory, checked when the chain was taken.
    uint8_t *hva
    uint64_t gpa
    uint32_t len


cdef enum:
    FEW_SEGS = 8


cdef struct vq_chain:
    # Copies of a chain's descriptors: first the ones that the device reads, then the ones that it writes.
    vq_seg few[FEW_SEGS]
    vq_seg *segs            # ``few``, or memory of its own
    uint32_t room           # how many there is room for
    uint32_t n_readable
    uint32_t n_total
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t id             # split: the head; packed: the buffer id
    uint16_t slots          # packed: how many descriptors of the ring it takes
    uint64_t sequence       # how many were taken before it


cdef struct vq_used:
    uint64_t sequence
    uint32_t written
    uint16_t id
    uint16_t slots


cdef struct vq_ram:
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    bint readonly


# What vq_take gives; what is below zero is an error's number.
cdef enum:
    VQ_NONE = 0
    VQ_TAKEN = 1


cdef class Virtqueue:
    cdef readonly int index
    cdef readonly int max_size
    cdef readonly str name
    cdef readonly object lock       # a DeviceLock: whoever serves the queue holds it
    cdef public int kick_fd
    cdef public int call_fd
    cdef public object on_call
    cdef public uint32_t size
    cdef public uint64_t desc_gpa
    cdef public uint64_t driver_gpa
    cdef public uint64_t device_gpa
    cdef readonly bint ready
    cdef readonly uint64_t generation
    cdef readonly uint64_t taken            # counts, for who asks what a queue has done
    cdef readonly uint64_t notified
    cdef GuestMemory _memory
    cdef list _regions                      # whoever holds a view of memory keeps it
    cdef vq_ram *_ram
    cdef int _ram_count
    cdef bint _packed, _event_idx, _indirect, _in_order
    cdef uint8_t *_desc
    cdef uint8_t *_driver
    cdef uint8_t *_device
    cdef uint16_t _avail, _used             # split: free-running indices; packed: places in the ring
    cdef bint _avail_wrap, _used_wrap
    cdef uint16_t _signalled                # of ``_used``, at the last look at whether the guest wants to know
    cdef bint _kicks                        # whether the guest is to ring
    cdef vq_used *_pending                  # pushed, and not shown to the guest yet
    cdef uint32_t _pending_count, _pending_room
    cdef uint64_t _sequence                 # of the next chain that is taken
    cdef uint64_t _next_pushed              # in-order: of the next one that may be shown

    # All of these are for whoever holds ``lock``, and want the queue ready. vq_push is -1 without memory.
    cdef int vq_take(self, vq_chain *chain) noexcept nogil
    cdef bint vq_pending(self) noexcept nogil
    cdef int vq_push(self, vq_chain *chain, uint64_t written) noexcept nogil
    cdef bint vq_flush(self) noexcept nogil
    cdef void vq_call(self) noexcept nogil

    cdef uint8_t *_host(self, uint64_t gpa, uint64_t size, bint write) noexcept nogil
    cdef int _take_split(self, vq_chain *chain) noexcept nogil
    cdef int _take_packed(self, vq_chain *chain) noexcept nogil
    cdef int _add(self, vq_chain *chain, uint64_t gpa, uint32_t size, bint write) noexcept nogil
    cdef int _add_table(self, vq_chain *chain, uint64_t gpa, uint32_t size) noexcept nogil
    cdef uint32_t _show_split(self, uint32_t count) noexcept nogil
    cdef uint32_t _show_packed(self, uint32_t count) noexcept nogil
    cdef bint _wants_call(self, uint32_t passed) noexcept nogil
    cdef uint32_t _in_order_count(self) noexcept nogil
    cdef void _want_kicks(self, bint wanted) noexcept nogil
    cdef _map_ram(self)


cdef void chain_init(vq_chain *chain) noexcept nogil
cdef void chain_free(vq_chain *chain) noexcept nogil


cdef class Chain:
    cdef vq_chain c
    cdef readonly Virtqueue queue
    cdef readonly uint64_t generation
    cdef list _readable, _writable
    cdef list _views(self, uint32_t first, uint32_t last)
