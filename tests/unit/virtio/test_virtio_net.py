"""VirtioNet: frames both ways, over both ring layouts and both kinds of ports; and what a bad driver or peer does."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from net_bench import ALL, HEADER_BYTES, MAC, OTHER, NetBench, frame

from pyvmm.devices.virtio import net_features as f
from pyvmm.devices.virtio.net import S_ANNOUNCE, S_LINK_UP
from pyvmm.devices.virtio.ring import F_RING_PACKED
from pyvmm.net.backend import CHECKSUM, TSO4

Make = Callable[..., NetBench]

RINGS = [
    {"packed": packed, "event_idx": event, "indirect": indirect}
    for packed, event, indirect in itertools.product((False, True), repeat=3)
]
HEADER = struct.Struct("<BBHHHHH")
NO_HEADER = bytes(HEADER_BYTES)
ONE_BUFFER = HEADER.pack(0, 0, 0, 0, 0, 0, 1)


@pytest.fixture
def bench() -> Iterator[Make]:
    made: list[NetBench] = []

    def make(*args: Any, **options: Any) -> NetBench:
        made.append(NetBench(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(params=RINGS, ids=lambda ring: "-".join(name for name, on in ring.items() if on) or "split")
def ring(request: pytest.FixtureRequest) -> dict[str, bool]:
    return dict(request.param)


@pytest.fixture(params=["stream", "tap"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def status(bench: NetBench) -> int:
    return int.from_bytes(bench.card.config[6:8], "little")


# -- frames ------------------------------------------------------------------------------------------------------------


def test_frames_go_both_ways_whole_and_in_order(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, ring=ring)
    header = NO_HEADER if kind == "tap" else b""
    for turn in range(40):
        frames = [frame(n, 60 + 37 * (turn + n)) for n in range(1 + turn % 7)]
        sent = it.send(*frames)
        assert it.went() == [header + data for data in frames]
        assert it.tx[0].used() == [(chain, 0) for chain in sent]
        it.give(*[2048] * len(frames))
        it.comes(*frames)
        assert it.received() == [(ONE_BUFFER, data) for data in frames]
    assert it.card.stats["sent"] == it.card.stats["received"]
    assert it.card.stats["dropped"] == it.card.stats["lost"] == 0


@pytest.fixture
def irqfd() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("way", ["irqfd", "by the device"])
def test_many_frames_are_one_turn_one_read_and_few_interrupts(
    bench: Make, ring: dict[str, bool], irqfd: int, way: str
) -> None:
    """The driver sees eight frames at a time, and goes on while the rest follow: one that knows no event index is told
    so each time; where Python has to interrupt, at the end.
    """
    it = bench("stream", ring=ring, sizes=(256, 512))
    for queue in it.card.queues:
        queue.call_fd = irqfd if way == "irqfd" else -1
    frames = [frame(n) for n in range(100)]
    it.give(*[256] * 100)
    port, notified = it.backend.ports[0], [queue.notified for queue in it.card.queues]
    for driver in it.drivers:
        driver.want_interrupts(True)
    it.peers[0].sendall(b"".join(len(data).to_bytes(4, "big") + data for data in frames))
    calls = port.calls
    it.io.turn()
    assert port.calls == calls + 1
    assert [data for _, data in it.received()] == frames
    it.send(*frames, kick=False)
    calls = port.calls
    it.serve(it.tx[0])
    assert port.calls == calls + 1
    assert it.went() == frames
    interrupts = [queue.notified - before for queue, before in zip(it.card.queues, notified, strict=True)]
    times = 13 if way == "irqfd" and not ring.get("event_idx") else 1
    assert interrupts == [times, times, 0]


def test_a_large_frame_is_shown_at_once(bench: Make, ring: dict[str, bool], kind: str, irqfd: int) -> None:
    it = bench(kind, ring=ring)
    for queue in it.card.queues:
        queue.call_fd = irqfd
    it.give(*[20000] * 3)
    notified = [queue.notified for queue in it.card.queues]
    for driver in it.drivers:
        driver.want_interrupts(True)
    it.comes(*[frame(n, 17000) for n in range(3)])
    it.send(*[frame(n, 17000) for n in range(3)])
    assert [len(data) for _, data in it.received()] == [17000] * 3
    times = 1 if ring.get("event_idx") else 3
    interrupts = [queue.notified - before for queue, before in zip(it.card.queues, notified, strict=True)]
    assert interrupts == [times, times, 0]


def test_a_frame_over_several_buffers(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, ring=ring)
    for size in (1, 1000, 1012, 1013, 2036, 2037, 30000, 60000):
        it.give(*[1024] * 60)
        it.comes(frame(1, max(size, 14)))
        ((header, data),) = it.received()
        count = -(-(len(data) + HEADER_BYTES) // 1024)
        assert (header[10:12], data) == (count.to_bytes(2, "little"), frame(1, max(size, 14)))
        it.give(*[1024] * count)
        it.comes(frame(2))
        assert [data for _, data in it.received()] == [frame(2)]
        it = bench(kind, ring=ring)


def test_a_frame_waits_for_the_buffers_that_it_needs(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.give(1024, 1024)
    it.comes(frame(1, 3000), frame(2))
    assert it.received() == []
    it.give(1024, 1024, 1024)
    assert [data for _, data in it.received()] == [frame(1, 3000), frame(2)]
    assert it.card.stats["dropped"] == 0


def test_a_frame_that_the_whole_ring_does_not_hold_is_dropped(bench: Make, kind: str) -> None:
    it = bench(kind, sizes=(4, 4))
    it.give(*[1024] * 4)
    it.comes(frame(1, 5000), frame(2))
    assert [data for _, data in it.received()] == [frame(2)]
    assert it.card.stats["dropped"] == 1


def test_without_mergeable_buffers_a_frame_has_one(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, take=ALL & ~(f.F_MRG_RXBUF | f.F_MQ), ring=ring)
    it.give(100, 2000, 100, 2000)
    it.comes(frame(1, 500), frame(2, 500), frame(3, 50), frame(4, 2500), frame(5, 60))
    # The first buffer is too small for the first, and the next frame has it.
    assert [data for _, data in it.received()] == [frame(3, 50), frame(5, 60)]
    assert it.card.stats["dropped"] == 3


def test_a_buffer_in_pieces_and_an_odd_header(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, ring=ring)
    it.given[0][it.rx[0].add([], [3, 5, 2, 1, 1, 7, 4000])] = None
    it.serve(it.rx[0])
    it.comes(frame(1, 700))
    assert it.received() == [(ONE_BUFFER, frame(1, 700))]
    it.tx[0].add([NO_HEADER[:5], NO_HEADER[5:] + frame(2)[:1], frame(2)[1:20], frame(2)[20:]])
    it.serve(it.tx[0])
    assert it.went() == [NO_HEADER * (kind == "tap") + frame(2)]


def test_an_old_driver_has_a_shorter_header(bench: Make, kind: str) -> None:
    it = bench(kind, take=ALL & ~(f.F_MRG_RXBUF | f.F_MQ))
    with it.card.lock:
        it.card.features &= ~f.F_VERSION_1
        it.card.driver_ok()
    it.io.settle()
    it.given[0][it.rx[0].add([], [10, 2000])] = None
    it.serve(it.rx[0])
    it.comes(frame(1), header=bytes(10))
    ((chain, written),) = it.rx[0].used()
    assert it.rx[0].data(chain)[:written] == bytes(10) + frame(1)
    it.send(frame(2), header=bytes(10))
    assert it.went() == [bytes(10) * (kind == "tap") + frame(2)]
    if kind == "tap":
        assert it.backend.told[-3:] == [("header", 10), ("offloads", it.card._guest_offloads), ("pairs", 1)]
    # It may set its address, a byte at a time (5.1.4.1).
    it.card.features &= ~f.F_CTRL_MAC_ADDR
    for n in range(6):
        it.card.config_write(n, 1, OTHER[n])
    assert it.card.mac == OTHER


# -- a host or a guest that does not keep up ---------------------------------------------------------------------------


def test_a_peer_that_stops_reading_holds_the_guest_up_and_loses_nothing(bench: Make, kind: str) -> None:
    it = bench(kind, sizes=(256, 512))
    frames = [frame(n, 1000 + n) for n in range(200)] * 10
    sent = 0
    went: list[bytes] = []
    stood = 0
    while len(went) < len(frames):
        while sent < len(frames) and it.tx[0].free >= 2:
            it.send(frames[sent], kick=False)
            sent += 1
        it.serve(it.tx[0])
        if not it.tx[0].used():
            stood += 1
            assert it.io.writers or sent == len(frames)
            went += [data[HEADER_BYTES * (kind == "tap") :] for data in it.went()]
            it.io.settle()
    assert stood > 2
    assert went == frames
    assert it.card.stats["sent"] == len(frames)
    assert it.card.stats["lost"] == it.card.stats["dropped"] == 0
    assert not it.io.writers


def test_a_flood_for_a_guest_without_buffers_stays_outside(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.peers[0].settimeout(0)
    sent = 0
    while True:
        try:
            it.comes(frame(sent, 1400))
        except BlockingIOError:
            break
        sent += 1
    assert sent < 2000
    fd = it.backend.ports[0].fd
    assert fd not in it.io.readers  # and nobody looks
    if kind == "stream":
        return  # the frame that was cut short is the peer's to go on with
    it.give(*[2048] * 256)
    got = len(it.received())
    while fd in it.io.readers:
        it.io.settle()
        it.give(*[2048] * it.rx[0].free)
        if not (more := len(it.received())):
            break
        got += more
    assert got == sent


def test_the_peers_end_is_the_links(bench: Make, kind: str) -> None:
    it = bench(kind)
    assert status(it) == S_LINK_UP
    changes = it.card.generation
    it.give(2048)
    it.peers[0].close()
    it.io.settle()
    assert status(it) == 0
    assert not it.card.link_up
    assert it.card.generation == changes + 1
    assert it.backend.ports[0].fd == -1
    it.send(frame(1), frame(2))
    assert len(it.tx[0].used()) == 2  # what is sent is lost
    assert it.card.stats["dropped"] == 2


def test_the_peers_end_is_noticed_by_the_sender_too(bench: Make) -> None:
    it = bench("stream")
    it.io.remove_reader(it.backend.ports[0].fd)
    it.peers[0].close()
    it.send(frame(1))
    it.send(frame(1))
    assert status(it) == 0


def test_the_cable_is_pulled_and_put_back(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.give(*[2048] * 4)
    it.card.link_up = False
    assert status(it) == 0
    it.send(frame(1))
    it.comes(frame(2), frame(3))
    assert (it.went(), it.received(), len(it.tx[0].used())) == ([], [], 1)
    assert it.card.stats["dropped"] == 3
    it.card.link_up = True
    it.comes(frame(4))
    it.send(frame(5))
    assert [data for _, data in it.received()] == [frame(4)]
    assert it.went() == [NO_HEADER * (kind == "tap") + frame(5)]
    assert status(it) == S_LINK_UP


# -- offloads ----------------------------------------------------------------------------------------------------------


def test_a_port_without_headers_offers_no_offloads(bench: Make) -> None:
    it = bench("stream")
    assert not it.card.offered & (f.F_CSUM | f.F_GUEST_CSUM | f.SEGMENTS_FOR_GUEST | f.F_HOST_TSO4 | f.F_HOST_USO)
    assert not it.card.offered & (f.F_MTU | f.F_MQ | f.F_CTRL_GUEST_OFFLOADS)
    tap = bench("tap", mtu=9000, pairs=2)
    for feature in (*f.GUEST_OFFLOADS, *f.HOST_OFFLOADS, f.F_MTU, f.F_MQ, f.F_CTRL_GUEST_OFFLOADS):
        assert tap.card.offered & feature
    assert tap.card.config[8:] == struct.pack("<HH", 2, 9000)


@pytest.mark.parametrize(
    ("without", "with_"),
    [
        (f.F_CSUM, f.F_HOST_TSO4),
        (f.F_CSUM, f.F_HOST_USO),
        (f.F_GUEST_CSUM, f.F_GUEST_TSO6),
        (f.F_GUEST_TSO4 | f.F_GUEST_TSO6, f.F_GUEST_ECN),
        (f.F_CTRL_VQ, f.F_MQ),
        (f.F_CTRL_VQ, f.F_CTRL_RX),
        (f.F_CTRL_VQ, f.F_CTRL_GUEST_OFFLOADS),
        (f.F_CTRL_VQ, f.F_GUEST_ANNOUNCE),
    ],
)
def test_a_feature_without_what_it_needs_is_refused(bench: Make, without: int, with_: int) -> None:
    card = bench("tap", pairs=2).card
    assert card.check_features(card.offered)
    assert not card.check_features(card.offered & ~without & ~with_ | with_)


def test_a_header_is_the_hosts_to_take_where_it_was_negotiated(bench: Make) -> None:
    it = bench("tap")
    segments = frame(1, 9000)
    for gso in (1, 4, 5, 0x81, 0x84):
        header = HEADER.pack(1, gso, 54, 1400, 34, 16, 0)
        it.send(segments, header=header)
        assert it.went() == [header + segments]
    it.give(*[4096] * 20)
    header = HEADER.pack(1, 4, 54, 1400, 34, 16, 0)
    it.comes(segments, header=header)
    assert it.received() == [(header[:10] + b"\3\0", segments)]


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(1, 0, 0, 0, 60000, 0, 0),
        HEADER.pack(1, 0, 0, 0, 34, 65535, 0),
        HEADER.pack(1, 0, 0, 0, 65535, 65535, 0),
        HEADER.pack(1, 0, 0, 0, 97, 2, 0),  # its last byte is beyond the end
        HEADER.pack(1, 1, 54, 0, 34, 16, 0),
        HEADER.pack(0, 1, 54, 1400, 34, 16, 0),
        HEADER.pack(1, 2, 54, 1400, 34, 16, 0),
        HEADER.pack(1, 3, 54, 1400, 34, 16, 0),
        HEADER.pack(1, 0x80, 54, 1400, 34, 16, 0),
        HEADER.pack(1, 0x85, 54, 1400, 34, 16, 0),
        b"\xff" * 12,
    ],
)
def test_a_header_that_makes_no_sense_is_a_frame_dropped(bench: Make, header: bytes) -> None:
    it = bench("tap")
    it.send(frame(1), header=header)
    it.send(frame(2))
    assert it.went() == [NO_HEADER + frame(2)]
    assert len(it.tx[0].used()) == 2
    assert it.card.stats["dropped"] == 1
    assert not it.card.faults


def test_what_was_not_negotiated_is_dropped(bench: Make) -> None:
    it = bench("tap", take=ALL & ~(f.F_CSUM | f.F_HOST_TSO4 | f.F_HOST_TSO6 | f.F_HOST_USO | f.F_HOST_ECN | f.F_MQ))
    it.send(frame(1), header=HEADER.pack(1, 0, 0, 0, 34, 16, 0))
    it.send(frame(1), header=HEADER.pack(1, 1, 54, 1400, 34, 16, 0))
    assert it.went() == []
    assert it.card.stats["dropped"] == 2


def test_sizes_that_no_frame_has_are_dropped(bench: Make, kind: str) -> None:
    """What the guest sends. What comes for it is for its driver to look at."""
    it = bench(kind, mtu=1500)
    pieces = [bytes(30000)] * 3
    it.tx[0].add([NO_HEADER, *pieces])
    it.tx[0].add([NO_HEADER])
    it.send(b"x" * 13, frame(1, 1519), frame(1, 1518), frame(2, 14))
    assert it.went() == [NO_HEADER * (kind == "tap") + data for data in (frame(1, 1518), frame(2, 14))]
    assert it.card.stats["dropped"] == 4
    assert len(it.tx[0].used()) == 6
    it.give(4096, 4096)
    it.comes(b"y" * 13, frame(3))
    assert [data for _, data in it.received()] == [b"y" * 13, frame(3)]
    assert not it.card.faults


def test_a_frame_shorter_than_its_header_breaks_the_card(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.tx[0].add([bytes(11)])
    it.serve(it.tx[0])
    assert it.card.faults == 1
    assert "shorter than its header" in it.card.fault


@pytest.mark.parametrize(("readable", "writable"), [([b"x"], []), ([], [11])])
def test_a_buffer_without_room_breaks_the_card(
    bench: Make, kind: str, readable: list[bytes], writable: list[int]
) -> None:
    it = bench(kind)
    it.rx[0].add(readable, writable)
    it.serve(it.rx[0])
    it.comes(frame(1))
    assert it.card.faults == 1
    assert "without room" in it.card.fault
    assert it.backend.ports[0].fd not in it.io.readers or it.io.turn() < 100


# -- the control queue -------------------------------------------------------------------------------------------------

GROUP = bytes.fromhex("333300000001")
BROADCAST = b"\xff" * 6


def tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + b"".join(each) for each in (unicast, multicast))


def passes(it: NetBench, *addresses: bytes, vlan: int | None = None) -> list[bool]:
    """Which of them the guest hears."""
    heard = []
    for n, to in enumerate(addresses):
        data = frame(n, 200, to)
        if vlan is not None:
            data = data[:12] + b"\x81\x00" + (0xE000 | vlan).to_bytes(2, "big") + data[12:]
        it.give(*[2048] * (8 - len(it.given[0])))
        it.comes(data)
        got = it.received()
        assert got in ([], [(ONE_BUFFER, data)])
        heard.append(bool(got))
    return heard


def test_modes(bench: Make, kind: str) -> None:
    it = bench(kind)
    stranger = bytes.fromhex("020000000077")
    to = (MAC, stranger, GROUP, BROADCAST)
    assert it.command(2, 0, b"\0\0") == 0  # VLAN 0; the others are not wanted
    assert passes(it, *to) == [True] * 4
    for changes, expected in (
        ({0: 0}, (1, 0, 0, 1)),
        ({1: 1}, (1, 0, 1, 1)),
        ({2: 1}, (1, 1, 1, 1)),
        ({3: 1}, (1, 1, 0, 1)),
        ({4: 1}, (0, 0, 0, 1)),
        ({5: 1}, (0, 0, 0, 0)),
        ({0: 2}, (1, 1, 1, 1)),
        ({0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 0}, (1, 0, 0, 1)),
    ):
        for what, on in changes.items():
            assert it.command(0, what, bytes([on])) == 0
        assert passes(it, *to) == [bool(wanted) for wanted in expected], changes
    assert it.card.stats["filtered"] == 13


def test_tables_of_addresses(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.command(0, 0, b"\0")
    more = bytes.fromhex("020000000055")
    other_group = bytes.fromhex("333300000002")
    assert passes(it, more, GROUP, other_group) == [False] * 3
    assert it.command(1, 0, tables([OTHER, more], [GROUP])) == 0
    assert passes(it, MAC, more, OTHER, GROUP, other_group) == [True, True, True, True, False]
    assert it.command(1, 0, tables([], [])) == 0
    assert passes(it, MAC, more, GROUP) == [True, False, False]
    many = [bytes([2, 1, 1, 1, n >> 8, n & 0xFF]) for n in range(200)]
    assert it.command(1, 0, tables(many[:64], [])) == 0
    assert passes(it, many[63], many[64]) == [True, False]
    assert it.command(1, 0, tables(many, [])) == 0
    assert passes(it, more, GROUP) == [True, False]
    assert it.command(1, 0, tables([], many)) == 0
    assert passes(it, more, other_group) == [False, True]
    assert it.command(1, 1, more) == 0
    assert it.card.mac == more
    assert passes(it, MAC, more) == [False, True]


def test_vlans(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.command(0, 0, b"\0")
    assert passes(it, MAC, vlan=7) == [False]
    for vlan in (0, 7, 4095):
        assert it.command(2, 0, vlan.to_bytes(2, "little")) == 0
        assert passes(it, MAC, OTHER, vlan=vlan) == [True, False]
    assert it.command(2, 1, (7).to_bytes(2, "little")) == 0
    assert passes(it, MAC, vlan=7) == [False]
    assert it.command(2, 0, (4096).to_bytes(2, "little")) == 1
    # A driver that did not take the feature hears all of them.
    it = bench(kind, take=ALL & ~(f.F_CTRL_VLAN | f.F_MQ))
    it.command(0, 0, b"\0")
    assert passes(it, MAC, vlan=7) == [True]
    assert it.command(2, 0, b"\7\0") == 1


@pytest.mark.parametrize(
    "command",
    [
        (0, 6, b"\1"),
        (0, 0, b""),
        (0, 0, b"\1\1"),
        (1, 0, b""),
        (1, 0, b"\1\0\0\0\2"),
        (1, 0, b"\xff\xff\xff\xff" + bytes(100)),
        (1, 0, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
        (1, 0, bytes(9)),
        (1, 1, bytes(5)),
        (1, 1, bytes(7)),
        (1, 2, bytes(6)),
        (2, 2, b"\0\0"),
        (2, 0, b"\0"),
        (3, 1, b""),
        (4, 0, b"\2\0"),  # MQ was not negotiated
        (4, 1, b"\2\0"),
        (5, 0, bytes(7)),
        (5, 0, b"\xff" * 8),
        (5, 1, bytes(8)),
        (6, 0, b""),
        (255, 255, bytes(3000)),
        (1, 0, bytes(70000)),
    ],
)
def test_a_command_that_is_none_is_answered_with_an_error(bench: Make, command: tuple[int, int, bytes]) -> None:
    it = bench("tap")
    before = it.card.save()
    assert it.command(*command) == 1
    after = it.card.save()
    assert {name: value for name, value in after.items() if name != "queues"} == {
        name: value for name, value in before.items() if name != "queues"
    }
    assert it.command(0, 0, b"\0") == 0
    assert not it.card.faults


def test_a_command_without_room_for_the_answer_breaks_the_card(bench: Make) -> None:
    for readable, writable in (([b"\0\0\1"], []), ([b"\0"], [1]), ([], [1])):
        it = bench("tap")
        it.control.add(readable, writable)
        it.serve(it.control)
        assert it.card.faults == 1


def test_offloads_may_be_taken_back(bench: Make) -> None:
    it = bench("tap")
    assert ("offloads", it.backend.offloads) in it.backend.told
    assert it.command(5, 0, (f.F_GUEST_CSUM | f.F_GUEST_TSO4).to_bytes(8, "little")) == 0
    assert it.backend.told[-1] == ("offloads", CHECKSUM | TSO4)
    assert it.command(5, 0, bytes(8)) == 0
    assert it.backend.told[-1] == ("offloads", 0)
    few = bench("tap", take=ALL & ~(f.F_GUEST_TSO6 | f.F_MQ))
    assert few.command(5, 0, f.F_GUEST_TSO6.to_bytes(8, "little")) == 1


def test_the_guest_is_asked_to_announce_itself(bench: Make) -> None:
    it = bench()
    it.card.announce()
    assert status(it) == S_LINK_UP | S_ANNOUNCE
    assert it.command(3, 0) == 0
    assert status(it) == S_LINK_UP
    it.card.announce()
    it.card.announce()  # it has not looked yet
    assert status(it) == S_LINK_UP | S_ANNOUNCE
    assert it.command(3, 1) == 1
    assert status(it) == S_LINK_UP | S_ANNOUNCE
    assert it.went() == []


# RFC 903: to all; Ethernet and IPv4, operation 3, both addresses the card's, and no IPv4 address yet.
RARP = b"\xff" * 6 + MAC + bytes.fromhex("8035 0001 0800 06 04 0003") + (MAC + bytes(4)) * 2 + bytes(18)


@pytest.mark.parametrize("missing", [f.F_GUEST_ANNOUNCE, f.F_STATUS, f.F_GUEST_ANNOUNCE | f.F_CTRL_VQ])
def test_for_a_guest_that_can_not_the_card_announces_it(bench: Make, missing: int) -> None:
    if missing & f.F_CTRL_VQ:
        missing |= f.CONTROLLED
    for kind, before in (("stream", b""), ("tap", bytes(HEADER_BYTES))):
        it = bench(kind, take=ALL & ~(missing | f.F_MQ))
        it.card.announce()
        it.io.settle()
        assert it.went() == [before + RARP]
        assert len(RARP) == 60
        assert not it.card.config[6] & S_ANNOUNCE
        it.card.link_up = False
        it.card.announce()
        it.io.settle()
        assert it.went() == []


def test_nobody_announces_a_guest_without_a_driver(bench: Make) -> None:
    it = bench("tap", take=ALL & ~(f.F_GUEST_ANNOUNCE | f.F_MQ))
    silent = it.make(1)
    silent.announce()
    it.io.settle()
    assert it.went() == []


def test_a_network_that_takes_nothing_holds_nobody_up(bench: Make) -> None:
    it = bench(take=ALL & ~(f.F_GUEST_ANNOUNCE | f.F_MQ))
    for _ in range(20000):
        it.card.announce()
        it.io.settle()
    assert it.card.stats["sent"] < 20000
    frames = it.went()
    assert set(frames) == {RARP}


def test_several_pairs(bench: Make) -> None:
    it = bench("tap", pairs=3, take=ALL)
    assert it.backend.told[-1] == ("pairs", 1)
    for pair in range(3):
        it.give(*[2048] * 4, pair=pair)
    it.comes(frame(0), pair=0)
    it.comes(frame(1), pair=1)
    assert [len(it.received(pair)) for pair in range(3)] == [1, 0, 0]
    it.send(frame(9), pair=1)
    assert it.went(1) == []
    for pairs, answer in ((0, 1), (4, 1), (65535, 1), (3, 0)):
        assert it.command(4, 0, pairs.to_bytes(2, "little")) == answer
    assert it.backend.told[-1] == ("pairs", 3)
    for pair in range(3):
        it.comes(frame(pair), pair=pair)
        it.send(frame(pair), pair=pair)
    assert [[data for _, data in it.received(pair)] for pair in range(3)] == [[frame(0)], [frame(1)] * 2, [frame(2)]]
    assert [it.went(pair)[-1] for pair in range(3)] == [NO_HEADER + frame(pair) for pair in range(3)]
    assert it.command(4, 0, b"\1\0") == 0
    it.comes(frame(5), pair=2)
    assert it.received(2) == []


# -- resets and state --------------------------------------------------------------------------------------------------


def reset(it: NetBench) -> None:
    """What a transport does at status 0."""
    with it.card.lock:
        it.card.write_status(0)
    it.io.settle()


def test_a_pair_that_was_rung_for_while_it_was_not_in_use(bench: Make, ring: dict[str, bool]) -> None:
    """As of a driver that goes to fewer of them and back under load: with an event index it would not ring again."""
    it = bench("tap", pairs=2, take=ALL, ring=ring)
    for pairs, n in ((2, 0), (1, 1), (2, 2)):
        assert it.command(4, 0, pairs.to_bytes(2, "little")) == 0
        if n == 2:
            assert it.went(1) == [NO_HEADER + frame(1)]
        it.tx[1].add([NO_HEADER + frame(n)])
        if it.tx[1].is_to_kick():
            it.serve(it.tx[1])
        assert it.went(1) == ([] if pairs == 1 else [NO_HEADER + frame(n)])


def test_after_a_reset_nothing_of_the_guests_is_touched(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, ring=ring)
    it.give(*[2048] * 50)
    it.command(0, 0, b"\0")
    it.command(1, 1, OTHER)
    reset(it)
    before = bytes(memoryview(it.memory.ram[0]))
    it.comes(*[frame(n) for n in range(10)])
    assert bytes(memoryview(it.memory.ram[0])) == before
    assert it.card.mac == MAC
    it.start()
    it.give(*[2048] * 50)
    assert [data for _, data in it.received()] == [frame(n) for n in range(10)]
    assert passes(it, bytes.fromhex("020000000077")) == [True]


def test_one_queue_is_stopped(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.give(*[2048] * 5)
    it.comes(frame(1))
    assert len(it.received()) == 1
    with it.card.lock:
        it.card.reset_queue(it.card.queues[0])
    before = it.rx[0].data(next(iter(it.given[0])))
    it.comes(frame(2))
    assert it.rx[0].data(next(iter(it.given[0]))) == before
    it.send(frame(3))
    assert len(it.went()) == 1


def moved(it: NetBench) -> None:
    """The card dies, and another one, with another peer, goes on."""
    from pyvmm.state import save_all

    state = save_all([("net", it.card)])["net"]["state"]
    old, kept = it.peers, it.card.queues
    it.close()
    it.card = it.make(len(old))
    it.card.ring_features |= F_RING_PACKED
    it.card.load(state)
    it.card.after_load()
    assert it.card.save() == state
    for driver, queue in zip([*it.drivers, it.control], it.card.queues, strict=False):
        driver.queue = queue
    assert len(kept) == len(it.card.queues)
    it.io.settle()


def test_it_goes_on_elsewhere_at_any_moment(bench: Make, ring: dict[str, bool], kind: str) -> None:
    it = bench(kind, ring=ring)
    it.command(0, 0, b"\0")
    it.command(2, 0, b"\7\0")
    for turn in range(10):
        it.give(*[1024] * 10)  # some of them are in the card's hand
        it.comes(frame(turn, 1500))
        moved(it)
        it.comes(frame(turn + 100, 2500))
        got = [data for _, data in it.received()]
        assert got == [frame(turn, 1500), frame(turn + 100, 2500)]
        it.send(frame(turn))
        assert it.went() == [NO_HEADER * (kind == "tap") + frame(turn)]
        it.tx[0].used()
        assert passes(it, OTHER) == [False]


def test_a_twin_has_its_own_address_and_hears_the_one_that_its_driver_knows(bench: Make, kind: str) -> None:
    it = bench(kind)
    known, stranger = bytes.fromhex("02000000aaaa"), bytes.fromhex("020000000077")
    assert it.command(2, 0, b"\0\0") == 0
    assert it.command(1, 1, known) == 0
    assert it.command(0, 0, b"\0") == 0
    assert passes(it, known, MAC, stranger) == [True, False, False]
    moved(it)
    generation = it.card.generation
    it.card.take_own_address()
    assert it.card.mac == MAC
    assert it.card.generation == generation + 1
    for _ in range(2):
        assert passes(it, known, MAC, stranger) == [True, True, False]
        moved(it)
    # With as many addresses as there may be besides.
    others = [n.to_bytes(6, "big") for n in range(0x020000000100, 0x020000000100 + 64)]
    assert it.command(1, 0, tables(others, [])) == 0
    assert passes(it, known, MAC, stranger) == [True, True, False]
    # The driver says what it has now; there is one address again.
    assert it.command(1, 1, stranger) == 0
    assert passes(it, known, MAC, stranger) == [False, False, True]
    it.card.take_own_address()
    it.card.take_own_address()
    assert it.card.generation == generation + 2


def test_frames_that_the_host_had_no_room_for_go_on_elsewhere(bench: Make, kind: str) -> None:
    it = bench(kind, sizes=(256, 512))
    frames = [frame(n, 1400) for n in range(1000)]
    sent: list[int] = []
    while not it.io.writers or it.tx[0].free >= 2:
        sent += it.send(frames[len(sent)])
        if len(sent) == len(frames):
            raise AssertionError("the peer takes any amount")
        it.tx[0].used()
    waiting = (512 - it.tx[0].free) // 2
    assert waiting > 100
    moved(it)
    went: list[bytes] = []
    while more := it.went():
        went += more
        it.io.settle()
    assert [data[HEADER_BYTES * (kind == "tap") :] for data in went] == frames[len(sent) - waiting : len(sent)]


def test_a_state_that_is_none(bench: Make) -> None:
    from pyvmm.errors import StateError

    it = bench("tap", pairs=2, take=ALL)
    it.give(*[2048] * 3)
    it.comes(frame(1))
    state = it.card.save()
    hand = state["hands"][0]
    assert hand
    for change in (
        {"pairs": 3},
        {"pairs": 0},
        {"former_mac": b"12345"},
        {"hands": None},
        {"hands": state["hands"][1:]},
        {"hands": [hand * 1000, *state["hands"][1:]]},
        {"filter": {**state["filter"], "vlans": b""}},
        {"filter": {**state["filter"], "unicast": [b"x"]}},
        {"filter": {**state["filter"], "unicast": [bytes(6)] * 65}},
    ):
        other = bench("tap", pairs=2, take=ALL).card
        with pytest.raises(StateError):
            other.load({**state, **change})


def test_a_state_whose_hand_is_not_in_memory_breaks_the_card(bench: Make, kind: str) -> None:
    it = bench(kind)
    it.give(2048)
    state = it.card.save()
    ((token,), _) = state["hands"]
    token[2] = [1 << 60, 2048]
    other = bench(kind).card
    other.load(state)
    other.after_load()
    assert "not inside of memory" in other.fault
    assert not other.live


def test_a_hand_may_be_as_large_as_its_queue(bench: Make) -> None:
    options = {"sizes": (512, 256), "mtu": 65535, "take": ALL & ~f.F_MQ}
    it = bench("tap", **options)
    it.give(*[64] * 512)
    state = it.card.save()
    assert len(state["hands"][0]) == 512
    moved(it)
    it.comes(frame(1, 5000))
    assert [data for _, data in it.received()] == [frame(1, 5000)]


def test_a_buffer_in_as_many_pieces_as_there_can_be(bench: Make, kind: str) -> None:
    """A call of the kernel takes so many, and no more to see what was cut off."""
    it = bench(kind, ring={"indirect": True}, take=ALL & ~f.F_MRG_RXBUF)
    for n, size in enumerate((800, 2000, 900)):
        it.given[0][it.rx[0].add([], [1] * 1024)] = None
        it.serve(it.rx[0])
        it.comes(frame(n, size))
    assert [data for _, data in it.received()] == [frame(0, 800), frame(2, 900)]
    assert it.card.stats["dropped"] == 1
