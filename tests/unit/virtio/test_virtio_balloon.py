"""The memory balloon (OASIS virtio 1.2, 5.5): what goes back to the host, what is asked and said; hostile drivers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from struct import pack
from typing import Any

import pytest
from balloon_bench import LAYOUTS, MEMORY_BYTES, MIB, PAGE, BalloonBench
from machine_guest import MachineGuest
from waiting import wait_for

import pyvmm
from pyvmm.devices.virtio.balloon import (
    ACTUAL,
    BATCH,
    F_DEFLATE_ON_OOM,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_PAGE_REPORTING,
    F_STATS_VQ,
    HINT,
    INFLATE,
    MOST_PAGES,
    NUM_PAGES,
    POISON,
    QUEUE_SIZE,
    REPORT,
    STAT,
    STATS,
)
from pyvmm.devices.virtio.device import NEEDS_RESET
from pyvmm.devices.virtio.ring import F_RING_PACKED
from pyvmm.errors import StateError
from pyvmm.guest_memory import GuestMemory

FIRST = 16 * MIB // PAGE  # the first page that neither rings nor buffers have
HERE = FIRST * PAGE


class Benches:
    def __init__(self) -> None:
        self.made: list[BalloonBench] = []

    def __call__(self, **options: Any) -> BalloonBench:
        self.made.append(BalloonBench(**options))
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


def fill(bench: BalloonBench) -> None:
    """Every page that is not the rings' has something in it."""
    bench.memory.write(HERE, b"\x5a" * (MEMORY_BYTES - HERE))


def given(bench: BalloonBench, *pages: int) -> bool:
    """Whether all of these read as zeros."""
    return all(not any(bench.memory.read(page * PAGE, PAGE)) for page in pages)


def kept(bench: BalloonBench, *pages: int) -> bool:
    return all(bench.memory.read(page * PAGE, PAGE) == b"\x5a" * PAGE for page in pages)


# -- what is offered ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, F_MUST_TELL_HOST | F_STATS_VQ),
        ({"deflate_on_oom": True}, F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM),
        ({"free_page_reporting": True}, F_MUST_TELL_HOST | F_STATS_VQ | F_PAGE_REPORTING | F_PAGE_POISON),
    ],
)
def test_features(benches: Benches, options: dict[str, bool], features: int) -> None:
    device = benches(**options).device
    assert (device.DEVICE_ID, device.own_features, len(device.queues)) == (5, features, 5)


def test_what_is_asked_for(benches: Benches) -> None:
    bench = benches(target_pages=100)
    assert bench.config(NUM_PAGES) == 100
    assert bench.config_interrupts == 0
    generation = bench.device.generation
    bench.device.set_target(200)
    assert bench.config(NUM_PAGES) == 200
    assert (bench.config_interrupts, bench.device.generation) == (1, generation + 1)
    bench.write_config(NUM_PAGES, 5)  # not the driver's
    assert bench.config(NUM_PAGES) == 200


def test_what_the_driver_says_to_have_given(benches: Benches) -> None:
    bench = benches()
    bench.write_config(ACTUAL, 0x1234)
    assert bench.actual == [0x1234]
    assert bench.device.actual_pages == bench.config(ACTUAL) == 0x1234
    for n, byte in enumerate((0x78, 0x56, 0x34, 0x12)):  # as legacy drivers on PCI do, 5.5.6.1
        bench.write_config(ACTUAL + n, byte, 1)
    assert bench.actual == [0x1234, 0x1234_5678]
    with bench.device.lock:
        bench.device.write_status(0)
    assert bench.actual[2:] == [0]


# -- giving ------------------------------------------------------------------------------------------------------------


def test_inflating_gives_pages_back(benches: Benches, ring: dict[str, bool]) -> None:
    bench = benches(ring=ring)
    fill(bench)
    pages = list(range(FIRST + 10, FIRST + 10 + 256))
    Random(1).shuffle(pages)
    bench.inflate(*pages)
    assert given(bench, *pages)
    assert kept(bench, FIRST + 9, FIRST + 10 + 256)
    assert bench.device.given_bytes == 256 * PAGE
    bench.deflate(*pages)
    bench.memory.write(pages[0] * PAGE, b"mine again")
    assert bench.memory.read(pages[0] * PAGE, 10) == b"mine again"
    assert bench.device.bad_pages == 0


