"""A vsock device that is saved and goes on elsewhere at any moment, with a driver that works when it comes to it.

The driver is as Linux's: a transport reset (virtio 1.2, 5.10.6.7) drops each socket that is connected, without a word
to the device, and no other; what comes for a socket that there is not is answered with a reset. Whatever has happened,
and how often it has moved, in the end both sides can connect and everything that is said on new streams arrives.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from vsock_bench import BUFFER, ROOM, Packet, VsockBench

from pyvmm.devices.virtio import vsock_packet as p

PORT, GUEST_PORT = 80, 22  # where somebody listens: at the host, in the guest
LIMIT = 8
MOST_SENT = 2 * ROOM  # at a time: more than either side has room for


class Socket:
    """One of the guest's."""

    def __init__(self, port: int, guest_port: int, *, connected: bool = False) -> None:
        self.port, self.guest_port, self.connected = port, guest_port, connected
        self.room = self.freed = 0  # the host's
        self.sent = b""
        self.unread = 0
        self.heard = b""

    @property
    def credit(self) -> int:
        return self.room - (len(self.sent) - self.freed)

    @property
    def counts(self) -> dict[str, int]:
        return {"room": ROOM, "forwarded": len(self.heard) - self.unread}


class Guest:
    """The driver, and the programs: one listens at GUEST_PORT, others connect to the host's PORT."""

    def __init__(self, it: VsockBench) -> None:
        self.it = it
        self.sockets: dict[tuple[int, int], Socket] = {}
        self.next_port = 5000

    def connect(self) -> Socket:
        self.next_port += 1
        made = self.sockets[PORT, self.next_port] = Socket(PORT, self.next_port)
        self.tell(p.OP_REQUEST, made)
        return made

    def tell(self, op: int, who: Socket, data: bytes = b"") -> None:
        """A packet; the device hears of it at the next ``kick``."""
        if self.it.tx.free < 2:
            self.it.kick(self.it.tx)
            self.it.tx.used()
        self.it.add(op, who.port, who.guest_port, data, **who.counts)

    def say(self, who: Socket, data: bytes) -> bytes:
        """As much of it as there is credit for: what is left."""
        while data and who.connected and who.credit > 0:
            piece = data[: min(who.credit, 1 << 16)]
            self.tell(p.OP_RW, who, piece)
            who.sent += piece
            data = data[len(piece) :]
        return data

    def kick(self) -> None:
        self.it.kick(self.it.tx)
        self.it.tx.used()

    def receive(self) -> int:
        """What the device has put there, and new buffers: how many packets."""
        packets = self.it.packets(refill=False)
        for packet in packets:
            self._take(packet)
        self.it.give(*[BUFFER] * len(packets))
        self.kick()
        return len(packets)

    def _take(self, packet: Packet) -> None:
        key = packet.src_port, packet.dst_port
        who = self.sockets.get(key)
        if who is None and packet.op == p.OP_REQUEST and packet.dst_port == GUEST_PORT:
            who = self.sockets[key] = Socket(*key, connected=True)
            self._hear(who, packet)
            self.tell(p.OP_RESPONSE, who)
        elif who is None:
            if packet.op != p.OP_RST:
                self.tell(p.OP_RST, Socket(*key))
        elif packet.op in (p.OP_RST, p.OP_SHUTDOWN):
            del self.sockets[key]
            if packet.op == p.OP_SHUTDOWN:
                self.tell(p.OP_RST, who)
        else:
            self._hear(who, packet)
            who.connected = who.connected or packet.op == p.OP_RESPONSE
            assert packet.op != p.OP_RW or who.connected
            if packet.op == p.OP_CREDIT_REQUEST:
                self.tell(p.OP_CREDIT_UPDATE, who)

    @staticmethod
    def _hear(who: Socket, packet: Packet) -> None:
        who.room, who.freed = packet.buf_alloc, packet.fwd_cnt
        who.heard += packet.data
        who.unread += len(packet.data)
        assert who.unread <= ROOM

    def read(self, who: Socket) -> None:
        """The program takes what is there."""
        if who.unread:
            who.unread = 0
            self.tell(p.OP_CREDIT_UPDATE, who)
            self.kick()

    def look_at_events(self) -> None:
        """Linux's event_work."""
        events = self.it.event_ids()
        assert all(event == bytes(4) for event in events)
        if events:
            for key, who in list(self.sockets.items()):
                if who.connected:
                    del self.sockets[key]
            self.it.give_events(len(events))


