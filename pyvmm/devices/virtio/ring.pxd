from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from pyvmm.devices.virtio.chain cimport Chain, vq_chain
from pyvmm.guest_memory cimport GuestMemory
from pyvmm.trace.tap cimport trace_tap_t


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


cdef struct desc_t:
    # struct virtq_desc (2.7.5) and struct pvirtq_desc (2.8.13): the same places, the last two by other names.
    uint64_t addr
    uint32_t len
    uint16_t third          # split: flags; packed: id
    uint16_t fourth         # split: next; packed: flags


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
    cdef readonly bint owes_call            # since a load: whoever serves the queue calls ``call_again`` first
    cdef trace_tap_t *tap                   # where it is recorded what becomes of chains; NULL: nobody traces
    cdef readonly object traced             # the Tap, while there is one
    cdef object _tap                        # the last one there was
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
    cdef int _add_desc(self, vq_chain *chain, const desc_t *desc, uint16_t flags) noexcept nogil
    cdef int _add(self, vq_chain *chain, uint64_t gpa, uint32_t size, bint write) noexcept nogil
    cdef int _add_table(self, vq_chain *chain, uint64_t gpa, uint32_t size) noexcept nogil
    cdef uint32_t _show_split(self, uint32_t count) noexcept nogil
    cdef uint32_t _show_packed(self, uint32_t count) noexcept nogil
    cdef bint _wants_call(self, uint32_t passed) noexcept nogil
    cdef uint32_t _in_order_count(self) noexcept nogil
    cdef void _want_kicks(self, bint wanted) noexcept nogil
    cdef _map_ram(self)
