"""VirtioVsock: sockets between guest and host, without a network; streams, and messages. OASIS virtio 1.2, 5.10.

The host's ends are Unix sockets (``HostEnd``): a client that asks for a port of the guest's, and programs that listen
for the guest's connections. The guest's packets go from its ring to the host's sockets, and what the host's sockets
have into the guest's buffers, both without a copy of ours. Rules that keep it within bounds:

- A connection keeps what the host does not take, as much as the guest was given credit for (vsock_connection.py).
- What is said to the guest is a bit in its connection, which stands in line once; only resets of what is no connection
  are kept by themselves, and where they have become MOST_REPLIES nothing more is taken from the guest until it takes
  some (5.10.6.1).
- There are ``connections`` of them at most, whoever opens them. Those that the host has left, and that the guest has
  not yet answered, are as many again: the first of more is reset. Clients that have not said where to are few, too
  (vsock_callers.py).

``_gate``, the receive queue's lock, protects all of it. Everything is done on the device's thread, but for what a vCPU
does: resets. Where the transmit queue's lock is held too, that was taken first.
"""

from __future__ import annotations

from _socket import SOCK_SEQPACKET

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.ring import RingError
from pyvmm.devices.virtio.vsock_callers import Callers
from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES, MOST_PIECES, NOTHING, Connection
from pyvmm.devices.virtio.vsock_messages import ENDED, TOO_LONG, MessageConnection
from pyvmm.errors import StateError
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any

    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.device import IoWatcher
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.vsock.host import HostEnd

    # A buffer of the guest's: its chain, the piece that its header goes into, the pieces behind, and their size.
    Buffer = tuple[Chain, memoryview | None, list[memoryview], int]

F_STREAM = 1 << 0
F_SEQPACKET = 1 << 1
RX, TX, EVENT = range(3)
QUEUE_SIZE = 256
CONFIG_BYTES = 8  # guest_cid
EVENT_BYTES = 4
TRANSPORT_RESET = bytes(EVENT_BYTES)

DEFAULT_CONNECTIONS = 256
MOST_REPLIES = QUEUE_SIZE
FIRST_HOST_PORT = 1 << 30  # of connections into the guest, as Firecracker has it
HOST_PORTS = 1 << 30
BATCH = 64
BATCHES_A_TURN = 8
PACKETS_A_TURN = 256
MOST_REACH = 32  # buffers that one read fills

# Bits of Connection.to_say; what can be said in any order is said in this one.
CONTROL = (p.OP_REQUEST, p.OP_RESPONSE, p.OP_CREDIT_UPDATE, p.OP_CREDIT_REQUEST)
DATA = 1 << p.OP_RW
SHUTDOWN = 1 << p.OP_SHUTDOWN

# What has become of the event that a loaded device has for its driver.
QUIET, DUE, TOLD = range(3)


class GuestMistake(RingError):
    """A packet, or a buffer, that can be none."""


