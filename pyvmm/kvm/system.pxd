cdef class Kvm:
    cdef readonly int fd
    cdef readonly int vcpu_mmap_size
    cdef tuple _device
    cdef int _open(self) except -1
