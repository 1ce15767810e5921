"""Link: our end of a vhost-user connection, the front end. Requests are sent in order; some are answered.

Whoever is at the other end may be gone, late, or answer what nobody asked: each of these is a BackEndError, and then
the link is of no more use. No call waits longer than its time limit. One caller at a time.
"""

from __future__ import annotations

# Not ``socket``: importing that takes as long as half of a start.
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SCM_RIGHTS, SOL_SOCKET, socket
from errno import ECONNRESET, EPIPE
from select import POLLIN, POLLOUT, poll
from struct import pack
from time import monotonic

from pyvmm.vhost_user import protocol as p

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    # Where it is in the guest, its size, its file, and where it begins there.
    MemoryPiece = tuple[int, int, int, int]

# A back end answers at once, but for one thing: it gives a ring back when it has done what it took from it.
LONGEST_ANSWER_S = 5.0
LONGEST_WORK_S = 30.0
GONE = "it has gone"
WANTED_PROTOCOL = p.P_MQ | p.P_REPLY_ACK | p.P_CONFIG


class BackEndError(Exception):
    """The other end is gone, does not answer, or says what it must not; a sentence says which."""


class Ring:
    """A queue as the back end is told of it: addresses are the guest's."""

    __slots__ = ("call_fd", "desc_gpa", "device_gpa", "driver_gpa", "index", "kick_fd", "size")

    def __init__(
        self, index: int, size: int, desc_gpa: int, driver_gpa: int, device_gpa: int, kick_fd: int, call_fd: int
    ) -> None:
        self.index = index
        self.size = size
        self.desc_gpa, self.driver_gpa, self.device_gpa = desc_gpa, driver_gpa, device_gpa
        self.kick_fd = kick_fd
        self.call_fd = call_fd


