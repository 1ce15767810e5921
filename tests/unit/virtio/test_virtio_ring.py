"""The rings of virtio (OASIS virtio 1.2, 2.7 and 2.8) against a driver, and against one that does what it must not."""

from __future__ import annotations

import itertools
import os
from random import Random
from typing import Any

import pytest
from driver import AVAIL, INDIRECT, NEXT, USED, WRITE, TestDriver
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.virtio.chain import Chain
from pyvmm.devices.virtio.ring import F_EVENT_IDX, F_RING_PACKED, F_VERSION_1, RingError, Virtqueue
from pyvmm.errors import StateError
from pyvmm.guest_memory import GuestMemory, RamRegion

MIB = 1 << 20
KINDS = [
    {"packed": packed, "event_idx": event_idx, "indirect": indirect}
    for packed, event_idx, indirect in itertools.product((False, True), repeat=3)
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(k for k in kind if kind[k]) or "plain")
both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def pair(size: int = 8, **kind: Any) -> tuple[TestDriver, Virtqueue]:
    memory = GuestMemory(4 * MIB)
    queue = Virtqueue(memory, 0, 256)
    return TestDriver(memory, queue, size=size, **kind), queue


@every_kind
def test_buffers_there_and_back(kind: dict[str, bool]) -> None:
    driver, queue = pair(**kind)
    for n in range(100):  # many times around the ring
        asked = [b"x" * (n + 1), b"yz"]
        chain_id = driver.add(asked, [5, 7])
        (chain,) = queue.take()
        assert [bytes(view) for view in chain.readable] == asked
        assert all(view.readonly for view in chain.readable)
        assert [view.nbytes for view in chain.writable] == [5, 7]
        assert (chain.readable_bytes, chain.writable_bytes) == (n + 3, 12)
        assert chain.read(n, 100) == b"xyz"
        assert chain.read(n + 3, 1) == b""
        assert chain.write(3, b"12345678901") == 9
        assert driver.used() == []
        queue.push(chain, 12)
        assert driver.used() == []
        queue.flush()
        assert driver.data(chain_id) == b"\0\0\x00123456789"
        assert driver.used() == [(chain_id, 12)]
        assert queue.take() == []


@every_kind
def test_several_at_once_and_out_of_order(kind: dict[str, bool]) -> None:
    driver, queue = pair(**kind)
    for _ in range(30):
        ids = [driver.add([bytes([n])], [1]) for n in range(3)]
        chains = queue.take()
        assert [chain.read(0, 1) for chain in chains] == [b"\0", b"\1", b"\2"]
        for chain in reversed(chains):
            queue.push(chain, 1)
        queue.flush()
        assert driver.used() == [(chain_id, 1) for chain_id in reversed(ids)]


@both_layouts
def test_in_order(packed: bool) -> None:
    """2.7.9, 2.8.11: used in the order in which they were made available, whatever is done first."""
    driver, queue = pair(packed=packed, in_order=True)
    for _ in range(20):
        ids = [driver.add([b"x"]) for _ in range(4)]
        one, two, three, four = queue.take()
        queue.push(two, 0)
        queue.push(four, 0)
        assert queue.flush() is False
        assert driver.used() == []
        queue.push(one, 0)
        queue.flush()
        assert [chain_id for chain_id, _ in driver.used()] == ids[:2]
        queue.push(three, 0)
        queue.flush()
        assert [chain_id for chain_id, _ in driver.used()] == ids[2:]


@both_layouts
def test_no_more_than_asked_for(packed: bool) -> None:
    driver, queue = pair(packed=packed)
    for _ in range(5):
        driver.add([b"x"])
    assert [len(queue.take(2)) for _ in range(4)] == [2, 2, 1, 0]


@both_layouts
def test_more_written_than_there_was_room_for_is_not_told(packed: bool) -> None:
    driver, queue = pair(packed=packed)
    chain_id = driver.add([b"x"], [4])
    queue.complete(queue.take()[0], 100)
    assert driver.used() == [(chain_id, 4)]


