"""VirtioBlk by the rules of virtio 1.2, 5.2: each with its section. Drives are real ones, with and without a lane."""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from errno import ECANCELED, EIO
from pathlib import Path
from typing import Any

import pytest
from blk_bench import IOERR, MEMORY_BYTES, OK, SECTOR, UNSUPP, BlkBench, header, segment

from pyvmm.block import BlockBackend, DriveOptions, open_drive
from pyvmm.block.coroutine import AioContext, Waiter
from pyvmm.block.driver import FormatDriver
from pyvmm.devices.virtio import blk, mmio
from pyvmm.event_loop import EventLoop
from pyvmm.guest_memory import GuestMemory

SECTORS = 2048
Open = Callable[..., BlockBackend]


@pytest.fixture
def image() -> Iterator[Path]:
    """1 MiB of bytes that tell their place, in memory."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(b"".join(number.to_bytes(4, "little") * 128 for number in range(SECTORS)))
        file.flush()
        yield Path(file.name)


@pytest.fixture
def drive(image: Path) -> Iterator[Open]:
    errors: list[BaseException] = []
    loop = EventLoop(errors.append)
    opened = []

    def open_it(**options: Any) -> BlockBackend:
        on_error = options.pop("on_error", None)
        opened.append(
            open_drive(DriveOptions(image, **options), loop=loop, clock=loop.clock, on_error=on_error)
        )
        return opened[-1]

    yield open_it
    for backend in opened:
        backend.close()
    loop.close()
    assert errors == []


# Reads and writes through the lane, through workers, and by way of the throttle's queue.
WAYS: dict[str, dict[str, Any]] = {
    "lane": {},
    "throttle": {"throttle_iops": 1 << 30},
    "zeroes": {"detect_zeroes": "on"},
}


@pytest.fixture(params=list(WAYS))
def bench(request: pytest.FixtureRequest, drive: Open) -> BlkBench:
    return BlkBench(drive(**WAYS[request.param]))


# -- configuration (5.2.4) ---------------------------------------------------------------------------------------------


def test_the_configuration_stands_where_5_2_4_has_it(drive: Open) -> None:
    disk = BlkBench(
        drive(), queues=3, geometry=(100, 16, 63), logical_block_bytes=1024, physical_block_bytes=4096
    ).disk
    config = bytes(disk.config)
    assert len(config) == 60

    def at(offset: int, layout: str) -> int:
        value: int = struct.unpack_from("<" + layout, config, offset)[0]
        return value

    assert at(0, "Q") == SECTORS
    assert at(8, "I") == 0  # size_max is not offered
    assert at(12, "I") == blk.QUEUE_SIZE - 2
    assert (at(16, "H"), at(18, "B"), at(19, "B")) == (100, 16, 63)
    assert at(20, "I") == 1024
    assert (at(24, "B"), at(25, "B"), at(26, "H"), at(28, "I")) == (2, 0, 0, 0)
    assert (at(32, "B"), at(33, "B"), at(34, "H")) == (1, 0, 3)
    assert (at(36, "I"), at(40, "I"), at(44, "I")) == (blk.MOST_SECTORS, blk.MOST_SEGMENTS, 8)
    assert (at(48, "I"), at(52, "I"), at(56, "B")) == (blk.MOST_SECTORS, blk.MOST_SEGMENTS, 1)
    assert config[57:60] == bytes(3)


ALWAYS = blk.F_SEG_MAX | blk.F_GEOMETRY | blk.F_BLK_SIZE | blk.F_FLUSH | blk.F_TOPOLOGY | blk.F_CONFIG_WCE


@pytest.mark.parametrize(
    ("options", "queues", "features"),
    [
        ({}, 1, ALWAYS | blk.F_DISCARD | blk.F_WRITE_ZEROES),
        ({}, 2, ALWAYS | blk.F_DISCARD | blk.F_WRITE_ZEROES | blk.F_MQ),
        ({"discard": "ignore"}, 1, ALWAYS | blk.F_WRITE_ZEROES),
        ({"read_only": True}, 1, ALWAYS | blk.F_RO),
    ],
)
def test_what_is_offered_is_what_is_there(drive: Open, options: dict[str, Any], queues: int, features: int) -> None:
    assert blk.VirtioBlk(GuestMemory(MEMORY_BYTES), drive(**options), queues=queues).offered & 0xFFFFFF == features


def test_a_part_of_a_block_is_not_part_of_the_disk(drive: Open) -> None:
    bench = BlkBench(drive(size=11 * SECTOR), logical_block_bytes=4096)
    assert struct.unpack_from("<Q", bench.disk.config) == (8,)
    assert bench.read(8, 1) == IOERR
    assert bench.read(0, 1) == IOERR  # no whole block
    assert len(bench.read(0, 8)) == 4096  # type: ignore[arg-type]


# -- reads and writes (5.2.6) ------------------------------------------------------------------------------------------


def test_sectors_are_read_and_written(bench: BlkBench, image: Path) -> None:
    before = image.read_bytes()
    assert bench.read(5, 3) == before[5 * SECTOR : 8 * SECTOR]
    data = os.urandom(4 * SECTOR)
    assert bench.write(SECTORS - 4, data) == OK
    assert image.read_bytes() == before[: -4 * SECTOR] + data
    assert bench.read(SECTORS - 4, 4) == data
    assert (bench.backend.stats.read.operations, bench.backend.stats.read.bytes) == (2, 7 * SECTOR)
    assert (bench.backend.stats.write.operations, bench.backend.stats.write.bytes) == (1, 4 * SECTOR)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 20, 500, 527])
def test_how_a_request_is_cut_means_nothing(bench: BlkBench, image: Path, cut: int) -> None:
    """2.7.4.2: the device makes no assumption on the arrangement of descriptors."""
    whole = header(blk.T_OUT, 7) + os.urandom(SECTOR)
    assert bench.ask([whole[:cut], whole[cut:]], [1]) == (OK, b"")
    assert image.read_bytes()[7 * SECTOR : 8 * SECTOR] == whole[16:]
    first = min(cut, SECTOR)
    assert bench.ask([header(blk.T_IN, 7)], [first, SECTOR + 1 - first]) == (OK, whole[16:])
    assert bench.ask([header(blk.T_IN, 7)[:3], header(blk.T_IN, 7)[3:]], [SECTOR + 1]) == (OK, whole[16:])


def test_many_at_a_time_are_answered_together(bench: BlkBench, image: Path) -> None:
    before = image.read_bytes()
    numbers = [bench.add([header(blk.T_IN, n)], [SECTOR, 1]) for n in range(20)]
    bench.serve()
    for n, number in enumerate(numbers):
        assert bench.wait(number) == OK
        assert bench.data(number)[:-1] == before[n * SECTOR : (n + 1) * SECTOR]
    assert bench.backend.stats.read.operations == 20


@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, SECTOR), (SECTORS - 1, 2 * SECTOR), (1 << 62, SECTOR), ((1 << 64) - 1, SECTOR), (0, 511), (0, 513)],
)
def test_what_is_no_whole_sector_of_the_disk_is_an_error(
    bench: BlkBench, image: Path, sector: int, size: int
) -> None:
    before = image.read_bytes()
    status, data = bench.ask([header(blk.T_IN, sector)], [size, 1])
    assert (status, data) == (IOERR, bytes(size))
    assert bench.ask([header(blk.T_OUT, sector), b"x" * size], [1]) == (IOERR, b"")
    assert image.read_bytes() == before


def test_nothing_at_all_is_read_and_written(bench: BlkBench) -> None:
    assert bench.read(0, 0) == b""
    assert bench.write(SECTORS, b"") == OK


def test_nothing_is_written_to_a_read_only_disk(drive: Open, image: Path) -> None:
    """5.2.6.2: IOERR, and no data."""
    before = image.read_bytes()
    bench = BlkBench(drive(read_only=True))
    assert bench.write(0, bytes(SECTOR)) == IOERR
    assert bench.ranges(blk.T_DISCARD, segment(0, 1)) == UNSUPP  # not offered
    assert bench.ranges(blk.T_WRITE_ZEROES, segment(0, 1)) == UNSUPP
    assert bench.flush() == OK
    assert image.read_bytes() == before


# -- other requests (5.2.6) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 18, 26, 0x8000_0000, 0xFFFF_FFFF])
def test_requests_that_are_not_there(bench: BlkBench, kind: int) -> None:
    assert bench.ask([header(kind), bytes(32)], [1]) == (UNSUPP, b"")


@pytest.mark.parametrize("serial", ["", "PV1", "x" * 20])
def test_the_name_has_20_characters_and_no_end(drive: Open, serial: str) -> None:
    bench = BlkBench(drive(), serial=serial)
    assert bench.ask([header(blk.T_GET_ID)], [20, 1]) == (OK, serial.encode().ljust(20, b"\0"))
    assert bench.ask([header(blk.T_GET_ID)], [4, 1])[0] == OK
    assert bench.ask([header(blk.T_GET_ID)], [1]) == (OK, b"")
    status, data = bench.ask([header(blk.T_GET_ID)], [30, 1])
    assert (status, data) == (OK, serial.encode().ljust(30, b"\0"))


def test_a_flush_brings_what_was_written_to_stable_storage(
    bench: BlkBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    assert bench.flush() == OK
    assert not synced
    bench.write(0, b"x" * SECTOR)
    assert bench.flush() == OK
    assert bench.flush() == OK
    assert len(synced) == 1


def test_zeros_are_written(bench: BlkBench, image: Path) -> None:
    before = image.read_bytes()
    assert bench.ranges(blk.T_WRITE_ZEROES, segment(8, 8), segment(100, 1, blk.UNMAP)) == OK
    after = bytearray(before)
    after[8 * SECTOR : 16 * SECTOR] = bytes(8 * SECTOR)
    after[100 * SECTOR : 101 * SECTOR] = bytes(SECTOR)
    assert image.read_bytes() == after


def test_discarded_blocks_become_holes(bench: BlkBench, image: Path) -> None:
    blocks = image.stat().st_blocks
    assert bench.ranges(blk.T_DISCARD, segment(0, 1024), segment(1024, 8)) == OK
    assert image.stat().st_blocks < blocks


def test_zeros_without_unmap_keep_their_space(bench: BlkBench, image: Path) -> None:
    blocks = image.stat().st_blocks
    assert bench.ranges(blk.T_WRITE_ZEROES, segment(0, SECTORS)) == OK
    assert image.stat().st_blocks == blocks
    assert bench.ranges(blk.T_WRITE_ZEROES, segment(0, SECTORS, blk.UNMAP)) == OK
    assert image.stat().st_blocks < blocks
    assert image.read_bytes() == bytes(SECTORS * SECTOR)


@pytest.mark.parametrize(
    ("kind", "flags", "status"),
    [
        (blk.T_DISCARD, 1, UNSUPP),
        (blk.T_DISCARD, 2, UNSUPP),
        (blk.T_WRITE_ZEROES, 2, UNSUPP),
        (blk.T_WRITE_ZEROES, 0x8000_0001, UNSUPP),
    ],
)
def test_flags_that_are_unknown(bench: BlkBench, image: Path, kind: int, flags: int, status: int) -> None:
    """5.2.6.2: UNSUPP, also for the one that is known of the other request."""
    before = image.read_bytes()
    assert bench.ranges(kind, segment(0, 8), segment(8, 8, flags)) == status
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", [blk.T_DISCARD, blk.T_WRITE_ZEROES])
@pytest.mark.parametrize(
    "segments",
    [
        b"",
        segment(0, 1)[:-1],
        segment(0, 1) + b"x",
        segment(0, 1) * (blk.MOST_SEGMENTS + 1),
        segment(SECTORS, 1),
        segment(0, 1) + segment(1, SECTORS),
        segment((1 << 64) - 1, 2),
        segment(0, blk.MOST_SECTORS + 1),
        segment(0, 0xFFFF_FFFF),
    ],
    ids=lambda value: f"{len(value)} bytes",
)
def test_ranges_that_can_not_be(bench: BlkBench, image: Path, kind: int, segments: bytes) -> None:
    before = image.read_bytes()
    assert bench.ask([header(kind), segments], [1]) == (IOERR, b"")
    assert image.read_bytes() == before


# -- write cache (5.2.5, 5.2.6.2) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "take", "cached"),
    [
        ("writeback", blk.F_FLUSH | blk.F_CONFIG_WCE, True),
        ("writeback", blk.F_FLUSH, True),
        ("writeback", blk.F_CONFIG_WCE, False),  # 5.2.5.2
        ("writeback", 0, False),  # 5.2.6.2, case 1
        ("writethrough", blk.F_FLUSH | blk.F_CONFIG_WCE, False),
        ("writethrough", blk.F_FLUSH, False),
        ("writethrough", 0, False),
    ],
)
def test_whether_a_write_is_stable_at_its_end(drive: Open, cache: str, take: int, cached: bool) -> None:
    bench = BlkBench(drive(cache=cache), take=take)
    assert bench.backend.write_cache == cached
    assert bench.disk.config[blk.WRITEBACK] == cached


def test_the_driver_sets_the_cache_mode(drive: Open) -> None:
    bench = BlkBench(drive())
    bench.disk.config_write(blk.WRITEBACK, 1, 0)
    assert (bench.backend.write_cache, bench.disk.config[blk.WRITEBACK]) == (False, 0)
    bench.disk.config_write(blk.WRITEBACK - 4, 8, 1 << 32)
    assert (bench.backend.write_cache, bench.disk.config[blk.WRITEBACK]) == (True, 1)
    bench.disk.config_write(0, 8, 0)
    bench.disk.config_write(blk.WRITEBACK + 1, 2, 0)
    assert bench.backend.write_cache
    bench.disk.config_write(blk.WRITEBACK, 1, 0)
    bench.disk.reset()
    assert bench.backend.write_cache


def test_who_has_not_negotiated_it_does_not(drive: Open) -> None:
    bench = BlkBench(drive(), take=blk.F_FLUSH)
    bench.disk.config_write(blk.WRITEBACK, 1, 0)
    assert bench.backend.write_cache


def test_a_write_through_the_cache_is_stable(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm.block.protocols import file_posix

    flags: list[int] = []
    real = os.pwritev

    def pwritev(fd: int, iov: Any, offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(fd, iov, offset, flag)

    monkeypatch.setattr(file_posix, "pwritev", pwritev)
    bench = BlkBench(drive(), take=0)
    assert bench.write(0, b"x" * SECTOR) == OK
    assert flags == [os.RWF_DSYNC]


# -- hostile requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readable", "writable"), [([header(0)], []), ([header(0)[:15]], [1]), ([b"x"], [1, 1]), ([], [17])]
)
def test_a_request_without_header_or_status_breaks_the_device(
    bench: BlkBench, readable: list[bytes], writable: list[int]
) -> None:
    number = bench.add(readable, writable)
    bench.serve()
    assert number not in bench.used()
    assert bench.disk.faults


def test_after_one_that_breaks_the_device_no_request_is_served(drive: Open, image: Path) -> None:
    """But what a lane does, which keeps no order, and has done what it can when the device hears of the rest."""
    bench = BlkBench(drive(**WAYS["throttle"]))
    before = image.read_bytes()
    bench.add([b"x"], [1])
    bench.add([header(blk.T_OUT, 0), b"w" * SECTOR], [1])
    bench.serve()
    assert bench.disk.faults == 1
    assert not bench.used()
    assert image.read_bytes() == before


def test_an_interrupt_without_an_eventfd_says_what_for(bench: BlkBench) -> None:
    """4.2.2: InterruptStatus, by which the driver knows that it has to look at its rings."""
    edges: list[int] = []

    def edge() -> None:
        edges.append(1)
        bench.interrupt()

    transport = mmio.VirtioMmio(bench.disk, edge)
    for n in range(3):
        assert isinstance(bench.read(n, 1), bytes)
        assert len(edges) == n + 1
        assert transport.read(mmio.INTERRUPT_STATUS, 4) == mmio.USED_BUFFER
        transport.write(mmio.INTERRUPT_ACK, 4, mmio.USED_BUFFER)
        assert transport.read(mmio.INTERRUPT_STATUS, 4) == 0


# -- what waits --------------------------------------------------------------------------------------------------------


class Step(Waiter):
    """A read or a write, until the test says how it went. One that is cancelled ends at once."""

    def __init__(self, driver: Waiting, what: str, iov: Any) -> None:
        super().__init__()
        self.driver = driver
        self.what = what
        self.iov = iov

    def cancel(self) -> None:
        self.driver.finish(-ECANCELED, self.driver.steps.index(self))


class Waiting(FormatDriver):
    """A disk on which reads and writes wait for the test."""

    size_bytes = SECTORS * SECTOR

    def __init__(self, context: AioContext) -> None:
        self._context = context
        self.steps: list[Step] = []

    async def co_readv(self, offset: int, iov: Any, length: int) -> int:
        return await self._step("read", iov)

    async def co_writev(self, offset: int, iov: Any, length: int, fua: bool) -> int:
        return await self._step("write", iov)

    def _step(self, what: str, iov: Any) -> Step:
        self.steps.append(Step(self, what, iov))
        return self.steps[-1]

    def finish(self, result: int = 0, index: int = 0) -> None:
        step = self.steps.pop(index)
        if step.what == "read" and not result:
            for view in step.iov:
                view[:] = b"r" * len(view)
        self._context.complete(step, result)

    async def co_flush(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class Slow:
    """A disk whose requests wait, on a loop that runs when told to."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[Callable[[], None]] = []
        self.call_soon = self.calls.append
        context = AioContext(self)
        self.driver = Waiting(context)
        self.backend = BlockBackend(DriveOptions("none", **options), self.driver, context)
        self.bench = BlkBench(self.backend)

    def finish(self, result: int = 0, index: int = 0) -> None:
        self.driver.finish(result, index)
        while self.calls:
            self.calls.pop(0)()

    def read(self, sector: int) -> int:
        number = self.bench.add([header(blk.T_IN, sector)], [SECTOR, 1])
        self.bench.serve()
        return number


