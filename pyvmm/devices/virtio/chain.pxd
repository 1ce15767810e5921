from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy


cdef struct vq_seg:
    # A piece of a chain: guest memory, checked when the chain was taken.
    uint8_t *hva
    uint64_t gpa
    uint32_t len


cdef enum:
    FEW_SEGS = 8


cdef struct vq_chain:
    # Copies of a chain's descriptors: first the ones that the device reads, then the ones that it writes.
    vq_seg few[FEW_SEGS]
    vq_seg *segs            # ``few``, or memory of its own
    uint32_t room           # how many there is room for
    uint32_t n_readable
    uint32_t n_total
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t id             # split: the head; packed: the buffer id
    uint16_t slots          # packed: how many descriptors of the ring it takes
    uint64_t sequence       # how many were taken before it


# Inline, for they are called for every chain, and another unit's functions are called by way of a pointer.

cdef inline void chain_empty(vq_chain *chain) noexcept nogil:
    """No pieces. What room it has it keeps."""
    chain.n_readable = chain.n_total = 0
    chain.readable_bytes = chain.writable_bytes = 0


cdef inline void chain_init(vq_chain *chain) noexcept nogil:
    """Before the first vq_take into it."""
    chain.segs = chain.few
    chain.room = FEW_SEGS
    chain_empty(chain)


cdef inline void chain_free(vq_chain *chain) noexcept nogil:
    if chain.segs != chain.few:
        free(chain.segs)
    chain_init(chain)


cdef inline void chain_move(vq_chain *target, vq_chain *source) noexcept nogil:
    """``target``, which has no memory of its own, becomes what ``source`` was; that is empty then."""
    target[0] = source[0]
    if source.segs == source.few:
        target.segs = target.few
    chain_init(source)


cdef inline int chain_add(vq_chain *chain, uint8_t *hva, uint64_t gpa, uint32_t size, bint write) noexcept nogil:
    """One more piece, readable ones first. -1 without memory."""
    cdef vq_seg *more
    if chain.n_total == chain.room:
        more = <vq_seg *>malloc(2 * chain.room * sizeof(vq_seg))
        if more == NULL:
            return -1
        memcpy(more, chain.segs, chain.n_total * sizeof(vq_seg))
        if chain.segs != chain.few:
            free(chain.segs)
        chain.segs = more
        chain.room *= 2
    chain.segs[chain.n_total].hva = hva
    chain.segs[chain.n_total].gpa = gpa
    chain.segs[chain.n_total].len = size
    chain.n_total += 1
    if write:
        chain.writable_bytes += size
    else:
        chain.n_readable += 1
        chain.readable_bytes += size
    return 0


cdef list chain_token(const vq_chain *chain)


cdef class Chain:
    cdef vq_chain c
    cdef readonly object queue          # the Virtqueue that it was taken from
    cdef readonly uint64_t generation   # the queue's, then
    cdef list _readable, _writable
    cdef list _views(self, uint32_t first, uint32_t last)