# -- who is told -------------------------------------------------------------------------------------------------------


@every_kind
def test_interrupts_as_the_driver_wants_them(kind: dict[str, bool]) -> None:
    driver, queue = pair(**kind)
    calls: list[int] = []
    queue.on_call = lambda: calls.append(1)

    def one() -> bool:
        driver.add([b"x"])
        before = len(calls)
        queue.push(queue.take()[0], 0)
        told = queue.flush()
        driver.used()
        assert len(calls) - before == told
        return told

    for _ in range(20):
        driver.want_interrupts(True)
        assert one()
        driver.want_interrupts(False)
        assert not one()
        assert not one()
    if kind["event_idx"]:
        for _ in range(20):
            slots = 1  # each chain is one descriptor
            driver.want_interrupts(True, after=2 * slots)
            assert [one() for _ in range(4)] == [False, False, True, False]


@every_kind
def test_an_event_in_the_middle_of_a_batch(kind: dict[str, bool]) -> None:
    if not kind["event_idx"]:
        return
    for turns in range(12):
        driver, queue = pair(**kind)
        for _ in range(turns):
            driver.add([b"x"])
            queue.complete(queue.take()[0], 0)
            driver.used()
        driver.want_interrupts(True, after=1)
        for _ in range(3):
            driver.add([b"x"])
        for chain in queue.take():
            queue.push(chain, 0)
        assert queue.flush()


def test_an_eventfd_is_signalled_once_for_a_batch() -> None:
    driver, queue = pair()
    queue.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for _ in range(3):
            driver.add([b"x"])
        for chain in queue.take():
            queue.push(chain, 0)
        queue.flush()
        assert os.eventfd_read(queue.call_fd) == 1
        assert queue.flush() is False
    finally:
        os.close(queue.call_fd)


@every_kind
def test_kicks_as_the_device_wants_them(kind: dict[str, bool]) -> None:
    driver, queue = pair(**kind)
    for _ in range(20):
        assert queue.enable_kicks() is False
        driver.add([b"x"])
        assert driver.is_to_kick()
        assert queue.pending()
        queue.disable_kicks()
        queue.complete(queue.take()[0], 0)
        driver.used()
        driver.add([b"x"])
        assert not driver.is_to_kick()
        assert queue.enable_kicks() is True, "it came in between: no kick will tell"
        queue.complete(queue.take()[0], 0)
        driver.used()


@every_kind
def test_an_interrupt_that_was_on_its_way_as_the_state_was_saved(kind: dict[str, bool]) -> None:
    """An irqfd of a pin interrupts a little later: what was saved of the controllers may know nothing of it."""
    driver, queue = pair(**kind)
    for seen in (False, True):
        driver.add([b"x"])
        driver.want_interrupts(True)
        queue.complete(queue.take()[0], 0)
        if seen:
            driver.used()
            driver.want_interrupts(True)
        calls: list[int] = []
        other = Virtqueue(driver.memory, 0, 256)
        other.on_call = lambda calls=calls: calls.append(1)
        assert not other.owes_call
        other.load(queue.save())
        other.after_load(driver.features)
        assert other.owes_call and calls == []
        other.call_again()
        assert not other.owes_call
        assert calls == ([] if seen and kind["event_idx"] else [1])
        assert other.notified == len(calls)
        driver.used()
        queue = driver.queue = other
    if kind["event_idx"] and not kind["packed"]:
        return  # where it wants none, its index only stays behind, and one too many does no harm
    driver.want_interrupts(False)
    other = Virtqueue(driver.memory, 0, 256)
    other.load(queue.save())
    other.after_load(driver.features)
    other.call_again()
    assert other.notified == 0


# -- what a driver must not do -----------------------------------------------------------------------------------------


def desc(driver: TestDriver, n: int, at: int, size: int, flags: int, following: int = 0, *, base: int = 0) -> None:
    """A descriptor of a split ring, or of a table."""
    data = at | size << 64 | flags << 96 | following << 112
    driver.put((base or driver.desc) + 16 * n, 16, data)


