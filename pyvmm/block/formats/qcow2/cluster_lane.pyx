"""ClusterLane: the lane of a disk in qcow2. What its map knows to be data, zeros or the backing file's is moved at once,
by the lanes of the files; all else is asked of the backend, as lane.pyx says.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from pyvmm.atomic cimport ATOMIC_SEQ_CST, atomic_load
from pyvmm.block.formats.qcow2.cluster_map cimport MAP_ASK, MAP_HERE, MAP_ZEROS, ClusterMap
from pyvmm.block.lane cimport LANE_READ, LANE_WRITE, Lane, iovec

cdef extern from * nogil:
    uint64_t atomic_load_size "__atomic_load_n" (uint64_t *, int)
    int atomic_add "__atomic_add_fetch" (int *, int, int)
    long long atomic_add_64 "__atomic_add_fetch" (long long *, long long, int)

cdef enum:
    MOST_PIECES = 1024


cdef struct cursor_t:
    const iovec *iov
    int count
    int index
    size_t into


cdef int cut(cursor_t *cursor, uint64_t length, iovec *out) noexcept nogil:
    """The next ``length`` bytes, as pieces of their own: how many. The cursor goes on behind them."""
    cdef int n = 0
    cdef size_t part
    while length and cursor.index < cursor.count:
        part = cursor.iov[cursor.index].iov_len - cursor.into
        if part > length:
            part = length
        if part:
            out[n].iov_base = <uint8_t *>cursor.iov[cursor.index].iov_base + cursor.into
            out[n].iov_len = part
            n += 1
        length -= part
        cursor.into += part
        if cursor.into == cursor.iov[cursor.index].iov_len:
            cursor.index += 1
            cursor.into = 0
    return n


cdef class ClusterLane(Lane):
    """Of the disk that ``map`` maps, whose data is in the file of ``file``. ``below``: the lane to the backing file's
    disk, of which ``below_bytes`` are there; None and 0 without one. Made as Lane(-1, 0, 0, size).
    """

    cdef ClusterMap map
    cdef Lane file
    cdef Lane below
    cdef uint64_t below_bytes

    def attach(self, ClusterMap map not None, Lane file not None, Lane below, uint64_t below_bytes):
        self.map = map
        self.file = file
        self.below = below
        self.below_bytes = below_bytes

    cdef ssize_t transfer(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil:
        cdef ssize_t done = -EAGAIN
        cdef int busy = atomic_add(&self.busy, 1, ATOMIC_SEQ_CST)
        cdef uint64_t size = atomic_load_size(&self.size, ATOMIC_SEQ_CST)
        if atomic_load(&self.granted, ATOMIC_SEQ_CST) >> kind & 1 and at <= size and length <= size - at \
                and count <= MOST_PIECES:
            if busy > self.most_busy:
                self.most_busy = busy
            if self.map.enter():
                done = self.mapped(kind, at, iov, count, length)
                self.map.leave()
                if done > 0 and kind == LANE_WRITE:
                    atomic_add_64(<long long *>&self._writes, 1, ATOMIC_SEQ_CST)
        atomic_add(&self.busy, -1, ATOMIC_SEQ_CST)
        return done

    cdef ssize_t mapped(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil:
        """As ``transfer``; one is inside of the map."""
        cdef uint64_t host = 0, run = 0
        cdef int found = self.map.find(kind == LANE_WRITE, at, length, &host, &run)
        if found == MAP_HERE and run == length:
            return self.file.transfer(kind, host, iov, count, length)
        if found == MAP_ASK:
            return -EAGAIN
        return self.piecewise(kind, at, iov, count, length)

    cdef ssize_t piecewise(self, int kind, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil:
        """Where the disk's bytes are not all in one place."""
        cdef iovec[MOST_PIECES] pieces
        cdef cursor_t cursor
        cdef uint64_t host = 0, run = 0, done = 0
        cdef ssize_t moved
        cdef int found, n
        cursor.iov = iov
        cursor.count = count
        cursor.index = 0
        cursor.into = 0
        while done < length:
            found = self.map.find(kind == LANE_WRITE, at + done, length - done, &host, &run)
            if found == MAP_ASK:
                break
            n = cut(&cursor, run, pieces)
            if found == MAP_HERE:
                moved = self.file.transfer(kind, host, pieces, n, run)
            elif found == MAP_ZEROS:
                moved = self.zeros(pieces, n, 0)
            else:
                moved = self.from_below(at + done, pieces, n, run)
            if moved > 0:
                done += moved
            if moved != <ssize_t>run:
                break
        return <ssize_t>done if done else -EAGAIN

    cdef ssize_t zeros(self, const iovec *iov, int count, uint64_t skip) noexcept nogil:
        """All but the first ``skip`` bytes: how many there are in all."""
        cdef uint64_t part, total = 0
        cdef int n
        for n in range(count):
            part = iov[n].iov_len
            if total + part > skip:
                if total >= skip:
                    memset(iov[n].iov_base, 0, part)
                else:
                    memset(<uint8_t *>iov[n].iov_base + (skip - total), 0, part - (skip - total))
            total += part
        return total

    cdef ssize_t from_below(self, uint64_t at, const iovec *iov, int count, uint64_t length) noexcept nogil:
        """What the backing file has; behind its end are zeros."""
        cdef ssize_t moved
        cdef uint64_t there
        if at >= self.below_bytes:
            return self.zeros(iov, count, 0)
        there = self.below_bytes - at
        if self.below is None or there < length:
            return -EAGAIN
        return self.below.transfer(LANE_READ, at, iov, count, length)