class VirtioVsock(VirtioDevice):
    """``cid`` is the guest's address. ``host`` has the host's sockets and belongs to the device, which closes it;
    ``messages`` likewise those with messages, where it has any.
    """

    DEVICE_ID = 19
    FEATURES = F_STREAM
    QUEUES = (QUEUE_SIZE, QUEUE_SIZE, 64)
    own_thread = True

    def __init__(
        self,
        memory: GuestMemory,
        host: HostEnd,
        *,
        cid: int,
        connections: int = DEFAULT_CONNECTIONS,
        messages: HostEnd | None = None,
    ) -> None:
        features = self.FEATURES | (0 if messages is None else F_SEQPACKET)
        super().__init__(memory, config_bytes=CONFIG_BYTES, features=features)
        self.cid = cid
        self.host = host
        self._hosts = {p.STREAM: host} if messages is None else {p.STREAM: host, p.SEQPACKET: messages}
        self.stats = {"opened": 0, "refused": 0, "sent": 0, "sent_bytes": 0, "received": 0, "received_bytes": 0}
        """Connections, and packets with their payload as the guest sees them, since the machine was made."""
        self._most = connections
        self._gate = self.queues[RX].lock
        self._connections: dict[tuple[int, int], Connection] = {}  # by host's and guest's port
        self._callers = [Callers(self, end) for end in self._hosts.values()]
        self._lingering: dict[int, Connection] = {}  # ended, but the host has yet to take what is kept
        self._left: dict[Connection, None] = {}  # by the host, and the guest has yet to say that it knows
        self._next_port = FIRST_HOST_PORT
        self._line: deque[Connection] = deque()  # those that have something to say to the guest
        self._replies: deque[bytes] = deque()
        self._stuck = False  # the transmit queue is left alone until some of them are gone
        self._hand: deque[Buffer] = deque()  # the guest's buffers, taken and not filled yet
        self._events: deque[Chain] = deque()  # the same for events
        self._event = QUIET
        self._tokens: list[list[Any]] = []
        self._ended = False
        self._set_cid()

    def _set_cid(self) -> None:
        self.config[:] = self.cid.to_bytes(CONFIG_BYTES, "little")

    @property
    def connections(self) -> int:
        """How many are open, or on their way to that."""
        return len(self._connections) - len(self._left)

    @property
    def _thread(self) -> IoWatcher:
        assert self.io is not None  # the board has given it
        return self.io

    # -- beginning and end -------------------------------------------------------------------------------------------

    def broken(self, why: str) -> None:
        super().broken(why)
        if self.io is not None:
            self.io.call_soon(self._end_if_broken)

    def _end_if_broken(self) -> None:
        if not self.live:
            self.quiesce()

    def quiesce(self) -> None:
        """Every connection ends: the driver that knew of them is gone. What was sent to the host still gets there."""
        with self._gate:
            for callers in self._callers:
                callers.end()
            for connection in list(self._connections.values()):
                self._forget(connection, linger=True)
            self._line.clear()
            self._replies.clear()
            self._stuck = False
            self._hand.clear()
            self._events.clear()
            self._event = QUIET

    def stop_queue(self, queue: Virtqueue) -> None:
        with self._gate:
            if queue.index == RX:
                self._hand.clear()
            elif queue.index == EVENT:
                self._events.clear()

    def close(self) -> None:
        """The machine ends: every socket is closed. Again is fine."""
        with self._gate:
            self._ended = True
            self.quiesce()
            for connection in list(self._lingering.values()):
                self._close(connection)
            for host in self._hosts.values():
                host.close()

    def abandon(self) -> None:
        """In a child of fork: close the descriptors. Takes no lock."""
        for end in (*self._connections.values(), *self._lingering.values()):
            end.close()
        for callers in self._callers:
            callers.abandon()
        for host in self._hosts.values():
            host.abandon()

    # -- the queues ---------------------------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue) -> None:
        with self._gate:
            if queue.index == TX:
                self._transmit(queue)
            elif queue.index == EVENT:
                self._look_at_events(queue)
            # From the first look on; and where there was no descriptor for a client there may be one.
            self._listen()
            self._deliver()

    def guarded(self, work: Callable[[], object]) -> None:
        """A callback of the thread's: what ``serve`` does for a queue."""
        with self._gate:
            if self.live:
                try:
                    work()
                    self._deliver()
                except RingError as error:
                    self.broken(str(error))

    def _look_at_events(self, queue: Virtqueue) -> None:
        """5.10.6.7. All of its buffers are taken at once, so the next one that comes says that the driver has seen the
        event and put its buffer back: only then does anybody connect to a guest that is about to drop connections.
        """
        before = len(self._events)
        self._events += queue.take(queue.max_size)
        while queue.enable_kicks():
            self._events += queue.take(queue.max_size)
        if self._event == TOLD and len(self._events) > before:
            self._event = QUIET
        if self._event == DUE and self._events:
            chain = self._events.popleft()
            if chain.write(0, TRANSPORT_RESET) < EVENT_BYTES:
                raise GuestMistake("a buffer for events without room for one (5.10.6.7)")
            queue.push(chain, EVENT_BYTES)
            queue.flush()
            self._event = TOLD

    @property
    def _drops_connections(self) -> bool:
        """Whether the driver has the event before it, or is about to. One without a buffer for events has no such plan.
        """
        about = bool(self._events) or self.queues[EVENT].pending()
        return self._event == TOLD or (self._event == DUE and about)

    # -- packets from the guest ----------------------------------------------------------------------------------------

    def _transmit(self, queue: Virtqueue) -> None:
        """Many packets at a time: what they bring for one socket is one system call."""
        queue.disable_kicks()
        for _ in range(BATCHES_A_TURN):
            if len(self._replies) >= MOST_REPLIES:
                self._stuck = True
                return
            chains = queue.take(BATCH)
            if not chains:
                if not queue.enable_kicks():
                    return
                queue.disable_kicks()
                continue
            touched: dict[Connection, None] = {}
            for chain in chains:
                self._packet(chain, touched)
            for connection in touched:
                self._give(connection)
            for chain in chains:
                queue.push(chain, 0)
            queue.flush()
        self.kick(queue)  # others of this thread have their turn first

    def _packet(self, chain: Chain, touched: dict[Connection, None]) -> None:
        views = chain.readable
        if chain.readable_bytes < p.HEADER_BYTES:
            raise GuestMistake(f"a packet of {chain.readable_bytes} bytes, which is less than a header (5.10.6)")
        whole = len(views[0]) >= p.HEADER_BYTES
        header = p.HEADER.unpack_from(views[0]) if whole else p.HEADER.unpack(chain.read(0, p.HEADER_BYTES))
        cid, to_cid, guest_port, port, size, kind, op, flags, room, forwarded = header
        if size > chain.readable_bytes - p.HEADER_BYTES:
            raise GuestMistake(f"a packet with {size} bytes of which its buffers have fewer (5.10.6)")
        if cid != self.cid:
            return  # nobody that could get an answer
        self.stats["received"] += 1
        ours = to_cid == p.HOST_CID and (kind == p.STREAM or (kind in self._hosts and self.features & F_SEQPACKET != 0))
        connection = self._connections.get((port, guest_port)) if ours else None
        if connection is not None and connection.kind != kind:
            connection, ours = None, False
        if connection is None:
            if op == p.OP_REQUEST and ours:
                self._open(port, guest_port, kind, room, forwarded)
            elif op != p.OP_RST:
                self._reply_reset(to_cid, port, guest_port, kind)
            return
        connection.guest_room, connection.guest_forwarded = room, forwarded
        if connection.starved and connection.credit:
            connection.starved = connection.asked = False
            self._say(connection, DATA)
        if op == p.OP_RW and connection.accepted:
            self.stats["received_bytes"] += size
            if connection.take(p.body(views, size), size, flags):
                touched[connection] = None
            else:
                self._reset(connection)
        else:
            self._control(connection, op, flags)

    def _control(self, connection: Connection, op: int, flags: int) -> None:
        """A packet that carries no data, of a connection that there is."""
        if op == p.OP_RST:
            connection.give()
            self._forget(connection)
        elif op == p.OP_RESPONSE and not connection.accepted:
            connection.accepted = True
            connection.say(b"OK %d\n" % connection.host_port)
            self.stats["opened"] += 1
            self._say(connection, DATA)
        elif not connection.accepted:
            self._reset(connection)
        elif op == p.OP_SHUTDOWN:
            self._guest_shuts(connection, flags)
        elif op == p.OP_CREDIT_REQUEST:
            self._say(connection, 1 << p.OP_CREDIT_UPDATE)
        elif op != p.OP_CREDIT_UPDATE:
            self._reset(connection)  # one that makes no sense here, or none that there is

    def _guest_shuts(self, connection: Connection, flags: int) -> None:
        connection.give()
        connection.shut(flags)
        if connection.guest_shut == p.BOTH_WAYS:
            # 5.10.6.5: that ends it, and the address may be used again; what is kept still goes to the host.
            self._reset(connection, linger=True)
            return
        if connection.guest_shut & p.NO_RECEIVE:
            self._stop_reading(connection)
        self._after_giving(connection)

    def _give(self, connection: Connection) -> None:
        """To the host, what this turn has brought."""
        connection.give()
        if self._connections.get((connection.host_port, connection.guest_port)) is connection:
            self._after_giving(connection)

    def _after_giving(self, connection: Connection) -> None:
        if connection.deaf:
            self._host_shuts(connection, p.NO_RECEIVE)
        elif connection.keeps and not connection.written:
            connection.written = True
            self._thread.add_writer(connection.fd, lambda: self.guarded(lambda: self._on_writable(connection)))
        if connection.wants_telling:
            self._say(connection, 1 << p.OP_CREDIT_UPDATE)

    def _on_writable(self, connection: Connection) -> None:
        if connection.fd < 0:
            return
        if connection.drain():
            self._unwrite(connection)
            connection.drained()
        self._after_giving(connection)

    # -- connections ---------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether there are as many connections as may be."""
        return self.connections + len(self._lingering) >= self._most

    def _open(self, port: int, guest_port: int, kind: int, room: int, forwarded: int) -> None:
        """The guest asks for a connection (5.10.6.5)."""
        end = None if self.full else self._hosts[kind].connect(port)
        if end is None:
            self.stats["refused"] += 1
            self._reply_reset(p.HOST_CID, port, guest_port, kind)
            return
        self.stats["opened"] += 1
        connection = made(end, port, guest_port, accepted=True)
        connection.guest_room, connection.guest_forwarded = room, forwarded
        self._connections[port, guest_port] = connection
        self._say(connection, 1 << p.OP_RESPONSE | DATA)

    def _reset(self, connection: Connection, *, linger: bool = False) -> None:
        """It ends now, and the guest is told."""
        self._reply_reset(p.HOST_CID, connection.host_port, connection.guest_port, connection.kind)
        self._forget(connection, linger=linger)

    def _reply_reset(self, cid: int, port: int, guest_port: int, kind: int) -> None:
        self._replies.append(
            p.HEADER.pack(cid, self.cid, port, guest_port, 0, kind, p.OP_RST, 0, BUFFER_BYTES, 0)
        )

    def _forget(self, connection: Connection, *, linger: bool = False) -> None:
        """It is no connection any more. ``linger``: the host still gets what is kept."""
        del self._connections[connection.host_port, connection.guest_port]
        self._left.pop(connection, None)
        connection.to_say = 0
        if connection.listed:
            self._line.remove(connection)
            connection.listed = False
        self._unwatch(connection)
        if linger and connection.keeps and not connection.deaf:
            self._lingering[connection.fd] = connection
            self._unwrite(connection)
            connection.written = True
            self._thread.add_writer(connection.fd, lambda: self._on_lingering(connection))
        else:
            self._close(connection)

    def _on_lingering(self, connection: Connection) -> None:
        """On the thread, ``live`` or not: it is the host's alone."""
        with self._gate:
            if connection.fd >= 0 and connection.drain():
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._unwatch(connection)
        self._unwrite(connection)
        self._lingering.pop(connection.fd, None)
        connection.close()
        self._listen()

    def _host_shuts(self, connection: Connection, flags: int) -> None:
        """The host does not send, or not receive any more: the guest gets to know, behind all data."""
        if not flags & ~connection.host_shut:
            return
        connection.host_shut |= flags
        self._say(connection, SHUTDOWN)
        if connection.host_shut == p.BOTH_WAYS:
            self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        """The host is gone, and its socket too. 5.10.6.5: the guest resets the connection when it knows; where it does
        not, in time, that is done for it: here, when as many others have come and gone.
        """
        self._close(connection)
        self._left[connection] = None
        if len(self._left) > self._most:
            self._reset(next(iter(self._left)))
        self._listen()

    def _stop_reading(self, connection: Connection) -> None:
        """Nothing more comes from the host: what is left to hear is that it closes its end."""
        connection.to_say &= ~DATA
        connection.starved = False
        if connection.fd < 0:
            return
        connection.watched = True
        self._thread.add_reader(
            connection.fd, lambda: self.guarded(lambda: self._look_whether_gone(connection)), edge=True
        )

    def _look_whether_gone(self, connection: Connection) -> None:
        if connection.fd >= 0 and connection.gone:
            self._host_shuts(connection, p.BOTH_WAYS)

    # -- clients of the host (vsock_callers.py) ------------------------------------------------------------------------

    @property
    def takes_clients(self) -> bool:
        """Whether somebody of the host's may connect to the guest now, but for ``full``."""
        return self.live and not self._ended and not self._drops_connections

    def _listen(self) -> None:
        for callers in self._callers:
            callers.listen()

    def connect(self, end: socket, guest_port: int) -> None:
        """A client has said where to: the guest is asked."""
        if self.full:
            self.stats["refused"] += 1
            end.close()
            return
        port = self._free_port(guest_port)
        connection = made(end, port, guest_port, accepted=False)
        self._connections[port, guest_port] = connection
        self._watch(connection)
        self._say(connection, 1 << p.OP_REQUEST)

    def _free_port(self, guest_port: int) -> int:
        """The host's port of a new connection to ``guest_port``."""
        while True:
            port = self._next_port
            self._next_port = FIRST_HOST_PORT + (port + 1 - FIRST_HOST_PORT) % HOST_PORTS
            if (port, guest_port) not in self._connections:
                return port

    # -- packets for the guest -----------------------------------------------------------------------------------------

    def _say(self, connection: Connection, what: int) -> None:
        """Tell the guest, when it is this connection's turn and the guest has a buffer."""
        connection.to_say |= what
        if not connection.listed:
            connection.listed = True
            self._line.append(connection)

    def _deliver(self) -> None:
        """What is to be said, as far as there are buffers; each connection has its turn."""
        rx = self.queues[RX]
        if not (self._line or self._replies) or not rx.ready:
            return
        rx.disable_kicks()
        stop = self.stats["sent"] + PACKETS_A_TURN
        while self._line or self._replies:
            if self.stats["sent"] >= stop:
                self.kick(rx)  # others of this thread have their turn first
                break
            if not self._hand and not self._take_buffers(rx):
                if not rx.enable_kicks():
                    break
                rx.disable_kicks()
            elif self._replies:
                self._put(self._hand.popleft(), self._replies.popleft())
            else:
                self._speak(self._line.popleft())
        rx.flush()
        if self._stuck and len(self._replies) < MOST_REPLIES:
            self._stuck = False
            self.kick(self.queues[TX])
        for connection in self._line:
            if connection.to_say & DATA:
                self._unwatch(connection)  # it would be called again and again for what it can't do yet

    def _take_buffers(self, rx: Virtqueue) -> bool:
        for chain in rx.take(MOST_REACH):
            self._hold(chain)
        return bool(self._hand)

    def _hold(self, chain: Chain) -> None:
        if chain.writable_bytes < p.HEADER_BYTES:
            raise GuestMistake(f"a buffer of {chain.writable_bytes} bytes has no room for a header (5.10.6)")
        views = chain.writable
        size = chain.writable_bytes - p.HEADER_BYTES
        head = views[0] if len(views[0]) >= p.HEADER_BYTES else None
        self._hand.append((chain, head, p.body(views, size), size))

    def _speak(self, connection: Connection) -> None:
        """One thing of what it has to say."""
        connection.listed = False
        for op in CONTROL:
            if connection.to_say & 1 << op:
                connection.to_say &= ~(1 << op)
                self._put(self._hand.popleft(), self._header(connection, op))
                break
        else:
            if connection.to_say & DATA:
                self._read(connection)
            elif connection.to_say & SHUTDOWN:
                connection.to_say &= ~SHUTDOWN
                self._put(self._hand.popleft(), self._header(connection, p.OP_SHUTDOWN, flags=connection.host_shut))
        if connection.to_say and not connection.listed:
            self._say(connection, 0)

    def _header(self, connection: Connection, op: int, *, size: int = 0, flags: int = 0) -> bytes:
        connection.told = connection.forwarded
        return p.HEADER.pack(
            *(p.HOST_CID, self.cid, connection.host_port, connection.guest_port, size, connection.kind, op, flags),
            *(BUFFER_BYTES, connection.forwarded & 0xFFFF_FFFF),
        )

    def _put(self, buffer: Buffer, header: bytes, size: int = 0) -> None:
        """A packet into a buffer, whose data is there already."""
        chain, head, _, _ = buffer
        if head is not None:
            head[: p.HEADER_BYTES] = header
        else:
            chain.write(0, header)
        self.queues[RX].push(chain, p.HEADER_BYTES + size)
        self.stats["sent"] += 1
        self.stats["sent_bytes"] += size

    def _read(self, connection: Connection) -> None:
        """Data from the host's socket, into as many buffers as it may fill."""
        if connection.kind == p.SEQPACKET:
            self._read_message(connection)
            return
        limit = connection.credit
        if not limit:
            self._read_without_credit(connection)
            return
        buffers, pieces, room = self._reach(connection, limit)
        if not buffers:
            return
        got = connection.read(pieces)
        if got > 0:
            self._fill(connection, buffers, got)
            connection.reach = min(2 * connection.reach, MOST_REACH) if got == room else 1
            return
        self._hand.extendleft(reversed(buffers))
        if got == NOTHING:
            self._await(connection)
        else:
            self._host_ends(connection)

    def _read_message(self, connection: Any) -> None:
        """A message from the host's socket, or what is left of it: one buffer, and another in its next turn."""
        got = connection.load()
        if got == NOTHING:
            self._await(connection)
        elif got == ENDED:
            self._host_ends(connection)
        elif got == TOO_LONG:
            self._reset(connection)
        elif connection.left and not connection.credit:
            self._starve(connection)
        else:
            buffer = self._hand.popleft()
            size = min(connection.left, connection.credit, buffer[3])
            if connection.left and not size:  # room for a header, and nothing else
                self._put(buffer, self._header(connection, p.OP_CREDIT_UPDATE))
                return
            flags = connection.unload(cut(buffer[2], size) if size else [], size)
            self._put(buffer, self._header(connection, p.OP_RW, size=size, flags=flags), size)

    def _await(self, connection: Connection) -> None:
        """The host has nothing for the guest now."""
        connection.to_say &= ~DATA
        connection.reach = 1
        self._watch(connection)

    def _reach(self, connection: Connection, limit: int) -> tuple[list[Buffer], list[memoryview], int]:
        """Buffers of the hand for its next data; the pieces of them that ``limit`` bytes may fill, and their size."""
        buffers: list[Buffer] = []
        pieces: list[memoryview] = []
        room = 0
        rx = self.queues[RX]
        while len(buffers) < connection.reach and room < limit and (self._hand or self._take_buffers(rx)):
            buffer = self._hand.popleft()
            _, _, own, size = buffer
            if not size:  # room for a header, and nothing else
                self._put(buffer, self._header(connection, p.OP_CREDIT_UPDATE))
                continue
            if len(pieces) + len(own) > MOST_PIECES:
                self._hand.appendleft(buffer)
                break
            buffers.append(buffer)
            pieces += own if size <= limit - room else cut(own, limit - room)
            room += min(size, limit - room)
        return buffers, pieces, room

    def _fill(self, connection: Connection, buffers: list[Buffer], got: int) -> None:
        """``got`` bytes stand in them, one after the other."""
        connection.sent += got
        used = 0
        for buffer in buffers:
            size = min(buffer[3], got)
            if not size:
                break
            self._put(buffer, self._header(connection, p.OP_RW, size=size), size)
            got -= size
            used += 1
        self._hand.extendleft(reversed(buffers[used:]))

    def _read_without_credit(self, connection: Connection) -> None:
        """The guest has no room: if that is for something, the socket is left alone until it has (5.10.6.3)."""
        there = connection.look()
        if there == NOTHING:
            self._await(connection)
            return
        if there == 0:
            self._host_ends(connection)
            return
        self._starve(connection)

    def _starve(self, connection: Connection) -> None:
        connection.starved = True
        connection.to_say &= ~DATA
        self._unwatch(connection)
        if not connection.asked:
            connection.asked = True
            self._say(connection, 1 << p.OP_CREDIT_REQUEST)

    def _host_ends(self, connection: Connection) -> None:
        """All that the host has sent was read."""
        self._host_shuts(connection, p.BOTH_WAYS if connection.gone else p.NO_SEND)
        self._stop_reading(connection)

    # -- watching ------------------------------------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        if not connection.watched:
            connection.watched = True
            self._thread.add_reader(connection.fd, lambda: self.guarded(lambda: self._on_readable(connection)))

    def _unwatch(self, connection: Connection) -> None:
        if connection.watched:
            connection.watched = False
            self._thread.remove_reader(connection.fd)

    def _unwrite(self, connection: Connection) -> None:
        if connection.written:
            connection.written = False
            self._thread.remove_writer(connection.fd)

    def _on_readable(self, connection: Connection) -> None:
        if connection.fd < 0:
            return
        if connection.accepted:
            self._say(connection, DATA)
        elif connection.look() == 0:
            self._reset(connection)
        else:
            self._unwatch(connection)  # it did not wait for the answer; what it sent does

    # -- state ---------------------------------------------------------------------------------------------------------

    # Of connections only this: a socket of the guest's that has lost its own still has the name, as Linux has it, and
    # would refuse a new one that is called alike.
    STATE = {"_next_port": range(FIRST_HOST_PORT, FIRST_HOST_PORT + HOST_PORTS)}

    def save(self) -> dict[str, Any]:
        """Connections are not in it: their other ends are this process's."""
        state: dict[str, Any] = super().save()
        state["hands"] = [[buffer[0].token for buffer in self._hand], [chain.token for chain in self._events]]
        return state

    def load(self, state: dict[str, Any]) -> None:
        hands = state.get("hands") if isinstance(state, dict) else None
        if not isinstance(hands, list) or len(hands) != 2:
            raise StateError("hands is no list of 2: the state is of something else")
        if not all(isinstance(hand, list) and len(hand) <= QUEUE_SIZE for hand in hands):
            raise StateError("hands has more in one than a queue holds")
        super().load({name: value for name, value in state.items() if name != "hands"})
        self._tokens = hands

    def after_load(self) -> None:
        """The guest's connections are gone, and its address may be another one: it is told so (5.10.6.7)."""
        super().after_load()
        self._set_cid()
        tokens, self._tokens = self._tokens, [[], []]
        with self._gate:
            if not self.live:
                return
            self._event = DUE
            try:
                self._retake(*tokens)
            except RingError as error:
                self.broken(str(error))

    def _retake(self, hand: list[Any], events: list[Any]) -> None:
        self._hand.clear()
        for token in hand:
            self._hold(self.queues[RX].retake(token))
        self._events = deque(self.queues[EVENT].retake(token) for token in events)


def made(end: socket, port: int, guest_port: int, *, accepted: bool) -> Connection:
    """A connection of the socket's kind."""
    if end.type == SOCK_SEQPACKET:
        return MessageConnection(end, port, guest_port, accepted=accepted)
    return Connection(end, port, guest_port, accepted=accepted)


def cut(pieces: list[memoryview], size: int) -> list[memoryview]:
    """Their first ``size`` bytes."""
    found = []
    for piece in pieces:
        if len(piece) >= size:
            found.append(piece[:size])
            break
        found.append(piece)
        size -= len(piece)
    return found
