"""Which pages of a memory have something in them: what a snapshot writes down.

Nothing here decides; it looks at very much memory, in C and without the GIL.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

cdef enum:
    PAGE_BYTES = 4096

# Linux Documentation/admin-guide/mm/pagemap.rst
cdef uint64_t PRESENT = 1 << 63
cdef uint64_t SWAPPED = <uint64_t>1 << 62
cdef uint64_t OF_FILE = <uint64_t>1 << 61   # a page of a file, or of memory that is shared


cdef bint is_zero(const uint8_t *page) noexcept nogil:
    cdef const uint64_t *words = <const uint64_t *>page
    cdef int n
    for n in range(0, PAGE_BYTES // 8, 8):
        if words[n] | words[n + 1] | words[n + 2] | words[n + 3] | words[n + 4] | words[n + 5] | words[n + 6] | words[n + 7]:
            return False
    return True


def touched_runs(entries, bint written_only):
    """(offset, size) in bytes of each run of pages that /proc/self/pagemap's ``entries``, eight bytes a page, has as
    touched: they are in memory or in swap. ``written_only``: only those that are no longer the file's they came from.
    """
    cdef Py_buffer view
    cdef const uint64_t *entry
    cdef Py_ssize_t n, count, since = -1
    cdef bint hit
    runs = []
    PyObject_GetBuffer(entries, &view, PyBUF_SIMPLE)
    try:
        entry = <const uint64_t *>view.buf
        count = view.len // 8
        for n in range(count):
            hit = entry[n] & (PRESENT | SWAPPED) and not (written_only and entry[n] & OF_FILE)
            if hit and since < 0:
                since = n
            elif not hit and since >= 0:
                runs.append((since * PAGE_BYTES, (n - since) * PAGE_BYTES))
                since = -1
        if since >= 0:
            runs.append((since * PAGE_BYTES, (count - since) * PAGE_BYTES))
    finally:
        PyBuffer_Release(&view)
    return runs


def data_runs(memory, base, Py_ssize_t offset, Py_ssize_t size):
    """(offset, size) of each run of pages in ``memory[offset:offset + size]`` that hold more than zeros; where ``base``
    is given, a memory of the same length, of those that differ from its. All in whole pages.
    """
    cdef Py_buffer view, other
    cdef const uint8_t *page
    cdef const uint8_t *before = NULL
    cdef Py_ssize_t at = offset, end = offset + size, since
    if offset < 0 or size < 0 or offset % PAGE_BYTES or size % PAGE_BYTES:
        raise ValueError(f"{size} bytes at {offset}: give whole pages")
    runs = []
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    try:
        if end > view.len:
            raise ValueError(f"{size} bytes at {offset} of {view.len}")
        page = <const uint8_t *>view.buf
        if base is not None:
            PyObject_GetBuffer(base, &other, PyBUF_SIMPLE)
            before = <const uint8_t *>other.buf
        try:
            if before != NULL and other.len != view.len:
                raise ValueError(f"a base of {other.len} bytes for {view.len}")
            while at < end:
                with nogil:
                    while at < end and same(page, before, at):
                        at += PAGE_BYTES
                    since = at
                    while at < end and not same(page, before, at):
                        at += PAGE_BYTES
                if at > since:
                    runs.append((since, at - since))
        finally:
            if before != NULL:
                PyBuffer_Release(&other)
    finally:
        PyBuffer_Release(&view)
    return runs


cdef bint same(const uint8_t *memory, const uint8_t *base, Py_ssize_t at) noexcept nogil:
    """Whether the page need not be written down."""
    if base != NULL:
        return memcmp(memory + at, base + at, PAGE_BYTES) == 0
    return is_zero(memory + at)
