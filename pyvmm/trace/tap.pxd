# A tap: where compiled code leaves a record of what it does, while somebody traces the machine.
#
# Whoever can be traced has a pointer to one, NULL when nobody does: that branch is all it costs then. What is behind it
# is recorder.pyx's, which is imported with the first trace; so only this header is compiled into the others.

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint16_t, uint64_t

cdef extern from "<x86intrin.h>" nogil:
    uint64_t trace_now "__rdtsc" ()

cdef extern from * nogil:
    """
    #define pyvmm_unlikely(x) __builtin_expect(!!(x), 0)
    """
    bint unlikely "pyvmm_unlikely" (bint)
    void tap_store "__atomic_store_n" (trace_tap_t **, trace_tap_t *, int)
    int TAP_RELEASE "__ATOMIC_RELEASE"


# The kinds of records; format.py says what is in each.
cdef enum trace_kind:
    TRACE_THREAD = 1
    TRACE_EXIT = 2
    TRACE_KICK = 3
    TRACE_TAKE = 4
    TRACE_BEGIN = 5
    TRACE_MOVE = 6
    TRACE_PUSH = 7
    TRACE_SHOW = 8
    TRACE_SUBMIT = 9
    TRACE_CALL = 10
    TRACE_DONE = 11
    TRACE_LINE = 12
    TRACE_MSI = 13
    TRACE_VECTOR = 14


cdef struct trace_tap_t:
    # ``since`` and ``ticks`` are of the TSC: when it began, and how long it took.
    void (*record)(trace_tap_t *tap, int kind, uint64_t since, uint64_t ticks, uint64_t a, uint64_t b) noexcept nogil
    void *recorder
    uint16_t source         # who: a vCPU, a queue, a drive, a GSI


cdef inline trace_tap_t *tap_of(tap) except? NULL:
    """Of a Tap (recorder.pyx), which must live as long as somebody may follow the pointer; None: NULL."""
    return NULL if tap is None else <trace_tap_t *>PyCapsule_GetPointer(tap.capsule, "pyvmm.trace_tap")


cdef inline void trace(trace_tap_t *tap, int kind, uint64_t a, uint64_t b) noexcept nogil:
    """Something has happened just now."""
    tap.record(tap, kind, trace_now(), 0, a, b)


cdef inline uint64_t pair(uint64_t low, uint64_t high) noexcept nogil:
    """Two numbers in one word, each at most what 32 bits hold."""
    cdef uint64_t most = 0xFFFFFFFFULL
    return (low if low < most else most) | (high if high < most else most) << 32
