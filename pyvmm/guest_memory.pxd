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
    cdef bint reserved              # in huge pages that the host has set aside
    cdef bint file_behind           # a page that is given back is a file's again
    cdef readonly str name
    cdef tuple _hear_discards
    cdef bint give_back(self, uint64_t offset, uint64_t size) noexcept nogil


cdef class GuestMemory:
    cdef readonly list ram          # RamRegion, by gpa
    cdef list _views                # a memoryview of each, to slice from
    cdef readonly uint64_t size_bytes
    cdef uint8_t *host(self, uint64_t gpa, uint64_t size) noexcept
