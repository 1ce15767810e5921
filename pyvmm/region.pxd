from libc.stdint cimport uint8_t, uint32_t, uint64_t

from cpython.object cimport PyObject

from pyvmm.bus cimport (BUS_OK, BUS_RAISED, REGION_PYTHON, PY_VECTORCALL_ARGUMENTS_OFFSET, Py_DECREF, Py_None,
                        PyErr_Occurred, PyErr_SetString, PyEval_RestoreThread, PyEval_SaveThread, PyExc_TypeError,
                        PyLong_AsUnsignedLongLongMask, PyLong_FromUnsignedLongLong, PyObject_Vectorcall, access_t, ones,
                        prefetch, region_t, shortcut, take_lock)
from pyvmm.device cimport pthread_mutex_unlock


cdef class MemoryRegion:
    cdef region_t c
    cdef readonly object device
    cdef readonly str name
    cdef readonly uint64_t size
    cdef readonly object space      # the AddressSpace it is mapped in, or None
    cdef readonly tuple eventfds    # (offset, size or 0, datamatch or None, fd)
    cdef readonly tuple coalesced   # (offset, size)
    cdef object _lock
    cdef object _read
    cdef object _write
    cdef object _end
    cdef object _buffer
    cdef object _source
    cdef int _set_up(self, size, name, lock, valid_sizes, impl_sizes, bint unaligned) except -1
    cdef int _set_handlers(self, read, write) except -1


cdef class LateRegion(MemoryRegion):
    cdef object _home       # the AddressSpace it is or was mapped in
    cdef object _arrived(self)


# What answers without Python. BUS_OK or BUS_RAISED, as all of these.
cdef int compiled_access(region_t *region, access_t *access) noexcept nogil

# A handler raised: its exception gets a note that names it and the access.
cdef void handler_raised(region_t *region, access_t *access) noexcept with gil

# String I/O at a FIFO window: the device's lock taken once, the data copied in one go.
cdef int fifo_string(region_t *region, uint8_t *data, uint32_t count, access_t *access) noexcept nogil


# Inline, so that a vCPU's way from its exit to a Python handler stays within one shared object (see bus.pxd).

cdef inline int region_access(region_t *region, access_t *access) noexcept nogil:
    """One access of a size that the region implements, whatever its kind."""
    if region.kind != REGION_PYTHON:
        return compiled_access(region, access)
    if region.shortcuts:
        return register_access(region, access)
    return python_access(region, access)


cdef inline int register_access(region_t *region, access_t *access) noexcept nogil:
    """A region whose device lets it answer for some registers at the moment."""
    if shortcut(region, access):
        return BUS_OK
    return python_access(region, access)


cdef inline int python_access(region_t *region, access_t *access) noexcept nogil:
    """read_func([device,] offset, size) or write_func([device,] offset, size, value), under the device's lock.

    With the GIL taken for it, where the caller has not got it.
    """
    cdef bint is_write = access.is_write
    cdef PyObject *function = region.write_func if is_write else region.read_func
    cdef PyObject *args[5]
    cdef PyObject *result
    cdef size_t count = 2
    cdef int rc = BUS_OK
    prefetch(region.device)
    prefetch(function)
    take_lock(region, access.ts)
    # The offset is of the view this vCPU has: the region may have gone since, or gone elsewhere.
    if not region.mapped or access.offset > region.last - region.base:
        pthread_mutex_unlock(region.lock)
        access.value = ones(access.size)
        return BUS_OK
    if access.ts != NULL:
        PyEval_RestoreThread(access.ts)
    args[0] = NULL
    args[2] = PyLong_FromUnsignedLongLong(access.offset)
    args[3] = PyLong_FromUnsignedLongLong(access.size)
    if is_write:
        args[4] = PyLong_FromUnsignedLongLong(access.value)
        count = 3
    args[1] = region.device
    if args[1] != NULL:
        result = PyObject_Vectorcall(function, &args[1], (count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
    else:
        result = PyObject_Vectorcall(function, &args[2], count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
    Py_DECREF(args[2])
    Py_DECREF(args[3])
    if is_write:
        Py_DECREF(args[4])
    if result == NULL:
        rc = BUS_RAISED
    else:
        if not is_write:
            access.value = PyLong_AsUnsignedLongLongMask(result)
            # The mask conversion reports an error (a read that returned a string, say) as all ones and the indicator.
            if access.value == <uint64_t>-1 and PyErr_Occurred() != NULL:
                rc = BUS_RAISED
                if result == Py_None:
                    PyErr_SetString(PyExc_TypeError, "it returned None and not a number: is a return missing?")
        Py_DECREF(result)
    if access.ts != NULL:
        PyEval_SaveThread()
    pthread_mutex_unlock(region.lock)
    if rc != BUS_OK:
        handler_raised(region, access)
    return rc
