cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int, unsigned long, ...)

# Every ioctl but KVM_RUN goes through here: its result, or KvmError with the name and the remedy.
cdef int checked(int rc, str name) except -1

# For those that may wait for an SRCU grace period (milliseconds): other Python threads go on meanwhile.
cdef inline int slow_ioctl(int fd, unsigned long request, void *argument) noexcept:
    cdef int rc
    with nogil:
        rc = ioctl(fd, request, argument)
    return rc
