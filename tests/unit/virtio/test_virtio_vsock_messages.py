"""Sockets with messages (SOCK_SEQPACKET) between guest and host: boundaries are kept. OASIS virtio 1.2, 5.10.6.6."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from vsock_bench import BUFFER, VsockBench

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.vsock import F_SEQPACKET
from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES
from pyvmm.devices.virtio.vsock_messages import MOST_KEPT

EOM = p.END_OF_MESSAGE
PART = 32 << 10


@pytest.fixture
def it(tmp_path: Path) -> Iterator[VsockBench]:
    bench = VsockBench(tmp_path / "vm.sock", seqpacket=True)
    yield bench
    assert not bench.device.faults
    bench.close()


def rw(it: VsockBench, data: bytes, flags: int = EOM, *, go: bool = True) -> list[int]:
    it.add(p.OP_RW, 9, 5000, data, flags=flags, kind=p.SEQPACKET)
    return [packet.op for packet in it.go()] if go else []


def joined(it: VsockBench, **fields: int) -> socket.socket:
    """The host's end of a connection that the guest has asked for."""
    with it.listen(9, socket.SOCK_SEQPACKET) as listener:
        answer = it.connect(9, kind=p.SEQPACKET, **fields)
        assert (answer.op, answer.kind) == (p.OP_RESPONSE, p.SEQPACKET)
        end, _ = listener.accept()
    Path(f"{it.path}_9").unlink()
    end.settimeout(10)
    return end


def messages(it: VsockBench) -> list[bytes]:
    """What the guest has got, whole; each packet's size is told to be free again."""
    found, data, forwarded = [], b"", 0
    while packets := it.packets():
        for packet in packets:
            if packet.op == p.OP_RW:
                assert packet.kind == p.SEQPACKET
                data += packet.data
                forwarded += len(packet.data)
                if packet.flags & EOM:
                    found.append(data)
                    data = b""
        it.add(p.OP_CREDIT_UPDATE, 9, 5000, kind=p.SEQPACKET, forwarded=forwarded)
        it.kick(it.tx)
        it.tx.used()
    assert not data
    return found


def test_it_is_offered_where_it_is_asked_for(it: VsockBench, tmp_path: Path) -> None:
    assert it.device.features & F_SEQPACKET
    without = VsockBench(tmp_path / "other.sock")
    assert not without.device.offered & F_SEQPACKET
    with without.listen(9, socket.SOCK_SEQPACKET):
        assert without.connect(9, kind=p.SEQPACKET).op == p.OP_RST
    without.close()


def test_boundaries_are_kept_both_ways(it: VsockBench) -> None:
    with joined(it) as end:
        rw(it, b"one")
        rw(it, b"tw", 0)
        rw(it, b"o")
        rw(it, b"")
        rw(it, b"x" * 100_000)
        assert [end.recv(1 << 20) for _ in range(4)] == [b"one", b"two", b"", b"x" * 100_000]
        for data in (b"a", b"", b"b" * 3 * BUFFER, b"c"):
            end.send(data)
        assert messages(it) == [b"a", b"", b"b" * 3 * BUFFER, b"c"]
        end.send(b"last")
        end.shutdown(socket.SHUT_WR)
        (data, shut) = it.packets()
        assert (data.data, data.flags & EOM) == (b"last", EOM)
        assert (shut.op, shut.flags) == (p.OP_SHUTDOWN, p.NO_SEND)
        rw(it, b"still")
        assert end.recv(100) == b"still"


