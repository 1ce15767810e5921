cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int, unsigned long, ...)

# Every ioctl but KVM_RUN goes through here: its result, or KvmError with the name and the remedy.
cdef int checked(int rc, str name) except -1
