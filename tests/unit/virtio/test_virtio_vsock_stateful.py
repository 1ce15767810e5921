"""Hypothesis opens streams, talks and listens at both ends, ends them in every way, and sends headers without sense in
between. What arrives is what was sent, in order and from the start; nothing raises, grows or is left over.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from vsock_bench import CID, ROOM, Packet, VsockBench

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES

STEPS = 40
PORT = 80
LIMIT = 6
GUEST_PORTS = st.integers(0, 3)
SIZES = st.sampled_from([0, 1, 44, 4052, 4053, 10_000, 70_000])
WORDS = st.one_of(st.sampled_from([0, 1, 2, 3, PORT, 1 << 30, 0xFFFF_FFFF]), st.integers(0, 0xFFFF_FFFF))
CIDS = st.sampled_from([CID, CID, 0, 2, 1 << 32 | CID, (1 << 64) - 1])


class Stream:
    """What was said on one, each way; ``wild``: headers without sense had its ports."""

    def __init__(self, end: socket.socket, port: int, guest_port: int) -> None:
        self.end, self.port, self.guest_port = end, port, guest_port
        end.setblocking(False)
        self.wild = self.over = False
        self.to_host = self.at_host = b""
        self.to_guest = self.at_guest = b""
        self.freed = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"room": ROOM, "forwarded": len(self.at_guest)}

    def listen(self) -> None:
        try:
            while data := self.end.recv(1 << 20):
                self.at_host += data
        except (BlockingIOError, ConnectionResetError):
            pass

    def check(self) -> None:
        assert self.to_host.startswith(self.at_host)
        assert self.to_guest.startswith(self.at_guest)


class Streams(RuleBasedStateMachine):
    ring: dict[str, bool] = {}

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.it = VsockBench(Path(self.folder.name) / "vm.sock", ring=self.ring, connections=LIMIT)
        self.listener = self.it.listen(PORT)
        self.listener.setblocking(False)
        self.streams: dict[tuple[int, int], Stream] = {}
        self.count = self.moves = 0

    def teardown(self) -> None:
        for stream in self.streams.values():
            stream.end.close()
        self.it.send(p.OP_CREDIT_UPDATE, 1, 1)
        self.listener.close()
        self.it.close()
        assert not self.it.io.writers
        assert not self.it.io.readers
        self.folder.cleanup()

    # -- what comes ------------------------------------------------------------------------------------------------

    def hear(self, packets: list[Packet]) -> list[Packet]:
        """Each packet counts for its stream; those of none are given back."""
        others = []
        for packet in packets:
            stream = self.streams.get((packet.src_port, packet.dst_port))
            if stream is None or (packet.src_cid, packet.kind) != (p.HOST_CID, p.STREAM):
                others.append(packet)
                continue
            stream.at_guest += packet.data
            stream.freed = packet.fwd_cnt
            if packet.op == p.OP_RST:
                stream.over = True
        for key, stream in list(self.streams.items()):
            stream.listen()
            stream.check()
            if stream.over:
                stream.end.close()
                del self.streams[key]
        return others

    def send(self, op: int, port: int, guest_port: int, data: bytes = b"", **fields: Any) -> list[Packet]:
        return self.hear(self.it.send(op, port, guest_port, data, **fields))

    def bytes_of(self, size: int) -> bytes:
        self.count += 1
        return (self.count.to_bytes(4, "little") * (size // 4 + 1))[:size]

    # -- what happens ----------------------------------------------------------------------------------------------

    @rule(guest_port=GUEST_PORTS)
    def the_guest_opens_one(self, guest_port: int) -> None:
        if (PORT, guest_port) in self.streams:
            return
        (answer,) = self.send(p.OP_REQUEST, PORT, guest_port, room=ROOM)
        if answer.op == p.OP_RST:
            assert self.it.device.connections >= LIMIT - 1 or self.it.io.writers
            return
        self.streams[PORT, guest_port] = Stream(self.listener.accept()[0], PORT, guest_port)

    @rule(guest_port=GUEST_PORTS, accepts=st.booleans())
    def the_host_opens_one(self, guest_port: int, accepts: bool) -> None:
        if self.it.device.connections >= LIMIT or self.it.io.writers:
            return
        end = self.it.call(guest_port)
        (request,) = self.hear(self.it.packets())
        assert (request.op, request.dst_port) == (p.OP_REQUEST, guest_port)
        self.send(p.OP_RESPONSE if accepts else p.OP_RST, request.src_port, guest_port, room=ROOM)
        if accepts:
            assert end.recv(100) == b"OK %d\n" % request.src_port
            self.streams[request.src_port, guest_port] = Stream(end, request.src_port, guest_port)
        else:
            assert end.recv(100) == b""
            end.close()

    def one(self, n: int) -> Stream | None:
        streams = list(self.streams.values())
        return streams[n % len(streams)] if streams else None

    @rule(n=st.integers(0, 9), size=SIZES)
    def the_guest_says(self, n: int, size: int) -> None:
        stream = self.one(n)
        if stream is None or stream.wild:
            return
        size = min(size, BUFFER_BYTES - (len(stream.to_host) - stream.freed))
        data = self.bytes_of(size)
        stream.to_host += data
        self.send(p.OP_RW, stream.port, stream.guest_port, data, **stream.counts)

    @rule(n=st.integers(0, 9), size=SIZES)
    def the_host_says(self, n: int, size: int) -> None:
        stream = self.one(n)
        if stream is None:
            return
        data = self.bytes_of(size)
        try:
            stream.to_guest += data[: stream.end.send(data)]
        except OSError:
            return
        self.hear(self.it.packets())

    @rule(n=st.integers(0, 9))
    def the_guest_has_read_all(self, n: int) -> None:
        stream = self.one(n)
        if stream is not None:
            self.send(p.OP_CREDIT_UPDATE, stream.port, stream.guest_port, **stream.counts)
            if not stream.wild and not stream.over:
                assert stream.at_guest == stream.to_guest

    @rule(n=st.integers(0, 9), how=st.sampled_from([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
    def the_host_shuts(self, n: int, how: int) -> None:
        stream = self.one(n)
        if stream is not None:
            stream.wild = True  # the guest may not hear of it before it says something
            try:
                stream.end.shutdown(how)
            except OSError:
                pass
            self.hear(self.it.packets())

    @rule(n=st.integers(0, 9), flags=st.integers(0, 7))
    def the_guest_shuts(self, n: int, flags: int) -> None:
        stream = self.one(n)
        if stream is not None:
            stream.wild = True
            self.send(p.OP_SHUTDOWN, stream.port, stream.guest_port, flags=flags, **stream.counts)

    @rule(
        guest_port=GUEST_PORTS,
        port=st.one_of(st.just(PORT), WORDS),
        op=st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
        kind=st.sampled_from([1, 1, 1, 0, 2, 0xFFFF]),
        cid=CIDS,
        to_cid=st.sampled_from([2, 2, 2, 0, 3, 1 << 32 | 2]),
        flags=WORDS,
        room=WORDS,
        forwarded=WORDS,
        size=SIZES,
    )
    def no_sense(self, guest_port: int, port: int, op: int, size: int, **fields: int) -> None:
        ours = (fields["cid"], fields["to_cid"], fields["kind"]) == (CID, p.HOST_CID, p.STREAM)
        stream = self.streams.get((port, guest_port)) if ours else None
        if stream is None and op == p.OP_REQUEST and port == PORT and ours:
            return
        data = bytes(size)
        if stream is not None:
            stream.wild = True
            stream.to_host += data if op == p.OP_RW else b""
        others = self.send(op, port, guest_port, data, **fields)
        if stream is None:
            answered = fields["cid"] == CID and op != p.OP_RST
            assert [packet.op for packet in others] == [p.OP_RST] * answered
        elif op == p.OP_RST:
            stream.over = True
            self.hear([])

    @rule()
    def it_goes_on_elsewhere(self) -> None:
        """At any moment, in a fresh device with another socket. No stream comes with it, and its driver is told so."""
        it = self.it
        self.listener.close()
        self.moves += 1
        buffers = len(it.given)
        it.move(Path(self.folder.name) / f"vm{self.moves}.sock")
        assert it.event_ids() == [bytes(4)]
        it.give_events(1)
        for stream in self.streams.values():
            stream.over = True
        self.hear(it.packets())
        assert (len(it.given), it.device.connections) == (buffers, 0)
        self.listener = it.listen(PORT)
        self.listener.setblocking(False)

    @invariant()
    def it_stands(self) -> None:
        device = self.it.device
        assert device.faults == 0
        assert device.connections <= LIMIT
        assert len(device._line) <= len(device._connections) <= 2 * LIMIT
        for connection in device._connections.values():
            assert len(connection._kept) <= BUFFER_BYTES
        self.it.io.settle()
        assert self.it.io.turn() == 0


RINGS: list[dict[str, bool]] = [{}, {"packed": True, "event_idx": True, "indirect": True}]


@pytest.mark.parametrize("ring", RINGS, ids=["split", "packed"])
def test_streams_and_what_makes_no_sense(ring: dict[str, bool]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Streams", (Streams,), {"ring": ring})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
