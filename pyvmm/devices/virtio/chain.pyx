"""Chain: buffers that a driver has lent to a device, in the pieces in which it gave them. OASIS virtio 1.2, 2.6.

The pieces are guest memory, which the driver may write at any moment; where they are and how long does not change any
more. Compiled code has chains as ``vq_chain``, Python as Chain: its views go straight to preadv and the like.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize


cdef list chain_token(const vq_chain *chain):
    """What Chain.token gives."""
    cdef uint32_t n
    readable, writable = [], []
    for n in range(chain.n_total):
        pairs = readable if n < chain.n_readable else writable
        pairs += [chain.segs[n].gpa, chain.segs[n].len]
    return [[chain.id, chain.slots, chain.sequence], readable, writable]


cdef class Chain:
    """A chain of buffers, as it was when it was taken: first what the device reads, then what it may write."""

    def __cinit__(self):
        chain_init(&self.c)

    def __dealloc__(self):
        chain_free(&self.c)

    @property
    def readable_bytes(self):
        return self.c.readable_bytes

    @property
    def writable_bytes(self):
        return self.c.writable_bytes

    @property
    def readable(self):
        """Views of guest memory, in order: for pwritev and the like."""
        if self._readable is None:
            self._readable = self._views(0, self.c.n_readable)
        return self._readable

    @property
    def writable(self):
        """Views of guest memory, in order: for preadv and the like."""
        if self._writable is None:
            self._writable = self._views(self.c.n_readable, self.c.n_total)
        return self._writable

    cdef list _views(self, uint32_t first, uint32_t last):
        cdef uint32_t n
        cdef Segment segment
        views = []
        for n in range(first, last):
            segment = Segment.__new__(Segment)
            segment.chain = self
            segment.hva = self.c.segs[n].hva
            segment.size = self.c.segs[n].len
            segment.readonly = n < self.c.n_readable
            views.append(memoryview(segment))
        return views

    def read(self, uint64_t offset, uint64_t size):
        """A copy of ``size`` bytes from ``offset`` on of what the device reads; fewer where it ends."""
        if offset >= self.c.readable_bytes:
            return b""
        size = min(size, self.c.readable_bytes - offset)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        cdef char *to = PyBytes_AS_STRING(data)
        cdef uint64_t length
        cdef uint32_t n
        for n in range(self.c.n_readable):
            length = self.c.segs[n].len
            if offset >= length:
                offset -= length
                continue
            length = min(length - offset, size)
            memcpy(to, self.c.segs[n].hva + offset, length)
            to += length
            size -= length
            offset = 0
            if size == 0:
                break
        return data

    def write(self, uint64_t offset, data):
        """Copy ``data`` into what the device may write, from ``offset`` on; how much of it there was room for."""
        view = memoryview(data).cast("B")
        cdef uint64_t done = 0
        cdef uint64_t size = view.nbytes
        for piece in self.writable:
            length = piece.nbytes
            if offset >= length:
                offset -= length
                continue
            length = min(length - offset, size - done)
            piece[offset:offset + length] = view[done:done + length]
            done += length
            offset = 0
            if done == size:
                break
        return done

    @property
    def token(self):
        """What to save of a chain that can't be pushed before the state is saved: Virtqueue.retake takes it."""
        return chain_token(&self.c)


cdef class Segment:
    """Exports the bytes of one piece; keeps the chain, and with it the memory."""

    cdef Chain chain
    cdef uint8_t *hva
    cdef uint32_t size
    cdef bint readonly

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.hva, self.size, self.readonly, flags)
