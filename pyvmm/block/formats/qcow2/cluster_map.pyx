"""ClusterMap: the L2 tables of a qcow2 image that are in memory, as compiled code looks at them.

Tables are as in the file, big-endian. Whoever looks is inside (``enter``, ``leave``) and needs no lock and no GIL; who
takes a table away, or frees a cluster that was mapped, sees to it first that nobody is (``settle``): flag and count are
those of Dekker's algorithm, as in lane.pyx. Entries change one at a time, by one store.

A map answers only what is plain: whatever is compressed, has to be copied, or breaks the format's rules is the driver's.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memmove

from pyvmm.atomic cimport ATOMIC_RELAXED, ATOMIC_SEQ_CST, atomic_load, atomic_store

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int)

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline uint64_t big(uint64_t value) { return __builtin_bswap64(value); }
    static int compare_clusters(const void *a, const void *b)
    {
        uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
        return x < y ? -1 : x > y;
    }
    """
    uint64_t big(uint64_t)
    int compare_clusters(const void *, const void *)
    int atomic_add "__atomic_add_fetch" (int *, int, int)
    uint64_t atomic_load_64 "__atomic_load_n" (const uint64_t *, int)
    void atomic_store_64 "__atomic_store_n" (uint64_t *, uint64_t, int)
    const uint64_t *load_table "__atomic_load_n" (const uint64_t **, int)
    void store_table "__atomic_store_n" (const uint64_t **, const uint64_t *, int)

cdef enum:
    SETTLE_US = 20
    ENTRY_BITS = 3

cdef uint64_t COPIED = <uint64_t>1 << 63
cdef uint64_t COMPRESSED = <uint64_t>1 << 62
cdef uint64_t ZERO = 1
cdef uint64_t OFFSETS = <uint64_t>0x00FFFFFFFFFFFE00

HERE, ZEROS, BELOW, ASK = MAP_HERE, MAP_ZEROS, MAP_BELOW, MAP_ASK


