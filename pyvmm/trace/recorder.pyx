"""Recorder: the rings of one machine's trace, one for each thread that records, and the way from them into a file.

A ring has one thread that writes and one that reads: ``drain`` takes what is there and writes it to the file, without
the GIL. A thread that finds its ring full drops its record and counts it; nobody ever waits. Which ring is a thread's
own it knows by itself (a thread-local, good for one trace); it looks among the recorder's when it records for the first
time, and takes over one whose thread has ended. So memory is bounded: ``threads`` rings, made when they are wanted.

What is recorded is 32 bytes: a TSC value, then in one word the kind (8 bits), the source (16) and a duration in ticks
(40, the longest 6 minutes at 3 GHz), and two words by the kind (format.py).
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EINTR, ESRCH, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from pyvmm.device cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, \
    pthread_mutex_unlock
from pyvmm.trace.tap cimport TRACE_THREAD, trace_now, trace_tap_t

cdef extern from * nogil:
    """
    #include <signal.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>

    /* The ring that the calling thread records to, of the trace with that number. */
    static __thread unsigned long pyvmm_trace_session;
    static __thread void *pyvmm_trace_ring;

    static int pyvmm_trace_tid(void) { return (int)syscall(SYS_gettid); }
    static void pyvmm_trace_name(char *name) { prctl(PR_GET_NAME, name); }
    static int pyvmm_trace_gone(int tid)
    {
        return syscall(SYS_tgkill, getpid(), tid, 0) < 0 && errno == ESRCH;
    }
    """
    unsigned long pyvmm_trace_session
    void *pyvmm_trace_ring
    int pyvmm_trace_tid()
    void pyvmm_trace_name(char *)
    bint pyvmm_trace_gone(int)
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int, const iovec *, int)
    uint64_t load_u64 "__atomic_load_n" (uint64_t *, int)
    void store_u64 "__atomic_store_n" (uint64_t *, uint64_t, int)
    uint64_t add_u64 "__atomic_add_fetch" (uint64_t *, uint64_t, int)
    int RELAXED "__ATOMIC_RELAXED"
    int ACQUIRE "__ATOMIC_ACQUIRE"
    int RELEASE "__ATOMIC_RELEASE"
    int SEQ_CST "__ATOMIC_SEQ_CST"

# Records in a ring: 512 KiB, 40 ms of what the fastest exits there are can fill it with.
RECORDS = 1 << 14
RECORD_BYTES = sizeof(record_t)
CHUNK_BYTES = sizeof(chunk_t)
CHUNK_MAGIC = MAGIC
CHUNK_RECORDS = KIND_RECORDS

cdef enum:
    MAGIC = 0x4b4e4843          # "CHNK"
    KIND_RECORDS = 1
    MOST_TICKS_BITS = 40


cdef struct record_t:
    uint64_t since
    uint64_t what           # ticks << 24 | source << 8 | kind
    uint64_t a
    uint64_t b


cdef struct ring_t:
    # The recording thread's.
    uint64_t head
    uint64_t room_until     # the head that the ring is full at, as far as it has looked
    uint64_t dropped
    record_t *records
    uint64_t mask
    int owner               # the thread's number; 0: nobody's
    uint64_t unused[2]
    # The reader's, on a cache line of its own.
    uint64_t tail
    uint64_t told_dropped


cdef struct recorder_t:
    uint64_t session        # 0: nobody traces
    uint64_t homeless       # records of threads that found no ring
    pthread_mutex_t mutex   # of the rings' owners
    ring_t **rings
    int most
    int count
    uint64_t size


# What stands in front of a chunk of the file (format.py).
cdef struct chunk_t:
    uint32_t magic
    uint16_t kind
    uint16_t ring
    uint32_t size
    uint32_t dropped
    uint64_t tsc
    uint64_t monotonic_ns


cdef uint64_t sessions = 0


cdef inline void put(ring_t *ring, int kind, int source, uint64_t since, uint64_t ticks, uint64_t a,
                     uint64_t b) noexcept nogil:
    cdef record_t *record
    cdef uint64_t head = ring.head
    if head == ring.room_until:
        ring.room_until = load_u64(&ring.tail, ACQUIRE) + ring.mask + 1
        if head == ring.room_until:
            store_u64(&ring.dropped, ring.dropped + 1, RELAXED)
            return
    if ticks >> MOST_TICKS_BITS:
        ticks = (<uint64_t>1 << MOST_TICKS_BITS) - 1
    record = &ring.records[head & ring.mask]
    record.since = since
    record.what = ticks << 24 | <uint64_t>source << 8 | <uint64_t>kind
    record.a = a
    record.b = b
    store_u64(&ring.head, head + 1, RELEASE)


cdef void tap_record(trace_tap_t *tap, int kind, uint64_t since, uint64_t ticks, uint64_t a,
                     uint64_t b) noexcept nogil:
    """What a tap calls."""
    cdef recorder_t *recorder = <recorder_t *>tap.recorder
    cdef uint64_t session = load_u64(&recorder.session, RELAXED)
    cdef ring_t *ring
    if not session:
        return                  # it has just ended
    if pyvmm_trace_session != session:
        find_ring(recorder, session)
    ring = <ring_t *>pyvmm_trace_ring
    if ring == NULL:
        add_u64(&recorder.homeless, 1, RELAXED)
        return
    put(ring, kind, tap.source, since, ticks, a, b)


cdef void find_ring(recorder_t *recorder, uint64_t session) noexcept nogil:
    """The calling thread's ring for this trace; none where there are too many threads, or is no memory."""
    global pyvmm_trace_session, pyvmm_trace_ring
    cdef int tid = pyvmm_trace_tid()
    cdef ring_t *found = NULL
    cdef uint64_t[2] name
    cdef int n
    pthread_mutex_lock(&recorder.mutex)
    for n in range(recorder.count):
        if recorder.rings[n].owner == tid:
            found = recorder.rings[n]
            break
    if found == NULL:
        for n in range(recorder.count):
            if not recorder.rings[n].owner or pyvmm_trace_gone(recorder.rings[n].owner):
                found = recorder.rings[n]
                break
    if found == NULL and recorder.count < recorder.most:
        found = new_ring(recorder.size)
        if found != NULL:
            recorder.rings[recorder.count] = found
            recorder.count += 1
    if found != NULL:
        found.owner = tid
    pthread_mutex_unlock(&recorder.mutex)
    pyvmm_trace_session = session
    pyvmm_trace_ring = found
    if found != NULL:
        memset(name, 0, sizeof(name))
        pyvmm_trace_name(<char *>name)
        put(found, TRACE_THREAD, 0, trace_now(), <uint64_t>tid, name[0], name[1])


