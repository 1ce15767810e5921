"""Ports: frames whole and in order, whatever the other end does; nothing waits and nothing grows."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.net.port import MOST_FRAME_BYTES, Port, StreamPort, TapPort

BUFFER_BYTES = 256 << 10


@pytest.fixture
def stream() -> Iterator[tuple[StreamPort, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    with theirs:
        port = StreamPort(ours.detach())
        yield port, theirs
        port.close()


@pytest.fixture
def messages() -> Iterator[tuple[TapPort, socket.socket]]:
    """A descriptor with a frame a call, as a tap's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(10)
    with theirs:
        port = TapPort(ours.detach())
        yield port, theirs
        port.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def all_of(end: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = end.recv(size - len(got))
        assert piece, "the other end was closed"
        got += piece
    return got


def received(port: Port, *sizes: int) -> tuple[int, bytes]:
    views: list[Any] = [bytearray(size) for size in sizes]
    size = port.receive(views)
    return size, b"".join(bytes(view) for view in views)[: max(size, 0)]


def test_a_stream_has_lengths_in_front_of_frames(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    assert port.send([b"abc", b"", b"defgh"])
    assert port.send([b"i"])
    assert port.calls == 0  # small ones go together
    assert port.flush()
    assert port.calls == 1
    assert all_of(peer, 17) == framed(b"abcdefgh", b"i")
    assert (port.sent, port.sent_bytes) == (2, 9)


def test_frames_of_a_stream_come_out_whole_however_they_arrive(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    data = framed(b"abc", b"", b"d" * 1000)
    for n in range(len(data)):
        peer.send(data[n : n + 1])
        size, frame = received(port, 2, 0, 2000)
        if n == 6:
            assert (size, frame) == (3, b"abc")
        elif n == len(data) - 1:
            assert (size, frame) == (1000, b"d" * 1000)
        else:
            assert size == 0
            assert not port.closed
            received(port, 2000)  # the port has seen that there is no more


def test_many_frames_cost_one_read(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    peer.sendall(framed(*[bytes([n]) * 60 for n in range(200)]))
    assert [received(port, 100) for _ in range(200)] == [(60, bytes([n]) * 60) for n in range(200)]
    assert received(port, 100) == (0, b"")
    assert port.calls == 1


@pytest.mark.parametrize("size", [20000, 65536, MOST_FRAME_BYTES])
def test_a_large_frame_is_sent_as_it_is(stream: tuple[StreamPort, socket.socket], size: int) -> None:
    port, peer = stream
    frame = bytes(n % 251 for n in range(size))
    assert port.send([b"first"])
    assert port.send([frame[:1000], frame[1000:]])
    assert port.calls == 2
    assert all_of(peer, 9 + 4 + size) == framed(b"first", frame)
    assert port.kept_bytes == 0


def test_a_peer_that_stops_reading_is_waited_for_and_loses_nothing(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    frames = []
    for n in range(1000):
        frame = bytes([n & 0xFF]) * (100 + 5000 * (n % 14))
        if not port.send([frame]):
            break
        frames.append(frame)
    else:
        raise AssertionError("the port takes any amount")
    assert not port.send([frame])
    assert port.kept_bytes <= BUFFER_BYTES
    assert not port.flush()
    size = sum(4 + len(frame) for frame in frames)
    got = b""
    while len(got) < size:
        got += peer.recv(1 << 20)
        port.flush()
    assert got == framed(*frames)
    assert port.flush()
    assert port.sent == len(frames)
    assert port.lost == 0


def test_what_is_longer_than_a_frame_is_lost_on_its_way_out(
    stream: tuple[StreamPort, socket.socket], messages: tuple[TapPort, socket.socket]
) -> None:
    for port, _ in (stream, messages):
        assert port.send([bytes(MOST_FRAME_BYTES), b"x"])
        assert (port.sent, port.lost, port.closed) == (0, 1, False)


def test_a_length_that_no_frame_has_closes_the_port(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    peer.sendall(framed(b"good") + (MOST_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(1000))
    assert received(port, 100) == (4, b"good")
    assert received(port, 100) == (0, b"")
    assert port.closed
    assert port.send([b"x"])  # lost
    assert port.sent == 0


def test_the_peers_end_closes_the_port_after_its_last_frame(
    stream: tuple[StreamPort, socket.socket], messages: tuple[TapPort, socket.socket]
) -> None:
    for (port, peer), data in ((stream, framed(b"last")), (messages, b"last")):
        peer.sendall(data)
        peer.close()
        assert received(port, 100) == (4, b"last")
        for _ in range(2):
            assert received(port, 100) == (0, b"")
        assert port.closed
        assert not received(port, 100)[0]
        port.close()
        assert port.fd == -1


def test_a_stream_whose_reader_is_gone_is_closed_without_a_signal(stream: tuple[StreamPort, socket.socket]) -> None:
    port, peer = stream
    peer.close()
    assert port.send([b"x"])
    assert port.flush()
    assert port.closed


@pytest.mark.parametrize("kind", ["stream", "messages"])
def test_a_frame_too_long_for_the_room_stays_for_more_room_or_is_dropped(
    kind: str, request: pytest.FixtureRequest
) -> None:
    port, peer = request.getfixturevalue(kind)
    frames = [bytes(range(100)), b"b" * 50, b"c" * 3000]
    for frame in frames:
        peer.sendall(framed(frame) if kind == "stream" else frame)
    assert received(port, 30, 40)[0] == -1
    assert port.waiting_bytes == 100
    assert received(port, 99)[0] == -1
    assert received(port, 30, 40, 40) == (100, frames[0])
    assert port.waiting_bytes == 0
    assert received(port, 49)[0] == -1
    port.drop()
    port.drop()  # there is none any more
    assert received(port, 1, 2999) == (3000, frames[2])
    assert (port.received, port.received_bytes, port.too_long) == (2, 3100, 1)


def test_a_tap_has_a_frame_a_call(messages: tuple[TapPort, socket.socket]) -> None:
    port, peer = messages
    assert port.send([b"abc", b"defgh"])
    assert peer.recv(100) == b"abcdefgh"
    peer.send(b"xyz")
    peer.send(b"u")
    assert received(port, 1, MOST_FRAME_BYTES) == (3, b"xyz")
    assert received(port, 10) == (1, b"u")
    assert received(port, 10) == (0, b"")
    assert port.calls == 4
    while port.send([bytes(5000)]):
        pass
    assert (port.lost, port.closed) == (0, False)


def test_a_port_may_get_another_peer() -> None:
    port = StreamPort()
    assert port.closed
    for name in (b"first", b"second"):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            port.connect(ours.detach())
            theirs.sendall(framed(name) + b"\0\0")
            assert received(port, 100) == (len(name), name)
            assert port.send([name])  # and it is never sent
        port.close()
    assert port.received == 2


def test_more_parts_than_the_kernel_takes_are_a_mistake_of_the_callers(
    stream: tuple[StreamPort, socket.socket],
) -> None:
    with pytest.raises(ValueError, match="1025 parts"):
        stream[0].send([b"x"] * 1025)
    assert stream[0].send([b"x"] * 1024)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_of_a_peer_are_frames_or_the_end(data: st.DataObject) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    port = StreamPort(ours.detach())
    with theirs:
        sent = b""
        got = []
        for _ in range(data.draw(st.integers(1, 20))):
            piece = data.draw(
                st.one_of(
                    st.binary(max_size=40),
                    st.integers(0, 300).map(lambda n: framed(bytes(n))),
                    st.integers(0, 0x20000).map(lambda n: n.to_bytes(4, "big")),
                )
            )
            sent += piece
            theirs.sendall(piece)
            for _ in range(data.draw(st.integers(0, 5))):
                size, frame = received(port, data.draw(st.integers(0, 400)))
                if size > 0:
                    got.append(frame)
                elif size < 0 and data.draw(st.booleans()):
                    break
        for _ in range(200):
            size, frame = received(port, MOST_FRAME_BYTES)
            if size > 0:
                got.append(frame)
            elif port.closed:
                break
        # An oracle that reads the same in one go.
        expected, closed = [], False
        while len(sent) >= 4 and not closed:
            size = int.from_bytes(sent[:4], "big")
            closed = size > MOST_FRAME_BYTES
            if closed or len(sent) < 4 + size:
                break
            if size:
                expected.append(sent[4 : 4 + size])
            sent = sent[4 + size :]
        assert got == expected
        assert port.closed == closed
    port.close()