def offer(driver: TestDriver, head: int, ahead: int = 1) -> None:
    driver.put(driver.driver + 4, 2, head)
    driver.put(driver.driver + 2, 2, ahead)


RAM = 0x20_0000


@pytest.mark.parametrize(
    ("set_up", "said"),
    [
        (lambda d: offer(d, 0, 9), "more is available, or was not given back yet"),
        (lambda d: offer(d, 8), "begins at a descriptor that there is none of"),
        (lambda d: desc(d, 0, RAM, 1, NEXT, 8), "goes on at a descriptor that there is none of"),
        (lambda d: desc(d, 0, RAM, 1, NEXT, 0), "goes round in a circle"),
        (lambda d: [desc(d, n, RAM, 1, NEXT, (n + 1) % 8) for n in range(8)], "goes round in a circle"),
        (lambda d: desc(d, 0, RAM, 0, 0), "has no byte"),
        (lambda d: desc(d, 0, 4 * MIB, 1, 0), "not inside of memory"),
        (lambda d: desc(d, 0, 4 * MIB - 1, 2, 0), "not inside of memory"),
        (lambda d: desc(d, 0, (1 << 64) - 1, 2, 0), "not inside of memory"),
        (lambda d: desc(d, 0, (1 << 64) - 1, 0xFFFF_FFFF, WRITE), "not inside of memory"),
        (lambda d: desc(d, 0, 1 << 63, 1, WRITE), "not inside of memory"),
        (lambda d: [desc(d, 0, RAM, 1, NEXT | WRITE, 1), desc(d, 1, RAM, 1, 0)], "comes after one to write"),
        (lambda d: desc(d, 0, RAM, 16, INDIRECT), "indirect descriptor where there can be none"),
    ],
)
def test_a_split_ring_that_is_wrong(set_up: Any, said: str) -> None:
    driver, queue = pair()
    offer(driver, 0)
    set_up(driver)
    with pytest.raises(RingError, match=said):
        queue.take()


@pytest.mark.parametrize(
    ("set_up", "said"),
    [
        (lambda d: desc(d, 0, RAM, 0, INDIRECT), "empty, or no multiple of 16"),
        (lambda d: desc(d, 0, RAM, 24, INDIRECT), "empty, or no multiple of 16"),
        (lambda d: desc(d, 0, 4 * MIB - 16, 32, INDIRECT), "not inside of memory"),
        (lambda d: desc(d, 0, RAM + 4, 16, INDIRECT), "not inside of memory"),
        (lambda d: desc(d, 0, RAM, 16, INDIRECT | NEXT, 1), "indirect descriptor where"),
        (lambda d: (desc(d, 0, RAM, 16, INDIRECT), desc(d, 0, RAM, 16, INDIRECT, base=RAM)), "indirect descriptor"),
        (lambda d: (desc(d, 0, RAM, 32, INDIRECT), desc(d, 0, RAM, 1, NEXT, 2, base=RAM)), "there is none of"),
        (lambda d: (desc(d, 0, RAM, 32, INDIRECT), desc(d, 0, RAM, 1, NEXT, 0, base=RAM)), "goes round in a circle"),
    ],
)
def test_an_indirect_table_that_is_wrong(set_up: Any, said: str) -> None:
    driver, queue = pair(indirect=True)
    offer(driver, 0)
    set_up(driver)
    with pytest.raises(RingError, match=said):
        queue.take()


@both_layouts
def test_no_more_is_out_than_the_queue_holds(packed: bool) -> None:
    """2.7.6, 2.8.6: a driver that makes buffers available again before they are used has no more out than its ring."""
    driver, queue = pair(size=4, packed=packed)
    for _ in range(4):
        driver.add([b"x"])
    held = queue.take()
    assert len(held) == 4
    queue.complete(held.pop(), 0)
    for _ in driver.used():
        driver.add([b"x"])
    held += queue.take()
    assert len(held) == 4
    if packed:
        at, wrap = driver._avail, driver._avail_wrap
        driver.put(driver.desc + 16 * at + 14, 2, AVAIL if wrap else USED)
    else:
        driver.put(driver.driver + 2, 2, driver._avail + 1)
    assert queue.pending()
    with pytest.raises(RingError, match="was not given back yet"):
        queue.take()