def test_neighbours_go_back_in_one_call(benches: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Watched(GuestMemory):
        def discard(self, gpa: int, size: int, *, zeros: bool = False) -> int:
            calls.append((gpa, size))
            return super().discard(gpa, size, zeros=zeros)

    bench = benches(memory=Watched(MEMORY_BYTES))
    driver = bench.drivers[INFLATE]
    for n in range(4):  # one after the other downwards, as an allocator gives them, in several requests
        first = FIRST + 256 * (4 - n)
        driver.add([pack("<256I", *range(first + 255, first - 1, -1))])
    bench.ring_for(INFLATE)
    assert calls == [((FIRST + 256) * PAGE, 1024 * PAGE)]
    assert len(driver.used()) == 4


def test_memory_shows_in_what_the_process_has(benches: Benches) -> None:
    bench = benches()
    fill(bench)
    before = resident_bytes()
    pages = range(FIRST, FIRST + 32 * MIB // PAGE)
    for first in range(pages.start, pages.stop, 256):
        bench.inflate(*range(first, first + 256))
    assert before - resident_bytes() > 30 * MIB
    assert bench.device.given_bytes == 32 * MIB


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_shared_memory_goes_back_too(benches: Benches) -> None:
    bench = benches(memory=GuestMemory(MEMORY_BYTES, shared=True))
    fill(bench)
    bench.inflate(*range(FIRST, FIRST + 256))
    assert given(bench, *range(FIRST, FIRST + 256))
    assert bench.device.given_bytes == MIB


# -- pages that are reported as free -----------------------------------------------------------------------------------


def test_free_pages_go_back(benches: Benches, ring: dict[str, bool]) -> None:
    bench = benches(ring=ring, free_page_reporting=True)
    fill(bench)
    bench.report((HERE, 2 * MIB), (HERE + 4 * MIB, 2 * MIB))
    assert given(bench, FIRST, FIRST + 511, FIRST + 1024)
    assert kept(bench, FIRST + 512, FIRST + 1023)
    assert bench.device.given_bytes == 4 * MIB


def test_parts_of_pages_stay(benches: Benches) -> None:
    bench = benches(free_page_reporting=True)
    fill(bench)
    bench.report((HERE + 1, 3 * PAGE), (HERE + 8 * PAGE, PAGE - 1))
    assert given(bench, FIRST + 1, FIRST + 2)
    assert kept(bench, FIRST, FIRST + 3, FIRST + 8)


@pytest.mark.parametrize("queue", [HINT, STATS])
def test_drivers_that_count_only_the_queues_they_use(benches: Benches, queue: int) -> None:
    """Linux before 6.11: the reporting queue is the next one that it has."""
    bench = benches(free_page_reporting=True, take=~F_STATS_VQ if queue == STATS else ~0)
    fill(bench)
    bench.report((HERE, MIB), queue=queue)
    assert given(bench, FIRST)


def test_without_the_feature_there_is_no_reporting(benches: Benches) -> None:
    bench = benches(free_page_reporting=True, take=~F_PAGE_REPORTING)
    fill(bench)
    bench.drivers[HINT].add([], [PAGE])
    bench.ring_for(HINT)
    assert bench.drivers[HINT].used() == []
    assert bench.device.given_bytes == 0


@pytest.mark.parametrize(("poison", "goes"), [(0, True), (0xAAAA_AAAA, False)])
def test_reported_pages_hold_what_they_are_filled_with(benches: Benches, poison: int, goes: bool) -> None:
    """5.5.6.7.2: they may change to that value, and to no other."""
    bench = benches(free_page_reporting=True, poison=poison)
    fill(bench)
    bench.write_config(POISON, 1)  # 5.5.6.6.1: not while it is live
    assert bench.config(POISON) == poison
    bench.report((HERE, MIB))
    assert given(bench, FIRST) == goes
    assert kept(bench, FIRST) != goes
    bench.inflate(FIRST + 300)
    assert given(bench, FIRST + 300)  # that is another matter: the driver fills them when it has them again


@pytest.mark.parametrize(("poison", "goes"), [(None, True), (0, False)])
def test_pages_of_a_snapshot(benches: Benches, tmp_path: Path, poison: int | None, goes: bool) -> None:
    """What goes back is the file's again: it is neither zeros nor what it was."""
    path = tmp_path / "memory"
    path.write_bytes(b"f" * MEMORY_BYTES)
    with path.open("rb") as file:
        memory = GuestMemory(MEMORY_BYTES, sources={0: (file.fileno(), 0)})
    bench = benches(memory=memory, free_page_reporting=True, poison=poison)
    fill(bench)
    bench.report((HERE, MIB))
    assert kept(bench, FIRST) != goes
    assert (bench.memory.read(HERE, 1) == b"f") == goes
    bench.inflate(FIRST + 300)
    assert bench.memory.read((FIRST + 300) * PAGE, 1) == b"f"


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics(benches: Benches, ring: dict[str, bool]) -> None:
    bench = benches(ring=ring)
    assert bench.device.stats == {}
    first = bench.tell_stats((5, 100), (4, 40), (77, 1), (2, 7))
    assert bench.device.stats == {"total_bytes": 100, "free_bytes": 40, "major_faults": 7}
    assert bench.came == 1
    assert bench.drivers[STATS].used() == []  # it is kept
    bench.device.ask_stats()
    bench.device.ask_stats()
    bench.io.settle()
    assert bench.drivers[STATS].used() == [(first, 0)]
    second = bench.tell_stats((5, 100), (4, 30))
    assert bench.device.stats["free_bytes"] == 30
    assert bench.came == 2
    for n in range(100):
        bench.device.ask_stats()
        bench.io.settle()
        assert bench.drivers[STATS].used() == [(second, 0)]
        second = bench.tell_stats((4, n))
        assert bench.device.stats["free_bytes"] == n


def test_a_driver_that_gives_several_buffers(benches: Benches) -> None:
    bench = benches()
    chains = [bench.tell_stats((4, n)) for n in range(3)]
    assert bench.drivers[STATS].used() == [(chain, 0) for chain in chains[:2]]
    assert bench.device.stats["free_bytes"] == 2


@pytest.mark.parametrize("size", [1, 9, 11, 10_000])
def test_statistics_of_a_strange_length(benches: Benches, size: int) -> None:
    bench = benches()
    bench.drivers[STATS].add([(STAT.pack(4, 9) * (size // 10 + 1))[:size]])
    bench.ring_for(STATS)
    assert bench.device.stats == ({"free_bytes": 9} if size >= 10 else {})
    assert not bench.device.faults


def test_the_first_buffer_of_a_legacy_driver_means_nothing(benches: Benches) -> None:
    bench = benches()
    bench.device.legacy = True
    bench.tell_stats((4, 1))
    assert bench.device.stats == {}
    bench.device.ask_stats()
    bench.io.settle()
    bench.drivers[STATS].used()
    bench.tell_stats((4, 2))
    assert bench.device.stats == {"free_bytes": 2}


# -- drivers that play games -------------------------------------------------------------------------------------------


def test_pages_that_are_none(benches: Benches) -> None:
    bench = benches()
    fill(bench)
    last = MEMORY_BYTES // PAGE
    bench.inflate(last, 0xFFFF_FFFF, FIRST, last - 1, FIRST, last + 1, 0xC0000)
    assert given(bench, FIRST, last - 1)
    assert bench.device.given_bytes == 2 * PAGE
    assert bench.device.bad_pages == 4
    assert not bench.device.faults


def test_the_hole_below_4_gib(benches: Benches) -> None:
    bench = benches(memory=GuestMemory(5 << 30))
    edge = 0xC000_0000 // PAGE
    bench.inflate(edge - 1, edge, 0x10_0000 - 1, 0x10_0000)
    assert bench.device.given_bytes == 2 * PAGE
    assert bench.device.bad_pages == 2


def test_a_request_without_end(benches: Benches) -> None:
    """It is acknowledged, and what is beyond the first of it stays."""
    bench = benches()
    fill(bench)
    numbers = pack(f"<{MOST_PAGES}I", *([FIRST] * MOST_PAGES))
    bench.ask(INFLATE, numbers, pack("<I", FIRST + 1), b"odd")
    assert given(bench, FIRST)
    assert kept(bench, FIRST + 1)


def test_others_have_their_turn(benches: Benches) -> None:
    bench = benches()
    driver = bench.drivers[INFLATE]
    for n in range(3 * BATCH):
        driver.add([pack("<I", FIRST + n)])
    bench.device.kick(driver.queue)
    bench.io.turn()
    assert len(driver.used()) == BATCH
    bench.io.settle()
    assert len(driver.used()) == 2 * BATCH


@pytest.mark.parametrize(("queue", "says"), [(INFLATE, "to be written to"), (REPORT, "to be read")])
def test_buffers_in_the_wrong_direction(benches: Benches, queue: int, says: str) -> None:
    bench = benches(free_page_reporting=True)
    bench.drivers[queue].add([bytes(4)], [4])
    bench.ring_for(queue)
    assert says in bench.device.fault
    assert bench.device.status & NEEDS_RESET
    with bench.device.lock:
        bench.device.write_status(0)
    bench.start()
    bench.inflate(FIRST)


@pytest.mark.parametrize("seed", range(8))
def test_anything_at_all(benches: Benches, seed: int) -> None:
    r = Random(seed)
    bench = benches(ring=LAYOUTS[r.choice(list(LAYOUTS))], free_page_reporting=True, poison=r.choice((None, 0, 5)))
    for _ in range(300):
        n = r.randrange(5)
        driver = bench.drivers[n]
        if driver.free < 8:
            with bench.device.lock:
                bench.device.write_status(0)
            bench.start()
            continue
        what = r.randrange(8)
        if what < 4:
            readable = [r.randbytes(r.randrange(1, 200)) for _ in range(r.randrange(1, 3))]
            driver.add([] if n >= HINT else readable, [100] if n >= HINT or r.randrange(60) == 0 else [])
            bench.ring_for(n)
        elif what == 4:
            bench.write_config(r.randrange(16), r.getrandbits(8), 1)
        elif what == 5:
            bench.device.ask_stats()
        elif what == 6:
            bench.device.set_target(r.randrange(1000))
        bench.io.settle()
        driver.used()
        if bench.device.faults:
            with bench.device.lock:
                bench.device.write_status(0)
            bench.device.faults = 0
            bench.start()
    with bench.device.lock:
        bench.device.write_status(0)
    bench.start()
    bench.inflate(FIRST)


# -- state -------------------------------------------------------------------------------------------------------------


def test_it_goes_on_elsewhere(benches: Benches, ring: dict[str, bool]) -> None:
    bench = benches(ring=ring, target_pages=50)
    chain = bench.tell_stats((4, 40))
    bench.device.set_target(60)
    bench.write_config(ACTUAL, 55)
    state = bench.device.save()
    assert bench.device.save() == state
    for fd in bench.kick_fds:
        bench.io.remove_reader(fd)
    device = bench.make()
    device.load(state)
    assert device.save() == {**state, "held": None}  # until the rings are found
    device.after_load()
    assert device.save() == state
    bench.device = device
    for driver, queue in zip(bench.drivers, device.queues, strict=False):
        driver.queue = queue
    assert (device.target_pages, device.actual_pages, device.stats) == (60, 55, {"free_bytes": 40})
    assert bench.config(NUM_PAGES) == 60
    device.ask_stats()
    bench.io.settle()
    assert bench.drivers[STATS].used() == [(chain, 0)]
    bench.tell_stats((4, 41))
    assert device.stats == {"free_bytes": 41}
    bench.inflate(FIRST)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: 5, "held is missing"),
        (lambda state: {**state, "target": 1 << 32}, "target is"),
        (lambda state: {**state, "values": [None] * 9}, "values has 9 entries"),
        (lambda state: {**state, "values": [-1] + [None] * 9}, "values"),
        (lambda state: {**state, "told": 1}, "told is 1"),
    ],
)
def test_states_that_can_not_be(benches: Benches, change: Any, says: str) -> None:
    bench = benches()
    with pytest.raises(StateError, match=says):
        bench.make().load(change(bench.device.save()))


def test_a_held_buffer_that_is_not_in_memory(benches: Benches) -> None:
    bench = benches()
    bench.tell_stats((4, 40))
    state = bench.device.save()
    device = bench.make()
    device.load({**state, "held": [[0, 1, 0], [1 << 40, 10], []]})
    device.after_load()
    assert device.status & NEEDS_RESET


# -- in a machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["microvm", "pc"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_on_a_board(board: str, packed: bool) -> None:
    layout = "packed" if packed else "split"
    with pyvmm.Machine(machine=board, accel="qtest", memory_mib=16, balloon=4, virtio_ring=layout) as m:
        heard: list[int] = []
        m.events.listen(lambda event: heard.append(event.data["actual_bytes"]), "balloon")
        guest = MachineGuest(m, "balloon")
        guest.start(F_MUST_TELL_HOST | F_STATS_VQ | (F_RING_PACKED if packed else 0), 0, 1, 2, packed=packed)
        assert guest.config(NUM_PAGES, 4) == 4 * MIB // PAGE
        m.set_balloon(1)
        assert guest.config(NUM_PAGES, 4) == MIB // PAGE
        first = 8 * MIB // PAGE
        m.memory.write(8 * MIB, b"x" * MIB)
        chain = guest.drivers[0].add([pack("<256I", *range(first, first + 256))])
        guest.notify(0)
        assert guest.used(0) == [(chain, 0)]
        assert m.memory.read(8 * MIB, MIB) == bytes(MIB)
        guest.write_config(ACTUAL, 4, 256)
        wait_for(lambda: heard == [MIB])
        with pytest.raises(TimeoutError, match=r"the guest has said nothing of its memory within 0\.0 s"):
            m.balloon_stats(0.0)
        guest.drivers[2].add([STAT.pack(4, 12345)])
        guest.notify(2)
        wait_for(lambda: guest.device.stats)  # type: ignore[attr-defined]
        state = m.save_state()
    with pyvmm.Machine(machine=board, accel="qtest", memory_mib=16, balloon=0, virtio_ring=layout) as m:
        m.load_state(state)
        other = m.devices["balloon"]
        assert (other.target_pages, other.actual_pages, other.stats) == (256, 256, {"free_bytes": 12345})  # type: ignore[attr-defined]


def test_the_sizes_are_the_drivers_to_use(benches: Benches) -> None:
    """Linux reports nothing where the queue has less than 32 places."""
    assert all(queue.max_size == QUEUE_SIZE >= 32 for queue in benches().device.queues)
