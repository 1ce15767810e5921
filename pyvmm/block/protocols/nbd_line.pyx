"""NbdLine: what an NBD server answers, a stream of replies taken apart, for the requests that are under way.

NetworkBlockDevice doc/proto.md, "Simple reply message" and "Structured reply message". What the server says is checked
against what it was asked: nothing is written outside of a request's memory, nothing grows with what it sends, and what
no server may say ends the connection, and is told as an NbdError. All of that needs no Python. What has ended of the lane's is
told to its device there and then; what has failed of that, or was lost with the connection, is given back, and asked
anew of the backend, where an error has its policy.

One thread receives, the drive's. It goes from one connection to the next: ``begin``, ``receive``, ``end``.
"""

from libc.errno cimport (EAGAIN, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, EOPNOTSUPP, EOVERFLOW, EPERM, ESHUTDOWN, errno)
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset, strerror

from pyvmm.atomic cimport ATOMIC_SEQ_CST
from pyvmm.block.lane cimport LANE_WRITE, iovec, lane_ask, lane_user
from pyvmm.block.protocols.nbd_requests cimport (NBD_MOST_PIECES, NBD_READ, NBD_WRITE, NbdRequests, big16, big32, big64,
                                                 nbd_slot, nbd_span)
from pyvmm.device cimport pthread_mutex_lock, pthread_mutex_unlock

from _operator import itemgetter

from pyvmm.block.protocols.nbd_handshake import NbdError

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t recv(int, void *, size_t, int)
    ssize_t recvmsg(int, msghdr *, int)
    int MSG_DONTWAIT

cdef extern from * nogil:
    int64_t atomic_add_64 "__atomic_add_fetch" (int64_t *, int64_t, int)

cdef enum:
    SIMPLE_MAGIC = 0x67446698
    CHUNK_MAGIC = 0x668E33EF
    SIMPLE_BYTES = 16
    CHUNK_BYTES = 20
    DONE = 1                    # a chunk's flag: it is the last one
    NONE = 0                    # kinds of chunks
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    ERROR_TYPES = 1 << 15
    ERROR_OFFSET = 1 << 15 | 2
    HOLE_BYTES = 12
    ERROR_BYTES = 6
    MOST_ERROR_BYTES = 6 + 4096 + 8     # a string's limit, and an offset
    BUFFER_BYTES = 256 << 10
    DIRECT_BYTES = 16 << 10     # from so many on a payload goes past our buffer
    MOST_SPANS = 16 << 10       # of one read's answer that do not touch each other
    ROUNDS = 16                 # of receiving, before what was asked for meanwhile is sent

# What is wrong with what came; what is below is a negative errno with BY_NUMBER added to it.
cdef enum:
    NOT_WHOLE = 1               # nothing: there has to come more
    FINE = 0
    ENDED = -1
    NO_REPLY = -2
    UNASKED = -3
    OLD_WAY = -4
    ELSEWHERE = -5
    TOO_MUCH = -6
    TWICE = -7
    TOO_LITTLE = -8
    NO_DATA = -9
    TOO_LONG = -10
    NO_KIND = -11
    NO_NUMBER = -12
    NO_WORDS = -13
    BY_NUMBER = -1000

WRONG = (
    "", "it has ended the connection", "what it answers is no reply", "it answers what was not asked",
    "it answers a read in the old way, against what was agreed", "it answers a read with what was not asked for",
    "it answers a read with more than was asked for", "it answers a part of a read twice",
    "it answers a read with less than was asked for", "it sends data that nobody asked for",
    "it sends more than such a reply can have", "it sends a kind of reply that was not agreed",
    "it tells of an error without a number", "it tells of an error in no words",
)


cdef int errno_of(uint32_t number) noexcept nogil:
    """The protocol's numbers are Linux's; others are taken as EINVAL (proto.md, "Error values")."""
    if number in (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, EOPNOTSUPP, ESHUTDOWN):
        return <int>number
    return EINVAL


