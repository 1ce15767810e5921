"""Drives interrupt lines as compiled units of the package do, without the GIL: for test_lines_without_the_gil.py."""

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from pyvmm.irq cimport IrqLine, line_set

cdef extern from * nogil:
    int SEQ_CST "__ATOMIC_SEQ_CST"
    int load "__atomic_load_n" (int *, int)
    void store "__atomic_store_n" (int *, int, int)

cdef int ready = 0, go = 0, done = 0


cdef double now() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return ts.tv_sec + ts.tv_nsec / 1e9


cdef int raise_pending() except -1:
    return -1


def drive(IrqLine line, levels):
    """Set the line to each of ``levels`` without the GIL. What its sink raises is raised here."""
    cdef bytes each = bytes(levels)
    cdef const unsigned char *p = each
    cdef Py_ssize_t n, count = len(each)
    cdef int failed = 0
    with nogil:
        for n in range(count):
            if line_set(line, p[n], False) < 0:
                failed = 1
                break
    if failed:
        raise_pending()


def pulse_when_told(IrqLine line, int count):
    """Wait for hold_the_gil, pulse the line so many times, and say so: all of it without the GIL."""
    cdef int n, failed = 0
    store(&go, 0, SEQ_CST)
    store(&done, 0, SEQ_CST)
    with nogil:
        store(&ready, 1, SEQ_CST)
        while not load(&go, SEQ_CST):
            pass
        for n in range(count):
            failed |= line_set(line, 1, False)
            failed |= line_set(line, 0, False)
        store(&done, 1, SEQ_CST)
    if failed:
        raise_pending()


def hold_the_gil(double limit_s):
    """Wait until it is there, tell it to begin, and keep the GIL until it is done: True; False after ``limit_s``."""
    cdef double end = now() + limit_s
    with nogil:
        while not load(&ready, SEQ_CST):
            if now() > end:
                break
    store(&ready, 0, SEQ_CST)
    store(&go, 1, SEQ_CST)
    while not load(&done, SEQ_CST):
        if now() > end:
            return False
    return True
