from cpython.object cimport PyObject

from pyvmm.device cimport pthread_mutex_t
from pyvmm.kvm.vm cimport Vm
from pyvmm.trace.tap cimport trace_tap_t


cdef class IrqWire:
    cdef pthread_mutex_t mutex      # of the lines' levels, the count and the sink; recursive
    cdef int up                     # how many of the lines are
    cdef readonly int gsi
    cdef readonly object sink
    # What of it ``drive`` looks at: a Vm, or a line of the wire it is, or what to call; of a Vm that is for errors.
    cdef Vm _vm
    cdef IrqLine _further
    cdef object _call
    cdef PyObject *_borrowed_call
    cdef trace_tap_t *tap           # where its levels are recorded; NULL: nobody traces
    cdef object _tap
    cdef int change(self, IrqLine line, int level, bint has_gil) noexcept nogil
    cdef int drive(self, int level, bint has_gil) noexcept nogil
    cdef int take_sink(self, sink) except -1


cdef class IrqLine:
    cdef readonly IrqWire wire
    cdef readonly int level


# Drive a line, with or without the GIL, from any thread. -1: the Python error indicator of this thread is set.
# With KVM's interrupt controllers behind it there is no Python on the way.
cdef inline int line_set(IrqLine line, int level, bint has_gil) noexcept nogil:
    return line.wire.change(line, level, has_gil)
