"""TxLane and RxLane: the frames of one queue, between its ring and its port (OASIS virtio 1.2, 5.1.6).

Compiled, because nothing is decided here that a reader would want to change, and every frame comes by: a turn takes what
is there, many frames, without the GIL. What is done the driver sees soon, after some frames or a large one, so that it goes
on while the lane does. What a lane can't get rid of stays in its hand, chains that were taken and not given back: frames
that the host has no room for, and buffers that no frame has come for. It is called with the queue's lock held. A turn ends with what is the matter:

    DONE     nothing more for now
    MORE     the turn is over and there may be more: others first
    STUCK    TxLane: the host has no room; RxLane: the guest has given no buffer, or too few: it kicks when it does
    CLOSED   the port is

All of a frame and its header is the guest's memory, or the peer's, and may change at any moment: what is looked at is
looked at in a copy. The kernel looks at headers for itself.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from pyvmm.devices.virtio.chain cimport (Chain, chain_free, chain_init, chain_move, chain_token, vq_chain, vq_seg)
from pyvmm.devices.virtio.ring cimport VQ_NONE, Virtqueue
from pyvmm.net.port cimport Port, iovec

from pyvmm.devices.virtio.ring import RingError
from pyvmm.errors import StateError

cdef extern from "<errno.h>" nogil:
    int EAGAIN, EMSGSIZE, ENOBUFS

cdef enum:
    FRAMES_A_TURN = 256
    CHAINS_A_LOOK = 64
    # After so much the driver sees what is done. A segment of 64 KiB takes as long as a wake-up; of small frames each costs
    # less than it takes to show it, and to interrupt a driver that wants that.
    FRAMES_A_SHOW = 8
    BYTES_A_SHOW = 16 << 10
    MOST_PARTS = 1024               # UIO_MAXIOV, and the longest chain
    MOST_FRAME = 65536 + 4096       # as net/port.pyx has it

    # struct virtio_net_hdr (5.1.6): flags, gso_type, then words: hdr_len, gso_size, csum_start, csum_offset; num_buffers
    NEW_HEADER = 12
    OLD_HEADER = 10                 # of a driver that knows neither VERSION_1 nor MRG_RXBUF
    NEEDS_CSUM = 1
    NO_SEGMENTS = 0

    LEAST_FRAME = 14                # addresses and type
    BESIDE_MTU = 18                 # these, and a VLAN's tag
    HEAD = 18

    # Modes of the filter (net_filter.py has their meaning), bits in the order of its MODES; then its overflows.
    PROMISC = 1
    ALLMULTI = 2
    ALLUNI = 4
    NOMULTI = 8
    NOUNI = 16
    NOBCAST = 32
    UNICAST_OVERFLOW = 64
    MULTICAST_OVERFLOW = 128

    # What a turn ends with beside the public ones. Below zero: the ring's own.
    EMPTY = 10                      # no chain is there: ask to be kicked, and look again
    TOO_SHORT = 11
    NO_ROOM = 12
    NO_MEMORY = 13

DONE, MORE, STUCK, CLOSED = range(4)
HEADER_BYTES = NEW_HEADER
OLD_HEADER_BYTES = OLD_HEADER
BESIDE_MTU_BYTES = BESIDE_MTU
GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 4, 5, 0x80

cdef int _DONE = DONE, _MORE = MORE, _STUCK = STUCK, _CLOSED = CLOSED


class GuestMistake(Exception):
    """What a driver did that no driver may: one sentence."""


cdef int copy_out(uint8_t *target, int size, const vq_seg *segs, uint32_t count) noexcept nogil:
    """The first ``size`` bytes of these, where there are so many; how many there are."""
    cdef int done = 0
    cdef int part
    cdef uint32_t n
    for n in range(count):
        part = min(<uint64_t>(size - done), <uint64_t>segs[n].len)
        memcpy(target + done, segs[n].hva, part)
        done += part
        if done == size:
            break
    return done


cdef void copy_in(const iovec *parts, int count, size_t offset, const uint8_t *data, size_t size) noexcept nogil:
    """``data`` at ``offset`` in the parts."""
    cdef size_t part
    cdef int n
    for n in range(count):
        if offset >= parts[n].iov_len:
            offset -= parts[n].iov_len
            continue
        part = min(size, parts[n].iov_len - offset)
        memcpy(<uint8_t *>parts[n].iov_base + offset, data, part)
        data += part
        size -= part
        offset = 0
        if size == 0:
            return


cdef int take_addresses(uint8_t (*table)[6], list addresses) except -1:
    """How many there are."""
    cdef bytes address
    cdef int n = 0
    for address in addresses:
        if len(address) != 6:
            raise ValueError(f"{address!r} is no address")
        memcpy(table[n], <const char *>address, 6)
        n += 1
    return n


cdef class Lane:
    """``has_header``: the port has virtio's header in front of frames. ``dropped`` counts frames that were not passed on
    because they make no sense, or because the link is down.
    """

    def __cinit__(self, Virtqueue queue not None, Port port not None, *, bint has_header):
        cdef uint32_t n
        self.queue = queue
        self.port = port
        self.has_header = has_header
        self.header_bytes = NEW_HEADER
        self.hand_room = queue.max_size
        self.hand = <vq_chain *>calloc(self.hand_room, sizeof(vq_chain))
        if self.hand == NULL:
            raise MemoryError
        for n in range(self.hand_room):
            chain_init(&self.hand[n])

    def __dealloc__(self):
        self.forget()
        free(self.hand)

    cdef vq_chain *in_hand(self, uint32_t n) noexcept nogil:
        return &self.hand[(self.hand_first + n) & (self.hand_room - 1)]

    cdef int take(self, uint32_t most) noexcept nogil:
        """Into the hand, as many as are there and have room; how many, or what the driver did wrong."""
        cdef uint32_t n
        cdef int got
        most = min(most, self.hand_room - self.hand_count)
        for n in range(most):
            got = self.queue.vq_take(self.in_hand(self.hand_count))
            if got == VQ_NONE:
                return n
            if got < 0:
                return got
            self.hand_count += 1
        return most

    cdef void give_back(self, uint32_t count) noexcept nogil:
        """The first of the hand were pushed."""
        self.hand_first = (self.hand_first + count) & (self.hand_room - 1)
        self.hand_count -= count

    cdef void moved(self, uint64_t size) noexcept nogil:
        """A frame of so many bytes was pushed."""
        self.unshown_frames += 1
        self.unshown_bytes += size
        if self.unshown_frames >= FRAMES_A_SHOW or self.unshown_bytes >= BYTES_A_SHOW:
            self.show()

    cdef void show(self) noexcept nogil:
        """The driver sees what was pushed."""
        self.unshown_frames = 0
        self.unshown_bytes = 0
        if self.queue.vq_flush():
            if self.queue.call_fd >= 0:
                self.queue.vq_call()
            else:
                self.calls = True

    cdef int turn(self, bint link_up) noexcept nogil:
        return _DONE

    def run(self, bint link_up):
        """One turn. GuestMistake and RingError of what the driver did."""
        cdef int outcome
        if self.generation != self.queue.generation:
            self.forget()
            self.generation = self.queue.generation
        if not self.queue.ready:
            return DONE
        self.queue.disable_kicks()
        while True:
            with nogil:
                outcome = self.turn(link_up)
            if self.calls:
                self.calls = False
                self.queue.call()
            if outcome == EMPTY:
                if self.queue.enable_kicks():
                    self.queue.disable_kicks()
                    continue
                return self.when_empty()
            if outcome < 0:
                self.queue.take(1)  # it says what is wrong
                raise RingError(f"queue {self.queue.index}: its descriptors change while they are available")
            if outcome == TOO_SHORT:
                raise GuestMistake(f"queue {self.queue.index}: a frame that is shorter than its header")
            if outcome == NO_ROOM:
                raise GuestMistake(f"queue {self.queue.index}: a buffer for frames without room")
            if outcome == NO_MEMORY:
                raise MemoryError
            return outcome

    def when_empty(self):
        return DONE

    def forget(self):
        """The chains in the hand are the driver's again."""
        cdef uint32_t n
        for n in range(self.hand_room):
            chain_free(&self.hand[n])
        self.hand_first = self.hand_count = 0

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def in_hand_count(self):
        return self.hand_count

    def tokens(self):
        """What is to be saved of the hand: a token a chain, as Virtqueue.retake has them."""
        cdef uint32_t n
        if self.generation != self.queue.generation:
            return []
        return [chain_token(self.in_hand(n)) for n in range(self.hand_count)]

    def retake(self, list tokens):
        """The hand as it was saved. RingError and StateError where it can't have been."""
        cdef Chain again
        self.forget()
        self.generation = self.queue.generation
        if len(tokens) > self.hand_room:
            raise StateError(f"a hand of {len(tokens)} chains, of a queue of {self.hand_room}")
        for token in tokens:
            again = self.queue.retake(token)
            chain_move(self.in_hand(self.hand_count), &again.c)
            self.hand_count += 1


