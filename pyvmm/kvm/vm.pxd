from libc.stdint cimport uint32_t

from pyvmm.kvm cimport uapi
from pyvmm.kvm.ioctl cimport ioctl


cdef class Vm:
    cdef readonly int fd
    cdef readonly size_t vcpu_mmap_size
    cdef readonly object memory
    cdef readonly bint has_irqchip
    cdef int _open(self) except -1


# KVM_IRQ_LINE for compiled callers: negative where it failed. Inline, as all that runs between an exit and the next entry.
cdef inline int vm_set_line(Vm vm, uint32_t gsi, uint32_t level) noexcept nogil:
    cdef uapi.kvm_irq_level line
    line.irq = gsi
    line.level = level
    return ioctl(vm.fd, uapi.KVM_IRQ_LINE, &line)