def test_a_client_of_the_host(it: VsockBench) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(10)
        end.connect(f"{it.path}.seq")
        end.send(b"CONNECT 5000\n")
        (request,) = it.packets()
        assert (request.op, request.kind, request.dst_port) == (p.OP_REQUEST, p.SEQPACKET, 5000)
        it.send(p.OP_RESPONSE, request.src_port, 5000, kind=p.SEQPACKET)
        assert end.recv(100) == b"OK %d\n" % request.src_port
        it.send(p.OP_RW, request.src_port, 5000, b"hello", flags=EOM, kind=p.SEQPACKET)
        assert end.recv(100) == b"hello"
    assert [packet.op for packet in it.packets()] == [p.OP_SHUTDOWN]
    for line in (b"CONNECT nobody\n", b"x" * 200, b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
            end.settimeout(10)
            end.connect(f"{it.path}.seq")
            end.send(line)
            it.io.settle()
            assert end.recv(100) == b""


def test_kinds_are_not_mixed_up(it: VsockBench) -> None:
    with it.listen(7), it.listen(8, socket.SOCK_SEQPACKET):
        assert it.connect(7, kind=p.SEQPACKET).op == p.OP_RST  # who listens there has a stream
        assert it.connect(8).op == p.OP_RST
    with joined(it) as end:
        (answer,) = it.send(p.OP_RW, 9, 5000, b"x", kind=p.STREAM)
        assert (answer.op, answer.kind) == (p.OP_RST, p.STREAM)
        (answer,) = it.send(p.OP_REQUEST, 9, 5000, kind=3)
        assert (answer.op, answer.kind) == (p.OP_RST, 3)
        rw(it, b"here")
        assert end.recv(10) == b"here"


def test_a_message_that_never_ends_is_cut_off(it: VsockBench) -> None:
    with joined(it) as end:
        for _ in range(BUFFER_BYTES // PART):
            assert p.OP_RST not in rw(it, b"x" * PART, 0)
        assert rw(it, b"x", 0) == [p.OP_RST]
        assert end.recv(10) == b""
        assert it.device.connections == 0


def test_the_longest_message(it: VsockBench) -> None:
    with joined(it) as end:
        for n in range(BUFFER_BYTES // PART):
            told = rw(it, bytes([n]) * PART, EOM if n == BUFFER_BYTES // PART - 1 else 0)
        assert told == [p.OP_CREDIT_UPDATE]  # or the next one would have no room
        assert end.recv(1 << 20) == b"".join(bytes([n]) * PART for n in range(BUFFER_BYTES // PART))


def test_a_host_that_does_not_read(it: VsockBench) -> None:
    """What it does not take is kept, within bounds, and gets there in the end; empty messages are bounded too."""
    with joined(it) as end:
        sent = 0
        while it.device.connections:
            for _ in range(200):
                rw(it, b"", go=False)
                sent += 1
            it.go()
            assert sent < 2 * MOST_KEPT
        assert sent > MOST_KEPT
    with joined(it) as end:
        count = 0
        while not any(connection.keeps for connection in it.device._connections.values()):
            rw(it, b"m" * 1000)
            count += 1
        rw(it, b"end")
        for _ in range(count):
            assert end.recv(2000) == b"m" * 1000
            it.io.settle()
        assert end.recv(2000) == b"end"
        it.packets()


def test_what_the_guest_has_no_room_for(it: VsockBench) -> None:
    with joined(it, room=8192) as end:
        end.send(b"a" * 8000)
        assert sum(len(packet.data) for packet in it.packets()) == 8000
        end.send(b"b" * 500)
        packets = it.packets()
        assert [packet.op for packet in packets] == [p.OP_RW, p.OP_CREDIT_REQUEST]
        assert (len(packets[0].data), packets[0].flags) == (192, 0)
        (rest,) = it.send(p.OP_CREDIT_UPDATE, 9, 5000, room=8192, forwarded=8192, kind=p.SEQPACKET)
        assert (rest.data, rest.flags) == (b"b" * 308, EOM)
        end.send(b"c" * 9000)  # it never can
        assert [packet.op for packet in it.packets()] == [p.OP_RST]


def test_after_a_move_there_are_no_connections(it: VsockBench, tmp_path: Path) -> None:
    with joined(it) as end:
        rw(it, b"half", 0)
        it.move(tmp_path / "there.sock")
        assert end.recv(100) == b""
    assert it.event_ids() == [bytes(4)]
    it.give_events(1)
    with joined(it) as end:
        rw(it, b"anew")
        assert end.recv(100) == b"anew"