cdef class TxLane(Lane):
    """Frames of the guest's."""

    def configure(self, *, uint32_t header_bytes, bint checksums, segments, uint32_t mtu):
        """``segments``: the gso types that were negotiated; ``mtu``: 0 where none was."""
        self.header_bytes = header_bytes
        self.checksums = checksums
        self.segment_count = 0
        for kind in segments:
            self.segments[self.segment_count] = kind
            self.segment_count += 1
        self.most_bytes = mtu + BESIDE_MTU if mtu else MOST_FRAME - NEW_HEADER

    cdef int turn(self, bint link_up) noexcept nogil:
        cdef int outcome = _MORE
        cdef int got
        cdef uint64_t size
        cdef uint32_t n
        for n in range(FRAMES_A_TURN):
            if self.hand_count == 0:
                got = self.take(CHAINS_A_LOOK)
                if self.hand_count == 0:
                    outcome = got if got < 0 else EMPTY
                    break
            got = self.send(self.in_hand(0), link_up)
            if got < 0:
                outcome = TOO_SHORT
                break
            if got == 0:
                outcome = _STUCK
                break
            if self.queue.vq_push(self.in_hand(0), 0) < 0:
                outcome = NO_MEMORY
                break
            size = self.in_hand(0).readable_bytes
            self.give_back(1)
            self.moved(size)
        self.port.flush_frames()
        self.show()
        return outcome

    cdef int send(self, const vq_chain *chain, bint link_up) noexcept nogil:
        """1 where the chain is done with, 0 where the host has no room, -1 where it is no frame at all."""
        cdef iovec parts[MOST_PARTS]
        cdef uint8_t header[OLD_HEADER]
        cdef uint64_t skip = 0 if self.has_header else self.header_bytes
        cdef int count = 0
        cdef uint32_t n
        if chain.readable_bytes < self.header_bytes:
            return -1
        copy_out(header, OLD_HEADER, chain.segs, chain.n_readable)
        if not link_up or not self.makes_sense(header, chain.readable_bytes - self.header_bytes):
            self.dropped += 1
            return 1
        for n in range(chain.n_readable):
            if skip >= chain.segs[n].len:
                skip -= chain.segs[n].len
                continue
            parts[count].iov_base = chain.segs[n].hva + skip
            parts[count].iov_len = chain.segs[n].len - skip
            skip = 0
            count += 1
        return 0 if self.port.send_frame(parts, count) == -EAGAIN else 1

    cdef bint makes_sense(self, const uint8_t *header, uint64_t size) noexcept nogil:
        """What was negotiated is looked at here, which the kernel can't know."""
        cdef bint partial = (header[0] & NEEDS_CSUM) != 0
        cdef uint32_t segment_bytes = header[4] | header[5] << 8
        cdef uint32_t start = header[6] | header[7] << 8
        cdef uint32_t offset = header[8] | header[9] << 8
        cdef int n
        if size < LEAST_FRAME or size > MOST_FRAME - NEW_HEADER:
            return False
        if partial and (not self.checksums or start + offset + 2 > size):
            return False
        if header[1] == NO_SEGMENTS:
            return size <= self.most_bytes
        if not partial or segment_bytes == 0:
            return False
        for n in range(self.segment_count):
            if header[1] == self.segments[n]:
                return True
        return False


