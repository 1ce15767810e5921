cdef class Kvm:
    cdef readonly int fd
    cdef readonly int vcpu_mmap_size
    cdef object _cpuid
    cdef int _open(self) except -1
