# The exit profiler's counters: written by one vCPU thread in the run loop, in C, on every exit.

from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "<x86intrin.h>" nogil:
    uint64_t rdtsc "__rdtsc" ()

cdef extern from * nogil:
    int clzll "__builtin_clzll" (unsigned long long)

cdef enum:
    STATS_BUCKETS = 32
    STATS_INDEX = 1024      # a power of two, twice the entries
    STATS_ENTRIES = 512

cdef enum exit_direction:
    DIRECTION_IN = 0
    DIRECTION_OUT = 1
    DIRECTION_NONE = 2


cdef struct exit_stat_t:
    uint64_t key            # reason << 56 | direction << 48 | port or page
    uint64_t count
    uint64_t ticks_sum      # TSC ticks from leaving KVM_RUN to entering it again
    uint64_t ticks_min
    uint64_t ticks_max
    uint64_t unused[3]      # the histogram starts on a cache line of its own: no load of it is waited for
    uint64_t histogram[STATS_BUCKETS]   # [n]: 2**n <= ticks < 2**(n+1)


cdef inline uint64_t exit_key(uint32_t reason, int direction, uint64_t where) noexcept nogil:
    return (<uint64_t>reason << 56) | (<uint64_t>direction << 48) | (where & 0xFFFFFFFFFFFFULL)


cdef inline void exit_stat_add(exit_stat_t *stat, uint64_t ticks) noexcept nogil:
    cdef int bucket = 63 - clzll(ticks | 1)
    stat.count += 1
    stat.ticks_sum += ticks
    if ticks < stat.ticks_min:
        stat.ticks_min = ticks
    if ticks > stat.ticks_max:
        stat.ticks_max = ticks
    stat.histogram[bucket if bucket < STATS_BUCKETS else STATS_BUCKETS - 1] += 1


cdef class ExitStats:
    cdef exit_stat_t *entries       # [0] takes what finds no room
    cdef int used
    cdef uint16_t *index            # open addressing: hash of a key -> entry number, 0 free
    cdef exit_stat_t *recent[8]     # by the key's low bits: the ports a guest hammers are found at once
    cdef uint64_t first_entry       # TSC before the first KVM_RUN, and after the first exit; 0 before that
    cdef uint64_t first_exit
    cdef void enter(self) noexcept nogil
    cdef exit_stat_t *slot(self, uint64_t key) noexcept nogil