def test_requests_come_back_in_the_order_in_which_they_are_done() -> None:
    slow = Slow()
    first, second = slow.read(0), slow.read(1)
    assert not slow.bench.used()
    slow.finish(index=1)
    assert list(slow.bench.used()) == [second]
    slow.finish()
    assert list(slow.bench.used()) == [second, first]
    assert slow.bench.data(first) == b"r" * SECTOR + b"\0"


def test_an_error_of_the_host_is_told() -> None:
    slow = Slow()
    number = slow.read(0)
    slow.finish(-EIO)
    assert slow.bench.wait(number) == IOERR


def test_a_reset_waits_for_what_is_under_way_and_writes_nothing_of_it() -> None:
    slow = Slow()
    first, second = slow.read(0), slow.read(1)
    disk = slow.bench.disk
    with disk.lock:
        disk.quiesce()
    assert slow.driver.steps == []
    assert not slow.bench.used()
    assert slow.bench.data(first) == slow.bench.data(second) == bytes(SECTOR + 1)
    assert slow.backend.stats.in_flight == 0


def test_a_reset_forgets_what_a_policy_has_put_aside() -> None:
    slow = Slow(rerror="stop")
    number = slow.read(0)
    slow.finish(-EIO)
    assert slow.backend.stalled == 1
    with slow.bench.disk.lock:
        slow.bench.disk.quiesce()
    assert slow.backend.stalled == 0
    assert number not in slow.bench.used()


