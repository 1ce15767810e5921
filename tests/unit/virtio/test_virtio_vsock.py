"""VirtioVsock (OASIS virtio 1.2, 5.10): streams both ways over every layout of the rings; and what a bad driver, a bad
peer and a save in between do to them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vsock_bench import BUFFER, CID, ROOM, Packet, VsockBench, header

from pyvmm.devices.virtio import vsock_packet as p
from pyvmm.devices.virtio.device import NEEDS_RESET
from pyvmm.devices.virtio.vsock import F_STREAM, FIRST_HOST_PORT, MOST_REPLIES, RX, TX
from pyvmm.devices.virtio.vsock_callers import MOST_CALLERS
from pyvmm.devices.virtio.vsock_connection import BUFFER_BYTES
from pyvmm.errors import StateError

Make = Callable[..., VsockBench]

RINGS = [
    {"packed": packed, "event_idx": event, "indirect": indirect}
    for packed, event, indirect in itertools.product((False, True), repeat=3)
]
PORT, GUEST_PORT = 80, 5000
MIB = 1 << 20


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Make]:
    made: list[VsockBench] = []

    def make(**options: Any) -> VsockBench:
        made.append(VsockBench(tmp_path / f"vm{len(made)}.sock", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=RINGS, ids=lambda ring: "-".join(name for name, on in ring.items() if on) or "split")
def ring(request: pytest.FixtureRequest) -> dict[str, bool]:
    return dict(request.param)


def joined(it: VsockBench, **fields: Any) -> socket.socket:
    """The host's end of a connection that the guest has opened to PORT."""
    with it.listen(PORT) as listener:
        assert it.connect(PORT, GUEST_PORT, **fields).op == p.OP_RESPONSE
        end, _ = listener.accept()
    os.unlink(f"{it.path}_{PORT}")
    end.settimeout(10)
    return end


def say(it: VsockBench, op: int, data: bytes = b"", **fields: Any) -> list[Packet]:
    """A packet of that connection."""
    return it.send(op, PORT, GUEST_PORT, data, **fields)


def ops(packets: list[Packet]) -> list[int]:
    return [packet.op for packet in packets]


def data_of(packets: list[Packet]) -> bytes:
    return b"".join(packet.data for packet in packets if packet.op == p.OP_RW)


