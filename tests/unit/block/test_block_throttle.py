"""Limits of rate, on a clock moved by hand."""

from __future__ import annotations

import threading
from errno import ECANCELED

import pytest
from block_drives import SECTOR, ManualLoop, Result

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.coroutine import AioContext
from pyvmm.block.driver import FormatDriver
from pyvmm.block.throttle import Bucket, Throttle
from pyvmm.clock import VirtualClock

S = 1_000_000_000


class Instant(FormatDriver):
    """A disk that takes no time."""

    size_bytes = 1 << 30

    async def co_readv(self, offset: int, iov: object, length: int) -> int:
        return 0

    async def co_writev(self, offset: int, iov: object, length: int, fua: bool) -> int:
        return 0

    async def co_flush(self) -> int:
        return 0

    def grow(self, options: DriveOptions, size_bytes: int | None) -> None:
        assert size_bytes is not None
        self.size_bytes = size_bytes

    def close(self) -> None:
        pass


class Drive:
    def __init__(self, **options: object) -> None:
        self.clock = VirtualClock()
        self.loop = ManualLoop()
        context = AioContext(self.loop)
        drive = DriveOptions("x", **options)
        assert drive.throttled
        self.backend = BlockBackend(drive, Instant(), context, throttle=Throttle(drive, self.clock, context))
        self.done: list[tuple[str, int]] = []
        self._sector = 0

    def submit(self, what: str, bytes_each: int = SECTOR, count: int = 1) -> None:
        submit = self.backend.aio_readv if what == "read" else self.backend.aio_writev
        for _ in range(count):
            submit(
                self._sector,
                [memoryview(bytearray(bytes_each))],
                lambda ret: self.done.append((what, self.clock.now_ns())),
            )
            self._sector += bytes_each // SECTOR


def test_no_limits_no_throttle() -> None:
    assert not DriveOptions("x").throttled


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize(
    ("options", "each"), [({"throttle_bps": 100 * SECTOR}, SECTOR), ({"throttle_iops": 100}, 64 * SECTOR)]
)
def test_the_rate_holds(what: str, options: dict[str, object], each: int) -> None:
    drive = Drive(**options)
    drive.submit(what, each, 300)
    assert 10 <= len(drive.done) <= 11  # a tenth of a second's worth comes at once
    drive.clock.step(1 * S)
    assert 110 <= len(drive.done) <= 112
    drive.clock.step(10 * S)
    assert len(drive.done) == 300
    assert drive.backend.stats.in_flight == 0
    assert 2.8 * S <= drive.done[-1][1] <= 2.95 * S
    times = [when for _, when in drive.done]
    assert times == sorted(times)


def test_a_burst_rate_lets_a_second_of_it_come_at_once() -> None:
    drive = Drive(throttle_iops=10, throttle_iops_max=50)
    drive.submit("read", count=100)
    assert 50 <= len(drive.done) <= 51
    drive.clock.step(1 * S)
    assert 60 <= len(drive.done) <= 61


def test_reads_and_writes_apart() -> None:
    drive = Drive(throttle_iops_write=10)
    drive.submit("write", count=5)
    drive.submit("read", count=50)
    assert [what for what, _ in drive.done].count("read") == 50
    assert [what for what, _ in drive.done].count("write") == 2


def test_the_total_counts_both() -> None:
    drive = Drive(throttle_iops=100)
    drive.submit("write", count=100)
    drive.submit("read", count=100)
    drive.clock.step(S)
    assert 110 <= len(drive.done) <= 112
    assert {what for what, _ in drive.done} == {"read", "write"}
    drive.clock.step(2 * S)
    assert len(drive.done) == 200


def test_one_larger_than_all_is_let_through_and_the_next_one_waits_for_it() -> None:
    drive = Drive(throttle_bps=10 * SECTOR)
    drive.submit("write", 100 * SECTOR)
    drive.submit("write")
    assert len(drive.done) == 1
    drive.clock.step(9 * S)
    assert len(drive.done) == 1
    drive.clock.step(1 * S)
    assert len(drive.done) == 2


def test_flushes_are_not_limited() -> None:
    drive = Drive(throttle_iops=1)
    drive.submit("write", count=3)
    result = Result()
    drive.backend.aio_flush(result)
    assert result.values == [0]


def test_drain_does_not_wait_for_guest_time() -> None:
    drive = Drive(throttle_iops=10)
    drive.submit("read", count=50)
    assert len(drive.done) == 2
    drive.backend.drain()
    assert len(drive.done) == 50
    drive.submit("read", count=5)  # and afterwards the limit holds again
    drive.submit("read", count=5)
    assert len(drive.done) == 50
    drive.clock.step(S)
    assert len(drive.done) == 60


def test_a_growth_does_not_wait_for_guest_time() -> None:
    """It waits for who writes the last sector: as a drain it lets them through."""
    drive = Drive(throttle_iops=10)
    drive._sector = drive.backend.sectors - 20
    drive.submit("write", count=20)
    assert len(drive.done) == 2
    grown: list[bool] = []
    thread = threading.Thread(target=lambda: grown.append(drive.backend.resize((1 << 30) + SECTOR)), daemon=True)
    thread.start()
    thread.join(20)
    assert grown == [True]
    assert len(drive.done) == 20
    drive.submit("read", count=5)  # and afterwards the limit holds again
    assert len(drive.done) < 25


def test_drain_lets_through_what_callbacks_submit_meanwhile() -> None:
    drive = Drive(throttle_iops=10)
    left = [20]

    def callback(ret: int) -> None:
        left[0] -= 1
        if left[0]:
            drive.backend.aio_readv(0, [memoryview(bytearray(512))], callback)

    drive.backend.aio_readv(0, [memoryview(bytearray(512))], callback)
    assert left == [18]
    drive.backend.drain()
    assert left == [0]


def test_cancel_of_one_that_waits() -> None:
    drive = Drive(throttle_iops=1)
    drive.submit("read")
    results = [Result() for _ in range(3)]
    requests = [drive.backend.aio_readv(0, [memoryview(bytearray(512))], result) for result in results]
    assert [result.values for result in results] == [[], [], []]
    requests[1].cancel()
    assert results[1].values == []
    drive.loop.run()
    assert results[0].values == []
    assert results[1].values == [-ECANCELED]
    drive.clock.step(2 * S)
    assert results[0].values == results[2].values == [0]
    requests[2].cancel()
    drive.loop.run()
    assert results[2].values == [0]


def test_an_exception_of_one_callback_leaves_the_others_alone() -> None:
    drive = Drive(throttle_iops=100, throttle_iops_max=100)
    drive.submit("read", count=102)
    served = len(drive.done)

    def callback(ret: int) -> None:
        raise ZeroDivisionError

    drive.backend.aio_readv(0, [memoryview(bytearray(512))], callback)
    drive.submit("read", count=3)
    with pytest.raises(ZeroDivisionError):
        drive.clock.step(5 * S)
    drive.clock.step(5 * S)
    drive.loop.run()
    assert len(drive.done) == 105 > served
    assert drive.backend.stats.in_flight == 0


def test_a_bucket_leaks_whole_numbers() -> None:
    bucket = Bucket(3, 0)
    bucket.add(1)
    assert bucket.wait_ns() == (S - 3 * S // 10) // 3 + 1
    bucket.leak(bucket.wait_ns())
    assert bucket.wait_ns() == 0
    bucket.leak(100 * S)
    assert bucket.wait_ns() == 0
