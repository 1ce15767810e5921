from libc.stdint cimport uint64_t

from pyvmm.bus cimport BUS_OK, access_t, flat_view_t, goes_direct, region_t
from pyvmm.device cimport DeviceLock
from pyvmm.region cimport LateRegion, MemoryRegion, region_access


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
    cdef DeviceLock _change         # the view and who uses it
    cdef DeviceLock _telling        # taken before _change: one change at a time, told in its order
    cdef unsigned long _changer     # the thread that makes one, 0: none
    cdef list _ears
    cdef int _holders
    cdef list _stand_ins            # LateRegions: wherever nothing is mapped, until somebody looks; None: there are none
    cdef list _coming               # what is to take its place, while that is made
    cdef unsigned long _comer       # the thread that makes it
    cdef LateRegion _stands(self, uint64_t first, uint64_t last, str name, DeviceLock lock, arrive)
    cdef bint _comes_here(self) noexcept
    cdef int _have_all(self) except -1
    cdef list _mapped(self)
    cdef _put_in(self, placed)
    cdef _insert(self, list regions, base, MemoryRegion region)
    cdef _publish(self, list regions)
    cdef _take_out(self, list gone)
    cdef int _wait_for_handlers(self, MemoryRegion region) except -1
    cdef int _begin(self) except -1
    cdef int _end(self) except -1
    cdef bint _changed_here(self) noexcept
    cdef bint _concerned(self, list regions) except -1
    cdef list _told(self, list ears, list regions)
    cdef object _tell_new(self, list ears, list regions)
    cdef object _tell_gone(self, list told)
    cdef object _commit(self, list ears)
    cdef FlatView current(self)
    cdef object _access(self, uint64_t addr, int size, uint64_t value, bint is_write)
    cdef int attach(self, ViewUser user) except -1
    cdef int detach(self, ViewUser user) except -1


# An access that no region takes as it is: split as the regions ask, all ones where nobody answers.
cdef int bus_access(flat_view_t *view, uint64_t addr, access_t *access) noexcept nogil


cdef inline int space_access(flat_view_t *view, region_t *region, uint64_t addr, access_t *access) noexcept nogil:
    """Any access of a space, by whoever finds it: ``region`` is what ``view`` has at ``addr``. BUS_OK or BUS_RAISED."""
    if region != NULL:
        access.offset = addr - region.base
        if goes_direct(region, access.offset, access.size):
            return region_access(region, access)
    elif access.size == 1:
        access.value = 0xff
        return BUS_OK
    return bus_access(view, addr, access)