def received(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        data = end.recv(size - len(found))
        assert data, "the end"
        found += data
    return found


# -- what the driver finds ---------------------------------------------------------------------------------------------


def test_the_driver_finds_its_address(bench: Make) -> None:
    it = bench(cid=0x1234_5678)
    assert it.device.read_config(0, 4) == 0x1234_5678
    assert it.device.read_config(4, 4) == 0
    assert it.device.DEVICE_ID == 19
    assert it.device.own_features == F_STREAM
    it.device.write_config(0, 4, 5)
    assert it.device.read_config(0, 4) == 0x1234_5678


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_word_each_way(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    with joined(it) as end:
        for n in range(300):  # more than a ring is long
            assert say(it, p.OP_RW, b"to the host %d" % n) == []
            assert end.recv(100) == b"to the host %d" % n
            end.sendall(b"to the guest %d" % n)
            (packet,) = it.packets()
            assert packet[:8] == (p.HOST_CID, CID, PORT, GUEST_PORT, len(packet.data), p.STREAM, p.OP_RW, 0)
            assert packet.data == b"to the guest %d" % n
    assert it.device.stats["opened"] == 1


class Echo:
    """The guest's or the host's end sends ``data`` and has all of it come back."""

    def __init__(self, it: VsockBench, port: int, guest_port: int, size: int) -> None:
        self.it, self.port, self.guest_port = it, port, guest_port
        self.data = random.Random(size).randbytes(size)
        self.sent = self.forwarded = 0
        self.room, self.freed = BUFFER_BYTES, 0
        self.got = hashlib.sha256()
        self.size = 0
        self.ended = False

    def hear(self, packets: list[Packet], keep: bytearray | None = None) -> None:
        for packet in packets:
            assert (packet.src_port, packet.dst_port) == (self.port, self.guest_port)
            self.room, self.freed = packet.buf_alloc, packet.fwd_cnt
            if packet.op == p.OP_RW:
                self.got.update(packet.data)
                self.size += packet.size
                if keep is not None:
                    keep += packet.data
            self.ended |= packet.op == p.OP_SHUTDOWN

    def speak(self, data: bytes | bytearray) -> int:
        """As much of ``data`` as there is credit for, and room in the ring; how much."""
        it, done = self.it, 0
        while done < len(data) and it.tx.free >= 2:
            credit = self.room - (self.sent - self.freed)
            size = min(credit, 65536, len(data) - done)
            if not size:
                break
            it.add(p.OP_RW, self.port, self.guest_port, bytes(data[done : done + size]), forwarded=self.size)
            self.sent += size
            done += size
        if not done:
            it.add(p.OP_CREDIT_UPDATE, self.port, self.guest_port, forwarded=self.size)
        return done


def echo_of_the_host(end: socket.socket) -> None:
    with end:
        while data := end.recv(100_000):
            end.sendall(data)


def join(it: VsockBench, *threads: threading.Thread) -> None:
    """Wait for the host's threads; the device's goes on meanwhile."""
    for _ in range(1000):
        if not any(thread.is_alive() for thread in threads):
            return
        it.io.turn(0.01)
        threads[0].join(0.01)
    raise AssertionError("the host's end never ends")


def guest_echo(it: VsockBench, size: int) -> None:
    """The guest sends, a program on the host sends it back."""
    end = joined(it)
    host = threading.Thread(target=echo_of_the_host, args=(end,))
    host.start()
    echo = Echo(it, PORT, GUEST_PORT, size)
    at = 0
    while echo.size < size:
        at += echo.speak(echo.data[at : at + BUFFER_BYTES])
        echo.hear(it.go())
        it.io.turn(0.01)
    assert echo.got.digest() == hashlib.sha256(echo.data).digest()
    say(it, p.OP_SHUTDOWN, flags=p.BOTH_WAYS)
    join(it, host)


def host_echo(it: VsockBench, size: int) -> None:
    """A program on the host sends, the guest sends it back."""
    end, port = it.called(1234)
    echo = Echo(it, port, 1234, size)
    came = hashlib.sha256()

    def send() -> None:
        end.sendall(echo.data)
        end.shutdown(socket.SHUT_WR)

    def hear() -> None:
        while data := end.recv(100_000):
            came.update(data)

    threads = [threading.Thread(target=send), threading.Thread(target=hear)]
    for thread in threads:
        thread.start()
    waiting = bytearray()
    while not (echo.ended and not waiting and echo.size == size):
        del waiting[: echo.speak(waiting[:BUFFER_BYTES])]
        echo.hear(it.go(), waiting)
        it.io.turn(0.01)
    it.send(p.OP_SHUTDOWN, port, 1234, flags=p.BOTH_WAYS)
    join(it, *threads)  # what is kept still goes to the host
    assert came.digest() == hashlib.sha256(echo.data).digest()
    end.close()


def test_an_echo_of_a_mebibyte(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    guest_echo(it, MIB)
    host_echo(it, MIB)
    assert it.device.connections == 0
    assert it.device.faults == 0


def test_an_echo_of_eight(bench: Make) -> None:
    it = bench(ring={"event_idx": True, "indirect": True})
    guest_echo(it, 8 * MIB)
    host_echo(it, 8 * MIB)
    assert it.device.stats["received_bytes"] == it.device.stats["sent_bytes"] == 16 * MIB


def test_several_streams_at_once_keep_to_themselves(bench: Make) -> None:
    it = bench()
    ends = []
    with it.listen(PORT) as listener:
        for n in range(20):
            assert it.connect(PORT, 6000 + n).op == p.OP_RESPONSE
            ends.append(listener.accept()[0])
    for n, end in enumerate(ends):
        it.add(p.OP_RW, PORT, 6000 + n, b"%d" % n * 3)
        end.sendall(b"%d" % n * 5000)
    packets = it.go()
    for n, end in enumerate(ends):
        assert end.recv(100) == b"%d" % n * 3
        assert data_of([packet for packet in packets if packet.dst_port == 6000 + n]) == b"%d" % n * 5000
        end.close()


def test_many_packets_are_one_call_and_one_interrupt(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    with joined(it, room=1 << 20) as end:
        before = [queue.notified for queue in it.device.queues]
        for driver in (it.rx, it.tx):
            driver.want_interrupts(True)
        for n in range(50):
            it.add(p.OP_RW, PORT, GUEST_PORT, b"%02d" % n, room=1 << 20)
        it.kick(it.tx)
        assert end.recv(1000) == b"".join(b"%02d" % n for n in range(50))
        end.sendall(bytes(20 * (BUFFER - p.HEADER_BYTES)))
        it.io.turn()
        assert [queue.notified - n for queue, n in zip(it.device.queues, before, strict=True)] == [1, 1, 0]
        assert len(it.packets()) == 20


def test_buffers_in_odd_pieces(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    with joined(it) as end:
        whole = header(p.OP_RW, PORT, GUEST_PORT, size=100) + bytes(range(100)) + b"behind the payload"
        it.tx.add([whole[:1], whole[1:30], whole[30:44], whole[44:50], whole[50:]])
        it.tx.add([whole[:50], whole[50:]])
        it.go()
        assert end.recv(1000) == bytes(range(100)) * 2
        drain_buffers(it)
        for sizes in ([1, 42, 1, 3, 4], [60, 40], [44, 7, 100], [10, 34, 1], [44], [45], [4096]):
            it.given[it.rx.add([], sizes)] = None
        end.sendall(bytes(range(255)))
        it.kick(it.rx)
        assert data_of(it.packets()) == bytes(range(255))


def drain_buffers(it: VsockBench) -> None:
    """The device has none of the guest's buffers any more: each was used for a reset."""
    while it.given:
        before = len(it.given)
        it.add(p.OP_RW, 1, 1)
        it.kick(it.tx)
        it.tx.used()
        it.packets(refill=False)
        assert len(it.given) == before - 1


def test_more_pieces_than_a_system_call_takes(bench: Make) -> None:
    it = bench(ring={"indirect": True})
    with joined(it) as end:
        sent = b""
        for n in range(4):
            data = random.Random(n).randbytes(900)
            whole = header(p.OP_RW, PORT, GUEST_PORT, size=900) + data
            it.tx.add([whole[:44], *(whole[44 + n : 45 + n] for n in range(900))])
            sent += data
        it.go()
        assert received(end, 3600) == sent
        drain_buffers(it)
        for _ in range(8):
            it.given[it.rx.add([], [44, *[1] * 1000])] = None
        end.sendall(sent * 2)
        it.kick(it.rx)
        assert data_of(it.packets(refill=False)) == (sent * 2)[:7200]
    assert it.device.faults == 0


# -- the end of a stream -----------------------------------------------------------------------------------------------


def test_the_host_sends_no_more_and_hears_on(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        end.sendall(b"last words")
        end.shutdown(socket.SHUT_WR)
        packets = it.packets()
        assert [(packet.op, packet.flags, packet.data) for packet in packets] == [
            (p.OP_RW, 0, b"last words"),
            (p.OP_SHUTDOWN, p.NO_SEND, b""),
        ]
        assert say(it, p.OP_RW, b"still here") == []
        assert end.recv(100) == b"still here"
        assert it.io.turn() == 0  # its end is no work for ever
        end.close()
        assert [(packet.op, packet.flags) for packet in it.packets()] == [(p.OP_SHUTDOWN, p.BOTH_WAYS)]
        assert say(it, p.OP_RST) == []
    assert it.device.connections == 0


def test_the_guest_sends_no_more_and_hears_on(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        say(it, p.OP_RW, b"last words")
        assert say(it, p.OP_SHUTDOWN, flags=p.NO_SEND) == []
        assert received(end, 10) == b"last words"
        assert end.recv(100) == b""
        end.sendall(b"still here")
        assert data_of(it.packets()) == b"still here"
        # A hint is permanent (5.10.6.5), so data is a mistake, and an end without flags takes nothing back.
        assert say(it, p.OP_SHUTDOWN, flags=0) == []
        assert ops(say(it, p.OP_RW, b"no")) == [p.OP_RST]
        assert end.recv(100) == b""


def test_the_guest_hears_no_more_and_sends_on(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        assert say(it, p.OP_SHUTDOWN, flags=p.NO_RECEIVE) == []
        with pytest.raises(BrokenPipeError):
            end.sendall(b"for nobody")
        say(it, p.OP_RW, b"still here")
        assert end.recv(100) == b"still here"
        assert it.io.turn() == 0
        assert ops(say(it, p.OP_SHUTDOWN, flags=p.NO_SEND)) == [p.OP_RST]
        assert end.recv(100) == b""
    assert it.device.connections == 0


def test_the_host_goes_away_while_the_guest_hears_no_more(bench: Make) -> None:
    it = bench()
    end = joined(it)
    say(it, p.OP_SHUTDOWN, flags=p.NO_RECEIVE)
    end.close()
    assert [(packet.op, packet.flags) for packet in it.packets()] == [(p.OP_SHUTDOWN, p.BOTH_WAYS)]


def test_the_host_goes_away(bench: Make) -> None:
    it = bench()
    end = joined(it)
    end.sendall(b"last words")
    end.close()
    assert [(packet.op, packet.flags) for packet in it.packets()] == [(p.OP_RW, 0), (p.OP_SHUTDOWN, p.BOTH_WAYS)]
    assert it.io.turn() == 0
    assert say(it, p.OP_RW, b"too late") == []
    assert ops(say(it, p.OP_SHUTDOWN, flags=p.BOTH_WAYS)) == [p.OP_RST]
    assert it.device.connections == 0
    assert joined(it, forwarded=0)  # the same ports again


def test_the_host_goes_away_with_something_unread(bench: Make) -> None:
    it = bench()
    end = joined(it)
    say(it, p.OP_RW, b"nobody reads this")
    end.close()
    assert [(packet.op, packet.flags) for packet in it.packets()] == [(p.OP_SHUTDOWN, p.BOTH_WAYS)]


def test_a_reset_of_the_guests_ends_it_on_the_host(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        it.add(p.OP_RW, PORT, GUEST_PORT, b"and before that")
        assert say(it, p.OP_RST) == []
        assert end.recv(100) == b"and before that"
        assert end.recv(100) == b""
    assert it.device.connections == 0


def test_what_the_guest_has_sent_gets_there_after_its_end(bench: Make) -> None:
    it = bench()
    sent = random.Random(1).randbytes(BUFFER_BYTES)
    with joined(it) as end:
        for at in range(0, len(sent), 1 << 16):
            it.add(p.OP_RW, PORT, GUEST_PORT, sent[at : at + (1 << 16)])
        it.add(p.OP_SHUTDOWN, PORT, GUEST_PORT, flags=p.BOTH_WAYS)
        assert p.OP_RST in ops(it.go())
        assert it.device.connections == 0
        assert it.io.writers
        # Its address may be used again before that.
        with joined(it) as other:
            say(it, p.OP_RW, b"the next")
            assert other.recv(100) == b"the next"
        found = b""
        while len(found) < len(sent):
            found += end.recv(1 << 16)
            it.io.settle()
        assert found == sent
        assert end.recv(100) == b""
        assert not it.io.writers


def test_a_guest_that_never_answers_an_end_is_not_waited_for(bench: Make) -> None:
    """5.10.6.5: a RST comes in its place; and nothing of the host's is held until then."""
    it = bench(connections=3)
    left = []
    before = len(os.listdir("/proc/self/fd"))
    for n in range(10):
        end, port = it.called(22)
        end.close()
        left.append(port)
        told = {(packet.op, packet.flags, packet.src_port) for packet in it.packets()}
        resets = [(p.OP_RST, 0, left[n - 3])] if n >= 3 else []
        assert told == {(p.OP_SHUTDOWN, p.BOTH_WAYS, port), *resets}
        assert it.device.connections == 0
    assert len(os.listdir("/proc/self/fd")) == before
    # What the guest has to say still is taken, and goes nowhere.
    packets = it.send(p.OP_RW, left[-1], 22, bytes(BUFFER_BYTES))
    assert [(packet.op, packet.fwd_cnt) for packet in packets] == [(p.OP_CREDIT_UPDATE, BUFFER_BYTES)]
    assert it.send(p.OP_SHUTDOWN, left[-1], 22, flags=p.NO_RECEIVE) == []
    assert ops(it.send(p.OP_SHUTDOWN, left[-1], 22, flags=p.NO_SEND)) == [p.OP_RST]
    assert it.send(p.OP_RST, left[-2], 22) == []
    assert ops(it.send(p.OP_RST, left[-4], 22)) == []


# -- who is refused ----------------------------------------------------------------------------------------------------


def test_where_nobody_listens_the_guest_is_refused(bench: Make) -> None:
    it = bench()
    answer = it.connect(PORT)
    assert (answer.op, answer.src_cid, answer.dst_cid) == (p.OP_RST, p.HOST_CID, CID)
    it.listen(PORT).close()  # the file is there still
    assert it.connect(PORT).op == p.OP_RST
    assert it.device.stats["refused"] == 2
    assert it.device.connections == 0


def test_what_is_of_no_connection_is_reset(bench: Make) -> None:
    it = bench()
    for op in (0, p.OP_RESPONSE, p.OP_SHUTDOWN, p.OP_RW, p.OP_CREDIT_UPDATE, p.OP_CREDIT_REQUEST, 8, 0xFFFF):
        (answer,) = it.send(op, 9, 10, b"data" if op == p.OP_RW else b"")
        assert (answer.op, answer.src_port, answer.dst_port, answer.kind) == (p.OP_RST, 9, 10, p.STREAM)
    assert it.send(p.OP_RST, 9, 10) == []


def test_types_and_addresses_that_there_are_none_of(bench: Make) -> None:
    it = bench()
    with it.listen(PORT):
        for kind in (0, 2, 3, 0xFFFF):
            (answer,) = it.send(p.OP_REQUEST, PORT, 10, kind=kind)
            assert (answer.op, answer.kind) == (p.OP_RST, kind)
        for cid in (0, 1, 4, CID, 1 << 32 | 2, (1 << 64) - 1):
            (answer,) = it.send(p.OP_REQUEST, PORT, 10, to_cid=cid)
            assert (answer.op, answer.src_cid, answer.dst_cid) == (p.OP_RST, cid, CID)
        # From somebody else: no answer would reach it.
        for cid in (0, 2, CID + 1, 1 << 32 | CID):
            assert it.send(p.OP_REQUEST, PORT, 10, cid=cid) == []
    assert it.device.connections == it.device.faults == 0


@pytest.mark.parametrize("op", [0, p.OP_REQUEST, p.OP_RESPONSE, 8, 0xFFFF])
def test_what_makes_no_sense_ends_a_connection(bench: Make, op: int) -> None:
    it = bench()
    with joined(it) as end:
        assert ops(say(it, op)) == [p.OP_RST]
        assert end.recv(100) == b""
    assert it.device.connections == 0
    joined(it).close()


@pytest.mark.parametrize("op", [0, p.OP_REQUEST, p.OP_SHUTDOWN, p.OP_RW, p.OP_CREDIT_UPDATE, p.OP_CREDIT_REQUEST, 9])
def test_what_makes_no_sense_while_a_client_waits(bench: Make, op: int) -> None:
    it = bench()
    with it.call(22) as end:
        (request,) = it.packets()
        assert ops(it.send(op, request.src_port, 22)) == [p.OP_RST]
        assert end.recv(100) == b""
    assert it.device.connections == 0


def test_there_is_a_limit_of_connections(bench: Make) -> None:
    it = bench(connections=3)
    ends = []
    with it.listen(PORT) as listener:
        for n in range(3):
            assert it.connect(PORT, n).op == p.OP_RESPONSE
            ends.append(listener.accept()[0])
        assert it.connect(PORT, 4).op == p.OP_RST
        client = it.call(22)  # it waits where it is
        assert it.packets() == []
        assert it.io.turn() == 0
        assert ops(it.send(p.OP_RST, PORT, 0)) == [p.OP_REQUEST]
        assert it.connect(PORT, 4).op == p.OP_RST
    for end in (*ends, client):
        end.close()


# -- clients of the host -----------------------------------------------------------------------------------------------


def test_a_client_comes_and_goes(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    ports = set()
    for n in range(5):
        end, port = it.called(22)
        ports.add(port)
        with end:
            end.sendall(b"hello %d" % n)
            assert data_of(it.packets()) == b"hello %d" % n
            it.send(p.OP_RW, port, 22, b"there")
            assert end.recv(100) == b"there"
            assert ops(it.send(p.OP_SHUTDOWN, port, 22, flags=p.BOTH_WAYS)) == [p.OP_RST]
            assert end.recv(100) == b""
    assert len(ports) == 5
    assert min(ports) >= 1 << 30


def test_a_client_is_refused_by_the_guest(bench: Make) -> None:
    it = bench()
    with it.call(22) as end:
        (request,) = it.packets()
        assert it.send(p.OP_RST, request.src_port, 22) == []
        assert end.recv(100) == b""
    assert it.device.connections == 0


def test_a_client_that_does_not_wait_for_the_answer(bench: Make) -> None:
    it = bench()
    with it.call("22\nand on") as end:
        (request,) = it.packets()
        assert it.io.turn() == 0
        assert data_of(it.send(p.OP_RESPONSE, request.src_port, 22)) == b"and on\n"
        assert end.recv(100) == b"OK %d\n" % request.src_port


def test_a_client_that_goes_before_the_answer(bench: Make) -> None:
    it = bench()
    end = it.call(22)
    (request,) = it.packets()
    end.close()
    (reset,) = it.packets()
    assert (reset.op, reset.src_port, reset.dst_port) == (p.OP_RST, request.src_port, 22)
    assert ops(it.send(p.OP_RESPONSE, request.src_port, 22)) == [p.OP_RST]
    # One that has sent something ahead: that is found out with the answer.
    end = it.call("22\nand on")
    (request,) = it.packets()
    end.close()
    packets = it.send(p.OP_RESPONSE, request.src_port, 22)
    assert [(packet.op, packet.flags) for packet in packets] == [(p.OP_RW, 0), (p.OP_SHUTDOWN, p.BOTH_WAYS)]


def test_a_line_in_pieces(bench: Make) -> None:
    it = bench()
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(10)
        end.connect(str(it.path))
        for byte in b"CONNECT 4294967294\n":
            assert it.packets() == []
            end.sendall(bytes([byte]))
        (request,) = it.packets()
        assert (request.op, request.dst_port) == (p.OP_REQUEST, 0xFFFF_FFFE)


@pytest.mark.parametrize(
    "line",
    ["CONNECT\n", "CONNECT \n", "CONNECT x\n", "connect 22\n", "CONNECT -1\n", "CONNECT +1\n", "CONNECT 4294967295\n",
     "CONNECT 22 \n", "CONNECT  22\n", "\n", "CONNECT 00000000022\n", "x" * 4000, "GET / HTTP/1.1\r\n\r\n",
     "CONNECT 22\r\n", "CONNECT \u0664\n"],
)  # fmt: skip
def test_a_line_that_is_none(bench: Make, line: str) -> None:
    it = bench()
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(10)
        end.connect(str(it.path))
        end.sendall(line.encode())
        assert it.packets() == []
        try:
            assert end.recv(100) == b""
        except ConnectionResetError:  # with something unread
            pass
    assert not it.device.faults


def test_clients_that_say_nothing_make_room(bench: Make) -> None:
    it = bench()
    ends = []
    for _ in range(MOST_CALLERS + 1):
        ends.append(socket.socket(socket.AF_UNIX))
        ends[-1].settimeout(10)
        ends[-1].connect(str(it.path))
        it.io.settle()
    assert ends[0].recv(1) == b""
    for end in ends[1:]:
        end.sendall(b"CONNECT 22\n")
    assert ops(it.packets()) == [p.OP_REQUEST] * MOST_CALLERS
    for end in ends:
        end.close()


def test_clients_that_say_nothing_take_nobodys_place(bench: Make) -> None:
    it = bench(connections=1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(10)
        silent.connect(str(it.path))
        it.io.settle()
        with joined(it):
            silent.sendall(b"CONNECT 22\n")  # too late: the guest has the one that there is
            assert it.packets() == []
            assert silent.recv(100) == b""
    assert it.device.stats["refused"] == 1


def test_a_client_waits_for_a_driver(bench: Make) -> None:
    it = bench()
    with it.device.lock:
        it.device.write_status(0)
    it.io.settle()
    with it.call(22) as end:
        it.io.settle()
        it.start()
        (request,) = it.packets()
        it.send(p.OP_RESPONSE, request.src_port, 22)
        assert end.recv(100) == b"OK %d\n" % request.src_port


# -- credit ------------------------------------------------------------------------------------------------------------


def test_the_guest_gets_no_more_than_it_has_room_for(bench: Make) -> None:
    it = bench()
    with joined(it, room=10_000) as end:
        end.sendall(bytes(30_000))
        packets = it.packets()
        assert len(data_of(packets)) == 10_000
        assert ops(packets)[-1] == p.OP_CREDIT_REQUEST
        assert it.io.turn() == 0
        # No room yet, and the device does not ask again and again.
        assert say(it, p.OP_CREDIT_UPDATE, room=10_000, forwarded=0) == []
        packets = say(it, p.OP_CREDIT_UPDATE, room=10_000, forwarded=1)
        assert len(data_of(packets)) == 1
        packets = say(it, p.OP_CREDIT_UPDATE, room=15_000, forwarded=10_001)
        assert len(data_of(packets)) == 15_000
        packets = say(it, p.OP_CREDIT_UPDATE, room=1 << 20, forwarded=20_000)
        assert len(data_of(packets)) == 30_000 - 25_001


@pytest.mark.parametrize(("room", "forwarded"), [(0, 0), (100, 1), (ROOM, ROOM), (100, -101), (ROOM, 1 << 31)])
def test_lies_about_room(bench: Make, room: int, forwarded: int) -> None:
    """What was freed is more than what was sent, or room is taken back: nothing is sent, and nothing breaks."""
    it = bench()
    with joined(it, room=room, forwarded=forwarded) as end:
        end.sendall(b"data")
        assert ops(it.packets()) == [p.OP_CREDIT_REQUEST]
        assert it.io.turn() == 0
        packets = say(it, p.OP_CREDIT_UPDATE, room=1000, forwarded=0)
        assert data_of(packets) == b"data"


def test_counters_go_round(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        ((_, connection),) = it.device._connections.items()
        connection.sent = (1 << 32) - 3
        connection.received = connection.forwarded = connection.told = (1 << 32) - 3
        it.add(p.OP_CREDIT_UPDATE, PORT, GUEST_PORT, room=10, forwarded=-3)
        end.sendall(b"0123456789abcdef")
        packets = it.go()
        assert data_of(packets) == b"0123456789"
        assert packets[-1].fwd_cnt == (1 << 32) - 3
        packets = say(it, p.OP_RW, b"words", room=10, forwarded=7)
        assert data_of(packets) == b"abcdef"
        assert packets[-1].fwd_cnt == 2
        assert end.recv(100) == b"words"


def test_a_host_that_does_not_read_holds_up_its_own_stream_only(bench: Make) -> None:
    it = bench()
    with joined(it) as end, it.listen(81) as listener:
        sent, told, freed = b"", 0, 0
        while True:
            data = random.Random(len(sent)).randbytes(min(1 << 16, BUFFER_BYTES - (len(sent) - freed)))
            if not data:
                break
            sent += data
            for packet in say(it, p.OP_RW, data):
                assert packet.op == p.OP_CREDIT_UPDATE
                freed = packet.fwd_cnt
                told += 1
            if not told and len(sent) > 2 * BUFFER_BYTES:
                break
        assert told  # what the host's socket has taken
        assert len(sent) >= BUFFER_BYTES
        assert it.connect(81, 1).op == p.OP_RESPONSE
        other, _ = listener.accept()
        it.send(p.OP_RW, 81, 1, b"not in the way")
        assert other.recv(100) == b"not in the way"
        other.close()
        assert it.io.turn() <= 1
        found = b""
        while len(found) < len(sent):
            found += end.recv(1 << 16)
            it.io.settle()
        assert found == sent
        updates = [packet.fwd_cnt for packet in it.packets() if packet.op == p.OP_CREDIT_UPDATE]
        assert len(sent) - updates[-1] < BUFFER_BYTES // 2
        (answer,) = say(it, p.OP_CREDIT_REQUEST)
        assert (answer.op, answer.fwd_cnt, answer.buf_alloc) == (p.OP_CREDIT_UPDATE, len(sent), BUFFER_BYTES)
        assert not it.io.writers


def test_a_guest_that_sends_more_than_it_may(bench: Make) -> None:
    it = bench()
    with joined(it) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(20):
            packets = say(it, p.OP_RW, bytes(1 << 16))
            if p.OP_RST in ops(packets):
                break
        else:
            raise AssertionError("it was never stopped")
        assert it.device.connections == 0
        assert not it.io.writers
    assert not it.device.faults


def test_a_packet_longer_than_all_room(bench: Make) -> None:
    it = bench()
    with joined(it):
        assert ops(say(it, p.OP_RW, bytes(BUFFER_BYTES + 1))) == [p.OP_RST]
    with joined(it) as end:
        assert p.OP_RST not in ops(say(it, p.OP_RW, b""))
        assert p.OP_RST not in ops(say(it, p.OP_RW, bytes(BUFFER_BYTES)))
        assert len(end.recv(1 << 20)) > 1000


# -- rings without room ------------------------------------------------------------------------------------------------


def test_a_guest_without_buffers(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    with joined(it) as end:
        drain_buffers(it)
        end.sendall(bytes(range(200)) * 100)
        it.io.settle()
        assert it.io.turn() == 0  # nobody is called for what can't be done
        assert it.packets() == []
        it.give(BUFFER, kick=False)
        assert it.rx.is_to_kick()
        it.kick(it.rx)
        (packet,) = it.packets(refill=False)
        assert packet.size == BUFFER - p.HEADER_BYTES
        it.give(*[BUFFER] * 20)
        it.give(BUFFER, kick=False)
        assert not it.rx.is_to_kick()  # there are enough
        assert packet.data + data_of(it.packets()) == bytes(range(200)) * 100


def test_resets_that_nobody_takes_stop_the_guest_for_a_while(bench: Make) -> None:
    """5.10.6.1: beyond some that are kept the guest's own packets stay in its ring."""
    it = bench()
    drain_buffers(it)
    sent = 0
    while it.tx.free > 2:
        for _ in range(100):
            if it.tx.free > 2:
                it.add(p.OP_CREDIT_REQUEST, 1, sent)
                sent += 1
        it.kick(it.tx)
        it.tx.used()
        assert sent < 10 * MOST_REPLIES
    assert MOST_REPLIES <= len(it.device._replies) <= MOST_REPLIES + 64
    assert it.io.turn() == 0
    found: list[int] = []
    while len(found) < sent:
        it.give(*[BUFFER] * min(50, sent - len(found)))
        it.tx.used()
        packets = it.packets(refill=False)
        assert packets
        assert ops(packets) == [p.OP_RST] * len(packets)
        found += [packet.dst_port for packet in packets]
    assert found == list(range(sent))
    it.give(BUFFER)
    assert ops(it.send(p.OP_RW, 1, 1)) == [p.OP_RST]


def test_what_comes_and_goes_unheard_leaves_nothing(bench: Make) -> None:
    it = bench()
    drain_buffers(it)
    with it.listen(PORT) as listener:
        for n in range(600):
            it.add(p.OP_REQUEST, PORT, n)
            it.add(p.OP_RST, PORT, n)
            it.kick(it.tx)
            it.tx.used()
            listener.accept()[0].close()
        assert it.device.connections == len(it.device._line) == len(it.device._replies) == 0
        it.give(BUFFER)
        assert it.packets() == []
    assert not it.io.writers
    assert len(it.io.readers) == 4  # three queues and the socket


# -- drivers that make mistakes ----------------------------------------------------------------------------------------


def broken(it: VsockBench, about: str) -> None:
    assert it.device.faults == 1
    assert about in it.device.fault
    assert it.device.status & NEEDS_RESET
    with it.device.lock:
        it.device.write_status(0)
    it.io.settle()
    it.start()
    joined(it).close()


@pytest.mark.parametrize("size", [1, 20, 43])
def test_a_packet_without_its_header(bench: Make, ring: dict[str, bool], size: int) -> None:
    it = bench(ring=ring)
    end = joined(it)
    it.tx.add([header(p.OP_RW, PORT, GUEST_PORT)[:size]])
    it.kick(it.tx)
    broken(it, "less than a header")
    assert end.recv(100) == b""


@pytest.mark.parametrize("size", [5, 4096, 1 << 31, 0xFFFF_FFFF])
def test_a_packet_that_ends_before_its_data(bench: Make, size: int) -> None:
    it = bench()
    end = joined(it)
    it.add(p.OP_RW, PORT, GUEST_PORT, b"data", size=size)
    it.kick(it.tx)
    assert it.tx.used() == []
    broken(it, "of which its buffers have fewer")
    assert end.recv(100) == b""


def test_a_buffer_without_room_for_a_header(bench: Make) -> None:
    it = bench()
    drain_buffers(it)
    it.rx.add([], [43])
    it.kick(it.rx)
    assert not it.device.faults  # nothing to say
    it.add(p.OP_RW, 1, 1)
    it.kick(it.tx)
    broken(it, "no room for a header")


def test_a_buffer_that_is_not_in_memory(bench: Make) -> None:
    it = bench()
    it.add(p.OP_RW, PORT, GUEST_PORT)
    it.tx.put(it.tx.desc, 8, 1 << 40)
    for n in range(16):
        it.tx.put(it.tx.desc + 16 * n, 8, 1 << 40)
    it.kick(it.tx)
    broken(it, "not inside of memory")


def test_a_client_of_a_broken_device_is_cut_off(bench: Make) -> None:
    it = bench()
    waiting = it.call(22)
    it.io.settle()
    it.tx.add([b"x"])
    it.kick(it.tx)
    assert it.device.faults
    assert waiting.recv(100) == b""
    assert it.device.connections == 0
    assert list(it.io.readers) == [queue.kick_fd for queue in it.device.queues]


# -- resets and state --------------------------------------------------------------------------------------------------


def test_a_reset_ends_every_connection(bench: Make, ring: dict[str, bool]) -> None:
    it = bench(ring=ring)
    ends = [joined(it), it.called(22)[0], it.call(23)]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(10)
        silent.connect(str(it.path))
        it.io.settle()
        with it.device.lock:
            it.device.write_status(0)
        for end in (*ends, silent):
            assert end.recv(100) == b""
            end.close()
    it.io.settle()
    assert it.device.connections == 0
    assert len(it.io.readers) == 3  # the queues
    it.start()
    guest_echo(it, 100_000)


def test_a_guest_goes_on_elsewhere_without_its_connections(bench: Make, ring: dict[str, bool], tmp_path: Path) -> None:
    it = bench(ring=ring)
    it.called(22)[0].close()
    it.packets()
    end = joined(it)
    end.sendall(bytes(10_000))
    it.io.turn()
    it.add(p.OP_RW, PORT, GUEST_PORT, b"under way")
    before = len(it.given)
    it.move(tmp_path / "other.sock", cid=9)
    assert end.recv(100) == b""
    assert it.event_ids() == [bytes(4)]  # TRANSPORT_RESET
    assert it.device.read_config(0, 8) == 9
    # A client comes when the driver has seen the event: connections from before that would be dropped.
    client = it.call(22)
    packets = it.packets()
    assert p.OP_REQUEST not in ops(packets)
    assert len(it.given) == before
    it.give_events(1)
    (request,) = it.packets()
    assert (request.op, request.dst_cid, request.dst_port) == (p.OP_REQUEST, 9, 22)
    assert request.src_port == FIRST_HOST_PORT + 1  # the guest may still have a socket that was joined to the first
    it.send(p.OP_RESPONSE, request.src_port, 22, cid=9)
    assert client.recv(100) == b"OK %d\n" % request.src_port
    # Its connections of before are gone: what it says of them from its old address, or from its new one.
    assert say(it, p.OP_RW, b"lost") == []
    assert ops(say(it, p.OP_RW, b"lost", cid=9)) == [p.OP_RST]
    client.close()


def test_every_buffer_of_the_guests_is_used_after_a_load(bench: Make, ring: dict[str, bool], tmp_path: Path) -> None:
    it = bench(ring=ring)
    with joined(it) as end:
        end.sendall(b"some are in the device's hand now")
        it.packets(refill=False)
    it.move(tmp_path / "other.sock")
    it.event_ids()
    drain_buffers(it)
    it.give(BUFFER)
    assert ops(it.send(p.OP_RW, 1, 1)) == [p.OP_RST]


def test_the_event_waits_for_a_buffer(bench: Make, tmp_path: Path) -> None:
    it = bench()
    it.move(tmp_path / "a.sock")
    assert len(it.event_ids()) == 1
    for name in ("b", "c", "d"):
        it.move(tmp_path / name)
        assert len(it.event_ids()) == 1
    it.move(tmp_path / "e")
    assert it.event_ids() == []
    it.move(tmp_path / "f")
    assert it.event_ids() == []
    with it.call(22):  # a driver that gives no buffers knows of no such event, and drops nothing
        assert ops(it.packets()) == [p.OP_REQUEST]
    assert ops(it.packets()) == [p.OP_RST]
    it.give_events(1)
    assert it.event_ids() == [bytes(4)]
    joined(it).close()
    it.give_events(1)
    assert it.event_ids() == []


def test_a_buffer_for_events_without_room(bench: Make, tmp_path: Path) -> None:
    it = bench()
    for _ in range(4):
        it.move(tmp_path / "a")
        it.event_ids()
        it.path.unlink()
    it.events.add([], [3])
    it.kick(it.events)
    it.move(tmp_path / "b")
    assert it.device.faults == 1
    assert "5.10.6.7" in it.device.fault


def test_more_buffers_for_events_than_there_can_be(bench: Make) -> None:
    """A driver that moves its index on and on, without any being used."""
    it = bench()
    for _ in range(40):
        for _ in range(10):
            it.events._free.append(0)
            it.events.add([], [4])
        it.kick(it.events)
        if it.device.faults:
            break
    assert it.device.faults == 1
    assert "than the queue is long" in it.device.fault
    it.io.settle()
    assert not it.device._events


def test_a_device_without_a_driver_is_saved(bench: Make, tmp_path: Path) -> None:
    it = bench()
    with it.device.lock:
        it.device.write_status(0)
    it.move(tmp_path / "other.sock", cid=77)
    assert it.device.read_config(0, 8) == 77
    it.start()
    assert it.event_ids() == []
    guest_echo_cid(it, 77)


def guest_echo_cid(it: VsockBench, cid: int) -> None:
    with joined(it, cid=cid) as end:
        say(it, p.OP_RW, b"hello", cid=cid)
        assert end.recv(100) == b"hello"


@pytest.mark.parametrize(
    "hands",
    [None, [], [[]], [[], [], []], [1, 2], [[], [[[0, 1, 0], [], [1 << 40, 64]]]], [[1], []], [[[]] * 300, []],
     [[[[0, 0, 0], [], []]], []], [[[[0, 1, 0], [], [1]]], []]],
)  # fmt: skip
def test_a_state_that_can_not_be(bench: Make, tmp_path: Path, hands: object) -> None:
    it = bench()
    state = it.device.save()
    state["hands"] = hands
    it.path = tmp_path / "other.sock"
    it.device.close()
    device = it.device = it.make()
    try:
        device.load(state)
        device.after_load()
    except StateError:
        return
    assert device.faults == 1
    assert "not inside of memory" in device.fault


@pytest.mark.parametrize("port", [0, FIRST_HOST_PORT - 1, 1 << 31, -1, None, "x"])
def test_a_port_that_can_not_be_the_next(bench: Make, port: object) -> None:
    it = bench()
    state = it.device.save()
    state["_next_port"] = port
    with pytest.raises(StateError, match="_next_port"):
        it.device.load(state)


def test_the_hosts_ports_go_round(bench: Make) -> None:
    it = bench()
    it.device._next_port = (1 << 31) - 1
    with it.call(22), it.call(22), it.call(23):
        packets = it.packets()
        assert [packet.src_port for packet in packets] == [(1 << 31) - 1, FIRST_HOST_PORT, FIRST_HOST_PORT + 1]
        it.device._next_port = FIRST_HOST_PORT
        with it.call(22):  # one that is in use is passed over
            assert [packet.src_port for packet in it.packets()] == [FIRST_HOST_PORT + 1]


def test_a_ring_that_is_reset(bench: Make) -> None:
    """VIRTIO_F_RING_RESET: of one queue, the connections stay."""
    it = bench()
    with joined(it) as end:
        for n, driver in ((RX, it.rx), (TX, it.tx)):
            queue = it.device.queues[n]
            with it.device.lock:
                it.device.reset_queue(queue)
            it.io.settle()
            again = type(driver)(it.memory, queue, base=driver.base, end=driver._end, **it.ring)
            if n == RX:
                it.rx, it.given = again, {}
                it.give(*[BUFFER] * 10)
            else:
                it.tx = again
        say(it, p.OP_RW, b"hello")
        assert end.recv(100) == b"hello"
        end.sendall(b"there")
        assert data_of(it.packets()) == b"there"


def test_in_a_child_of_fork_descriptors_are_closed(bench: Make) -> None:
    it = bench()
    end, _ = it.called(22)
    lingers = joined(it)
    for _ in range(4):
        say(it, p.OP_RW, bytes(1 << 16))
    say(it, p.OP_SHUTDOWN, flags=p.BOTH_WAYS)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(it.path))
        it.io.settle()
        before = set(os.listdir("/proc/self/fd"))
        it.device.abandon()
        assert len(before - set(os.listdir("/proc/self/fd"))) == 4  # each connection's, the client's, the listener's
    assert it.path.exists()
    end.close()
    lingers.close()
    it.device = it.make()
