"""The console on virtio (OASIS virtio 1.2, 5.3): output, input, ports, sizes; slow readers, drivers that play games."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from console_bench import LAYOUTS, ConsoleBench, SlowEnd

from pyvmm.chardev import Chardev, NullChardev
from pyvmm.devices.virtio import console_control as control
from pyvmm.devices.virtio.console import EMERG_WRITE, F_EMERG_WRITE, F_MULTIPORT, F_SIZE, FLUSH_TURNS
from pyvmm.devices.virtio.console_port import BATCH, INPUT_BYTES, PIECE_BYTES, TURN_BYTES
from pyvmm.devices.virtio.device import DRIVER_OK, NEEDS_RESET
from pyvmm.errors import StateError


class Benches:
    """Makes benches, and closes them."""

    def __init__(self) -> None:
        self.made: list[ConsoleBench] = []

    def __call__(self, *ends: Chardev | tuple[Chardev, str | None], **options: Any) -> ConsoleBench:
        pairs = [end if isinstance(end, tuple) else (end, None) for end in ends]
        self.made.append(ConsoleBench(*pairs, **options))
        return self.made[-1]


@pytest.fixture
def benches() -> Iterator[Benches]:
    benches = Benches()
    yield benches
    for bench in benches.made:
        bench.close()


@pytest.fixture(params=list(LAYOUTS))
def ring(request: pytest.FixtureRequest) -> dict[str, bool]:
    return LAYOUTS[request.param]


# -- the plain console -------------------------------------------------------------------------------------------------


def test_a_plain_console_has_no_ports(benches: Benches) -> None:
    device = benches(SlowEnd()).device
    assert (device.DEVICE_ID, len(device.queues)) == (3, 2)
    assert device.own_features == F_SIZE | F_EMERG_WRITE


def test_output(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd()
    bench = benches(end, ring=ring)
    for n in range(200):
        bench.say(b"line %d\n" % n)
        assert [written for _, written in bench.sending().used()] == [0]
    assert end.read() == b"".join(b"line %d\n" % n for n in range(200))


def test_what_is_there_together_is_one_write_and_one_interrupt(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd()
    bench = benches(end, ring=ring)
    driver = bench.sending()
    before = driver.queue.notified
    driver.queue.on_call = lambda: None
    for n in range(40):
        driver.add([b"%d," % n])
    bench.device.kick(driver.queue)
    bench.io.settle()
    assert end.data == b"".join(b"%d," % n for n in range(40))
    assert end.writes == 1
    assert driver.queue.notified - before == 1
    assert len(driver.used()) == 40


def test_output_waits_for_a_reader_that_is_slow_and_none_is_lost(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd(room=1000)
    bench = benches(end, ring=ring)
    driver = bench.sending()
    sent = bytearray()
    r = Random(3)
    for _ in range(400):
        while driver.free < 4:
            assert len(end.data) >= 1000, "it stands, and the reader is not the one it waits for"
            assert len(end.data) < 1000 + PIECE_BYTES
            end.read()
            bench.io.settle()
            driver.used()
        text = r.randbytes(r.randrange(1, 700))
        sent += text
        bench.say(text)
    while len(end.said) < len(sent):
        assert end.read()
        bench.io.settle()
    driver.used()
    assert end.said == sent
    assert driver.free == driver.size


def test_a_flood_is_taken_in_pieces_and_turns(benches: Benches) -> None:
    end = SlowEnd()
    bench = benches(end)
    driver = bench.sending()
    most = 0
    write = end.write

    def watch(data: bytes) -> None:
        nonlocal most
        most = max(most, len(data))
        write(data)

    end.write = watch  # type: ignore[method-assign]
    big = bytes(range(256)) * 3000
    driver.add([big, big])
    bench.device.kick(driver.queue)
    assert bench.io.turn() == 1
    assert len(end.data) == TURN_BYTES
    bench.io.settle()
    assert end.data == big + big
    assert most == PIECE_BYTES
    assert len(driver.used()) == 1


def test_what_goes_out_before_the_machine_stands_is_bounded(benches: Benches) -> None:
    """The rest follows when it goes on, without another ring of the driver's."""
    end = SlowEnd()
    bench = benches(end)
    big = bytes(range(256)) * 6000
    bench.sending().add([big])
    bench.device.flush()
    assert len(end.data) == FLUSH_TURNS * TURN_BYTES < len(big)
    bench.io.settle()
    assert end.data == big


