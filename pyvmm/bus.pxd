# The hot half of an address space: C structures and inline functions shared by region.pyx, address_space.pyx (host-side
# accesses) and cpu_exec.pyx (vCPU exits). Inline, because after an exit caches and TLB are cold: a call into another
# shared object costs more in misses than the lookup itself.
#
# Everything here is C and runs without the GIL; where a Python device must be called, the thread state handed in
# is restored around that one call (or, where it is NULL, the caller holds the GIL already).

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pyvmm.device cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock


cdef extern from "Python.h" nogil:
    # Declared nogil: the callers below take and give the GIL by hand.
    ctypedef struct PyThreadState:
        pass
    PyThreadState *PyEval_SaveThread()
    void PyEval_RestoreThread(PyThreadState *)
    PyObject *PyObject_Vectorcall(PyObject *, PyObject **, size_t, PyObject *)
    size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    PyObject *PyLong_FromUnsignedLongLong(unsigned long long)
    unsigned long long PyLong_AsUnsignedLongLongMask(PyObject *)
    PyObject *PyErr_Occurred()
    void PyErr_SetString(PyObject *, const char *)
    PyObject *PyExc_TypeError
    PyObject *Py_None
    void Py_DECREF(PyObject *)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int, const void *, size_t)

cdef extern from *:
    void prefetch "__builtin_prefetch" (const void *) noexcept nogil


cdef enum region_kind:
    REGION_PYTHON       # read/write are Python callables
    REGION_LATCH        # reads give the last value written (or a constant), GIL-free
    REGION_SINK         # written bytes are gathered, GIL-free until the buffer is full or a line ends
    REGION_FIFO         # a window over a buffer: accesses move through it, one Python call at its end
    REGION_EVENT        # a write signals an eventfd
    REGION_BUFFER       # plain memory


cdef enum shortcut_kind:
    SHORTCUT_LATCH = 1      # reads of single bytes that are ``latched`` give theirs of ``value``
    SHORTCUT_GATHER = 2     # writes to the byte at gathered_at go to ``memory``


cdef enum bus_result:
    BUS_OK = 0
    BUS_RAISED = -1     # a handler raised: the Python error indicator of this thread is set


cdef struct region_t:
    uint64_t base
    uint64_t last           # inclusive
    int kind
    bint mapped             # cleared under the lock by unmap: after that no handler runs
    uint16_t direct_sizes   # bit n: an aligned access of n bytes goes to the handler as it is
    uint8_t valid_min
    uint8_t valid_max
    uint8_t impl_min
    uint8_t impl_max
    uint8_t unaligned
    uint8_t writable        # LATCH: keeps what is written
    uint8_t event_size      # EVENT: of the writes that signal, 0: any; and then only at offset 0
    uint8_t event_match     # EVENT: only those of ``value``
    uint8_t wide            # an access that begins inside is taken whole, also where it reaches past the end
    PyObject *owner         # the MemoryRegion this is part of
    pthread_mutex_t *lock
    PyObject *device        # first argument of the handlers, or NULL where they are bound
    PyObject *read_func
    PyObject *write_func
    PyObject *end_func      # FIFO: called at the window's end; SINK: called with the bytes gathered
    uint8_t *memory         # FIFO, SINK, BUFFER
    uint64_t memory_size
    uint64_t position
    uint64_t value          # LATCH; EVENT: what is written there; PYTHON: a byte for each of the first eight offsets
    uint64_t count          # accesses served without Python
    int fd                  # EVENT
    int direction           # FIFO: 1 the guest reads, 2 it writes, 0 closed
    uint8_t shortcuts       # PYTHON: which single bytes are answered here for now, SHORTCUT_*
    uint8_t latched         # bit n: the byte at offset n
    uint8_t gathered_at


cdef struct access_t:
    uint64_t offset         # in the region that answers
    uint64_t value          # what is written, or the answer
    int size
    bint is_write
    PyThreadState *ts       # of a vCPU's thread, which is outside the GIL; NULL where the caller holds the GIL


cdef struct flat_view_t:
    int count
    uint64_t *bases         # ascending
    region_t **regions


cdef inline region_t *flat_view_find(flat_view_t *view, uint64_t addr) noexcept nogil:
    """The region that holds ``addr``, or NULL. Binary search over the bases only: few cache lines."""
    cdef int low = 0, high = view.count, mid
    cdef region_t *region
    while low < high:
        mid = (low + high) >> 1
        if view.bases[mid] <= addr:
            low = mid + 1
        else:
            high = mid
    if low == 0:
        return NULL
    region = view.regions[low - 1]
    # Both sides relative: a region that has moved since this view was made is not found at its old place, and never
    # with an offset that wraps.
    return region if addr - region.base <= region.last - region.base else NULL


cdef inline uint64_t ones(int size) noexcept nogil:
    return <uint64_t>-1 if size >= 8 else (<uint64_t>1 << (8 * size)) - 1


cdef inline uint64_t load(const uint8_t *data, int size) noexcept nogil:
    """``size`` bytes, little endian. The sizes that guests use are an instruction each, and no call."""
    cdef uint64_t value = 0
    if size == 4:
        memcpy(&value, data, 4)
    elif size == 1:
        value = data[0]
    elif size == 2:
        memcpy(&value, data, 2)
    else:
        memcpy(&value, data, size)
    return value


cdef inline void store(uint8_t *data, int size, uint64_t value) noexcept nogil:
    if size == 4:
        memcpy(data, &value, 4)
    elif size == 1:
        data[0] = <uint8_t>value
    elif size == 2:
        memcpy(data, &value, 2)
    else:
        memcpy(data, &value, size)


cdef inline bint goes_direct(region_t *region, uint64_t offset, int size) noexcept nogil:
    """True where the handler takes this very access: no splitting, no widening, wholly inside."""
    return (region.direct_sizes >> size) & 1 and (region.unaligned or not offset & (size - 1)) \
        and (offset + size - 1 <= region.last - region.base or region.wide)


cdef inline void take_lock(region_t *region, PyThreadState *ts) noexcept nogil:
    """The device's lock. Never waits for it with the GIL held: its owner may be waiting for the GIL."""
    cdef PyThreadState *own
    if ts != NULL:
        pthread_mutex_lock(region.lock)
    elif pthread_mutex_trylock(region.lock) != 0:
        own = PyEval_SaveThread()
        pthread_mutex_lock(region.lock)
        PyEval_RestoreThread(own)


cdef inline bint shortcut(region_t *region, access_t *access) noexcept nogil:
    """Whether a Python device's region has answered by itself. A line's end, and what no longer fits, it leaves to Python."""
    cdef bint served = False
    if access.size != 1:
        return False
    take_lock(region, access.ts)
    if region.mapped:
        if not access.is_write:
            if access.offset < 8 and (region.latched >> access.offset) & 1:
                access.value = (region.value >> (8 * access.offset)) & 0xff
                served = True
        elif region.shortcuts & SHORTCUT_GATHER and access.offset == region.gathered_at \
                and <uint8_t>access.value != 10 and region.position < region.memory_size:
            region.memory[region.position] = <uint8_t>access.value
            region.position += 1
            served = True
    region.count += served
    pthread_mutex_unlock(region.lock)
    return served
