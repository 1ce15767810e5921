"""A ring of the kernel's io_uring: requests go in without being waited for, results come out (io_uring(7)).

Two rings are shared with the kernel. In the submission queue we own the tail and the kernel owns the head, in the
completion queue it is the other way round. Whoever moves an index stores it with release order, after what it makes
visible; whoever reads the other side's index loads it with acquire order, before what it then reads. Nothing else
orders the two sides.

Each request has a slot, which holds the Python object that stands for it and the buffers of its memory: they stay
exported, so in their place, until the kernel is done with them. Slots are C memory, invisible to the garbage collector:
what is in the kernel's hands is kept, whatever becomes of the objects around it.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport pid_t
from posix.unistd cimport close, getpid, read

from pyvmm.atomic cimport (ATOMIC_ACQUIRE, ATOMIC_RELEASE, ATOMIC_SEQ_CST, atomic_exchange, atomic_load_u32, atomic_store,
                           atomic_store_u32)
from pyvmm.block.uring_abi cimport (
    URING_ENTER_GETEVENTS, URING_FEAT_NODROP, URING_FEAT_SINGLE_MMAP, URING_FEAT_SUBMIT_STABLE, URING_FSYNC_DATASYNC,
    URING_NR_ENTER, URING_NR_REGISTER, URING_NR_SETUP, URING_OFF_SQ_RING, URING_OFF_SQES, URING_OP_ASYNC_CANCEL,
    URING_OP_FSYNC, URING_OP_READ, URING_OP_READV, URING_OP_SUPPORTED, URING_OP_WRITE, URING_OP_WRITEV, URING_PROBE_OPS,
    URING_REGISTER_EVENTFD, URING_REGISTER_PROBE, URING_SQ_CQ_OVERFLOW, uring_cqe, uring_params, uring_probe, uring_sqe,
)

import os

from pyvmm.errors import StateError

cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef extern from "<unistd.h>" nogil:
    long syscall(long, ...)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *, size_t, int)
    int MADV_DONTFORK

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int, int)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
    int poll(pollfd *, unsigned long, int)
    short POLLIN

cdef enum:
    MOST_SEGMENTS = 1024                # UIO_MAXIOV
    MOST_BYTES = 0x7FFFF000             # MAX_RW_COUNT: no read or write moves more; the rest is a short transfer
    MOST_SLOTS = 65536
    RECHECK_MS = 100

cdef uint64_t CANCELS = <uint64_t>1 << 63   # in user_data: the completion of a cancellation itself, which has no slot
cdef uint32_t GENERATIONS = 0x7FFFFFFF

IOV_MAX = MOST_SEGMENTS

# What is asked of the kernel; Linux 5.6 was the first to have all of it.
cdef uint32_t NEEDED_FEATURES = URING_FEAT_SINGLE_MMAP | URING_FEAT_NODROP | URING_FEAT_SUBMIT_STABLE
cdef dict NEEDED_OPS = {
    "IORING_OP_READV": URING_OP_READV, "IORING_OP_WRITEV": URING_OP_WRITEV, "IORING_OP_FSYNC": URING_OP_FSYNC,
    "IORING_OP_ASYNC_CANCEL": URING_OP_ASYNC_CANCEL, "IORING_OP_READ": URING_OP_READ,
    "IORING_OP_WRITE": URING_OP_WRITE,
}


cdef struct Slot:
    PyObject *request
    Py_buffer one               # of a request with one piece of memory
    Py_buffer *buffers          # &one, or in memory of its own together with the vectors
    iovec *vectors
    unsigned int count
    uint32_t generation         # tells a request from the one that had the slot before
    int32_t result
    int next                    # in the list of free slots, or of those that are done
    bint busy
    bint done


cdef class Ring:
    """Ring(entries, depth): ``entries`` may be queued before a ``submit``, ``depth`` (as many, where it is 0) may be
    under way at a time.

    OSError, its ``filename`` the call or the operation that the kernel refused. One thread at a time: whoever shares a
    ring holds a lock; StateError where two are inside all the same, after ``close``, and in a child after a fork (the
    kernel's side of the ring is its parent's).
    """

    cdef readonly int fd
    cdef readonly int event_fd
    cdef readonly unsigned int entries
    cdef readonly unsigned int depth
    cdef readonly unsigned int in_flight
    cdef readonly unsigned int strays
    cdef pid_t pid
    cdef int inside
    cdef char *rings
    cdef size_t rings_bytes
    cdef uring_sqe *sqes
    cdef size_t sqes_bytes
    cdef uint32_t *sq_head
    cdef uint32_t *sq_tail
    cdef uint32_t *sq_flags
    cdef uint32_t sq_mask
    cdef uint32_t tail                  # of the submission queue; the kernel sees it at submit
    cdef uint32_t *cq_head
    cdef uint32_t *cq_tail
    cdef uint32_t cq_mask
    cdef uring_cqe *cqes
    cdef Slot *slots
    cdef int free
    cdef int first_done
    cdef int last_done
    cdef unsigned int waiting           # busy, and not done

    def __cinit__(self, unsigned int entries, unsigned int depth=0):
        cdef uring_params params
        cdef unsigned int n
        self.fd = self.event_fd = -1
        self.pid = getpid()
        memset(&params, 0, sizeof(params))
        self.fd = <int>syscall(URING_NR_SETUP, entries, &params)
        if self.fd < 0:
            refuse("io_uring_setup", errno)
        if params.features & NEEDED_FEATURES != NEEDED_FEATURES:
            refuse("IORING_FEAT_SUBMIT_STABLE", EOPNOTSUPP)
        self.check_operations()
        self.entries = params.sq_entries
        self.depth = depth or params.sq_entries
        if self.depth > MOST_SLOTS:
            raise ValueError(f"a ring of {self.depth} requests: {MOST_SLOTS} at most")
        self.map_rings(&params)
        self.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.event_fd < 0:
            refuse("eventfd", errno)
        if syscall(URING_NR_REGISTER, self.fd, URING_REGISTER_EVENTFD, &self.event_fd, 1) < 0:
            refuse("io_uring_register", errno)
        self.slots = <Slot *>PyMem_RawCalloc(self.depth, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        for n in range(self.depth):
            self.slots[n].next = <int>n + 1 if n + 1 < self.depth else -1
        self.free = 0
        self.first_done = self.last_done = -1

    def __dealloc__(self):
        if self.slots != NULL and self.in_flight and self.pid == getpid() and self.fd >= 0:
            # Its memory may not go while the kernel reads or writes there.
            with nogil:
                self.wait_for_all()
        self.give_back()

    cdef int check_operations(self) except -1:
        cdef uring_probe probe
        memset(&probe, 0, sizeof(probe))
        if syscall(URING_NR_REGISTER, self.fd, URING_REGISTER_PROBE, &probe, URING_PROBE_OPS) < 0:
            refuse("io_uring_register", errno)
        for name, op in NEEDED_OPS.items():
            if op >= probe.ops_len or not probe.ops[<int>op].flags & URING_OP_SUPPORTED:
                refuse(name, EOPNOTSUPP)
        return 0

    cdef int map_rings(self, uring_params *params) except -1:
        cdef uint32_t *array
        cdef uint32_t n
        cdef size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t)
        cdef size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(uring_cqe)
        cdef void *where
        self.rings_bytes = max(sq_bytes, cq_bytes)
        where = mmap(NULL, self.rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, URING_OFF_SQ_RING)
        if where == MAP_FAILED:
            refuse("mmap", errno)
        self.rings = <char *>where
        self.sqes_bytes = params.sq_entries * sizeof(uring_sqe)
        where = mmap(NULL, self.sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, URING_OFF_SQES)
        if where == MAP_FAILED:
            refuse("mmap", errno)
        self.sqes = <uring_sqe *>where
        # What a child does there would be done to its parent's ring.
        madvise(self.rings, self.rings_bytes, MADV_DONTFORK)
        madvise(self.sqes, self.sqes_bytes, MADV_DONTFORK)
        self.sq_head = <uint32_t *>(self.rings + params.sq_off.head)
        self.sq_tail = <uint32_t *>(self.rings + params.sq_off.tail)
        self.sq_flags = <uint32_t *>(self.rings + params.sq_off.flags)
        self.sq_mask = (<uint32_t *>(self.rings + params.sq_off.ring_mask))[0]
        self.cq_head = <uint32_t *>(self.rings + params.cq_off.head)
        self.cq_tail = <uint32_t *>(self.rings + params.cq_off.tail)
        self.cq_mask = (<uint32_t *>(self.rings + params.cq_off.ring_mask))[0]
        self.cqes = <uring_cqe *>(self.rings + params.cq_off.cqes)
        self.tail = self.sq_tail[0]
        array = <uint32_t *>(self.rings + params.sq_off.array)
        for n in range(params.sq_entries):
            array[n] = n                # entry n of the queue is always sqes[n]
        return 0

    cdef void give_back(self) noexcept:
        """Everything. Nothing of it is in the kernel's hands any more, or it is the child of a fork that asks."""
        cdef unsigned int n
        if self.pid == 0:
            return                      # refused arguments: nobody has set the descriptors' numbers
        # In a child these ranges are unmapped, or by now something else's.
        if self.pid == getpid():
            if self.sqes != NULL:
                munmap(self.sqes, self.sqes_bytes)
            if self.rings != NULL:
                munmap(self.rings, self.rings_bytes)
        self.sqes = NULL
        self.rings = NULL
        if self.event_fd >= 0:
            close(self.event_fd)
        if self.fd >= 0:
            close(self.fd)
        self.fd = self.event_fd = -1
        if self.slots != NULL:
            for n in range(self.depth):
                if self.slots[n].busy:
                    self.let_go(&self.slots[n])
            PyMem_RawFree(self.slots)
            self.slots = NULL

    # -- one thread at a time -------------------------------------------------------------------------------

    cdef int come_in(self) except -1:
        if self.fd < 0:
            raise StateError("the ring is closed")
        if self.pid != getpid():
            raise StateError("the ring belongs to the process that made it: open the drive again after a fork")
        if atomic_exchange(&self.inside, 1, ATOMIC_SEQ_CST):
            raise StateError("two threads in one ring: whoever shares it holds a lock")
        return 0

    cdef void go_out(self) noexcept:
        atomic_store(&self.inside, 0, ATOMIC_SEQ_CST)

    # -- in -------------------------------------------------------------------------------------------------

    @property
    def unsubmitted(self):
        """How many entries are queued that the kernel has not taken."""
        self.come_in()
        try:
            return self.queued()
        finally:
            self.go_out()

    cdef uint32_t queued(self) noexcept nogil:
        return self.tail - atomic_load_u32(self.sq_head, ATOMIC_ACQUIRE)

    def readv(self, request, int fd, iov, uint64_t offset, unsigned int flags=0):
        """Queue a read into the writable buffers of ``iov``; ``flags`` are preadv2's. False: the ring is full.

        BufferError, TypeError: one is read-only, not contiguous, or no buffer. ValueError: more than IOV_MAX of them.
        """
        self.come_in()
        try:
            return self.queue_transfer(URING_OP_READV, request, fd, iov, offset, flags)
        finally:
            self.go_out()

    def writev(self, request, int fd, iov, uint64_t offset, unsigned int flags=0):
        """As ``readv``, the other way; the buffers may be read-only."""
        self.come_in()
        try:
            return self.queue_transfer(URING_OP_WRITEV, request, fd, iov, offset, flags)
        finally:
            self.go_out()

    def fdatasync(self, request, int fd):
        """Queue an fdatasync(2). False: the ring is full."""
        self.come_in()
        try:
            if not self.has_room():
                return False
            self.fill(self.take_slot(request), URING_OP_FSYNC, fd, 0, 0, 0, URING_FSYNC_DATASYNC)
            return True
        finally:
            self.go_out()

    def cancel(self, request):
        """Queue the wish that ``request`` end with -ECANCELED, or -EINTR; it may be too late. Whether it is there."""
        cdef unsigned int n
        self.come_in()
        try:
            for n in range(self.depth):
                if self.slots[n].busy and self.slots[n].request == <PyObject *>request:
                    if self.queued() >= self.entries:
                        return False
                    self.queue_cancel(&self.slots[n])
                    return True
            return False
        finally:
            self.go_out()

    cdef bint has_room(self) noexcept:
        return self.free >= 0 and self.queued() < self.entries

    cdef Slot *take_slot(self, request) noexcept:
        cdef Slot *slot = &self.slots[self.free]
        self.free = slot.next
        Py_INCREF(request)
        slot.request = <PyObject *>request
        slot.busy = True
        slot.done = False
        slot.generation = (slot.generation + 1) & GENERATIONS
        self.in_flight += 1
        self.waiting += 1
        return slot

    cdef uint64_t user_data(self, Slot *slot) noexcept nogil:
        return <uint64_t>slot.generation << 32 | <uint64_t>(slot - self.slots)

    cdef bint queue_transfer(self, uint8_t op, request, int fd, iov, uint64_t offset, unsigned int flags) except -1:
        cdef Slot *slot
        cdef unsigned int count = len(iov)
        if count > MOST_SEGMENTS:
            raise ValueError(f"{count} pieces of memory: {MOST_SEGMENTS} at most")
        if not self.has_room():
            return False
        # The slot is still on the free list: where this raises there is nothing to undo.
        slot = &self.slots[self.free]
        pin(slot, iov, count, PyBUF_WRITABLE if op == URING_OP_READV else PyBUF_SIMPLE)
        self.take_slot(request)
        if count == 1:
            self.fill(slot, URING_OP_READ if op == URING_OP_READV else URING_OP_WRITE, fd, offset,
                      <uint64_t>slot.one.buf, <uint32_t>min(slot.one.len, <Py_ssize_t>MOST_BYTES), flags)
        else:
            self.fill(slot, op, fd, offset, <uint64_t>slot.vectors, count, flags)
        return True

    cdef void fill(self, Slot *slot, uint8_t op, int fd, uint64_t offset, uint64_t address, uint32_t length,
                   uint32_t flags) noexcept:
        cdef uring_sqe *sqe = self.next_entry()
        sqe.opcode = op
        sqe.fd = fd
        sqe.off = offset
        sqe.addr = address
        sqe.len = length
        sqe.op_flags = flags
        sqe.user_data = self.user_data(slot)

    cdef uring_sqe *next_entry(self) noexcept nogil:
        cdef uring_sqe *sqe = &self.sqes[self.tail & self.sq_mask]
        memset(sqe, 0, sizeof(uring_sqe))
        self.tail += 1
        return sqe

    cdef void queue_cancel(self, Slot *slot) noexcept nogil:
        cdef uring_sqe *sqe = self.next_entry()
        sqe.opcode = URING_OP_ASYNC_CANCEL
        sqe.fd = -1
        sqe.addr = self.user_data(slot)
        sqe.user_data = CANCELS | sqe.addr

    def submit(self):
        """Give the kernel all that is queued, without the GIL: 0, or the errno of what it would not take now.

        EBUSY: reap first. EAGAIN: it is short of memory. What is left stays queued; see ``take_back``.
        """
        cdef int rc = 0
        self.come_in()
        try:
            if self.queued():           # else there is nothing to give the GIL away for
                with nogil:
                    rc = self.submit_all()
            return rc
        finally:
            self.go_out()

    cdef int submit_all(self) noexcept nogil:
        cdef uint32_t left
        cdef int rc
        # Release: the kernel, which loads the tail with acquire, must see the entries before it.
        atomic_store_u32(self.sq_tail, self.tail, ATOMIC_RELEASE)
        while True:
            left = self.queued()
            if left == 0:
                return 0
            rc = enter(self.fd, left, 0, 0)
            if rc < 0 and rc != -EINTR:
                return -rc
            if rc == 0:
                return EAGAIN

    def take_back(self):
        """The requests that are queued and were never submitted: the ring has forgotten them."""
        cdef uint32_t head
        cdef uint64_t user_data
        cdef list found = []
        self.come_in()
        try:
            head = atomic_load_u32(self.sq_head, ATOMIC_ACQUIRE)
            while self.tail != head:
                user_data = self.sqes[(self.tail - 1) & self.sq_mask].user_data
                if not user_data & CANCELS:
                    found.append(<object>self.slots[<uint32_t>user_data].request)
                self.tail -= 1
                atomic_store_u32(self.sq_tail, self.tail, ATOMIC_RELEASE)
                if not user_data & CANCELS:
                    self.waiting -= 1
                    self.free_slot(&self.slots[<uint32_t>user_data])
            found.reverse()
            return found
        finally:
            self.go_out()

    # -- out ------------------------------------------------------------------------------------------------

    def reap(self):
        """Requests whose results are there: (request, bytes or 0 or a negative errno), in the order they came."""
        self.come_in()
        try:
            self.empty_queue()
            if self.overflown():        # a system call, which the rest of this is not
                with nogil:
                    self.harvest()
            return self.results()
        finally:
            self.go_out()

    cdef list results(self):
        cdef list found = []
        cdef Slot *slot
        while self.first_done >= 0:
            slot = &self.slots[self.first_done]
            found.append((<object>slot.request, slot.result))
            self.first_done = slot.next
            if self.first_done < 0:
                self.last_done = -1
            self.free_slot(slot)
        return found

    cdef void empty_queue(self) noexcept nogil:
        """Note everything that is in the completion queue."""
        cdef uint32_t head = self.cq_head[0]    # nobody else writes it
        cdef uint32_t tail = atomic_load_u32(self.cq_tail, ATOMIC_ACQUIRE)
        while head != tail:
            self.note(self.cqes[head & self.cq_mask].user_data, self.cqes[head & self.cq_mask].res)
            head += 1
        # Release: the kernel may use these entries again only after they were read.
        atomic_store_u32(self.cq_head, head, ATOMIC_RELEASE)

    cdef bint overflown(self) noexcept nogil:
        """Whether the kernel keeps results back because the queue was full."""
        return atomic_load_u32(self.sq_flags, ATOMIC_ACQUIRE) & URING_SQ_CQ_OVERFLOW

    cdef void harvest(self) noexcept nogil:
        """Note everything, what the kernel keeps back too."""
        cdef int rc
        while True:
            self.empty_queue()
            if not self.overflown():
                return
            rc = enter(self.fd, 0, 0, URING_ENTER_GETEVENTS)
            if rc < 0 and rc != -EINTR:
                return

    cdef void note(self, uint64_t user_data, int32_t result) noexcept nogil:
        cdef uint32_t n = <uint32_t>user_data
        cdef Slot *slot
        if user_data & CANCELS:
            return
        if n >= self.depth or not self.slots[n].busy or self.slots[n].done or user_data != self.user_data(&self.slots[n]):
            self.strays += 1
            return
        slot = &self.slots[n]
        slot.result = result
        slot.done = True
        slot.next = -1
        if self.last_done < 0:
            self.first_done = <int>n
        else:
            self.slots[self.last_done].next = <int>n
        self.last_done = <int>n
        self.waiting -= 1

    cdef void free_slot(self, Slot *slot) noexcept:
        self.let_go(slot)
        slot.next = self.free
        self.free = <int>(slot - self.slots)

    cdef void let_go(self, Slot *slot) noexcept:
        cdef PyObject *request = slot.request
        slot.busy = slot.done = False
        slot.request = NULL
        self.in_flight -= 1
        unpin(slot)
        Py_DECREF(<object>request)

    def acknowledge(self):
        """Make ``event_fd`` unreadable until the next result. Before ``reap``: what comes in between rings again."""
        cdef uint64_t value
        self.come_in()
        read(self.event_fd, &value, sizeof(value))
        self.go_out()

    def close(self):
        """Cancel what has not begun, wait for the rest, and give everything back. The results, as ``reap``.

        -ECANCELED for what was never submitted. In the child of a fork only the child's own side ends.
        """
        if self.fd < 0:
            return []
        if self.pid != getpid():
            self.give_back()
            return []
        self.come_in()
        try:
            with nogil:
                self.wait_for_all()
            found = self.results()
            self.give_back()
            return found
        finally:
            self.go_out()

    cdef void wait_for_all(self) noexcept nogil:
        """Until no request is with the kernel. None of them can be waited for in vain: what may last is cancelled."""
        cdef uint32_t head = atomic_load_u32(self.sq_head, ATOMIC_ACQUIRE)
        cdef uint32_t n
        cdef pollfd watched
        cdef int rc
        for n in range(self.tail - head):
            self.note(self.sqes[(head + n) & self.sq_mask].user_data, -ECANCELED)
        self.tail = head
        for n in range(self.depth):
            if self.slots[n].busy and not self.slots[n].done:
                if self.queued() >= self.entries:
                    self.submit_all()
                    if self.queued() >= self.entries:
                        break           # the kernel takes nothing: then wait without
                self.queue_cancel(&self.slots[n])
        self.submit_all()
        while True:
            self.harvest()
            if self.waiting == 0:
                return
            rc = enter(self.fd, self.queued(), 1, URING_ENTER_GETEVENTS)
            if rc < 0 and rc != -EINTR:
                # Short of memory, or a filter has come to forbid the call: the results come all the same.
                watched.fd = self.event_fd
                watched.events = POLLIN
                poll(&watched, 1, RECHECK_MS)


