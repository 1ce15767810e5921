cdef class Vm:
    cdef readonly int fd
    cdef readonly size_t vcpu_mmap_size
    cdef readonly object memory
    cdef readonly bint has_irqchip
    cdef int _open(self) except -1
