# The last descriptor of a VM is closed by a worker of the kernel's.
#
# With an interrupt controller the end of a VM waits for a grace period (kvm_destroy_vm, srcu_barrier): 10 to 25 ms in
# close(), or in the end of the process, and nobody needs to wait for it. io_uring lets go of the files that are
# registered with a ring on a workqueue, after the ring has been closed (Linux io_uring/io_uring.c, io_ring_exit_work).
# So the VM's file is registered with a ring that has no other use; both are closed, and the kernel does the rest.

from libc.string cimport memset
from posix.unistd cimport close

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option)
    enum:
        PR_GET_SECCOMP

# <asm/unistd_64.h> and <linux/io_uring.h>: headers older than the kernel may not have them.
cdef enum:
    NR_IO_URING_SETUP = 425
    NR_IO_URING_REGISTER = 427
    REGISTER_FILES = 2
    PARAMS_BYTES = 120


cdef inline void last_close(int fd) noexcept nogil:
    """close(2), waiting for nothing where io_uring can be had, which is not asked under a seccomp filter: it may kill."""
    cdef unsigned char params[PARAMS_BYTES]
    cdef long ring = -1
    if prctl(PR_GET_SECCOMP) == 0:
        memset(params, 0, PARAMS_BYTES)
        ring = syscall(NR_IO_URING_SETUP, 1, params)
    if ring >= 0:
        syscall(NR_IO_URING_REGISTER, ring, REGISTER_FILES, &fd, 1)
        close(<int>ring)
    close(fd)
