"""VirtioNet: a network card by virtio (OASIS virtio 1.2, 5.1).

Queue 2n receives and 2n + 1 sends, a pair for each port of the backend; behind the last pair that the driver uses comes
the control queue (5.1.2). Frames move in lanes (net_lane.pyx), each on its pair's thread: a kick runs the lane that
sends, a readable descriptor the one that receives. Where a guest gives no buffers nobody reads: what comes meanwhile
waits at the host, within its bounds, and is lost there. Where the host takes no more, frames stay in the guest's ring.

What is of the whole card is on the first pair's thread, the device's: commands, the link. Features and resets are a
vCPU's. Two pairs have nothing in common but that: whoever takes a port away from a pair holds the locks of its queues.
"""

from __future__ import annotations

from pyvmm.address_space import Held
from pyvmm.device import DeviceLock
from pyvmm.devices.virtio import net_control
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.net_features import (
    F_CSUM,
    F_CTRL_MAC_ADDR,
    F_CTRL_VLAN,
    F_CTRL_VQ,
    F_GUEST_ANNOUNCE,
    F_HOST_ECN,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_HOST_USO,
    F_MQ,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    F_VERSION_1,
    GUEST_OFFLOADS,
    SEGMENTS_FOR_GUEST,
    goes_together,
    guest_offloads,
    offered,
)
from pyvmm.devices.virtio.net_filter import MAC_BYTES, MOST_MACS, RxFilter
from pyvmm.devices.virtio.net_lane import (
    BESIDE_MTU_BYTES,
    CLOSED,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    HEADER_BYTES,
    MORE,
    OLD_HEADER_BYTES,
    STUCK,
    GuestMistake,
    RxLane,
    TxLane,
)
from pyvmm.devices.virtio.ring import RingError
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.devices.virtio.chain import Chain
    from pyvmm.devices.virtio.device import IoWatcher
    from pyvmm.devices.virtio.ring import Virtqueue
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.net.backend import NetBackend

QUEUE_SIZE = 256
CONTROL_SIZE = 64
COMMANDS_A_TURN = 64

# struct virtio_net_config (5.1.4): where its fields are.
STATUS, MAX_PAIRS, MTU, CONFIG_BYTES = 6, 8, 10, 12
S_LINK_UP, S_ANNOUNCE = 1, 2

DEFAULT_MTU = 1500
LEAST_FRAME_BYTES = 60
MOST_SEGMENT_BYTES = 65535 + BESIDE_MTU_BYTES  # an IP packet's most, before it is cut