cdef class ClusterMap:
    """Of ``count`` L2 tables, in clusters of 1 << ``cluster_bits`` bytes. ``external``: the data is in a file of its own,
    at the guest's offsets.
    """

    def __cinit__(self, uint64_t count, int cluster_bits, bint external=False):
        self.slots = <slot_t *>calloc(max(count, <uint64_t>1), sizeof(slot_t))
        if self.slots == NULL:
            raise MemoryError
        self.count = count
        self.bits = cluster_bits
        self.table_bits = cluster_bits - ENTRY_BITS
        self.external = external
        self.held = {}

    def __dealloc__(self):
        free(self.slots)
        free(self.metadata)

    # -- looking ---------------------------------------------------------------------------------------------

    cdef bint enter(self) noexcept nogil:
        """Whether one may look; then ``leave`` follows."""
        atomic_add(&self.inside, 1, ATOMIC_SEQ_CST)
        if atomic_load(&self.shut, ATOMIC_SEQ_CST):
            atomic_add(&self.inside, -1, ATOMIC_SEQ_CST)
            return False
        return True

    cdef void leave(self) noexcept nogil:
        atomic_add(&self.inside, -1, ATOMIC_SEQ_CST)

    cdef int kind_of(self, uint64_t entry, bint write, bint trusted, uint64_t cluster, uint64_t *host) noexcept nogil:
        """What an entry says of the disk's cluster at ``cluster``."""
        cdef uint64_t offset = entry & OFFSETS
        if entry & ~(COPIED | OFFSETS | ZERO):
            return MAP_ASK
        if entry & ZERO:
            return MAP_ASK if write else MAP_ZEROS
        if not entry & COPIED and (write or not offset):
            return MAP_ASK if write else MAP_BELOW
        if self.external:
            if offset != cluster:
                return MAP_ASK
        elif (not offset or offset & ((<uint64_t>1 << self.bits) - 1)
                or offset >= atomic_load_64(&self.file_end, ATOMIC_RELAXED) or (write and not trusted)):
            return MAP_ASK
        host[0] = offset
        return MAP_HERE

    cdef int find(self, bint write, uint64_t at, uint64_t length, uint64_t *host, uint64_t *run) noexcept nogil:
        """What is at the disk's byte ``at``, and how many bytes from there on, at most ``length``, are likewise: data
        that is contiguous in the file, or none. One is inside.
        """
        cdef uint64_t size = <uint64_t>1 << self.bits
        cdef uint64_t into = at & (size - 1)
        cdef uint64_t cluster = at >> self.bits
        cdef uint64_t per_table = <uint64_t>1 << self.table_bits
        cdef uint64_t index, place, next_host = 0
        cdef const uint64_t *table
        cdef slot_t *slot
        cdef int first = MAP_ASK, kind
        run[0] = 0
        if write and self.frozen:
            return MAP_ASK
        while run[0] < length:
            index = cluster >> self.table_bits
            if index >= self.count:
                break
            slot = &self.slots[index]
            table = load_table(&slot.table, ATOMIC_SEQ_CST)
            if table == NULL:
                break
            atomic_store(&slot.used, 1, ATOMIC_RELAXED)
            place = cluster & (per_table - 1)
            kind = self.kind_of(big(atomic_load_64(&table[place], ATOMIC_RELAXED)), write, slot.trusted,
                                cluster << self.bits, &next_host)
            if not run[0]:
                first = kind
                if kind == MAP_ASK:
                    break
                if kind == MAP_HERE:
                    host[0] = next_host + into
                run[0] = size - into
            elif kind != first or (kind == MAP_HERE and next_host != host[0] + run[0]):
                break
            else:
                run[0] += size
            cluster += 1
        if run[0] > length:
            run[0] = length
        return first

    def lookup(self, bint write, uint64_t at, uint64_t length):
        """The host offset of these bytes, where they are data and contiguous; else -1."""
        cdef uint64_t host = 0, run = 0
        cdef int kind
        if not self.enter():
            return -1
        kind = self.find(write, at, length, &host, &run)
        self.leave()
        return host if kind == MAP_HERE and run == length else -1

    def runs(self, bint write, uint64_t at, uint64_t length):
        """(HERE, ZEROS, BELOW or ASK; host offset; bytes) of the first bytes there."""
        cdef uint64_t host = 0, run = 0
        cdef int kind
        if not self.enter():
            return MAP_ASK, 0, 0
        kind = self.find(write, at, length, &host, &run)
        self.leave()
        return kind, host, run

    # -- changing: one at a time, the driver's lock is held ----------------------------------------------------------

    @property
    def end(self):
        """Where the file with the data ends: no cluster that begins behind is one."""
        return atomic_load_64(&self.file_end, ATOMIC_RELAXED)

    @end.setter
    def end(self, uint64_t end):
        atomic_store_64(&self.file_end, end, ATOMIC_RELAXED)

    def freeze(self):
        """Nothing is written by this map from now on."""
        self.frozen = True
        self.settle()

    def settle(self):
        """Return when whoever was inside has left."""
        atomic_store(&self.shut, 1, ATOMIC_SEQ_CST)
        with nogil:
            while atomic_load(&self.inside, ATOMIC_SEQ_CST):
                usleep(SETTLE_US)
        atomic_store(&self.shut, 0, ATOMIC_SEQ_CST)

    def put(self, uint64_t index, table, bint trusted):
        """``table``, a bytearray of one cluster, is the L2 table of this number from now on, in another one's place."""
        cdef Py_buffer buffer
        if index >= self.count or <uint64_t>len(table) != <uint64_t>1 << self.bits:
            raise IndexError(index)
        if index in self.held:
            self.drop(index)
        PyObject_GetBuffer(table, &buffer, PyBUF_SIMPLE)
        self.held[index] = (table, memoryview(table))  # the view keeps it where it is
        self.slots[index].trusted = trusted
        self.slots[index].used = 1
        store_table(&self.slots[index].table, <const uint64_t *>buffer.buf, ATOMIC_SEQ_CST)
        PyBuffer_Release(&buffer)

    def drop(self, uint64_t index):
        """That table is not in memory any more."""
        if index not in self.held:
            return
        store_table(&self.slots[index].table, NULL, ATOMIC_SEQ_CST)
        self.settle()
        self.held.pop(index)[1].release()

    def clear(self):
        for index in list(self.held):
            self.drop(index)

    def unused(self, uint64_t index):
        """Whether nobody has looked at that table since the last time this was asked."""
        cdef int used = atomic_load(&self.slots[index].used, ATOMIC_RELAXED)
        atomic_store(&self.slots[index].used, 0, ATOMIC_RELAXED)
        return not used

    def entry(self, uint64_t index, uint64_t place):
        cdef const uint64_t *table = self.slots[index].table
        if index >= self.count or table == NULL or place >> self.table_bits:
            raise IndexError(index, place)
        return big(atomic_load_64(&table[place], ATOMIC_RELAXED))

    def set_entry(self, uint64_t index, uint64_t place, uint64_t entry):
        cdef uint64_t *table = <uint64_t *>self.slots[index].table
        if index >= self.count or table == NULL or place >> self.table_bits:
            raise IndexError(index, place)
        atomic_store_64(&table[place], big(entry), ATOMIC_SEQ_CST)

    def resize(self, uint64_t count):
        """There are so many tables now, and not fewer than before. MemoryError."""
        cdef slot_t *slots = <slot_t *>calloc(max(count, <uint64_t>1), sizeof(slot_t))
        cdef slot_t *before = self.slots
        cdef uint64_t n
        if slots == NULL:
            raise MemoryError
        for n in range(min(count, self.count)):
            slots[n] = before[n]
        atomic_store(&self.shut, 1, ATOMIC_SEQ_CST)
        with nogil:
            while atomic_load(&self.inside, ATOMIC_SEQ_CST):
                usleep(SETTLE_US)
        self.slots = slots
        self.count = count
        atomic_store(&self.shut, 0, ATOMIC_SEQ_CST)
        free(before)

    # -- what may not be the guest's -------------------------------------------------------------------------

    def guard(self, clusters, tables):
        """``clusters`` (an array of 64-bit host offsets) and those that entries of ``tables`` (bytes of big-endian
        entries each) lead to are the image's own. MemoryError.
        """
        cdef Py_buffer buffer
        cdef uint64_t n = 0, k, total = len(clusters) + sum(len(table) >> ENTRY_BITS for table in tables)
        cdef uint64_t *found = <uint64_t *>malloc(max(total, <uint64_t>1) * sizeof(uint64_t))
        if found == NULL:
            raise MemoryError
        for cluster in clusters:
            found[n] = cluster
            n += 1
        for table in tables:
            PyObject_GetBuffer(table, &buffer, PyBUF_SIMPLE)
            for k in range(<uint64_t>buffer.len >> ENTRY_BITS):
                found[n] = big((<const uint64_t *>buffer.buf)[k]) & OFFSETS
                if found[n]:
                    n += 1
            PyBuffer_Release(&buffer)
        qsort(found, n, sizeof(uint64_t), compare_clusters)
        free(self.metadata)
        self.metadata = found
        self.metadata_count = n
        self.metadata_room = total

    def guard_also(self, uint64_t first, uint64_t count):
        """So are ``count`` clusters from host offset ``first`` on, which were free. MemoryError."""
        cdef uint64_t place = self.place_of(first), n, room
        cdef uint64_t *more
        if self.metadata_count + count > self.metadata_room:
            room = 2 * (self.metadata_count + count)
            more = <uint64_t *>realloc(self.metadata, room * sizeof(uint64_t))
            if more == NULL:
                raise MemoryError
            self.metadata = more
            self.metadata_room = room
        memmove(self.metadata + place + count, self.metadata + place,
                (self.metadata_count - place) * sizeof(uint64_t))
        for n in range(count):
            self.metadata[place + n] = first + (n << self.bits)
        self.metadata_count += count

    def leads_into(self, uint64_t first, uint64_t count):
        """Whether an entry for data, of a table that is in memory, leads to one of ``count`` clusters from there on. Others
        are looked at when they are loaded (``vet``).
        """
        cdef uint64_t end = first + (count << self.bits), index, n, entry, host
        cdef uint64_t per_table = <uint64_t>1 << self.table_bits
        cdef const uint64_t *table
        for index in self.held:
            table = self.slots[index].table
            for n in range(per_table):
                entry = big(table[n])
                host = entry & OFFSETS
                if first <= host < end and not entry & COMPRESSED:
                    return True
        return False

    cdef uint64_t place_of(self, uint64_t host) noexcept nogil:
        """Of the first of the image's own clusters that is not before this host offset."""
        cdef uint64_t low = 0, high = self.metadata_count, middle
        while low < high:
            middle = (low + high) >> 1
            if self.metadata[middle] < host:
                low = middle + 1
            else:
                high = middle
        return low

    cdef bint in_metadata(self, uint64_t host) noexcept nogil:
        cdef uint64_t place = self.place_of(host)
        return place < self.metadata_count and self.metadata[place] == host

    def guarded(self, uint64_t host):
        """Whether the cluster at this host offset is one of the image's own."""
        return self.in_metadata(host)

    def unguard(self, uint64_t host):
        """The cluster at this host offset is free."""
        cdef uint64_t n, kept = 0
        if not self.in_metadata(host):
            return
        for n in range(self.metadata_count):
            if self.metadata[n] != host:
                self.metadata[kept] = self.metadata[n]
                kept += 1
        self.metadata_count = kept

    def vet(self, table):
        """Whether no entry for data leads to a cluster of the image's own."""
        cdef Py_buffer buffer
        cdef uint64_t n, entry
        cdef bint fine = True
        PyObject_GetBuffer(table, &buffer, PyBUF_SIMPLE)
        for n in range(<uint64_t>buffer.len >> ENTRY_BITS):
            entry = big((<const uint64_t *>buffer.buf)[n])
            if entry & OFFSETS and not entry & COMPRESSED and self.in_metadata(entry & OFFSETS):
                fine = False
                break
        PyBuffer_Release(&buffer)
        return fine
