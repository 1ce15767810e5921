from libc.stdint cimport uint8_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef class Port:
    cdef readonly int fd
    cdef readonly bint closed
    cdef readonly uint64_t sent, sent_bytes, received, received_bytes, lost, too_long, calls
    # How long the frame is that receive_frame had and did not give; 0: there is none.
    cdef readonly size_t waiting_bytes
    # Of one frame, virtio's header in front of it where the port is a tap's. What they give is bytes, or -errno:
    # -EAGAIN where there is no room at the host, or no frame, for now. -EMSGSIZE of receive_frame: there is one that is
    # too long for the parts, and it stays, for a call with more, or for drop_frame. After any other -errno a frame is
    # lost, and `closed` says whether the port is too.
    cdef Py_ssize_t send_frame(self, const iovec *parts, int count) noexcept nogil
    cdef Py_ssize_t receive_frame(self, const iovec *parts, int count) noexcept nogil
    cdef void drop_frame(self) noexcept nogil
    # What send_frame has kept goes out, after the last frame of a batch. 0 or -errno.
    cdef int flush_frames(self) noexcept nogil


cdef class TapPort(Port):
    cdef uint8_t *scratch
    cdef Py_ssize_t took(self, Py_ssize_t size) noexcept nogil
    cdef bint has_scratch(self) noexcept nogil


cdef class StreamPort(Port):
    cdef uint8_t *incoming
    cdef size_t in_begin, in_end
    cdef bint drained
    cdef uint8_t *outgoing
    cdef size_t out_begin, out_end
    cdef int put_out(self) noexcept nogil
    cdef Py_ssize_t send_at_once(self, const iovec *parts, int count, size_t size) noexcept nogil