cdef class RxLane(Lane):
    """Frames for the guest. ``filtered`` counts those that it does not want."""

    def __cinit__(self, *args, **kwargs):
        self.parts = <iovec *>malloc(MOST_PARTS * sizeof(iovec))
        if self.parts == NULL:
            raise MemoryError
        self.modes = PROMISC

    def __dealloc__(self):
        free(self.parts)

    def configure(self, *, uint32_t header_bytes, bint mergeable, uint64_t target_bytes):
        """``target_bytes``: with header, what a frame may need: so much room is at hand where the guest has given it."""
        self.header_bytes = header_bytes
        self.mergeable = mergeable
        self.target_bytes = target_bytes

    def set_filter(self, int modes, bytes mac, list unicast, list multicast, bytes vlans):
        """What RxFilter says now. ``modes``: its flags as bits, in the order of MODES, then the overflows."""
        if len(mac) != 6 or len(vlans) != sizeof(self.vlans) or max(len(unicast), len(multicast)) > 64:
            raise ValueError("a filter of another size")
        self.modes = modes
        memcpy(self.mac, <const char *>mac, 6)
        memcpy(self.vlans, <const char *>vlans, sizeof(self.vlans))
        self.unicast_count = take_addresses(self.unicast, unicast)
        self.multicast_count = take_addresses(self.multicast, multicast)

    def when_empty(self):
        return STUCK

    cdef int turn(self, bint link_up) noexcept nogil:
        cdef int outcome = _MORE
        cdef int chains
        cdef Py_ssize_t size
        cdef uint32_t n
        for n in range(FRAMES_A_TURN):
            chains = self.room()
            if chains <= 0:
                outcome = chains if chains < 0 else EMPTY
                break
            if chains > <int>self.hand_room:
                outcome = NO_ROOM
                break
            size = self.receive()
            if size > 0:
                chains = self.deliver(chains, size, link_up)
                if chains < 0:
                    outcome = NO_MEMORY
                    break
            elif size == -EMSGSIZE:
                if self.looked_for < self.port.waiting_bytes + self.header_bytes:
                    continue  # it is longer than what was looked for: now it is known
                # A frame that no buffer holds, or one that waits for the guest to add some.
                if not self.mergeable or <uint32_t>chains < self.hand_count or self.hand_count == self.hand_room:
                    self.port.drop_frame()
                else:
                    outcome = EMPTY
                    break
            elif self.port.closed:
                outcome = _CLOSED
                break
            elif size == -EAGAIN:
                outcome = _DONE
                break
            elif size == -ENOBUFS:
                outcome = NO_MEMORY
                break
        self.show()
        return outcome

    cdef int room(self) noexcept nogil:
        """Where the next frame may go: ``parts``, and of how many chains they are. What is there may have to do; 0: there
        is nothing. Below zero, or more than there can be: what the driver did wrong.
        """
        cdef uint64_t target = max(self.target_bytes, self.port.waiting_bytes + self.header_bytes)
        cdef uint64_t size = 0
        cdef uint32_t n = 0
        cdef uint32_t at
        cdef vq_chain *chain
        cdef int got
        self.looked_for = target
        self.part_count = 0
        while size < target:
            if n == self.hand_count:
                got = self.take(CHAINS_A_LOOK)
                if got < 0 and n == self.hand_count:
                    return got
                if n == self.hand_count:
                    break
            chain = self.in_hand(n)
            if chain.writable_bytes < (self.header_bytes if n == 0 else 1):
                return self.hand_room + 1
            if n and (not self.mergeable or self.part_count + chain.n_total - chain.n_readable > MOST_PARTS - 1):
                break
            for at in range(chain.n_readable, chain.n_total):
                self.parts[self.part_count].iov_base = chain.segs[at].hva
                self.parts[self.part_count].iov_len = chain.segs[at].len
                self.part_count += 1
            size += chain.writable_bytes
            n += 1
        return n

    cdef Py_ssize_t receive(self) noexcept nogil:
        """One frame into ``parts``, behind the header where the port has none; its size with that."""
        cdef size_t skip = 0 if self.has_header else self.header_bytes
        cdef Py_ssize_t size
        cdef int n = 0
        while n < self.part_count and skip >= self.parts[n].iov_len:
            skip -= self.parts[n].iov_len
            n += 1
        if n == self.part_count:
            # Room for a header, and for nothing else.
            return self.port.receive_frame(self.parts, 0)
        self.parts[n].iov_base = <uint8_t *>self.parts[n].iov_base + skip
        self.parts[n].iov_len -= skip
        size = self.port.receive_frame(&self.parts[n], self.part_count - n)
        self.parts[n].iov_base = <uint8_t *>self.parts[n].iov_base - skip
        self.parts[n].iov_len += skip
        return size if self.has_header or size <= 0 else size + self.header_bytes

    cdef int deliver(self, uint32_t chains, uint64_t size, bint link_up) noexcept nogil:
        """The guest gets as many chains as a frame of ``size`` bytes with its header fills. -1 without memory."""
        cdef uint8_t head[NEW_HEADER + HEAD]
        cdef uint32_t used = 0
        cdef uint64_t left = size
        cdef uint64_t part
        cdef vq_seg piece
        cdef int n, done
        # One that is too short for its addresses is passed on as QEMU does it, drivers look for that.
        if not link_up or size <= self.header_bytes:
            self.dropped += 1
            return 0
        if not self.modes & PROMISC:
            done = 0
            memset(head, 0, sizeof(head))
            for n in range(self.part_count):
                piece.hva = <uint8_t *>self.parts[n].iov_base
                piece.len = <uint32_t>self.parts[n].iov_len
                done += copy_out(head + done, <int>sizeof(head) - done, &piece, 1)
                if done == sizeof(head):
                    break
            if not self.passes(head + self.header_bytes):
                self.filtered += 1
                return 0
        while left:
            left -= min(left, self.in_hand(used).writable_bytes)
            used += 1
        memset(head, 0, NEW_HEADER)
        head[OLD_HEADER] = used & 0xFF
        head[OLD_HEADER + 1] = used >> 8
        if not self.has_header:
            copy_in(self.parts, self.part_count, 0, head, self.header_bytes)
        elif self.header_bytes == NEW_HEADER:
            copy_in(self.parts, self.part_count, OLD_HEADER, head + OLD_HEADER, 2)
        left = size
        for n in range(<int>used):
            part = min(left, self.in_hand(n).writable_bytes)
            if self.queue.vq_push(self.in_hand(n), part) < 0:
                return -1
            left -= part
        self.give_back(used)
        self.moved(size)
        return 0

    cdef bint passes(self, const uint8_t *head) noexcept nogil:
        """Whether a frame that begins so is for the guest, where it does not want all (5.1.6.5.1 to 5.1.6.5.3)."""
        cdef int vlan, n
        if head[12] == 0x81 and head[13] == 0:  # IEEE 802.1Q
            vlan = (head[14] & 0x0F) << 8 | head[15]
            if not self.vlans[vlan >> 3] >> (vlan & 7) & 1:
                return False
        if head[0] & 1:
            if head[0] & head[1] & head[2] & head[3] & head[4] & head[5] == 0xFF:
                return not self.modes & NOBCAST
            if self.modes & NOMULTI:
                return False
            if self.modes & (ALLMULTI | MULTICAST_OVERFLOW):
                return True
            for n in range(self.multicast_count):
                if memcmp(head, self.multicast[n], 6) == 0:
                    return True
            return False
        if self.modes & NOUNI:
            return False
        if self.modes & (ALLUNI | UNICAST_OVERFLOW) or memcmp(head, self.mac, 6) == 0:
            return True
        for n in range(self.unicast_count):
            if memcmp(head, self.unicast[n], 6) == 0:
                return True
        return False