cdef int enter(int fd, unsigned int to_submit, unsigned int min_complete, unsigned int flags) noexcept nogil:
    """io_uring_enter(2): how many it took, or a negative errno."""
    cdef long rc = syscall(URING_NR_ENTER, fd, to_submit, min_complete, flags, NULL, 0)
    return <int>rc if rc >= 0 else -errno


cdef int refuse(str name, int number) except -1:
    raise OSError(number, os.strerror(number), name)


cdef int pin(Slot *slot, iov, unsigned int count, int how) except -1:
    """Take the buffers of ``iov``: all of them, or none and it raises."""
    cdef unsigned int n
    slot.count = 0
    slot.buffers = &slot.one
    slot.vectors = NULL
    if count != 1:
        # One more of each: of no bytes at all there might be NULL.
        slot.buffers = <Py_buffer *>PyMem_RawCalloc(count + 1, sizeof(Py_buffer) + sizeof(iovec))
        if slot.buffers == NULL:
            raise MemoryError()
        slot.vectors = <iovec *>(slot.buffers + count + 1)
    try:
        for n in range(count):
            PyObject_GetBuffer(iov[n], &slot.buffers[n], how)
            slot.count += 1
            if slot.vectors != NULL:
                slot.vectors[n].iov_base = slot.buffers[n].buf
                slot.vectors[n].iov_len = slot.buffers[n].len
    except BaseException:
        unpin(slot)
        raise
    return 0


cdef void unpin(Slot *slot) noexcept:
    cdef unsigned int n
    for n in range(slot.count):
        PyBuffer_Release(&slot.buffers[n])
    slot.count = 0
    if slot.vectors != NULL:
        PyMem_RawFree(slot.buffers)
        slot.vectors = NULL
