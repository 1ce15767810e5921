from libc.stdint cimport uint64_t

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


cdef class FlatView:
    cdef flat_view_t c
    cdef readonly list regions


cdef class AddressSpace:
    cdef readonly str name
    cdef readonly uint64_t size
    cdef readonly FlatView view
    cdef uint64_t generation        # bumped after a new view is in place; vCPUs compare it on every exit
    cdef object _change


# Any access, GIL-free: splits it as the regions ask, all ones where nobody answers. BUS_OK or BUS_RAISED.
cdef int bus_read(flat_view_t *view, uint64_t addr, int size, uint64_t *value, PyThreadState *ts) noexcept nogil
cdef int bus_write(flat_view_t *view, uint64_t addr, int size, uint64_t value, PyThreadState *ts) noexcept nogil
