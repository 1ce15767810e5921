from pyvmm.kvm cimport uapi


cdef class Vcpu:
    cdef readonly int fd
    cdef readonly int id
    cdef uapi.kvm_run *run
    cdef readonly size_t run_size
    cdef int _open(self) except -1
    cdef int _tsc_offset(self, unsigned long request, void *value, str name) except -1
    cdef bytes _get(self, unsigned long request, size_t size, str name)
    cdef int _set(self, unsigned long request, size_t size, bytes state, str name) except -1