cdef ring_t *new_ring(uint64_t size) noexcept nogil:
    cdef void *p
    cdef ring_t *ring
    if posix_memalign(&p, 64, sizeof(ring_t)) != 0:
        return NULL
    ring = <ring_t *>p
    memset(ring, 0, sizeof(ring_t))
    if posix_memalign(&p, 64, size * sizeof(record_t)) != 0:
        free(ring)
        return NULL
    ring.records = <record_t *>p
    ring.mask = size - 1
    ring.room_until = size
    return ring


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef int write_whole(int fd, iovec *pieces, int count) noexcept nogil:
    """All of it, however the kernel cuts it: 0, or an errno."""
    cdef ssize_t done
    while count:
        done = writev(fd, pieces, count)
        if done < 0:
            if errno == EINTR:
                continue
            return errno
        while count and <size_t>done >= pieces.iov_len:
            done -= pieces.iov_len
            pieces += 1
            count -= 1
        if count:
            pieces.iov_base = <char *>pieces.iov_base + done
            pieces.iov_len -= done
    return 0


cdef class Recorder:
    """Rings for ``threads`` threads, of ``records`` each (a power of two). Nothing is recorded before ``start``.

    ``start``, ``stop`` and ``drain`` are one thread's at a time; taps are made by it too.
    """

    cdef recorder_t c
    cdef readonly uint64_t recorded
    cdef uint64_t lost

    def __cinit__(self, int threads, uint64_t records=RECORDS):
        if threads < 1 or records < 2 or records & (records - 1):
            raise ValueError("a recorder of no thread, or with rings that are no power of two long")
        pthread_mutex_init(&self.c.mutex, NULL)
        self.c.most = threads
        self.c.size = records
        self.c.rings = <ring_t **>calloc(threads, sizeof(ring_t *))
        if self.c.rings == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int n
        for n in range(self.c.count):
            free(self.c.rings[n].records)
            free(self.c.rings[n])
        free(self.c.rings)
        pthread_mutex_destroy(&self.c.mutex)

    @property
    def rings(self):
        """How many threads have one."""
        return self.c.count

    @property
    def dropped(self):
        """How many records found no room, since the start."""
        cdef uint64_t dropped = load_u64(&self.c.homeless, RELAXED)
        cdef int n
        for n in range(self.c.count):
            dropped += load_u64(&self.c.rings[n].dropped, RELAXED)
        return dropped - self.lost

    def start(self):
        """What taps are told is recorded from now on. What an earlier trace left in the rings is not."""
        global sessions
        cdef ring_t *ring
        cdef int n
        for n in range(self.c.count):
            ring = self.c.rings[n]
            store_u64(&ring.tail, load_u64(&ring.head, ACQUIRE), RELEASE)
            ring.told_dropped = load_u64(&ring.dropped, RELAXED)
        self.recorded = self.lost = 0
        self.lost = self.dropped
        store_u64(&self.c.session, add_u64(&sessions, 1, SEQ_CST), SEQ_CST)

    def stop(self):
        """Nothing is recorded any more, but for what a thread is in the middle of. ``drain`` brings the rest."""
        store_u64(&self.c.session, 0, SEQ_CST)

    def drain(self, int fd):
        """Write all that is there now to ``fd``, one chunk a ring: how many bytes. OSError where it takes no more."""
        cdef uint64_t size = 0
        cdef int n, failed
        for n in range(self.c.count):
            with nogil:
                failed = self.drain_ring(fd, n, &size)
            if failed:
                raise OSError(failed, "trace")
        return size

    cdef int drain_ring(self, int fd, int number, uint64_t *size) noexcept nogil:
        cdef ring_t *ring = self.c.rings[number]
        cdef uint64_t tail = ring.tail
        cdef uint64_t head = load_u64(&ring.head, ACQUIRE)
        cdef uint64_t dropped = load_u64(&ring.dropped, RELAXED)
        cdef uint64_t count = head - tail, at = tail & ring.mask
        cdef uint64_t first = min(count, ring.mask + 1 - at)
        cdef chunk_t chunk
        cdef iovec[3] pieces
        cdef int failed
        if not count and dropped == ring.told_dropped:
            return 0
        chunk.magic = MAGIC
        chunk.kind = KIND_RECORDS
        chunk.ring = <uint16_t>number
        chunk.size = <uint32_t>(count * sizeof(record_t))
        chunk.dropped = <uint32_t>min(dropped - ring.told_dropped, 0xffffffffULL)
        chunk.tsc = trace_now()
        chunk.monotonic_ns = monotonic_ns()
        pieces[0].iov_base = &chunk
        pieces[0].iov_len = sizeof(chunk_t)
        pieces[1].iov_base = &ring.records[at]
        pieces[1].iov_len = first * sizeof(record_t)
        pieces[2].iov_base = ring.records
        pieces[2].iov_len = (count - first) * sizeof(record_t)
        failed = write_whole(fd, pieces, 3)
        if not failed:
            ring.told_dropped = dropped
            store_u64(&ring.tail, head, RELEASE)
            self.recorded += count
            size[0] += sizeof(chunk_t) + chunk.size
        return failed

    def tap(self, int source):
        """A Tap by which ``source`` records."""
        return Tap(self, source)