def test_a_state_in_which_more_was_pushed_than_the_ring_holds() -> None:
    """A place in a packed ring goes on by as many descriptors as a chain had: by too many, past its end."""
    driver, queue = pair(packed=True, in_order=True)
    for _ in range(2):
        driver.add([b"x"])
    queue.push(queue.take()[1], 0)
    state = queue.save()
    assert state["pushed"] == [[1, 0, 1, 1]]
    too_many = [[n, 0, 0, 1] for n in range(9)]
    for pushed in ([[1, 0, 1, 9]], [[1, 0, 1, 0]], too_many):
        with pytest.raises(StateError, match="pushed"):
            Virtqueue(driver.memory, 0, 256).load({**state, "pushed": pushed})
    Virtqueue(driver.memory, 0, 256).load({**state, "pushed": [[1, 0, 1, 8]]})


@both_layouts
def test_a_table_is_as_long_as_a_chain_may_be(packed: bool) -> None:
    driver, queue = pair(packed=packed, indirect=True)
    driver.add([b"x"] * 1024)
    (chain,) = queue.take()
    assert len(chain.readable) == 1024
    driver.add([b"x"] * 1025)
    with pytest.raises(RingError, match="more descriptors than"):
        queue.take()


def test_descriptors_before_an_indirect_one() -> None:
    """2.7.5.3.2: the device handles normal descriptors that are followed by one with INDIRECT."""
    driver, queue = pair(indirect=True)
    driver.memory.write(RAM + 0x100, b"one")
    driver.memory.write(RAM + 0x200, b"two")
    desc(driver, 0, RAM + 0x100, 3, NEXT, 1)
    desc(driver, 1, RAM, 16, INDIRECT)
    desc(driver, 0, RAM + 0x200, 3, 0, base=RAM)
    offer(driver, 0)
    assert queue.take()[0].read(0, 10) == b"onetwo"


def test_4_gib_in_one_chain() -> None:
    """2.7.5.2: at most 2^32 bytes; the sum is of the same memory again and again."""
    driver, queue = pair()
    for n in range(8):
        desc(driver, n, 0, 4 * MIB, NEXT if n < 7 else 0, n + 1)
    offer(driver, 0)
    assert queue.take()[0].readable_bytes == 32 * MIB
    driver, queue = pair(indirect=True)
    for n in range(1024):
        desc(driver, n, 0, 4 * MIB, NEXT if n < 1023 else 0, n + 1, base=RAM)
    desc(driver, 0, RAM, 16 * 1024, INDIRECT)
    offer(driver, 0)
    with pytest.raises(RingError, match="more than 2\\^32 bytes"):
        queue.take()


def test_a_packed_chain_that_never_ends() -> None:
    driver, queue = pair(packed=True)
    for n in range(8):
        driver.put(driver.desc + 16 * n, 16, RAM | 1 << 64 | (NEXT | AVAIL) << 112)
    with pytest.raises(RingError, match="goes round in a circle"):
        queue.take()


def test_packed_descriptors_that_are_used_are_not_taken() -> None:
    driver, queue = pair(packed=True)
    for flags in (0, USED, AVAIL | USED):
        driver.put(driver.desc, 16, RAM | 1 << 64 | flags << 112)
        assert not queue.pending()
        assert queue.take() == []


def test_what_a_device_writes_is_not_in_rom() -> None:
    memory = GuestMemory(4 * MIB)
    memory.add(RamRegion(0xFFFC_0000, 0x1000, readonly=True, name="rom"))
    queue = Virtqueue(memory, 0, 8)
    driver = TestDriver(memory, queue, size=8)
    desc(driver, 0, 0xFFFC_0000, 16, 0)
    offer(driver, 0)
    assert queue.take()[0].readable_bytes == 16
    desc(driver, 0, 0xFFFC_0000, 16, WRITE)
    offer(driver, 0, 2)
    driver.put(driver.driver + 6, 2, 0)
    with pytest.raises(RingError, match="not inside of memory"):
        queue.take()