class Link:
    """``end``, connected, is its own from here on. ``features`` are the back end's, ``queues`` how many it has (0: it
    does not say). BackEndError where it is no back end.
    """

    def __init__(self, end: socket) -> None:
        self._end = end
        self._protocol = 0
        self.queues = 0
        try:
            end.setblocking(False)
            self._negotiate()
        except BaseException:
            end.close()
            raise

    @property
    def fd(self) -> int:
        """Readable where the other end is gone, or says something; -1 once it is closed."""
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def _negotiate(self) -> None:
        self.features = self._ask_number(p.GET_FEATURES)
        self._speaks = bool(self.features & p.F_PROTOCOL_FEATURES)
        if self._speaks:
            self._protocol = self._ask_number(p.GET_PROTOCOL_FEATURES) & WANTED_PROTOCOL
            self._send(p.SET_PROTOCOL_FEATURES, p.U64.pack(self._protocol))
            if self._protocol & p.P_MQ:
                self.queues = self._ask_number(p.GET_QUEUE_NUM)
        self._send(p.SET_OWNER)

    # -- what it is told -----------------------------------------------------------------------------------------------

    def begin(self, features: int, memory: Sequence[MemoryPiece]) -> None:
        """A driver has negotiated ``features``; and this is the guest's memory. Before any ring."""
        wanted = features & self.features & ~p.F_PROTOCOL_FEATURES
        self._tell(p.SET_FEATURES, p.U64.pack(wanted | self.features & p.F_PROTOCOL_FEATURES))
        if len(memory) > p.MOST_REGIONS:
            raise BackEndError(f"memory in {len(memory)} pieces, of which it takes {p.MOST_REGIONS}")
        # What the user address is of is ours to say: with the guest's own nothing of this process is told.
        regions = b"".join(p.MEMORY_REGION.pack(gpa, size, gpa, offset) for gpa, size, _, offset in memory)
        self._tell(p.SET_MEM_TABLE, p.MEMORY.pack(len(memory), 0) + regions, [fd for _, _, fd, _ in memory])

    def start(self, ring: Ring, base: int) -> None:
        """Serve ``ring``, from ``base`` on: what ``stop`` gave, or a new ring's."""
        index = ring.index
        self._tell(p.SET_VRING_NUM, p.RING_STATE.pack(index, ring.size))
        self._tell(p.SET_VRING_BASE, p.RING_STATE.pack(index, base))
        addresses = (index, 0, ring.desc_gpa, ring.device_gpa, ring.driver_gpa, 0)
        self._tell(p.SET_VRING_ADDR, p.RING_ADDRESS.pack(*addresses))
        self.call_by(index, ring.call_fd)
        self._tell(p.SET_VRING_KICK, p.U64.pack(index), [ring.kick_fd])
        if self._speaks:
            self._tell(p.SET_VRING_ENABLE, p.RING_STATE.pack(index, 1))
        self._settle()

    def call_by(self, index: int, fd: int) -> None:
        """Interrupts of ring ``index`` go to the eventfd ``fd``."""
        self._tell(p.SET_VRING_CALL, p.U64.pack(index), [fd])

    def switch_call(self, index: int, fd: int) -> None:
        """The same, and on return none goes to the former one any more."""
        self.call_by(index, fd)
        self._settle()

    def stop(self, index: int) -> int:
        """Returns when the back end has done what it took from ring ``index``, and touches it no more: its base."""
        if self._speaks:
            self._tell(p.SET_VRING_ENABLE, p.RING_STATE.pack(index, 0))
        self._send(p.GET_VRING_BASE, p.RING_STATE.pack(index, 0))
        answer = self._receive(p.GET_VRING_BASE, p.RING_STATE.size, LONGEST_WORK_S)
        told, base = p.RING_STATE.unpack(answer)
        if told != index:
            raise BackEndError(f"it was asked for ring {index}, and answers for ring {told}")
        return int(base)

    def config(self, size: int) -> bytes | None:
        """The first ``size`` bytes of the device's configuration space; None where the back end has none."""
        if not self._protocol & p.P_CONFIG:
            return None
        head = p.CONFIG.pack(0, size, 0)
        self._send(p.GET_CONFIG, head + bytes(size))
        return self._receive(p.GET_CONFIG, len(head) + size)[len(head) :]

    def look(self) -> None:
        """BackEndError where the other end is gone, or has said what nobody asked for."""
        try:
            there = self._end.recv(1, MSG_PEEK | MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise gone(error) from None
        raise BackEndError("it says what nobody asked for" if there else GONE)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _tell(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """A request that the back end acknowledges, where it can."""
        acknowledged = bool(self._protocol & p.P_REPLY_ACK)
        self._send(request, payload, fds, p.NEED_REPLY if acknowledged else 0)
        if acknowledged and (code := p.U64.unpack(self._receive(request, p.U64.size))[0]):
            raise BackEndError(f"it refuses request {request}, with {code}")

    def _settle(self) -> None:
        """It has taken note of all that it was told."""
        if not self._protocol & p.P_REPLY_ACK:
            self._ask_number(p.GET_FEATURES)

    def _ask_number(self, request: int) -> int:
        self._send(request)
        return int(p.U64.unpack(self._receive(request, p.U64.size))[0])

    def _send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        data = p.HEADER.pack(request, p.VERSION | flags, len(payload)) + payload
        rights = [(SOL_SOCKET, SCM_RIGHTS, pack(f"{len(fds)}i", *fds))] if fds else []
        deadline = monotonic() + LONGEST_ANSWER_S
        while data:
            try:
                sent = self._end.sendmsg([data], rights, MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(POLLOUT, deadline)
                continue
            except OSError as error:
                raise gone(error) from None
            data, rights = data[sent:], []

    def _receive(self, request: int, size: int, longest_s: float = 0.0) -> bytes:
        """The payload of the answer to ``request``, which has so many bytes."""
        deadline = monotonic() + (longest_s or LONGEST_ANSWER_S)
        told, flags, length = p.HEADER.unpack(self._read(p.HEADER.size, deadline))
        if told != request or flags & ~p.NEED_REPLY != p.VERSION | p.REPLY or length != size:
            raise BackEndError(
                f"its answer to request {request} is message {told} with flags {flags:#x} and {length} bytes"
            )
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            try:
                # Descriptors that come along are the kernel's to drop: there is no room for them.
                piece = self._end.recv(size - len(data))
            except BlockingIOError:
                self._wait(POLLIN, deadline)
                continue
            except OSError as error:
                raise gone(error) from None
            if not piece:
                raise BackEndError(GONE)
            data += piece
        return data

    def _wait(self, events: int, deadline: float) -> None:
        left_s = deadline - monotonic()
        waiting = poll()
        waiting.register(self._end, events)
        if left_s <= 0 or not waiting.poll(left_s * 1000):
            raise BackEndError("it does not answer")


def gone(error: OSError) -> BackEndError:
    return BackEndError(GONE if error.errno in (EPIPE, ECONNRESET) else f"the connection is broken: {error.strerror}")