cdef class NbdLine(NbdRequests):
    """Of one drive. ``begin`` is for each connection that it gets; there is none at first."""

    cdef uint8_t *data              # BUFFER_BYTES
    cdef uint32_t first, last       # what of it has come, and was not looked at
    cdef int wrong                  # with what came, and not told yet
    cdef bint structured
    # A payload under way: whose, where in its memory it goes, how much is to come, whether its request is done then.
    cdef nbd_slot *paid
    cdef uint64_t at, left
    cdef bint is_last
    cdef nbd_slot *ended_first      # of requests in Python, in order
    cdef nbd_slot *ended_last
    cdef lane_ask *back_first       # of the lane's, to be given back
    cdef lane_ask *back_last
    cdef lane_user *touched         # who has heard of something

    def __cinit__(self, *args):
        self.data = <uint8_t *>malloc(BUFFER_BYTES)
        if self.data == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.data)

    # -- a connection's life -------------------------------------------------------------------------------------

    def begin(self, int fd, bint structured, uint64_t most_bytes, uint64_t block_bytes):
        """There is one, in its transmission phase; a payload has at most so many bytes, a request whole blocks."""
        self.first = self.last = 0
        self.wrong = FINE
        self.structured = structured
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.drop_out()
            self.put = self.gone = 0
            self.socket_fd = fd
            self.most_bytes = most_bytes
            self.block_mask = block_bytes - 1
            self.connected = True
            pthread_mutex_unlock(&self.mutex)

    def end(self):
        """The connection is over, or is to be: the requests of coroutines that have no answer, the oldest first. Those of
        the lane are to be given back.
        """
        cdef uint32_t n
        cdef nbd_slot *slot
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.connected = False
            self.paid = NULL
            self.left = 0
            self.drop_out()
            for n in range(self.slot_count):
                slot = self.slots[n]
                if slot.cookie and slot.ask != NULL:
                    self.put_back(slot)
                elif slot.cookie:
                    self.put_ended(slot, <int64_t>slot.cookie)
            pthread_mutex_unlock(&self.mutex)
        lost = self.ended()
        lost.sort(key=itemgetter(1))        # a cookie: the serial number is above
        return [request for request, _ in lost]

    def receive(self):
        """Take what has come: ([(a request of a coroutine, its result)], whether there may be more). NbdError where the
        connection is over, when all that had ended before was told.
        """
        cdef int rc = self.wrong, rounds
        with nogil:
            for rounds in range(ROUNDS):
                if rc != FINE or self.ended_first != NULL or self.back_first != NULL:
                    break
                rc = self.take_in()
            self.tell()
            pthread_mutex_lock(&self.mutex)
            self.flush_out()            # where that fails the next look finds the same
            pthread_mutex_unlock(&self.mutex)
        ended = self.ended()
        self.wrong = min(rc, FINE)
        if rc < FINE and not ended:
            raise NbdError(strerror(BY_NUMBER - rc).decode() if rc < BY_NUMBER else WRONG[-rc])
        return ended, rc != NOT_WHOLE

    cdef list ended(self):
        """What has ended, and what is to be given back has been."""
        cdef nbd_slot *slot
        cdef list ended = []
        while self.ended_first != NULL:
            slot = self.ended_first
            self.ended_first = slot.next
            result = slot.result
            request = self.forget(slot.index)
            if request is not None:
                ended.append((request, result))
        self.ended_last = NULL
        return ended

    def give_back(self):
        """To their devices, what the lane has not done; they ask the backend for it, here and now."""
        cdef lane_ask *ask
        cdef lane_user *user
        while self.back_first != NULL:
            ask = self.back_first
            self.back_first = ask.next
            self.touch(ask.user)
            try:
                ask.user.given_back(ask)
            finally:
                self.leave()
        self.back_last = NULL
        while self.touched != NULL:
            user = self.touched
            self.touched = user.next
            user.touched = False
            user.rested(user)

    # -- what comes ----------------------------------------------------------------------------------------------

    cdef int take_in(self) noexcept nogil:
        """Once. NOT_WHOLE: nothing is there any more."""
        cdef ssize_t count
        cdef uint32_t size = 0
        cdef int rc
        if self.left >= DIRECT_BYTES and self.first == self.last:
            count = self.take_payload()
        else:
            if self.first:
                memmove(self.data, self.data + self.first, self.last - self.first)
                self.last -= self.first
                self.first = 0
            size = BUFFER_BYTES - self.last
            count = recv(self.socket_fd, self.data + self.last, size, MSG_DONTWAIT)
            if count > 0:
                self.last += count
        if count < 0:
            if errno == EAGAIN:
                return NOT_WHOLE
            return FINE if errno == EINTR else BY_NUMBER - errno
        if not count:
            return ENDED
        rc = self.take_apart()
        if rc == FINE and not self.left and count < size:
            return NOT_WHOLE            # less than there was room for: that was all
        return rc

    cdef ssize_t take_payload(self) noexcept nogil:
        """A payload straight into its request's memory."""
        cdef iovec[NBD_MOST_PIECES] pieces
        cdef msghdr message
        cdef nbd_slot *slot = self.paid
        cdef uint64_t skip = self.at
        cdef int n, count = 0
        cdef ssize_t came
        for n in range(slot.pieces):
            if skip >= slot.iov[n].iov_len:
                skip -= slot.iov[n].iov_len
                continue
            if count == NBD_MOST_PIECES:
                break
            pieces[count].iov_base = <uint8_t *>slot.iov[n].iov_base + skip
            pieces[count].iov_len = slot.iov[n].iov_len - skip
            skip = 0
            count += 1
        cut_to(pieces, &count, self.left)
        memset(&message, 0, sizeof(message))
        message.msg_iov = pieces
        message.msg_iovlen = count
        came = recvmsg(self.socket_fd, &message, MSG_DONTWAIT)
        if came > 0:
            self.at += came
            self.left -= came
        return came

    cdef int take_apart(self) noexcept nogil:
        """What stands in the buffer, as far as it is whole. FINE, or what is wrong."""
        cdef int rc = FINE
        cdef uint32_t there, magic
        cdef uint64_t part
        while rc == FINE:
            if self.paid != NULL:
                part = min(self.left, <uint64_t>(self.last - self.first))
                scatter(self.paid, self.at, self.data + self.first, part)
                self.first += part
                self.at += part
                self.left -= part
                if self.left:
                    return FINE
                rc = self.payload_done()
                continue
            there = self.last - self.first
            if there < SIMPLE_BYTES:
                return FINE
            magic = big32((<uint32_t *>(self.data + self.first))[0])
            if magic == SIMPLE_MAGIC:
                rc = self.simple()
            elif magic == CHUNK_MAGIC and self.structured:
                rc = self.chunk(there)
            else:
                rc = NO_REPLY
        return FINE if rc == NOT_WHOLE else rc

    cdef int payload_done(self) noexcept nogil:
        cdef nbd_slot *slot = self.paid
        self.paid = NULL
        return self.outcome(slot) if self.is_last else FINE

    cdef int expect(self, nbd_slot *slot, uint64_t at, uint64_t length, bint is_last) noexcept nogil:
        """Its payload follows."""
        self.paid = slot
        self.at = at
        self.left = length
        self.is_last = is_last
        return FINE

    cdef nbd_slot *asked(self, uint64_t cookie) noexcept nogil:
        cdef nbd_slot *slot
        pthread_mutex_lock(&self.mutex)
        slot = self.slot_of(cookie)
        pthread_mutex_unlock(&self.mutex)
        return slot

    cdef int simple(self) noexcept nogil:
        cdef uint8_t *head = self.data + self.first
        cdef uint32_t number = big32((<uint32_t *>(head + 4))[0])
        cdef nbd_slot *slot = self.asked((<uint64_t *>(head + 8))[0])
        cdef int rc
        self.first += SIMPLE_BYTES
        if slot == NULL:
            return UNASKED
        if number:
            return self.end_slot(slot, -errno_of(number))
        if slot.command != NBD_READ:
            return self.outcome(slot)
        if self.structured:
            return OLD_WAY
        rc = covers(slot, 0, slot.length)
        return rc if rc < FINE else self.expect(slot, 0, slot.length, True)

    cdef int chunk(self, uint32_t there) noexcept nogil:
        """One chunk, without its data."""
        cdef uint8_t *head = self.data + self.first
        cdef uint8_t *body = head + CHUNK_BYTES
        cdef int flags, kind, rc = FINE
        cdef uint32_t length, fixed, most
        cdef uint64_t at
        cdef bint is_last
        cdef nbd_slot *slot
        if there < CHUNK_BYTES:
            return NOT_WHOLE
        flags = big16((<uint16_t *>(head + 4))[0])
        kind = big16((<uint16_t *>(head + 6))[0])
        length = big32((<uint32_t *>(head + 16))[0])
        slot = self.asked((<uint64_t *>(head + 8))[0])
        if slot == NULL:
            return UNASKED
        fixed = 8 if kind == OFFSET_DATA else length
        if kind == OFFSET_DATA:
            if slot.command != NBD_READ or length <= 8:
                return NO_DATA
        most = MOST_ERROR_BYTES if kind & ERROR_TYPES else HOLE_BYTES
        if fixed > most:
            return TOO_LONG
        if there < CHUNK_BYTES + fixed:
            return NOT_WHOLE
        self.first += CHUNK_BYTES + fixed
        is_last = flags & DONE
        if kind == OFFSET_DATA:
            at = big64((<uint64_t *>body)[0]) - slot.offset
            rc = covers(slot, at, length - 8)
            return rc if rc < FINE else self.expect(slot, at, length - 8, is_last)
        if kind & ERROR_TYPES:
            rc = error(slot, kind, body, length)
        elif kind == OFFSET_HOLE and length == HOLE_BYTES and slot.command == NBD_READ:
            at = big64((<uint64_t *>body)[0]) - slot.offset
            fixed = big32((<uint32_t *>(body + 8))[0])
            rc = covers(slot, at, fixed)
            if rc == FINE:
                scatter(slot, at, NULL, fixed)
        elif kind != NONE or length or not is_last:
            rc = NO_KIND
        return self.outcome(slot) if rc == FINE and is_last else rc

    # -- what ends -----------------------------------------------------------------------------------------------

    cdef int outcome(self, nbd_slot *slot) noexcept nogil:
        """The server says that this was all."""
        if slot.error:
            return self.end_slot(slot, -slot.error)
        if slot.command == NBD_READ and slot.got != slot.length:
            return TOO_LITTLE
        return self.end_slot(slot, <int64_t>slot.length if slot.command <= NBD_WRITE else 0)

    cdef int end_slot(self, nbd_slot *slot, int64_t result) noexcept nogil:
        cdef lane_ask *ask = slot.ask
        pthread_mutex_lock(&self.mutex)
        self.slot_end(slot)
        if ask == NULL:
            self.put_ended(slot, result)
        elif result == <int64_t>slot.length:
            self.slot_free(slot)
        else:
            self.put_back(slot)
            ask = NULL
        pthread_mutex_unlock(&self.mutex)
        if ask != NULL:
            if ask.kind == LANE_WRITE:
                # Now, when the server has them and nobody knows of it: a flush that comes after sees that it has to be.
                atomic_add_64(&self._writes, 1, ATOMIC_SEQ_CST)
            self.touch(ask.user)
            ask.user.ended(ask)
            self.leave()
        return FINE

    cdef void put_ended(self, nbd_slot *slot, int64_t result) noexcept nogil:
        """A coroutine is to hear of it."""
        slot.cookie = 0
        slot.result = result
        slot.next = NULL
        if self.ended_first == NULL:
            self.ended_first = slot
        else:
            self.ended_last.next = slot
        self.ended_last = slot

    cdef void put_back(self, nbd_slot *slot) noexcept nogil:
        """What it was for is to be given back; ``mutex`` is held."""
        cdef lane_ask *ask = slot.ask
        ask.next = NULL
        if self.back_first == NULL:
            self.back_first = ask
        else:
            self.back_last.next = ask
        self.back_last = ask
        self.slot_free(slot)

    cdef void touch(self, lane_user *user) noexcept nogil:
        if not user.touched:
            user.touched = True
            user.next = self.touched
            self.touched = user

    cdef void tell(self) noexcept nogil:
        """Who has heard of something hears that it was all for now."""
        cdef lane_user *user = self.touched
        while user != NULL:
            user.told(user)
            user = user.next