@pytest.mark.parametrize(
    ("packed", "change", "said"),
    [
        (False, {"size": 0}, "has the size 0"),
        (False, {"size": 7}, "has the size 7"),
        (False, {"size": 512}, "has the size 512"),
        (False, {"desc_gpa": 0x10_0008}, "at 0x100008 can't be there"),
        (False, {"driver_gpa": 0x10_8001}, "can't be there"),
        (False, {"device_gpa": 0x10_C002}, "can't be there"),
        (False, {"desc_gpa": 4 * MIB - 16}, "can't be there"),
        (False, {"device_gpa": 4 * MIB - 8}, "can't be there"),
        (False, {"driver_gpa": (1 << 64) - 2}, "can't be there"),
        (True, {"driver_gpa": 0x10_8002}, "can't be there"),
        (True, {"desc_gpa": 1 << 63}, "can't be there"),
    ],
)
def test_a_queue_that_can_not_be_set_up(packed: bool, change: dict[str, int], said: str) -> None:
    driver, queue = pair(packed=packed)
    queue.disable()
    for name, value in change.items():
        setattr(queue, name, value)
    with pytest.raises(RingError, match=said):
        queue.enable(driver.features)
    assert not queue.ready
    assert queue.take() == []
    assert not queue.pending()


def test_a_packed_queue_need_be_no_power_of_two() -> None:
    """2.8.10.1."""
    driver, queue = pair(size=7, packed=True)
    for n in range(50):
        chain_id = driver.add([b"x"] * (n % 3 + 1))
        queue.complete(queue.take()[0], 0)
        assert driver.used() == [(chain_id, 0)]


@both_layouts
def test_after_a_reset_nothing_old_is_pushed(packed: bool) -> None:
    driver, queue = pair(packed=packed)
    driver.add([b"x"], [4])
    (old,) = queue.take()
    queue.forget()
    queue.complete(old, 4)
    again = TestDriver(driver.memory, queue, size=8, packed=packed)
    queue.complete(old, 4)
    assert again.used() == []
    chain_id = again.add([b"y"])
    (new,) = queue.take()
    queue.complete(new, 0)
    queue.complete(new, 0)
    assert again.used() == [(chain_id, 0)]


def test_views_outlive_the_machine() -> None:
    driver, queue = pair()
    driver.add([b"still there"], [3])
    (chain,) = queue.take()
    read, write = chain.readable[0], chain.writable[0]
    driver.memory.close()
    del driver, queue, chain
    assert bytes(read) == b"still there"
    write[:] = b"yes"