def test_input(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd()
    bench = benches(end, ring=ring)
    end.feed(b"before there is room")
    bench.io.settle()
    assert bench.heard() == b""
    bench.give(6)
    assert bench.heard() == b"before"
    bench.give(5, 100)
    assert bench.heard() == b" there is room"
    bench.give(*[16] * 20)
    for n in range(20):
        end.feed(b"%d" % n)
        bench.io.settle()
        assert bench.heard() == b"%d" % n


def test_much_input_waits_at_the_host(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd()
    bench = benches(end, ring=ring)
    data = Random(1).randbytes(50_000)
    end.feed(data)
    bench.io.settle()
    assert end.fed_bytes == len(data) - INPUT_BYTES
    got = b""
    while len(got) < len(data):
        bench.give(1000, 70)
        more = bench.heard()
        assert more
        got += more
    assert got == data


def test_two_who_found_the_same_room(benches: Benches) -> None:
    """A reader of a descriptor, and a thread that feeds: all of it comes, and what follows too."""
    end = SlowEnd()
    bench = benches(end)
    port = bench.device.ports[0]
    rooms = [end._room(), end._room()]
    for byte, room in zip(b"ab", rooms, strict=True):
        assert end._receive is not None
        end._receive(bytes((byte,)) * room)
    assert end._room() == 0
    device = bench.make([(SlowEnd(), None)])
    device.load(bench.device.save())
    bench.give(*[INPUT_BYTES] * 3)
    end.feed(b"more")
    bench.io.settle()
    assert bench.heard() == b"a" * INPUT_BYTES + b"b" * INPUT_BYTES + b"more"
    assert port.chardev.fed_bytes == 0


def test_input_comes_when_there_is_a_driver(benches: Benches) -> None:
    end = SlowEnd()
    bench = benches(end)
    with bench.device.lock:
        bench.device.write_status(0)
    end.feed(b"x" * 10_000)
    assert end.fed_bytes == 10_000  # nobody is there
    bench.start()
    bench.give(*[INPUT_BYTES] * 3)
    assert bench.heard() == b"x" * 10_000
    assert end.fed_bytes == 0


def test_what_no_driver_has_read_is_the_next_ones(benches: Benches) -> None:
    end = SlowEnd()
    bench = benches(end)
    end.feed(b"typed ahead")
    with bench.device.lock:
        bench.device.write_status(0)
    bench.start()
    bench.give(100)
    assert bench.heard() == b"typed ahead"


def test_the_size_of_the_screen(benches: Benches) -> None:
    end = SlowEnd()
    end.resize(80, 25)
    bench = benches(end)
    assert bench.device.read_config(0, 2) == 80
    assert bench.device.read_config(2, 2) == 25
    assert bench.config_interrupts == 0
    generation = bench.device.generation
    end.resize(132, 50)
    bench.io.settle()
    assert (bench.device.read_config(0, 2), bench.device.read_config(2, 2)) == (132, 50)
    assert bench.config_interrupts == 1
    assert bench.device.generation == generation + 1
    end.resize(132, 50)
    bench.io.settle()
    assert bench.config_interrupts == 1


@pytest.mark.parametrize("size", [(0, 25), (80, 0x10000), (80.0, 25), ("80", "25"), (True, 25)])
def test_no_such_size(size: Any) -> None:
    with pytest.raises(TypeError, match="give columns and lines, from 1 to 65535"):
        NullChardev().resize(*size)


def test_an_emergency_write_needs_no_driver(benches: Benches) -> None:
    end = SlowEnd()
    bench = benches(end)
    device = bench.device
    with device.lock:
        device.write_status(0)
        for size in (1, 2, 4):
            device.write_config(EMERG_WRITE, size, 0x4142)
        device.write_config(0, 4, 0xFFFF_FFFF)  # not the driver's
        device.write_config(EMERG_WRITE + 4, 4, 0x43)
    assert end.read() == b"BBB"
    assert device.read_config(0, 4) == 0


# -- ports -------------------------------------------------------------------------------------------------------------


def test_what_a_driver_is_told_of_ports(benches: Benches, ring: dict[str, bool]) -> None:
    sized = SlowEnd()
    sized.resize(100, 40)
    bench = benches(SlowEnd(), (SlowEnd(), "org.example.0"), sized, ring=ring)
    assert bench.device.read_config(4, 4) == 3
    assert len(bench.device.queues) == 8
    bench.listen(3)
    assert bench.told() == []
    bench.tell(0, control.DEVICE_READY)
    assert bench.told() == [(n, control.DEVICE_ADD, 1, b"") for n in range(3)]
    bench.tell(0, control.DEVICE_READY)
    bench.listen(20)
    assert bench.told() == []  # 5.3.6.2.1: not one that exists
    bench.tell(1, control.PORT_READY)
    assert bench.told() == [(1, control.PORT_OPEN, 1, b""), (1, control.PORT_NAME, 1, b"org.example.0")][::-1]
    bench.tell(2, control.PORT_READY)
    assert bench.told() == [
        (2, control.CONSOLE_PORT, 1, b""),
        (2, control.PORT_OPEN, 1, b""),
        (2, control.RESIZE, 0, (100).to_bytes(2, "little") + (40).to_bytes(2, "little")),
    ]
    sized.resize(101, 41)
    bench.io.settle()
    assert bench.told() == [(2, control.RESIZE, 0, b"\x65\0\x29\0")]
    assert bench.config_interrupts == 0  # that is of port 0


def test_messages_wait_for_buffers_and_none_is_lost(benches: Benches, ring: dict[str, bool]) -> None:
    bench = benches(SlowEnd(), *((SlowEnd(), f"port{n}") for n in range(1, 8)), ring=ring)
    for _ in range(3):
        bench.tell(0, control.DEVICE_READY)
        for n in range(8):
            bench.tell(n, control.PORT_READY)
    got = []
    while True:
        bench.listen()
        told = bench.told()
        if not told:
            break
        got += told
    assert sorted(got) == sorted(
        [
            *((n, control.DEVICE_ADD, 1, b"") for n in range(8)),
            *((n, control.PORT_OPEN, 1, b"") for n in range(8)),
            *((n, control.PORT_NAME, 1, b"port%d" % n) for n in range(1, 8)),
            (0, control.CONSOLE_PORT, 1, b""),
        ]
    )


def test_a_port_has_input_while_it_is_open(benches: Benches, ring: dict[str, bool]) -> None:
    agent = SlowEnd()
    bench = benches(SlowEnd(), (agent, "agent"), ring=ring)
    bench.set_up()
    bench.give(100, 100, port=1)
    agent.feed(b"hello")
    bench.io.settle()
    assert (bench.heard(1), agent.fed_bytes) == (b"", 5)
    bench.tell(1, control.PORT_OPEN)
    assert (bench.heard(1), agent.fed_bytes) == (b"hello", 0)
    bench.tell(1, control.PORT_OPEN, 0)
    agent.feed(b"x" * 100_000)
    bench.io.settle()
    assert (bench.heard(1), agent.fed_bytes) == (b"", 100_000)


def test_ports_do_not_wait_for_each_other(benches: Benches, ring: dict[str, bool]) -> None:
    slow, quick = SlowEnd(room=10), SlowEnd()
    bench = benches(slow, (quick, "quick"), ring=ring)
    bench.set_up(0, 1)
    bench.say(*[b"0123456789"] * 5)
    bench.say(b"at once", port=1)
    assert quick.read() == b"at once"
    assert slow.read() == b"0123456789"
    while len(slow.said) < 50:
        bench.io.settle()
        assert slow.read()
    assert slow.said == b"0123456789" * 5


def test_a_driver_that_knows_of_no_ports_has_the_first_console(benches: Benches) -> None:
    end, agent = SlowEnd(), SlowEnd()
    bench = benches((end, None), (agent, "agent"), take=F_SIZE)
    assert bench.device.offered & F_MULTIPORT
    bench.say(b"hello")
    assert end.read() == b"hello"
    bench.give(10)
    end.feed(b"there")
    bench.io.settle()
    assert bench.heard() == b"there"


def test_where_only_programs_have_ports_the_console_is_nobodys(benches: Benches) -> None:
    bench = benches((SlowEnd(), "agent"), take=F_SIZE)
    assert [port.number for port in bench.device.ports if port.announced] == [1]
    bench.say(b"into the void")
    assert len(bench.sending().used()) == 1  # or Linux waited for it for ever


def test_a_port_that_the_driver_can_not_have(benches: Benches) -> None:
    bench = benches(SlowEnd(), (SlowEnd(), "agent"))
    bench.listen(10)
    bench.tell(0, control.DEVICE_READY)
    bench.told()
    bench.tell(1, control.PORT_READY, 0)
    assert bench.told() == []
    bench.tell(0, control.DEVICE_READY)  # it tries again
    assert bench.told() == [(1, control.DEVICE_ADD, 1, b"")]


# -- drivers that play games -------------------------------------------------------------------------------------------


def is_broken(bench: ConsoleBench) -> str:
    assert bench.device.status & NEEDS_RESET
    assert bench.device.faults == 1
    with bench.device.lock:
        bench.device.write_status(0)
    bench.start()
    bench.say(b"again")
    return bench.device.fault


def test_buffers_in_the_wrong_direction(benches: Benches) -> None:
    bench = benches(SlowEnd())
    bench.sending().add([b"x"], [10])
    bench.ring_for(bench.sending())
    assert "to be written to" in is_broken(bench)
    end = SlowEnd()
    bench = benches(end)
    bench.receiving().add([b"x"], [10])
    end.feed(b"x")
    bench.io.settle()
    assert "to be read" in is_broken(bench)


@pytest.mark.parametrize("size", [1, 7])
def test_a_message_that_is_too_short(benches: Benches, size: int) -> None:
    bench = benches(SlowEnd(), (SlowEnd(), "agent"))
    bench.drivers[3].add([bytes(size)])
    bench.ring_for(bench.drivers[3])
    assert f"a control message of {size} bytes" in is_broken(bench)


def test_a_buffer_that_is_too_small_for_a_message(benches: Benches) -> None:
    bench = benches(SlowEnd(), (SlowEnd(), "agent"))
    bench.listen(1, 7)
    bench.tell(0, control.DEVICE_READY)
    assert "a message of 8 bytes, and a buffer for 7" in is_broken(bench)


@pytest.mark.parametrize("event", range(10))
def test_messages_that_mean_nothing(benches: Benches, event: int) -> None:
    bench = benches((SlowEnd(), "agent"))
    bench.listen(20)
    for number in (0, 2, 31, 0xFFFF_FFFF):
        for value in (0, 1, 0xFFFF):
            bench.tell(number, event, value)
    assert not bench.device.faults
    assert all(number == 1 for number, *_ in bench.told())


@pytest.mark.parametrize("seed", range(12))
def test_any_messages_and_buffers_at_all(benches: Benches, seed: int) -> None:
    """Nothing raises, nothing grows, and after a reset it works."""
    r = Random(seed)
    ring = LAYOUTS[r.choice(list(LAYOUTS))]
    ends = [SlowEnd(room=r.choice((1, 100, 1 << 20))) for _ in range(4)]
    bench = benches(ends[0], *((end, f"n{n}") for n, end in enumerate(ends[1:])), ring=ring)
    for _ in range(600):
        driver = r.choice(bench.drivers)
        what = r.randrange(10)
        if what < 6 and driver.free > 8:
            odd = r.randrange(50) == 0
            message = control.MESSAGE.pack(r.choice((0, 1, 2, 3, 9)), r.randrange(9), r.randrange(2))
            readable = [r.choice((message, r.randbytes(r.randrange(1, 100))))]
            if driver in bench.drivers[0::2] and not odd:
                driver.add([], [r.choice((1, 8, 200))])
            else:
                driver.add(readable, [3] if odd else [])
            bench.ring_for(driver)
        elif what < 7:
            r.choice(ends).read()
        elif what < 8:
            end = r.choice(ends)
            if end.fed_bytes < 10_000:
                end.feed(r.randbytes(r.randrange(2000)))
        elif what < 9:
            r.choice(ends).resize(r.randrange(1, 200), r.randrange(1, 100))
        else:
            driver.used()
        bench.io.settle()
        assert all(len(port.save()["hand"]) <= BATCH for port in bench.device.ports)
        if bench.device.faults:
            with bench.device.lock:
                bench.device.write_status(0)
            bench.device.faults = 0
            bench.start()
    with bench.device.lock:
        bench.device.write_status(0)
    for end in ends:
        end.read()
    bench.start()
    bench.say(b"it works")
    assert ends[0].read()[-1:] == b"s" or ends[0].said.endswith(b"it works")


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_it_goes_on_elsewhere_from_any_moment(benches: Benches, ring: dict[str, bool], seed: int) -> None:
    """No byte is lost, none comes twice, either way; no message is."""
    r = Random(seed)
    ends = [SlowEnd(room=300), SlowEnd(room=50)]
    bench = benches(ends[0], (ends[1], "agent"), ring=ring)
    said, fed, heard = [b"", b""], [b"", b""], [b"", b""]
    messages: list[tuple[int, int, int, bytes]] = []
    bench.listen(3)
    bench.tell(0, control.DEVICE_READY)
    for n in (0, 1):
        bench.tell(n, control.PORT_READY)
        bench.tell(n, control.PORT_OPEN)
    for _ in range(150):
        n = r.randrange(2)
        what = r.randrange(6)
        if what == 0:
            ends = bench.move(ends)
        elif what == 1 and bench.sending(n).free > 6:
            texts = [r.randbytes(r.randrange(1, 200)) for _ in range(3)]
            said[n] += b"".join(texts)
            bench.say(*texts, port=n)
        elif what == 2:
            ends[n].read()
        elif what == 3:
            data = r.randbytes(r.randrange(1, 3000))
            fed[n] += data
            ends[n].feed(data)
        elif what == 4 and bench.receiving(n).free > 4:
            bench.give(r.randrange(1, 1000), port=n)
        elif bench.drivers[2].free > 2:
            bench.listen()
        bench.io.settle()
        bench.sending(n).used()
        heard[n] += bench.heard(n)
        messages += bench.told()
    bench.listen(20)
    for n in (0, 1):
        for _ in range(200):
            ends[n].read()
            bench.io.settle()
            if bench.receiving(n).free > 4:
                bench.give(1000, port=n)
            heard[n] += bench.heard(n)
        bench.sending(n).used()
        assert ends[n].said == said[n]
        assert heard[n] == fed[n]
        assert bench.sending(n).free == bench.sending(n).size
    messages += bench.told()
    assert sorted(messages) == [
        (0, control.DEVICE_ADD, 1, b""),
        (0, control.CONSOLE_PORT, 1, b""),
        (0, control.PORT_OPEN, 1, b""),
        (1, control.DEVICE_ADD, 1, b""),
        (1, control.PORT_OPEN, 1, b""),
        (1, control.PORT_NAME, 1, b"agent"),
    ]
    assert not bench.device.faults


def test_the_middle_of_a_long_buffer_is_where_it_goes_on(benches: Benches, ring: dict[str, bool]) -> None:
    end = SlowEnd(room=1000)
    bench = benches(end, ring=ring)
    text = Random(1).randbytes(5 * PIECE_BYTES)
    bench.say(text)
    ends = [end]
    for n in range(5):
        assert ends[0].said + ends[0].data == text[: (n + 1) * PIECE_BYTES]
        assert bench.device.ports[0].save()["sent"] == (n + 1) % 5 * PIECE_BYTES
        ends = bench.move(ends)
        bench.io.settle()
    assert ends[0].said + ends[0].data == text
    assert len(bench.sending().used()) == 1


def test_a_screen_of_another_size_elsewhere(benches: Benches) -> None:
    end = SlowEnd()
    end.resize(80, 25)
    bench = benches(end, (SlowEnd(), "agent"))
    bench.set_up(0)
    bench.told()
    state = bench.device.save()
    other = SlowEnd()
    other.resize(90, 30)
    device = bench.make([(other, None), (SlowEnd(), "agent")])
    device.load(state)
    device.after_load()
    assert device.status & DRIVER_OK
    for driver, queue in zip(bench.drivers, device.queues, strict=True):
        driver.queue = queue
    bench.io.settle()
    assert bench.told() == [(0, control.RESIZE, 0, b"\x5a\0\x1e\0")]
    assert (device.read_config(0, 2), device.read_config(2, 2)) == (90, 30)
    assert bench.config_interrupts == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: 5, "ports"),
        (lambda state: {**state, "ports": state["ports"][:1]}, "ports has 1 entries"),
        (lambda state: {**state, "ports": [1, 2]}, "no state"),
        (lambda state: {**state, "control": None}, "control"),
        (lambda state: {**state, "control": {"added": {}}}, "control"),
        (lambda state: {**state, "more": 1}, "'more' is unknown"),
        (lambda state: port_with(state, sent=1 << 32), "sent is"),
        (lambda state: port_with(state, input=bytes(2 * INPUT_BYTES + 1)), "input has"),
        (lambda state: port_with(state, hand=5), "hand is no list"),
        (lambda state: port_with(state, hand=[0] * (BATCH + 1)), "hand is no list"),
        (lambda state: port_with(state, open=2), "open is 2"),
    ],
)
def test_states_that_can_not_be(benches: Benches, change: Any, says: str) -> None:
    bench = benches(SlowEnd(), (SlowEnd(), "agent"))
    state = bench.device.save()
    device = bench.make([(SlowEnd(), None), (SlowEnd(), "agent")])
    with pytest.raises(StateError, match=says):
        device.load(change(state))


def port_with(state: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Port 0 is changed."""
    first, *others = state["ports"]
    return {**state, "ports": [{**first, **fields}, *others]}


@pytest.mark.parametrize("token", [[[0, 1, 0], [0xFFFF_FFFF_0000, 8], []], [[0, 1, 0], [8, 1 << 33], []]])
def test_a_hand_that_is_not_in_memory(benches: Benches, token: Any) -> None:
    bench = benches(SlowEnd(), (SlowEnd(), "agent"))
    device = bench.make([(SlowEnd(), None), (SlowEnd(), "agent")])
    device.load(port_with(bench.device.save(), hand=[token]))
    device.after_load()
    assert device.status & NEEDS_RESET
    assert device.faults == 1