cdef void cut_to(iovec *pieces, int *count, uint64_t length) noexcept nogil:
    """No more than so many bytes of them."""
    cdef int n
    for n in range(count[0]):
        if pieces[n].iov_len >= length:
            pieces[n].iov_len = length
            count[0] = n + 1
            return
        length -= pieces[n].iov_len


cdef void scatter(nbd_slot *slot, uint64_t at, const uint8_t *data, uint64_t length) noexcept nogil:
    """``length`` bytes into a request's memory from its byte ``at`` on, which is inside; zeros where ``data`` is NULL."""
    cdef int n
    cdef uint64_t part
    for n in range(slot.pieces):
        if at >= slot.iov[n].iov_len:
            at -= slot.iov[n].iov_len
            continue
        part = min(slot.iov[n].iov_len - at, length)
        if data == NULL:
            memset(<uint8_t *>slot.iov[n].iov_base + at, 0, part)
        else:
            memcpy(<uint8_t *>slot.iov[n].iov_base + at, data, part)
            data += part
        length -= part
        at = 0
        if not length:
            return


cdef int covers(nbd_slot *slot, uint64_t begin, uint64_t length) noexcept nogil:
    """A piece of a read has come, and none has come there before. FINE, or what is wrong."""
    cdef uint64_t end = begin + length
    cdef nbd_span *spans = slot.spans
    cdef nbd_span *more
    cdef int low = 0, high = slot.span_count, middle, room
    if not length or begin > slot.length or length > slot.length - begin:
        return ELSEWHERE
    if length > slot.length - slot.got or slot.span_count > MOST_SPANS:
        return TOO_MUCH
    slot.got += length
    if length == slot.length:
        return FINE
    while low < high:                   # the first that begins behind ``begin``
        middle = (low + high) // 2
        if spans[middle].begin < begin:
            low = middle + 1
        else:
            high = middle
    if low and spans[low - 1].end > begin or low < slot.span_count and spans[low].begin < end:
        return TWICE
    if low and spans[low - 1].end == begin:
        spans[low - 1].end = end
        if low < slot.span_count and spans[low].begin == end:
            spans[low - 1].end = spans[low].end
            slot.span_count -= 1
            memmove(spans + low, spans + low + 1, (slot.span_count - low) * sizeof(nbd_span))
        return FINE
    if low < slot.span_count and spans[low].begin == end:
        spans[low].begin = begin
        return FINE
    if slot.span_count == slot.span_room:
        room = max(16, 2 * slot.span_room)
        more = <nbd_span *>realloc(spans, room * sizeof(nbd_span))
        if more == NULL:
            return BY_NUMBER - ENOMEM
        slot.spans = spans = more
        slot.span_room = room
    memmove(spans + low + 1, spans + low, (slot.span_count - low) * sizeof(nbd_span))
    spans[low].begin = begin
    spans[low].end = end
    slot.span_count += 1
    return FINE


cdef int error(nbd_slot *slot, int kind, const uint8_t *body, uint32_t length) noexcept nogil:
    """The request has failed, whatever else comes for it."""
    cdef uint32_t number, text
    if length < ERROR_BYTES:
        return NO_NUMBER
    number = big32((<uint32_t *>body)[0])
    text = big16((<uint16_t *>(body + 4))[0])
    if ERROR_BYTES + text + (8 if kind == ERROR_OFFSET else 0) > length or not number:
        return NO_WORDS
    if not slot.error:
        slot.error = errno_of(number)
    return FINE