# -- any driver, at any moment -----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32), kind=st.sampled_from(KINDS), in_order=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_order_of_things(seed: int, kind: dict[str, bool], in_order: bool) -> None:
    """A model of what was given and not given back, with state saved and loaded in between."""
    r = Random(seed)
    memory = GuestMemory(4 * MIB)
    queue = Virtqueue(memory, 0, 256)
    driver = TestDriver(memory, queue, size=r.choice((1, 2, 8, 64)), in_order=in_order, **kind)
    given_out: dict[int, tuple[bytes, int]] = {}
    order: list[int] = []
    held: list[tuple[int, Chain]] = []
    pushed: dict[int, int] = {}
    for _ in range(120):
        what = r.randrange(6)
        if what <= 1:
            n = r.randrange(1, 4)
            if driver.free < (1 if kind["indirect"] else n):
                continue
            readable = [r.randbytes(r.randrange(1, 50)) for _ in range(r.randrange(n + 1))]
            writable = [r.randrange(1, 50) for _ in range(n - len(readable))]
            chain_id = driver.add(readable, writable)
            given_out[chain_id] = b"".join(readable), sum(writable)
            order.append(chain_id)
        elif what == 2:
            for chain in queue.take(r.randrange(1, 5)):
                chain_id = chain.token[0][0]
                data, room = given_out[chain_id]
                assert chain.read(0, 1 << 20) == data
                assert chain.writable_bytes == room
                held.append((chain_id, chain))
        elif what == 3 and held:
            chain_id, chain = held.pop(r.randrange(len(held)))
            written = r.randrange(chain.writable_bytes + 1)
            queue.push(chain, written)
            pushed[chain_id] = written
        elif what == 4:
            queue.flush()
            seen = driver.used()
            for chain_id, written in seen:
                assert pushed.pop(chain_id) == written
                del given_out[chain_id]
                if in_order:
                    assert order[0] == chain_id
                order.remove(chain_id)
            if not in_order:
                assert not pushed
        else:
            state = queue.save()
            tokens = [chain.token for _, chain in held]
            assert queue.save() == state
            queue = Virtqueue(memory, 0, 256)
            queue.load(state)
            queue.after_load(driver.features)
            assert queue.save() == state
            held = [(chain_id, queue.retake(token)) for (chain_id, _), token in zip(held, tokens, strict=True)]


@given(seed=st.integers(0, 1 << 32), kind=st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_memory_of_the_rings_changes_at_any_moment(seed: int, kind: dict[str, bool]) -> None:
    """RingError or chains inside of memory, and never anything else; a stray access beside the RAM would kill."""
    r = Random(seed)
    driver, queue = pair(**kind)
    edges = (0, 1, RAM, 4 * MIB - 1, 4 * MIB, (1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - 1, driver.desc)
    held: list[Chain] = []
    for _ in range(80):
        what = r.randrange(5)
        if what == 0 and driver.free >= 3:
            driver.add([b"abc"], [8, 8])
        elif what <= 2:
            base = r.choice((driver.desc, driver.driver, driver.device, driver.base + 0x10000))
            at = base + r.randrange(0, 0x120, r.choice((1, 2, 4, 8)))
            size = r.choice((1, 2, 4, 8))
            value = r.choice((r.getrandbits(64), r.getrandbits(4), r.choice(edges)))
            driver.put(at, size, value & (1 << 8 * size) - 1)
        elif what == 3:
            try:
                held += queue.take(8)
            except RingError as error:
                assert "\n" not in str(error)
                queue.forget()
                driver = TestDriver(driver.memory, queue, size=8, **kind)
        elif held:
            chain = held.pop()
            for view in (*chain.readable, *chain.writable):
                assert len(bytes(view)) == view.nbytes
            if chain.writable:
                chain.write(0, b"x" * chain.writable_bytes)
            queue.push(chain, chain.writable_bytes)
            queue.flush()
            queue.enable_kicks()


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_a_hostile_state(data: st.DataObject, kind: dict[str, bool]) -> None:
    driver, queue = pair(**kind)
    for _ in range(3):
        driver.add([b"x"], [4])
    chains = queue.take(2)
    queue.push(chains[0], 1)
    state, token = queue.save(), chains[1].token
    number = st.sampled_from([-1, 0, 1, 7, 8, 0xFFFF, 0x1_0000, 1 << 32, (1 << 64) - 1, 1 << 64, True, None, b"", []])
    name = data.draw(st.sampled_from(list(state)))
    state[name] = data.draw(number)
    part = data.draw(st.integers(0, 2))
    token[part] = data.draw(st.lists(st.integers(0, 1 << 64), max_size=6) | number)
    other = Virtqueue(driver.memory, 0, 256)
    try:
        other.load(state)
        other.after_load(driver.features)
        other.retake(token)
        for chain in other.take():
            other.push(chain, 1)
        other.flush()
    except (StateError, RingError) as error:
        assert "\n" not in str(error)


def test_features_that_are_not_the_rings_are_left_alone() -> None:
    assert F_VERSION_1 == 1 << 32 and F_RING_PACKED == 1 << 34 and F_EVENT_IDX == 1 << 29