class Moves(RuleBasedStateMachine):
    ring: dict[str, bool] = {}

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.moves = 0
        self.it = VsockBench(self._path(), ring=self.ring, connections=LIMIT)
        self.guest = Guest(self.it)
        self.listener = self._listen()
        self.ends: dict[socket.socket, bytes] = {}  # of the host's programs, whoever has connected: what they give back
        self.given_back = 0

    def _path(self) -> Path:
        return Path(self.folder.name) / f"vm{self.moves}.sock"

    def _listen(self) -> socket.socket:
        listener = self.it.listen(PORT)
        listener.setblocking(False)
        return listener

    # -- the host ------------------------------------------------------------------------------------------------------

    @rule()
    def the_host_echoes(self) -> None:
        try:
            while True:
                end, _ = self.listener.accept()
                end.setblocking(False)
                self.ends[end] = b""
        except BlockingIOError:
            pass
        for end in list(self.ends):
            try:
                while data := self.ends[end] or end.recv(1 << 16):
                    self.ends[end] = data
                    self.ends[end] = data[end.send(data) :]
                    self.given_back += len(data) - len(self.ends[end])
                self._drop(end)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(end)
        self.it.io.settle()

    def _drop(self, end: socket.socket) -> None:
        del self.ends[end]
        end.close()

    @rule()
    def a_client_calls(self) -> None:
        """It may have to wait until the driver has seen an event."""
        if len(self.ends) < LIMIT:
            end = self.it.call(GUEST_PORT)
            end.setblocking(False)
            self.ends[end] = b""
            self.it.io.settle()

    # -- the guest -----------------------------------------------------------------------------------------------------

    @rule(kick=st.booleans())
    def it_connects(self, kick: bool) -> None:
        if len(self.guest.sockets) < LIMIT:
            self.guest.connect()
            if kick:
                self.guest.kick()

    @rule(n=st.integers(0, 9), size=st.sampled_from([1, 5000, MOST_SENT]), kick=st.booleans())
    def it_says(self, n: int, size: int, kick: bool) -> None:
        connected = [who for who in self.guest.sockets.values() if who.connected]
        if connected:
            self.guest.say(connected[n % len(connected)], b"x" * size)
            if kick:
                self.guest.kick()

    @rule()
    def it_receives(self) -> None:
        self.guest.receive()

    @rule()
    def it_reads(self) -> None:
        for who in list(self.guest.sockets.values()):
            self.guest.read(who)

    @rule()
    def it_looks_at_events(self) -> None:
        self.guest.look_at_events()

    # -- elsewhere -----------------------------------------------------------------------------------------------------

    @rule(works=st.booleans())
    def it_moves(self, works: bool) -> None:
        """``works``: the new device has had its first look at the queues."""
        self.listener.close()
        self.moves += 1
        self.it.move(self._path())
        for end in list(self.ends):
            self._drop(end)
        self.listener = self._listen()
        if works:
            self.it.io.settle()

    @invariant()
    def it_stands(self) -> None:
        assert self.it.device.faults == 0, self.it.device.fault
        assert self.it.device.connections <= LIMIT

    # -- in the end ----------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Everybody does what there is to do, until there is nothing."""
        for _ in range(1000):
            given_back = self.given_back
            self.guest.kick()
            self.the_host_echoes()
            self.guest.look_at_events()
            self.it_reads()
            if not self.guest.receive() and given_back == self.given_back:
                return
        raise AssertionError("it does not come to rest")

    def teardown(self) -> None:
        try:
            self.rest()
            for who in list(self.guest.sockets.values()):  # room for new ones: what was dropped may still count
                self.guest.tell(p.OP_RST, who)
                del self.guest.sockets[who.port, who.guest_port]
            for end in list(self.ends):
                self._drop(end)
            self.rest()
            self._new_streams_work()
        finally:
            for end in self.ends:
                end.close()
            self.listener.close()
            self.it.close()
            self.folder.cleanup()

    def _new_streams_work(self) -> None:
        who = self.guest.connect()
        self.rest()
        assert who.connected
        data = left = bytes(range(251)) * 2000
        while left or len(who.heard) < len(data):
            before = len(left), len(who.heard)
            left = self.guest.say(who, left)
            self.rest()
            assert (len(left), len(who.heard)) != before, "the stream stands still"
        assert who.heard == data
        caller = self.it.call(GUEST_PORT)
        self.it.io.settle()
        self.rest()
        with caller:
            assert caller.recv(100).startswith(b"OK ")


RINGS: list[dict[str, bool]] = [{}, {"event_idx": True}, {"packed": True, "event_idx": True, "indirect": True}]


@pytest.mark.parametrize("ring", RINGS, ids=["split", "event index", "packed"])
def test_moves_at_any_moment(ring: dict[str, bool]) -> None:
    machine = type("Moves", (Moves,), {"ring": ring})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