def test_what_a_policy_has_put_aside_is_in_the_state_and_asked_again() -> None:
    slow = Slow(rerror="stop")
    number, other = slow.read(3), slow.read(4)
    slow.finish(-EIO)
    slow.finish()
    assert list(slow.bench.used()) == [other]
    assert slow.backend.stalled == 1
    state = slow.bench.disk.save()
    disk_state = slow.backend.save()
    again = slow  # the same ring, and a device that knows nothing of it
    slow.backend.drop_stalled()
    again.bench.disk.load(state)
    again.backend.load(disk_state)
    again.bench.disk.after_load()
    again.backend.after_load()
    assert again.backend.stalled == 1
    assert slow.driver.steps == []
    again.backend.resume()
    again.finish()
    assert again.bench.wait(number) == OK
    assert again.bench.data(number) == b"r" * SECTOR + b"\0"


def test_several_queues_are_served_at_the_same_time(drive: Open, image: Path) -> None:
    bench = BlkBench(drive(), queues=3)
    before = image.read_bytes()
    numbers: dict[int, list[int]] = {}

    def work(queue: int) -> None:
        numbers[queue] = []
        for n in range(50):
            numbers[queue].append(bench.add([header(blk.T_IN, 10 * queue)], [SECTOR, 1], queue))
            bench.serve(queue)
            assert bench.wait(numbers[queue][-1], queue) == OK, n

    threads = [threading.Thread(target=work, args=(queue,)) for queue in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for queue in range(3):
        expected = before[10 * queue * SECTOR :][:SECTOR]
        assert all(bench.data(number, queue)[:-1] == expected for number in numbers[queue])
    assert bench.backend.stats.read.operations == 150


def test_what_a_driver_has_out_is_bounded() -> None:
    """One that makes a buffer available again and again while it is not done."""
    slow = Slow()
    (driver,) = slow.bench.drivers
    slow.read(0)
    for n in range(2, 2 * driver.size):
        driver.put(driver.driver + 2, 2, n)
        slow.bench.serve()
    assert slow.bench.disk.faults == 1
    assert len(slow.driver.steps) == driver.size
