"""The exit profiler: for every exit reason, port or page, and direction, how often and how long in user space.

Always on. The run loop pays two rdtsc and a handful of stores to lines that stay in the cache.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from pyvmm.kvm.exits import exit_name

DIRECTIONS = ("in", "out", "")
_IO, _MMIO = "IO", "MMIO"


class ExitStat:
    """One row: an exit reason, its port (IO) or page (MMIO), a direction, and what it cost in user space.

    Times are nanoseconds from leaving KVM_RUN to entering it again: whole ones in what ``Machine.exit_stats`` gives.
    ``histogram_ns`` is [(upper bound, count)]. ``region`` names who answers there, more than one where they share a
    page; None where nobody does, and for exits that have no address.
    """

    __slots__ = ("reason", "address", "direction", "count", "sum_ns", "min_ns", "max_ns", "histogram_ns", "region")

    def __init__(self, reason, address, direction, count, sum_ns, min_ns, max_ns, histogram_ns, region=None):
        self.reason = reason
        self.address = address
        self.direction = direction
        self.count = count
        self.sum_ns = sum_ns
        self.min_ns = min_ns
        self.max_ns = max_ns
        self.histogram_ns = histogram_ns
        self.region = region

    @property
    def mean_ns(self):
        mean_ns = self.sum_ns / self.count if self.count else 0.0
        return round(mean_ns) if isinstance(self.sum_ns, int) else mean_ns

    @property
    def median_ns(self):
        """The upper bound of the histogram's middle bucket: right within a factor of two."""
        seen = 0
        for bound, count in self.histogram_ns:
            seen += count
            if 2 * seen >= self.count:
                return bound
        return 0.0

    def __repr__(self):
        where = f" {self.address:#x}" if self.address is not None else ""
        return f"<ExitStat {self.reason}{where} {self.direction} x{self.count}, {self.mean_ns:.0f} ns>"


cdef class ExitStats:
    """The counters of one vCPU. Reading them while it runs is safe; a row may then be one exit ahead in part."""

    def __cinit__(self):
        cdef void *p
        if posix_memalign(&p, 64, STATS_ENTRIES * sizeof(exit_stat_t)) != 0:
            raise MemoryError
        self.entries = <exit_stat_t *>p
        self.index = <uint16_t *>calloc(STATS_INDEX, sizeof(uint16_t))
        if self.index == NULL:
            raise MemoryError
        self.clear()

    def __dealloc__(self):
        free(self.entries)
        free(self.index)

    def clear(self):
        """Start from nothing. The vCPU must be parked."""
        cdef int i
        memset(self.index, 0, STATS_INDEX * sizeof(uint16_t))
        # Entry by entry when it is taken: pages of entries never used are never touched.
        memset(self.entries, 0, sizeof(exit_stat_t))
        self.entries[0].key = <uint64_t>-1
        self.entries[0].ticks_min = <uint64_t>-1
        self.used = 1
        self.first_entry = self.first_exit = 0
        for i in range(8):
            self.recent[i] = &self.entries[0]

    cdef void enter(self) noexcept nogil:
        """The guest is about to be entered."""
        if not self.first_entry:
            self.first_entry = rdtsc()

    cdef exit_stat_t *slot(self, uint64_t key) noexcept nogil:
        """The entry of ``key``, made where it is new; entry 0, the rest, where there is no room."""
        cdef exit_stat_t *stat = self.recent[(key ^ (key >> 48)) & 7]
        cdef uint32_t at
        if stat.key == key:
            return stat
        at = <uint32_t>((key * 0x9E3779B97F4A7C15ull) >> 54) & (STATS_INDEX - 1)
        while self.index[at]:
            stat = &self.entries[self.index[at]]
            if stat.key == key:
                self.recent[(key ^ (key >> 48)) & 7] = stat
                return stat
            at = (at + 1) & (STATS_INDEX - 1)
        if self.used == STATS_ENTRIES:
            return &self.entries[0]
        if not self.first_exit:
            self.first_exit = rdtsc()
        stat = &self.entries[self.used]
        memset(stat, 0, sizeof(exit_stat_t))
        stat.key = key
        stat.ticks_min = <uint64_t>-1
        self.index[at] = self.used
        self.used += 1
        self.recent[(key ^ (key >> 48)) & 7] = stat
        return stat

    def first_exit_ns(self, double tsc_khz):
        """From the first KVM_RUN to the first exit, nanoseconds: None before that."""
        return round((self.first_exit - self.first_entry) * 1e6 / tsc_khz) if self.first_exit else None

    def since_first_exit_ns(self, double tsc_khz):
        """How long ago the first exit was, nanoseconds: None before that."""
        return round((rdtsc() - self.first_exit) * 1e6 / tsc_khz) if self.first_exit else None

    def rows(self, double tsc_khz):
        """[ExitStat], most time first."""
        cdef exit_stat_t *stat
        cdef int i, n
        cdef double ns = 1e6 / tsc_khz
        result = []
        for i in range(self.used):
            stat = &self.entries[i]
            if not stat.count:
                continue
            reason = exit_name(stat.key >> 56) if i else "other"
            address = stat.key & 0xFFFFFFFFFFFFULL
            address = address if reason == _IO else address << 12 if reason == _MMIO else None
            histogram = [((2 << n) * ns, stat.histogram[n]) for n in range(STATS_BUCKETS) if stat.histogram[n]]
            result.append(ExitStat(reason, address, DIRECTIONS[(stat.key >> 48) & 0xFF] if i else "", stat.count,
                                   stat.ticks_sum * ns, stat.ticks_min * ns, stat.ticks_max * ns, histogram))
        result.sort(key=lambda row: -row.sum_ns)
        return result


def merge(tables):
    """One table out of those of several vCPUs, in whole nanoseconds."""
    merged = {}
    for table in tables:
        for row in table:
            key = (row.reason, row.address, row.direction)
            if key not in merged:
                merged[key] = ExitStat(*key, 0, 0, round(row.min_ns), 0, [])
            total = merged[key]
            total.count += row.count
            total.sum_ns += round(row.sum_ns)
            total.min_ns = min(total.min_ns, round(row.min_ns))
            total.max_ns = max(total.max_ns, round(row.max_ns))
            buckets = dict(total.histogram_ns)
            for bound, count in row.histogram_ns:
                buckets[round(bound)] = buckets.get(round(bound), 0) + count
            total.histogram_ns = sorted(buckets.items())
    return sorted(merged.values(), key=lambda row: -row.sum_ns)


def format_table(rows, names=None):
    """The table of ``--exit-stats``. ``names`` maps (reason, address) to what stands for the region."""
    lines = [f"{'exit':<16} {'address':>10} {'':3} {'count':>9} {'mean ns':>8} {'min':>7} {'~median':>8} {'max':>9} "
             f"{'total ms':>9}  region"]
    for r in rows:
        address = f"{r.address:#x}" if r.address is not None else ""
        name = (names or {}).get((r.reason, r.address), r.region or "")
        lines.append(f"{r.reason:<16} {address:>10} {r.direction:3} {r.count:>9} {r.mean_ns:>8.0f} {r.min_ns:>7.0f} "
                     f"{r.median_ns:>8.0f} {r.max_ns:>9.0f} {r.sum_ns / 1e6:>9.2f}  {name}".rstrip())
    total = sum(r.count for r in rows)
    lines.append(f"{total} exits, {sum(r.sum_ns for r in rows) / 1e6:.1f} ms in user space")
    return "\n".join(lines)
