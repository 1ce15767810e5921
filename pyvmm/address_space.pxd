from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pyvmm.bus cimport PyThreadState, flat_view_t, region_t


cdef class MemoryRegion:
    cdef region_t c
    cdef readonly object device
    cdef readonly str name
    cdef readonly uint64_t size
    cdef readonly AddressSpace space
    cdef object _lock
    cdef object _read
    cdef object _write
    cdef object _end
    cdef object _buffer
    cdef object _source


cdef class FlatView:
    cdef flat_view_t c
    cdef readonly list regions


cdef class ViewUser:
    cdef int stale                  # set after a new view is in place; a vCPU looks at it on every exit


cdef class AddressSpace:
    cdef readonly str name
    cdef readonly uint64_t size
    cdef readonly FlatView view
    cdef list users
    cdef list _reserved
    cdef MemoryRegion _add(self, base, MemoryRegion region)
    cdef object _change
    cdef FlatView current(self)
    cdef int attach(self, ViewUser user) except -1
    cdef int detach(self, ViewUser user) except -1


# Any access, GIL-free: splits it as the regions ask, all ones where nobody answers. BUS_OK or BUS_RAISED.
cdef int bus_read(flat_view_t *view, uint64_t addr, int size, uint64_t *value, PyThreadState *ts) noexcept nogil
cdef int bus_write(flat_view_t *view, uint64_t addr, int size, uint64_t value, PyThreadState *ts) noexcept nogil

# A handler raised: its exception gets a note that names it and the access.
cdef void handler_raised(region_t *region, uint64_t offset, int size, bint is_write) noexcept with gil

# String I/O at a FIFO window: the device's lock taken once, the data copied in one go.
cdef int fifo_string(region_t *region, uint8_t *data, uint32_t count, int size, bint is_write,
                     PyThreadState *ts) noexcept nogil