class VirtioNet(VirtioDevice):
    """``backend`` is what it is joined to, ``mac`` its address, six bytes; ``mtu`` the largest packet, for a guest that
    is to be told one.
    """

    DEVICE_ID = 1
    own_thread = True

    def __init__(
        self,
        memory: GuestMemory,
        backend: NetBackend,
        *,
        mac: bytes,
        mtu: int | None = None,
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        self.backend = backend
        self.filter = RxFilter()
        self.on_filter: Callable[[], object] = nobody_looks
        """Called when the guest has changed what it lets through, once until somebody has looked (``look_at_filter``):
        a guest can do that as often as it likes.
        """
        self._filter_told = False
        self._mac_at_power_on = mac
        self._former_mac = b""  # what a driver goes on with that has not looked since there is another one
        self._mtu = mtu or 0
        self._pairs_there = len(backend.ports)
        self._pairs = 1  # in use
        self._guest_offloads = 0
        self._link_wanted = True
        self._announce = False
        self._begun = False  # the driver has been ready since the last reset
        self._attached = False
        self._header_bytes = OLD_HEADER_BYTES  # as the backend was told last
        self._watched: set[int] = set()
        self._watching = DeviceLock()  # around that set and what it says; the last, below a queue's lock
        self._tokens: list[list[Any]] = []
        sizes = [queue_size] * (2 * self._pairs_there) + [CONTROL_SIZE]
        features = offered(backend.offloads, pairs=self._pairs_there, mtu=mtu is not None)
        super().__init__(memory, queues=sizes, config_bytes=CONFIG_BYTES, features=features)
        self.thread_per_queue = self._pairs_there > 1
        rx, tx = self.queues[:-1:2], self.queues[1:-1:2]
        header = backend.has_header
        self._rx = [RxLane(*each, has_header=header) for each in zip(rx, backend.ports, strict=True)]
        self._tx = [TxLane(*each, has_header=header) for each in zip(tx, backend.ports, strict=True)]
        self.config[MAX_PAIRS:] = self._pairs_there.to_bytes(2, "little") + self._mtu.to_bytes(2, "little")
        self.reset_device()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """Its address now: the guest may change it."""
        return bytes(self.config[:MAC_BYTES])

    @property
    def link_up(self) -> bool:
        """Whether the cable is in; setting it pulls it, or puts it back. The link is down too where nobody is at the
        other end.
        """
        return self._link_wanted and self.backend.connected

    @link_up.setter
    def link_up(self, up: bool) -> None:
        self._link_wanted = up
        self._link_changed()

    @property
    def stats(self) -> dict[str, int]:
        """Frames and bytes since the machine was made. ``dropped``: by us, ``lost``: by the host, ``filtered``: not for
        the guest.
        """
        ports = self.backend.ports
        return {
            "sent": sum(port.sent for port in ports),
            "sent_bytes": sum(port.sent_bytes for port in ports),
            "received": sum(port.received for port in ports),
            "received_bytes": sum(port.received_bytes for port in ports),
            "lost": sum(port.lost for port in ports),
            "dropped": sum(lane.dropped for lane in (*self._rx, *self._tx)) + sum(port.too_long for port in ports),
            "filtered": sum(lane.filtered for lane in self._rx),
        }

    def look_at_filter(self) -> RxFilter:
        """What the guest lets through now. The next change is told again."""
        self._filter_told = False
        return self.filter

    def announce(self) -> None:
        """Have the network told where the guest is, as after a move to another host: the guest is asked to (5.1.6.5.4),
        or where it knows no such request a RARP frame says it. Nothing is said for a guest whose driver was never
        ready. From any thread.
        """
        if not self.features & F_GUEST_ANNOUNCE or not self.features & F_STATUS:
            if self.io is not None:
                self._thread.call_soon(self._tell_where)
            return
        self._announce = True
        self._link_changed()

    def _tell_where(self) -> None:
        """On the device's thread. A frame for which there is no room is lost, as frames are."""
        if not self._attached or not self.link_up:
            return
        lane = self._tx[0]
        header = bytes(self._header_bytes) if self.backend.has_header else b""
        with lane.queue.lock:
            port = lane.port
            if port.closed:
                return
            port.send([header + reverse_request(self._former_mac or self.mac)])
            if not port.flush():
                fd = port.fd
                self._thread.add_writer(fd, lambda: self._on_writable(0, fd))

    def take_own_address(self) -> None:
        """Of a twin, which has been loaded: have the address that it was made with, not the other one's. Its driver is
        told of a change (5.1.4), and may look at once, when it is bound again, or never; until then frames to the one
        that it knows are let through too.
        """
        if self.mac == self._mac_at_power_on:
            return
        if self._begun:
            self._former_mac = self.mac
        self.config[:MAC_BYTES] = self._mac_at_power_on
        self._refilter()
        self.config_changed()

    def _link_changed(self) -> None:
        with self.notice:  # from any thread: of two changes the later one must not be written first
            status = (S_LINK_UP if self.link_up else 0) | (S_ANNOUNCE if self._announce else 0)
            before = int.from_bytes(self.config[STATUS:MAX_PAIRS], "little")
            if status != before:
                self.config[STATUS:MAX_PAIRS] = status.to_bytes(2, "little")
                self.config_changed()

    @property
    def _thread(self) -> IoWatcher:
        """The device's, which serves the first pair and the control queue."""
        assert self.io is not None  # the board has given it
        return self.io

    def thread_of(self, queue: Virtqueue) -> int:
        pair = queue.index // 2
        return pair if pair < self._pairs_there else 0

    def _pairs_thread(self, pair: int) -> IoWatcher:
        return self.ios.get(pair, self._thread)

    # -- negotiation ------------------------------------------------------------------------------------------------

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Drivers older than VERSION_1 write the address here, a byte at a time (5.1.4)."""
        if not self.features & (F_VERSION_1 | F_CTRL_MAC_ADDR) and offset + size <= MAC_BYTES:
            self.config[offset : offset + size] = value.to_bytes(size, "little")

    def check_features(self, features: int) -> bool:
        return goes_together(features)

    def driver_ok(self) -> None:
        if not self._begun:
            self._begun = True
            self.filter.reset(by_vlan=bool(self.features & F_CTRL_VLAN))
            self._guest_offloads = guest_offloads(self.features)
        self._take_effect()
        self._thread.call_soon(self._begin)

    def _take_effect(self) -> None:
        """What was negotiated, and what the control queue has said since, is what lanes and backend go by."""
        features = self.features
        new = features & (F_VERSION_1 | F_MRG_RXBUF)
        self._header_bytes = header_bytes = HEADER_BYTES if new else OLD_HEADER_BYTES
        mtu = self._mtu if features & F_MTU else 0
        ecn = (0, GSO_ECN) if features & F_HOST_ECN else (0,)
        segments = [
            kind | bit
            for feature, kind, bits in (
                (F_HOST_TSO4, GSO_TCPV4, ecn),
                (F_HOST_TSO6, GSO_TCPV6, ecn),
                (F_HOST_USO, GSO_UDP_L4, (0,)),
            )
            if features & feature
            for bit in bits
        ]
        whole = features & SEGMENTS_FOR_GUEST
        largest = MOST_SEGMENT_BYTES if whole else (self._mtu or DEFAULT_MTU) + BESIDE_MTU_BYTES
        for tx in self._tx:
            tx.configure(
                header_bytes=header_bytes, checksums=bool(features & F_CSUM), segments=segments, mtu=mtu
            )
        for rx in self._rx:
            rx.configure(
                header_bytes=header_bytes,
                mergeable=bool(features & F_MRG_RXBUF),
                target_bytes=header_bytes + largest,
            )
        self._refilter()
        self.backend.configure(header_bytes)
        self.backend.set_offloads(self._guest_offloads)
        self.backend.enable_pairs(self._pairs)

    def _begin(self) -> None:
        """On the device's thread: frames may come."""
        if not self._attached:
            self._attached = True
            self.backend.attach(self._thread, self._link_arrived)
        self._link_changed()
        self._watch()

    def _link_arrived(self) -> None:
        self._link_changed()
        self._watch()

    def quiesce(self) -> None:
        """Nobody has a buffer of the guest's any more."""
        for lane in (*self._rx, *self._tx):
            with lane.queue.lock:
                lane.forget()

    def stop_queue(self, queue: Virtqueue) -> None:
        for lane in (*self._rx, *self._tx):
            if lane.queue is queue:
                with queue.lock:
                    lane.forget()

    def reset_device(self) -> None:
        self._begun = False
        self.filter.reset(by_vlan=False)
        self._pairs = 1
        self._guest_offloads = 0
        self.config[:MAC_BYTES] = self._mac_at_power_on
        self._former_mac = b""
        with self.notice:
            self._announce = False
            self.config[STATUS:MAX_PAIRS] = (S_LINK_UP if self.link_up else 0).to_bytes(2, "little")

    # -- the queues -------------------------------------------------------------------------------------------------

    def handle(self, queue: Virtqueue) -> None:
        # Behind the pairs that the driver knows; it knows of more than one with MQ (5.1.2).
        control = 2 * (self._pairs_there if self.features & F_MQ else 1)
        pair, sends = divmod(queue.index, 2)
        if queue.index == control:
            if self.features & F_CTRL_VQ:
                self._commands(queue)
        elif queue.index > control or pair >= self._pairs:
            return
        elif sends:
            self._send(pair)
        else:
            self._receive(pair)

    def _send(self, pair: int) -> None:
        lane = self._tx[pair]
        try:
            outcome = lane.run(self.link_up)
        except GuestMistake as mistake:
            self.broken(str(mistake))
            return
        if lane.port.closed:
            self._thread.call_soon(self._look_for_lost)
        elif outcome == STUCK or not lane.port.flush():
            self._pairs_thread(pair).add_writer(lane.port.fd, lambda: self._on_writable(pair, lane.port.fd))
        elif outcome == MORE:
            self.kick(lane.queue)

    def _on_writable(self, pair: int, fd: int) -> None:
        """On the pair's thread, without a lock."""
        thread, lane = self._pairs_thread(pair), self._tx[pair]
        thread.remove_writer(fd)
        with lane.queue.lock:
            if self.live and lane.queue.ready and pair < self._pairs:
                self._guarded(self._send, pair)
            elif not lane.port.closed and not lane.port.flush():
                thread.add_writer(fd, lambda: self._on_writable(pair, fd))

    def _on_readable(self, pair: int) -> None:
        """On the pair's thread, without a lock."""
        lane = self._rx[pair]
        with lane.queue.lock:
            if self.live and lane.queue.ready and pair < self._pairs:
                self._guarded(self._receive, pair)
            else:
                self._unwatch(pair)

    def _guarded(self, work: Any, pair: int) -> None:
        """What ``handle``'s caller does about a ring that makes no sense."""
        try:
            work(pair)
        except RingError as error:
            self.broken(str(error))

    def _receive(self, pair: int) -> None:
        lane = self._rx[pair]
        try:
            outcome = lane.run(self.link_up)
        except GuestMistake as mistake:
            self._unwatch(pair)
            self.broken(str(mistake))
            return
        if outcome == STUCK:
            self._unwatch(pair)
            return
        if outcome == CLOSED:
            self._thread.call_soon(self._look_for_lost)
            return
        self._watch_one(pair)
        if outcome == MORE:
            self._pairs_thread(pair).call_soon(lambda: self._on_readable(pair))

    # -- the host's end ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Every pair that is in use; who has no buffers is found out at once."""
        for pair in range(self._pairs):
            self._watch_one(pair)

    def _watch_one(self, pair: int) -> None:
        port = self.backend.ports[pair]
        with self._watching:
            if pair not in self._watched and not port.closed:
                self._watched.add(pair)
                self._pairs_thread(pair).add_reader(port.fd, lambda: self._on_readable(pair))

    def _unwatch(self, pair: int) -> None:
        with self._watching:
            if pair in self._watched:
                self._watched.discard(pair)
                self._pairs_thread(pair).remove_reader(self.backend.ports[pair].fd)

    def _look_for_lost(self) -> None:
        """On the device's thread: a port was found closed."""
        if not any(port.closed and port.fd >= 0 for port in self.backend.ports):
            return
        with self._no_frames(range(self._pairs_there)):
            for pair, port in enumerate(self.backend.ports):
                self._unwatch(pair)
                if port.fd >= 0:
                    self._pairs_thread(pair).remove_writer(port.fd)
            self.backend.lost()
        self._link_changed()
        for lane in self._tx:
            self.kick(lane.queue)  # what waited for room is lost

    def _no_frames(self, pairs: range) -> Held:
        """``with``: none of these pairs has a frame under way. Nobody else takes two of their locks."""
        locks = [lane.queue.lock for pair in pairs for lane in (self._rx[pair], self._tx[pair])]

        def acquire() -> None:
            for lock in locks:
                lock.acquire()

        def release() -> None:
            for lock in locks:
                lock.release()

        return Held(acquire, release)

    def _refilter(self) -> None:
        """The lanes look at frames as the filter says now."""
        wanted = self.filter
        unicast = wanted.unicast
        if self._former_mac:
            unicast = [self._former_mac, *unicast[: MOST_MACS - 1]]
        for lane in self._rx:
            with lane.queue.lock:
                lane.set_filter(wanted.modes, self.mac, unicast, wanted.multicast, bytes(wanted.vlans))

    # -- the control queue ------------------------------------------------------------------------------------------

    def _commands(self, queue: Virtqueue) -> None:
        queue.disable_kicks()
        try:
            for _ in range(COMMANDS_A_TURN):
                chains = queue.take(1)
                if not chains:
                    if not queue.enable_kicks():
                        return
                    continue
                self._command(queue, chains[0])
        finally:
            queue.flush()
        self.kick(queue)

    def _command(self, queue: Virtqueue, chain: Chain) -> None:
        if chain.readable_bytes < net_control.HEADER_BYTES or not chain.writable_bytes:
            self.broken("a command without a header, or without room for its answer")
            return
        command = chain.read(0, net_control.MOST_BYTES)
        answer = net_control.answer(self, command) if chain.readable_bytes == len(command) else net_control.ERR
        self._refilter()
        if answer == net_control.OK and command[0] in net_control.FILTERS and not self._filter_told:
            self._filter_told = True
            self.on_filter()
        chain.write(0, bytes([answer]))
        queue.push(chain, 1)

    def set_mac(self, mac: bytes) -> None:
        self.config[:MAC_BYTES] = mac
        self._former_mac = b""

    def set_pairs(self, pairs: int) -> bool:
        """Use so many. Whether that can be (5.1.6.5.5)."""
        if not 1 <= pairs <= self._pairs_there:
            return False
        before = self._pairs
        try:
            with self._no_frames(range(min(before, pairs), max(before, pairs))):
                self.backend.enable_pairs(pairs)
                self._pairs = pairs
        except OSError:  # the host takes no more
            return False
        for pair in range(pairs, self._pairs_there):
            self._unwatch(pair)
        for pair in range(before, pairs):
            self.kick(self._tx[pair].queue)  # it may have been rung for while it was not in use, and is not again
        self._watch()
        return True

    def set_guest_offloads(self, features: int) -> bool:
        """What frames for the guest may leave to it from now on, of what was negotiated (5.1.6.5.6)."""
        allowed = self.features & sum(GUEST_OFFLOADS)
        if features & ~allowed:
            return False
        self._guest_offloads = guest_offloads(features)
        self.backend.set_offloads(self._guest_offloads)
        return True

    def announced(self) -> None:
        with self.notice:
            self._announce = False
            self.config[STATUS] &= ~S_ANNOUNCE & 0xFF

    def counters(self) -> dict[str, int]:
        """Frames and bytes, all pairs together, as the guest has them: "rx_packets" it has been sent. From any thread;
        the lanes count on.
        """
        ports = self.backend.ports
        return {
            "rx_packets": sum(port.received for port in ports),
            "rx_bytes": sum(port.received_bytes for port in ports),
            "rx_dropped": sum(port.too_long for port in ports) + sum(lane.dropped + lane.filtered for lane in self._rx),
            "tx_packets": sum(port.sent for port in ports),
            "tx_bytes": sum(port.sent_bytes for port in ports),
            "tx_dropped": sum(port.lost for port in ports) + sum(lane.dropped for lane in self._tx),
        }

    # -- state ------------------------------------------------------------------------------------------------------

    STATE_VERSION = 2
    STATE = {
        "filter": "part",
        "_former_mac": ("bytes", 0, MAC_BYTES),
        "_pairs": range(1, 0x10000),
        "_guest_offloads": 8,
        "_link_wanted": "flag",
        "_announce": "flag",
        "_begun": "flag",
    }

    def save(self) -> dict[str, Any]:
        state: dict[str, Any] = super().save()
        state["hands"] = [lane.tokens() for lane in self._lanes]
        return state

    def load(self, state: dict[str, Any]) -> None:
        hands = state.get("hands") if isinstance(state, dict) else None
        if not isinstance(hands, list) or len(hands) != len(self._lanes):
            raise StateError(f"hands is no list of {len(self._lanes)}: the state is of something else")
        for lane, hand in zip(self._lanes, hands, strict=True):
            if not isinstance(hand, list) or len(hand) > lane.queue.max_size:
                raise StateError(f"hands has more than the {lane.queue.max_size} that a queue holds, or no list")
        super().load({name: value for name, value in state.items() if name != "hands"})
        if len(self._former_mac) not in (0, MAC_BYTES):
            raise StateError(f"former_mac has {len(self._former_mac)} bytes, not {MAC_BYTES}, or none")
        if self._pairs > self._pairs_there:
            raise StateError(f"pairs is {self._pairs}, of {self._pairs_there}")
        self._tokens = hands

    @property
    def _lanes(self) -> Sequence[RxLane | TxLane]:
        return (*self._rx, *self._tx)

    def after_load(self) -> None:
        """Frames that were on their way are lost, as frames are; buffers and frames of the guest's are not."""
        super().after_load()
        tokens, self._tokens = self._tokens, []
        for lane, hand in zip(self._lanes, tokens, strict=False):
            with lane.queue.lock:
                try:
                    lane.retake(hand)
                except RingError as error:
                    self.broken(str(error))


def reverse_request(mac: bytes) -> bytes:
    """A RARP request for the address of who sends it (RFC 903), of Ethernet's least length without a checksum."""
    head = b"\xff" * MAC_BYTES + mac + b"\x80\x35"
    return (head + b"\0\1\x08\0\6\4\0\3" + (mac + bytes(4)) * 2).ljust(LEAST_FRAME_BYTES, b"\0")


def nobody_looks() -> None:
    """In place of ``on_filter``."""
