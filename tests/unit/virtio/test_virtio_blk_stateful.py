"""Hypothesis asks a disk on virtio for anything, cut into descriptors in any way, and compares it with an image in
memory: reads, writes, ranges, several at once, hostile ones in between. With a lane and without one."""

from __future__ import annotations

import itertools
import random
import tempfile
from typing import Any

import pytest
from blk_bench import IOERR, OK, SECTOR, UNSUPP, BlkBench, header, segment
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyvmm.block import DriveOptions, open_drive
from pyvmm.devices.virtio import blk
from pyvmm.event_loop import EventLoop

SECTORS = 64
SECTOR_NUMBERS = st.one_of(st.integers(0, SECTORS), st.integers(0, (1 << 64) - 1))
CUTS = st.lists(st.integers(0, 4 * SECTOR), max_size=3)
STEPS = 40


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """``data`` in pieces; none of them empty."""
    edges = sorted({0, len(data), *(at for at in cuts if at < len(data))})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


class Disk(RuleBasedStateMachine):
    options: dict[str, Any] = {}
    ring: dict[str, bool] = {}

    def __init__(self) -> None:
        super().__init__()
        self.file = tempfile.NamedTemporaryFile(dir="/dev/shm")  # noqa: SIM115
        self.model = bytearray(random.Random(1).randbytes(SECTORS * SECTOR))
        self.file.write(self.model)
        self.file.flush()
        self.errors: list[BaseException] = []
        self.loop = EventLoop(self.errors.append)
        drive = DriveOptions(self.file.name, **self.options)
        self.backend = open_drive(drive, loop=self.loop, clock=self.loop.clock)
        self.bench = BlkBench(self.backend, ring=self.ring)

    def teardown(self) -> None:
        self.backend.close()
        self.loop.close()
        self.file.seek(0)
        assert self.file.read() == bytes(self.model)
        self.file.close()
        assert self.errors == []

    def inside(self, sector: int, size: int) -> bool:
        return not size % SECTOR and sector * SECTOR + size <= len(self.model)

    @rule(
        sector=SECTOR_NUMBERS,
        count=st.integers(0, 8),
        odd=st.sampled_from([0, 0, 0, 1, 511]),
        cuts=CUTS,
        seed=st.integers(0, 255),
    )
    def write(self, sector: int, count: int, odd: int, cuts: list[int], seed: int) -> None:
        data = random.Random(seed).randbytes(count * SECTOR + odd)
        good = self.inside(sector, len(data))
        status, _ = self.bench.ask(cut(header(blk.T_OUT, sector) + data, cuts), [1])
        assert status == (OK if good else IOERR)
        if good:
            self.model[sector * SECTOR : sector * SECTOR + len(data)] = data

    @rule(sector=SECTOR_NUMBERS, count=st.integers(0, 8), odd=st.sampled_from([0, 0, 0, 1, 511]), cuts=CUTS)
    def read(self, sector: int, count: int, odd: int, cuts: list[int]) -> None:
        size = count * SECTOR + odd
        pieces = [len(piece) for piece in cut(bytes(size + 1), cuts)]
        status, data = self.bench.ask([header(blk.T_IN, sector)], pieces)
        if self.inside(sector, size):
            assert (status, data) == (OK, bytes(self.model[sector * SECTOR : sector * SECTOR + size]))
        else:
            assert (status, data) == (IOERR, bytes(size))

    @rule(
        segments=st.lists(
            st.tuples(SECTOR_NUMBERS, st.integers(0, 8), st.sampled_from([0, 0, 0, 1, 2])), min_size=1, max_size=4
        )
    )
    def zeroes(self, segments: list[tuple[int, int, int]]) -> None:
        status = self.bench.ranges(blk.T_WRITE_ZEROES, *(segment(*each) for each in segments))
        if any(flags > 1 for _, _, flags in segments):
            assert status == UNSUPP
        elif all(self.inside(sector, count * SECTOR) for sector, count, _ in segments):
            assert status == OK
            for sector, count, _ in segments:
                self.model[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        else:
            assert status == IOERR

    @rule(first=st.integers(0, 40), count=st.integers(1, 12), seed=st.integers(0, 255), reads=st.booleans())
    def several(self, first: int, count: int, seed: int, reads: bool) -> None:
        """Adjacent ones at once, in some order: they may be joined, and each has its own bytes and status."""
        order = list(range(first, first + count))
        random.Random(seed).shuffle(order)
        data = {n: random.Random(n + seed).randbytes(SECTOR) for n in order}
        if reads:
            numbers = {n: self.bench.add([header(blk.T_IN, n)], [SECTOR, 1]) for n in order}
        else:
            numbers = {n: self.bench.add([header(blk.T_OUT, n), data[n]], [1]) for n in order}
        last = self.bench.add([header(blk.T_IN, SECTORS)], [SECTOR, 1])
        self.bench.serve()
        for n, number in numbers.items():
            assert self.bench.wait(number) == OK
            if reads:
                assert self.bench.data(number)[:-1] == self.model[n * SECTOR : (n + 1) * SECTOR]
            else:
                self.model[n * SECTOR : (n + 1) * SECTOR] = data[n]
        assert self.bench.wait(last) == IOERR

    @rule(kind=st.integers(0, (1 << 32) - 1), data=st.binary(max_size=40), room=st.integers(0, 40))
    def anything(self, kind: int, data: bytes, room: int) -> None:
        if kind in blk.REQUESTS:
            return
        assert self.bench.ask([header(kind), data] if data else [header(kind)], [room + 1])[0] == UNSUPP

    @rule()
    def flush(self) -> None:
        assert self.bench.flush() == OK

    @invariant()
    def nothing_is_left_over(self) -> None:
        assert self.bench.disk.faults == 0
        self.backend.drain()  # what a worker has told the guest of it counts a moment later
        assert self.backend.stats.in_flight == 0
        self.file.seek(0)
        assert self.file.read() == bytes(self.model)


WAYS: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "lane": ({}, {}),
    "lane, packed, events, indirect": ({}, {"packed": True, "event_idx": True, "indirect": True}),
    "throttle": ({"throttle_iops": 1 << 30}, {}),
    "write-through": ({"cache": "writethrough"}, {}),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_disk_is_as_an_image_in_memory(way: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    options, ring = WAYS[way]
    machine = type("Disk", (Disk,), {"options": options, "ring": ring})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
