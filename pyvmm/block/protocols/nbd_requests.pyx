"""NbdRequests: what an NBD server is asked and has not answered, and the way of that to its socket.

NetworkBlockDevice doc/proto.md, "Request message". A request has a slot, which its cookie names: the slot's number in
the low bits, and a serial number above, so that an answer to what is over finds nothing. Requests come from coroutines
(``ask``) and from a device's thread without the GIL (``submit``: this is the drive's lane, one that ``waits``), and
go out in the order in which they came, many in one call where they come together or the drive's thread is about to look
anyway. Nothing here waits; what the socket does not take stays in ``out`` until that thread finds room for it.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from pyvmm.block.lane cimport LANE_READ, Lane, iovec, lane_ask
from pyvmm.device cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int, const msghdr *, int)
    int shutdown(int, int)
    int SHUT_RDWR
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int, const void *, size_t)

cdef enum:
    REQUEST_MAGIC = 0x25609513
    INDEX_BITS = 16
    MOST_PLUGGED = 8        # requests that wait for others before they are sent: the server may have to do with these

WAIT_FOR_MORE = MOST_PLUGGED


cdef int64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class NbdRequests(Lane):
    """Of a drive, through all of its connections. It is made as Lane(-1, 0, 0, 0), and told later where the disk is
    (``place``). ``wake_fd`` is the eventfd that its thread sleeps on; -1: none.
    """

    def __cinit__(self, *args):
        self.waits = True
        self.socket_fd = -1
        self.wake_fd = -1
        self.awake = True
        self.requests = {}
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        cdef uint32_t n
        for n in range(self.slot_count):
            self.let_go(self.slots[n])
            free(self.slots[n].spans)
            free(self.slots[n])
        free(self.slots)
        free(self.out)
        free(self.rest)
        pthread_mutex_destroy(&self.mutex)

    def place(self, uint64_t offset, uint64_t size):
        """The disk is so much of the export, and its device asks by ``submit``."""
        self.offset = offset
        self.resize(size)

    # -- slots: ``mutex`` is held for the first three ------------------------------------------------------------

    cdef nbd_slot *slot_make(self) noexcept nogil:
        """One that nobody has; NULL without memory, or where there are too many."""
        cdef nbd_slot *slot = self.free_slots
        cdef nbd_slot **more
        cdef uint32_t room
        if slot != NULL:
            self.free_slots = slot.next
            slot.next = NULL
            return slot
        if self.slot_count == self.slot_room:
            room = max(64, 2 * self.slot_room)
            more = <nbd_slot **>realloc(self.slots, room * sizeof(nbd_slot *)) if room <= 1 << INDEX_BITS else NULL
            if more == NULL:
                return NULL
            self.slots = more
            self.slot_room = room
        slot = <nbd_slot *>calloc(1, sizeof(nbd_slot))
        if slot != NULL:
            slot.index = self.slot_count
            self.slots[self.slot_count] = slot
            self.slot_count += 1
        return slot

    cdef void slot_free(self, nbd_slot *slot) noexcept nogil:
        slot.cookie = 0
        if slot.ask != NULL:
            slot.ask = NULL
            slot.iov = NULL
            slot.pieces = 0
        slot.next = self.free_slots
        self.free_slots = slot

    cdef nbd_slot *slot_of(self, uint64_t cookie) noexcept nogil:
        """The one that waits for an answer by that name, or NULL."""
        cdef uint32_t index = cookie & ((1 << INDEX_BITS) - 1)
        if not cookie or index >= self.slot_count or self.slots[index].cookie != cookie:
            return NULL
        return self.slots[index]

    cdef void slot_end(self, nbd_slot *slot) noexcept nogil:
        """No answer is waited for any more. Where the server has answered before it had all of it, as it may with an error,
        the rest does not stay in memory that is the guest's again.
        """
        slot.cookie = 0
        if slot.put_upto > self.gone and self.own_rest() < 0:
            self.drop_out()             # without memory for it the connection ends
            shutdown(self.socket_fd, SHUT_RDWR)

    # -- requests of coroutines ----------------------------------------------------------------------------------

    def ask(self, request, int command, int flags, uint64_t offset, uint64_t length, iov):
        """Send it, with the data of ``iov`` or for it; ``receive`` brings its end, and ``end`` has it where the connection
        is lost. False without a connection; MemoryError.
        """
        cdef nbd_slot *slot
        cdef int rc
        with nogil:
            pthread_mutex_lock(&self.mutex)
            slot = self.slot_make()
            pthread_mutex_unlock(&self.mutex)
        if slot == NULL:
            raise MemoryError("too many requests")
        slot.command = command
        slot.flags = flags
        slot.offset = offset
        slot.length = length
        try:
            self.hold(slot, iov)
            self.requests[slot.index] = request
            with nogil:
                pthread_mutex_lock(&self.mutex)
                rc = self.put_out(slot, self.plugs != 0)
                pthread_mutex_unlock(&self.mutex)
        except BaseException:
            self.forget(slot.index)
            raise
        if rc < 0:
            self.forget(slot.index)
            if rc == -ENOMEM:
                raise MemoryError
        return rc >= 0

    cdef hold(self, nbd_slot *slot, iov):
        """Its memory is that of the views ``iov``."""
        cdef int count = len(iov)
        slot.pieces = 0
        if not count:
            return
        slot.iov = <iovec *>malloc(count * sizeof(iovec))
        slot.held = <Py_buffer *>malloc(count * sizeof(Py_buffer))
        if slot.iov == NULL or slot.held == NULL:
            raise MemoryError
        for view in iov:
            PyObject_GetBuffer(view, &slot.held[slot.pieces],
                               PyBUF_WRITABLE if slot.command == NBD_READ else PyBUF_SIMPLE)
            slot.iov[slot.pieces].iov_base = slot.held[slot.pieces].buf
            slot.iov[slot.pieces].iov_len = slot.held[slot.pieces].len
            slot.pieces += 1

    cdef let_go(self, nbd_slot *slot):
        """The memory of a request in Python is its caller's again."""
        cdef int n
        if slot.ask != NULL:
            return
        if slot.held != NULL:
            for n in range(slot.pieces):
                PyBuffer_Release(&slot.held[n])
        free(slot.held)
        free(slot.iov)
        slot.held = NULL
        slot.iov = NULL
        slot.pieces = 0

    def forget(self, uint32_t index):
        """The slot of a request in Python is free: that request, or None."""
        cdef nbd_slot *slot = self.slots[index]
        request = self.requests.pop(index, None)
        self.let_go(slot)
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.slot_free(slot)
            pthread_mutex_unlock(&self.mutex)
        return request

    # -- requests of a device ----------------------------------------------------------------------------------

    cdef int submit(self, lane_ask *ask) noexcept nogil:
        cdef nbd_slot *slot
        cdef int rc = -EAGAIN
        if ask.length > self.most_bytes or (ask.at + self.offset | ask.length) & self.block_mask:
            return -EAGAIN
        if not self.enter(ask.kind, ask.at, ask.pieces, ask.length):
            return -EAGAIN
        pthread_mutex_lock(&self.mutex)
        slot = self.slot_make() if self.connected else NULL
        if slot != NULL:
            slot.command = NBD_READ if ask.kind == LANE_READ else NBD_WRITE
            slot.flags = 0
            slot.offset = self.offset + ask.at
            slot.length = ask.length
            slot.pieces = ask.pieces
            slot.iov = ask.iov
            slot.ask = ask
            rc = self.put_out(slot, True)
            if rc < 0:
                self.slot_free(slot)
        pthread_mutex_unlock(&self.mutex)
        if rc < 0:
            self.leave()
        return rc

    cdef void send(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)
        if self.out_count and not self.awake and self.connected:
            self.send_now()
        pthread_mutex_unlock(&self.mutex)

    def plug(self):
        """Who asks has more to ask for, and will say so when it has not: a message a request costs a system call here and
        a wake-up there.
        """
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.plugs += 1
            pthread_mutex_unlock(&self.mutex)

    def unplug(self):
        cdef bint last
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.plugs -= 1
            last = not self.plugs
            pthread_mutex_unlock(&self.mutex)
            if last:
                self.send()

    # -- the way out: ``mutex`` is held --------------------------------------------------------------------------

    cdef int put_out(self, nbd_slot *slot, bint gather) noexcept nogil:
        """Send the request; with ``gather`` it may wait for more. 0; -EAGAIN without a connection; -ENOMEM."""
        cdef uint8_t *header = slot.header
        cdef int n, pieces = slot.pieces if slot.command == NBD_WRITE else 0
        if not self.connected:
            return -EAGAIN
        if not self.room_out(1 + pieces):
            return -ENOMEM
        self.serial += 1
        slot.cookie = self.serial << INDEX_BITS | slot.index
        slot.since_ns = now_ns()
        slot.got = 0
        slot.span_count = slot.error = 0
        (<uint32_t *>header)[0] = big32(REQUEST_MAGIC)
        (<uint32_t *>header)[1] = big32(<uint32_t>slot.flags << 16 | <uint32_t>slot.command)
        memcpy(header + 8, &slot.cookie, 8)     # a name, and so in no order of its own
        (<uint64_t *>(header + 16))[0] = big64(slot.offset)
        (<uint32_t *>(header + 24))[0] = big32(<uint32_t>slot.length)
        n = self.out_first + self.out_count
        self.out[n].iov_base = header
        self.out[n].iov_len = NBD_HEADER_BYTES
        self.put += NBD_HEADER_BYTES
        if pieces:
            memcpy(self.out + n + 1, slot.iov, pieces * sizeof(iovec))
            self.put += slot.length
        slot.put_upto = self.put
        self.out_count += 1 + pieces
        if gather:
            self.plugged += 1
            if self.plugged < MOST_PLUGGED:
                return 0
        if not self.awake:
            self.send_now()
        return 0

    cdef bint room_out(self, int pieces) noexcept nogil:
        """Whether there is room for so many more behind the last."""
        cdef int wanted
        cdef iovec *more
        if self.out_first + self.out_count + pieces <= self.out_room:
            return True
        memmove(self.out, self.out + self.out_first, self.out_count * sizeof(iovec))
        self.out_first = 0
        if self.out_count + pieces > self.out_room:
            wanted = max(256, 2 * (self.out_count + pieces))
            more = <iovec *>realloc(self.out, wanted * sizeof(iovec))
            if more == NULL:
                return False
            self.out = more
            self.out_room = wanted
        return True

    cdef void send_now(self) noexcept nogil:
        cdef uint64_t one = 1
        self.flush_out()            # where that fails the thread finds the same, and what to do about it
        if self.out_count:
            write(self.wake_fd, &one, 8)    # it is to wait until there is room

    cdef int flush_out(self) noexcept nogil:
        """As much as goes: 0, or a negative errno."""
        cdef msghdr message
        cdef ssize_t sent
        memset(&message, 0, sizeof(message))
        self.plugged = 0
        while self.out_count:
            message.msg_iov = self.out + self.out_first
            message.msg_iovlen = min(self.out_count, NBD_MOST_PIECES)
            sent = sendmsg(self.socket_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent >= 0:
                self.gone_out(sent)
            elif errno == EAGAIN:
                return 0
            elif errno != EINTR:
                return -errno
        return 0

    cdef void gone_out(self, uint64_t sent) noexcept nogil:
        cdef iovec *first
        self.gone += sent
        while self.out_count:
            first = self.out + self.out_first
            if sent < first.iov_len:
                first.iov_base = <uint8_t *>first.iov_base + sent
                first.iov_len -= sent
                return
            sent -= first.iov_len
            self.out_first += 1
            self.out_count -= 1
        self.drop_out()

    cdef int own_rest(self) noexcept nogil:
        """What is to go out is in memory of our own: 0, or -ENOMEM."""
        cdef uint64_t size = self.put - self.gone, done = 0
        cdef uint8_t *copy = <uint8_t *>malloc(size)
        cdef int n
        if copy == NULL:
            return -ENOMEM
        for n in range(self.out_first, self.out_first + self.out_count):
            memcpy(copy + done, self.out[n].iov_base, self.out[n].iov_len)
            done += self.out[n].iov_len
        free(self.rest)
        self.rest = copy
        self.out_first = 0
        self.out_count = 1
        self.out[0].iov_base = copy
        self.out[0].iov_len = size
        return 0

    cdef void drop_out(self) noexcept nogil:
        """Nothing is to go out."""
        self.out_first = self.out_count = self.plugged = 0
        free(self.rest)
        self.rest = NULL

    # -- what the thread of the drive goes by --------------------------------------------------------------------

    def wake_up(self):
        """It is awake: who asks need not send, for it does so before it sleeps."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.awake = True
            pthread_mutex_unlock(&self.mutex)

    def fall_asleep(self):
        """Send what is there, and let others do so from now on: whether the socket has taken all of it. OSError where the
        connection is over.
        """
        cdef int rc = 0, left
        with nogil:
            pthread_mutex_lock(&self.mutex)
            if self.connected:
                rc = self.flush_out()
            self.awake = False
            left = self.out_count
            pthread_mutex_unlock(&self.mutex)
        if rc < 0:
            raise OSError(-rc, "")
        return not left

    @property
    def oldest_s(self):
        """When the oldest was sent that has no answer (CLOCK_MONOTONIC); None where there is none."""
        cdef uint32_t n
        cdef int64_t since = 0
        with nogil:
            pthread_mutex_lock(&self.mutex)
            for n in range(self.slot_count):
                if self.slots[n].cookie and (not since or self.slots[n].since_ns < since):
                    since = self.slots[n].since_ns
            pthread_mutex_unlock(&self.mutex)
        return since / 1e9 if since else None

    @property
    def unsent(self):
        """How many pieces have not gone out."""
        return self.out_count
