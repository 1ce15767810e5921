from libc.stdint cimport uint8_t, uint64_t


cdef class RamRegion:
    cdef uint8_t *hva
    cdef Py_ssize_t length
    cdef Py_ssize_t[1] shape
    cdef Py_ssize_t[1] strides
    cdef readonly uint64_t gpa
    cdef readonly bint readonly
    cdef readonly int fd
    cdef readonly bint from_file    # a ``source`` was given
    cdef readonly str name


cdef class GuestMemory:
    cdef readonly list ram          # RamRegion, by gpa
    cdef list _views                # a memoryview of each, to slice from
    cdef readonly uint64_t size_bytes
    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept
