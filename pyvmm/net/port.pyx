"""Ports: one queue pair's end at the host. Compiled, because nothing is decided here and every frame comes by.

A TapPort's descriptor has a frame a system call, virtio's header in front of it: straight from and to guest memory. A
StreamPort's is a stream of a length (four bytes, big endian) and a frame, as QEMU's socket netdevs and passt speak it;
many frames are read at once and, where they are small, sent at once, by way of a buffer of bounded size. Large ones go
out of guest memory as they are.

Nothing waits: where the other end takes no more, a frame is not taken (-EAGAIN), and stays with the guest. What the other
end says is hostile: a length that no frame has closes the port.

A port is used by one thread at a time in each direction.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport close

cdef extern from "<errno.h>" nogil:
    int EBADFD, EMSGSIZE, ENOTCONN, EPROTO, ENOBUFS

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int, const iovec *, int)
    ssize_t writev(int, const iovec *, int)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recv(int, void *, size_t, int)
    ssize_t send(int, const void *, size_t, int)
    ssize_t sendmsg(int, const msghdr *, int)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef enum:
    MOST_PARTS = 1024           # UIO_MAXIOV
    MOST_BYTES = 65536 + 4096   # of a frame with its header; QEMU's NET_BUFSIZE
    LENGTH_BYTES = 4
    BUFFER_BYTES = 256 << 10
    # From here on a system call of its own is cheaper than a copy.
    LARGE_BYTES = 16 << 10

MOST_FRAME_BYTES = MOST_BYTES


cdef size_t total(const iovec *parts, int count) noexcept nogil:
    cdef size_t size = 0
    cdef int n
    for n in range(count):
        size += parts[n].iov_len
    return size


cdef void scatter(const uint8_t *source, size_t size, const iovec *parts, int count) noexcept nogil:
    """``size`` bytes into the parts, which have room for them."""
    cdef size_t part
    cdef int n
    for n in range(count):
        part = min(size, parts[n].iov_len)
        memcpy(parts[n].iov_base, source, part)
        source += part
        size -= part


cdef void gather(uint8_t *target, size_t size, const iovec *parts) noexcept nogil:
    """The first ``size`` bytes of the parts."""
    cdef size_t part
    while size:
        part = min(size, parts.iov_len)
        memcpy(target, parts.iov_base, part)
        target += part
        size -= part
        parts += 1


cdef class Port:
    """The base: a descriptor, and what went through it.

    ``sent`` and ``received`` count frames, ``lost`` those the host did not take, ``too_long`` those that were dropped
    because there was no room for them, ``calls`` system calls. ``closed``: nothing comes or goes any more; ``fd`` is -1 then, once
    ``close`` was called.
    """

    def __cinit__(self, *args, **kwargs):
        self.fd = -1
        self.closed = True

    def __init__(self, int fd = -1):
        if fd >= 0:
            self.connect(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def connect(self, int fd):
        """Take ``fd``, which does not block, in the place of a former one."""
        self.close()
        self.fd = fd
        self.closed = False
        self.waiting_bytes = 0

    def close(self):
        """Give the descriptor back. Again is fine."""
        cdef int fd = self.fd
        self.fd = -1
        self.closed = True
        if fd >= 0:
            close(fd)

    cdef Py_ssize_t send_frame(self, const iovec *parts, int count) noexcept nogil:
        return -ENOTCONN

    cdef Py_ssize_t receive_frame(self, const iovec *parts, int count) noexcept nogil:
        return -ENOTCONN

    cdef void drop_frame(self) noexcept nogil:
        pass

    cdef int flush_frames(self) noexcept nogil:
        return 0

    def send(self, list views):
        """One frame, its header in front where the port is a tap's. False: no room for now, try again when ``fd`` is
        writable. True also where the host has refused it: it is lost then, as frames are.
        """
        cdef Parts parts = Parts(views, False)
        cdef Py_ssize_t result
        with nogil:
            result = self.send_frame(parts.vectors, parts.count)
        return result != -EAGAIN

    def flush(self):
        """What ``send`` has kept goes out. False: not all of it yet."""
        cdef int result
        with nogil:
            result = self.flush_frames()
        return result != -EAGAIN

    def receive(self, list views):
        """One frame into ``views``: how many bytes it has. 0: there is none for now, or the port is ``closed``; -1: one
        of ``waiting_bytes`` is there, too long for them: it stays, for a call with more of them, or for ``drop``.
        """
        cdef Parts parts = Parts(views, True)
        cdef Py_ssize_t result
        with nogil:
            result = self.receive_frame(parts.vectors, parts.count)
        if result == -EMSGSIZE:
            return -1
        return result if result > 0 else 0

    def drop(self):
        """Lose the frame that ``receive`` had no room for."""
        with nogil:
            self.drop_frame()


cdef class Parts:
    """Python's buffers as vectors, held in their place until this goes."""

    cdef Py_buffer *buffers
    cdef iovec *vectors
    cdef int count

    def __cinit__(self, list views, bint writable):
        cdef size_t room = len(views)
        if room > MOST_PARTS:
            raise ValueError(f"{room} parts of a frame: at most {MOST_PARTS} are taken")
        self.buffers = <Py_buffer *>PyMem_RawCalloc(room + 1, sizeof(Py_buffer))
        self.vectors = <iovec *>PyMem_RawCalloc(room + 1, sizeof(iovec))
        if self.buffers == NULL or self.vectors == NULL:
            raise MemoryError
        for view in views:
            PyObject_GetBuffer(view, &self.buffers[self.count], PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
            self.vectors[self.count].iov_base = self.buffers[self.count].buf
            self.vectors[self.count].iov_len = self.buffers[self.count].len
            self.count += 1

    def __dealloc__(self):
        cdef int n
        for n in range(self.count):
            PyBuffer_Release(&self.buffers[n])
        PyMem_RawFree(self.buffers)
        PyMem_RawFree(self.vectors)


cdef class TapPort(Port):
    """A descriptor that has one frame a system call: a tap's queue."""

    def __dealloc__(self):
        PyMem_RawFree(self.scratch)

    cdef Py_ssize_t send_frame(self, const iovec *parts, int count) noexcept nogil:
        cdef size_t size = total(parts, count)
        cdef ssize_t done
        if self.closed:
            return -ENOTCONN
        if size > MOST_BYTES:
            self.lost += 1
            return -EMSGSIZE
        while True:
            self.calls += 1
            done = writev(self.fd, parts, count)
            if done >= 0:
                self.sent += 1
                self.sent_bytes += done
                return done
            if errno == EAGAIN:
                return -EAGAIN
            if errno != EINTR:
                break
        # An interface that is down (EIO), no memory for now (ENOBUFS), a header that makes no sense (EINVAL).
        self.lost += 1
        return -errno

    cdef Py_ssize_t receive_frame(self, const iovec *parts, int count) noexcept nogil:
        cdef iovec vectors[MOST_PARTS]
        cdef const iovec *target = parts
        cdef int target_count = count
        cdef size_t room = total(parts, count)
        cdef size_t direct = room       # how much of it the call itself brings into its place
        cdef ssize_t done
        if self.waiting_bytes:
            if room < self.waiting_bytes:
                return -EMSGSIZE
            done = self.waiting_bytes
            self.waiting_bytes = 0
            scatter(self.scratch, done, parts, count)
            return self.took(done)
        if self.closed:
            return -ENOTCONN
        if room < MOST_BYTES:
            # The kernel does not tell that it has cut a frame: what is too long shows in a part after the guest's.
            if not self.has_scratch():
                return -ENOBUFS
            if count == MOST_PARTS:     # a call takes no more of them: it all comes by way of the scratch
                direct = target_count = 0
            memcpy(vectors, parts, target_count * sizeof(iovec))
            vectors[target_count].iov_base = self.scratch + direct
            vectors[target_count].iov_len = MOST_BYTES - direct
            target = vectors
            target_count += 1
        while True:
            self.calls += 1
            done = readv(self.fd, target, target_count)
            if done > 0:
                break
            if done < 0 and errno == EINTR:
                continue
            if done < 0 and errno == EAGAIN:
                return -EAGAIN
            self.closed = True  # the interface is gone
            return -ENOTCONN
        if <size_t>done > room:
            gather(self.scratch, direct, parts)
            self.waiting_bytes = done
            return -EMSGSIZE
        if direct < room:
            scatter(self.scratch, done, parts, count)
        return self.took(done)

    cdef Py_ssize_t took(self, Py_ssize_t size) noexcept nogil:
        self.received += 1
        self.received_bytes += size
        return size

    cdef bint has_scratch(self) noexcept nogil:
        if self.scratch == NULL:
            self.scratch = <uint8_t *>PyMem_RawMalloc(MOST_BYTES)
        return self.scratch != NULL

    cdef void drop_frame(self) noexcept nogil:
        if self.waiting_bytes:
            self.waiting_bytes = 0
            self.too_long += 1


cdef class StreamPort(Port):
    """A descriptor of a stream: each frame with its length in front of it."""

    def __dealloc__(self):
        PyMem_RawFree(self.incoming)
        PyMem_RawFree(self.outgoing)

    def connect(self, int fd):
        if self.incoming == NULL:
            self.incoming = <uint8_t *>PyMem_RawMalloc(BUFFER_BYTES)
            self.outgoing = <uint8_t *>PyMem_RawMalloc(BUFFER_BYTES)
            if self.incoming == NULL or self.outgoing == NULL:
                raise MemoryError
        Port.connect(self, fd)
        # What is left of another peer's is no part of this one's stream.
        self.in_begin = self.in_end = self.out_begin = self.out_end = 0
        self.drained = False

    @property
    def kept_bytes(self):
        """How much of what was sent waits for the other end."""
        return self.out_end - self.out_begin

    cdef Py_ssize_t send_frame(self, const iovec *parts, int count) noexcept nogil:
        cdef size_t size = total(parts, count)
        cdef size_t needed = size + LENGTH_BYTES
        cdef int n
        if self.closed:
            return -ENOTCONN
        if size > MOST_BYTES:
            self.lost += 1
            return -EMSGSIZE
        if size >= LARGE_BYTES and count < MOST_PARTS:
            if self.put_out() == 0:
                return self.send_at_once(parts, count, size)
        if BUFFER_BYTES - self.out_end < needed:
            self.put_out()
            if self.closed:
                return -ENOTCONN
            memmove(self.outgoing, self.outgoing + self.out_begin, self.out_end - self.out_begin)
            self.out_end -= self.out_begin
            self.out_begin = 0
            if BUFFER_BYTES - self.out_end < needed:
                return -EAGAIN
        put_length(self.outgoing + self.out_end, size)
        self.out_end += LENGTH_BYTES
        for n in range(count):
            memcpy(self.outgoing + self.out_end, parts[n].iov_base, parts[n].iov_len)
            self.out_end += parts[n].iov_len
        self.sent += 1
        self.sent_bytes += size
        return size

    cdef Py_ssize_t send_at_once(self, const iovec *parts, int count, size_t size) noexcept nogil:
        """A large frame, out of guest memory; nothing else is kept. What the other end does not take of it is kept."""
        cdef iovec vectors[MOST_PARTS + 1]
        cdef uint8_t length[LENGTH_BYTES]
        cdef msghdr message
        cdef ssize_t done
        cdef size_t skip, part
        cdef int n
        put_length(length, size)
        vectors[0].iov_base = length
        vectors[0].iov_len = LENGTH_BYTES
        memcpy(&vectors[1], parts, count * sizeof(iovec))
        memset(&message, 0, sizeof(message))
        message.msg_iov = vectors
        message.msg_iovlen = count + 1
        while True:
            self.calls += 1
            done = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if done >= 0 or errno != EINTR:
                break
        if done < 0:
            if errno == EAGAIN:
                return -EAGAIN
            if errno == ENOBUFS:
                self.lost += 1
                return -ENOBUFS
            self.closed = True
            return -ENOTCONN
        skip = done
        self.out_begin = self.out_end = 0
        for n in range(count + 1):
            part = vectors[n].iov_len
            if skip >= part:
                skip -= part
                continue
            memcpy(self.outgoing + self.out_end, <uint8_t *>vectors[n].iov_base + skip, part - skip)
            self.out_end += part - skip
            skip = 0
        self.sent += 1
        self.sent_bytes += size
        return size

    cdef int put_out(self) noexcept nogil:
        """What is kept, as far as the other end takes it. 0 where that was all."""
        cdef ssize_t done
        while self.out_begin != self.out_end:
            self.calls += 1
            done = send(self.fd, self.outgoing + self.out_begin, self.out_end - self.out_begin,
                        MSG_DONTWAIT | MSG_NOSIGNAL)
            if done >= 0:
                self.out_begin += done
            elif errno == EAGAIN or errno == ENOBUFS:
                return -EAGAIN
            elif errno != EINTR:
                self.closed = True
                return -ENOTCONN
        self.out_begin = self.out_end = 0
        return 0

    cdef int flush_frames(self) noexcept nogil:
        return -ENOTCONN if self.closed else self.put_out()

    cdef Py_ssize_t receive_frame(self, const iovec *parts, int count) noexcept nogil:
        cdef size_t size
        cdef ssize_t done
        cdef uint8_t *frame
        while True:
            if self.in_end - self.in_begin >= LENGTH_BYTES:
                frame = self.incoming + self.in_begin
                size = get_length(frame)
                if size > MOST_BYTES:
                    self.closed = True  # no frame is so long: whatever follows is none either
                    return -EPROTO
                if self.in_end - self.in_begin - LENGTH_BYTES >= size:
                    if size:
                        break
                    self.in_begin += LENGTH_BYTES
                    continue
            if self.closed:
                return -ENOTCONN
            if self.drained:
                # The last read took all there was: epoll tells of more.
                self.drained = False
                return -EAGAIN
            if self.in_begin:
                memmove(self.incoming, self.incoming + self.in_begin, self.in_end - self.in_begin)
                self.in_end -= self.in_begin
                self.in_begin = 0
            self.calls += 1
            done = recv(self.fd, self.incoming + self.in_end, BUFFER_BYTES - self.in_end, MSG_DONTWAIT)
            if done > 0:
                self.in_end += done
                self.drained = self.in_end < BUFFER_BYTES
            elif done < 0 and errno == EAGAIN:
                return -EAGAIN
            elif done == 0 or errno != EINTR:
                self.closed = True
                return -ENOTCONN
        if total(parts, count) < size:
            self.waiting_bytes = size
            return -EMSGSIZE
        scatter(frame + LENGTH_BYTES, size, parts, count)
        self.in_begin += LENGTH_BYTES + size
        self.waiting_bytes = 0
        self.received += 1
        self.received_bytes += size
        return size

    cdef void drop_frame(self) noexcept nogil:
        if self.waiting_bytes:
            self.in_begin += LENGTH_BYTES + self.waiting_bytes
            self.waiting_bytes = 0
            self.too_long += 1


cdef inline void put_length(uint8_t *at, size_t size) noexcept nogil:
    at[0] = (size >> 24) & 0xFF
    at[1] = (size >> 16) & 0xFF
    at[2] = (size >> 8) & 0xFF
    at[3] = size & 0xFF


cdef inline size_t get_length(const uint8_t *at) noexcept nogil:
    return <uint32_t>at[0] << 24 | <uint32_t>at[1] << 16 | <uint32_t>at[2] << 8 | at[3]