cdef class Tap:
    """A place of records: whoever is traced keeps it for as long as it lives. In Python it is told by ``mark``."""

    cdef trace_tap_t c
    cdef Recorder recorder
    cdef readonly object capsule

    def __cinit__(self, Recorder recorder not None, int source):
        self.recorder = recorder
        self.c.record = tap_record
        self.c.recorder = &recorder.c
        self.c.source = <uint16_t>min(max(source, 0), 0xffff)
        self.capsule = PyCapsule_New(&self.c, "pyvmm.trace_tap", NULL)

    @property
    def source(self):
        return self.c.source

    @staticmethod
    def now():
        """The TSC, for ``since``."""
        return trace_now()

    def mark(self, int kind, a=0, b=0, uint64_t since=0):
        """Something has happened, or what began at ``since`` is over; whole numbers, of which 64 bits are kept."""
        cdef uint64_t now = trace_now()
        cdef uint64_t ticks = now - since if since and now > since else 0
        tap_record(&self.c, kind, since or now, ticks, a & 0xFFFF_FFFF_FFFF_FFFF, b & 0xFFFF_FFFF_FFFF_FFFF)


def clock_pair():
    """(TSC, CLOCK_MONOTONIC in ns), of one moment."""
    cdef uint64_t before = trace_now()
    cdef int64_t now_ns = monotonic_ns()
    cdef uint64_t after = trace_now()
    return before + (after - before) // 2, now_ns
