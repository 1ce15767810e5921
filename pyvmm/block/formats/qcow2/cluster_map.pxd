from libc.stdint cimport uint64_t

# What is at a place of the disk.
cdef enum:
    MAP_HERE            # data, at a host offset
    MAP_ZEROS
    MAP_BELOW           # the backing file's, or zeros where there is none
    MAP_ASK             # whatever else: Python knows


cdef struct slot_t:
    const uint64_t *table       # big-endian, as in the file; NULL: not in memory. Atomic
    int used                    # since somebody looked for one to be given up; atomic
    int trusted                 # no entry of it leads to one of the image's own tables


cdef class ClusterMap:
    cdef slot_t *slots
    cdef uint64_t count
    cdef int bits
    cdef int table_bits         # of an entry's number in its table
    cdef bint external
    cdef uint64_t file_end      # where the file with the data ends; atomic
    cdef int inside             # readers; atomic
    cdef int shut               # none may enter; atomic
    cdef bint frozen
    cdef dict held
    cdef uint64_t *metadata     # clusters of tables, sorted
    cdef uint64_t metadata_count, metadata_room
    cdef bint enter(self) noexcept nogil
    cdef void leave(self) noexcept nogil
    cdef int kind_of(self, uint64_t entry, bint write, bint trusted, uint64_t cluster, uint64_t *host) noexcept nogil
    cdef int find(self, bint write, uint64_t at, uint64_t length, uint64_t *host, uint64_t *run) noexcept nogil
    cdef uint64_t place_of(self, uint64_t host) noexcept nogil
    cdef bint in_metadata(self, uint64_t host) noexcept nogil
