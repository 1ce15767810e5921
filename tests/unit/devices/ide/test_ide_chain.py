"""Movers: splitting, iovs of any shape, finding the first bad sector, cancelling; and the depth of the stack."""

from __future__ import annotations

import sys
from errno import ECANCELED, EIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ide_bench import SECTOR, FakeBackend, pattern

from pyvmm.device import Device
from pyvmm.devices.ide.chain import Discards, Mover


def views(buffer: bytearray, sizes: list[int]) -> list[memoryview]:
    whole = memoryview(buffer)
    result = []
    at = 0
    for size in sizes:
        result.append(whole[at : at + size])
        at += size
    return result


class Run:
    """One mover, and how it ended."""

    def __init__(
        self,
        backend: FakeBackend,
        lba: int,
        iov: list[memoryview],
        count: int,
        *,
        write: bool = False,
        bad: bool = False,
    ):
        self.ends: list[tuple[int, int]] = []
        aio = backend.aio_writev if write else backend.aio_readv
        self.mover = Mover(
            Device().lock,
            aio,  # type: ignore[arg-type]
            lba,
            iov,
            count,
            lambda: self.ends.append((self.mover.moved, self.mover.ret)),
            bad,
        )
        self.mover.start()


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4000).map(lambda n: 2 * n), min_size=1, max_size=30),
    bad=st.sets(st.integers(0, 80), max_size=4),
    write=st.booleans(),
    spare=st.integers(0, 3),
)
def test_any_iov_and_any_bad_sectors(sizes: list[int], bad: set[int], write: bool, spare: int) -> None:
    count = max(0, sum(sizes) // SECTOR - spare)
    if not count:
        return
    backend = FakeBackend(pattern(count + 8))
    image = bytes(backend.data)
    backend.bad = {4 + n for n in bad}
    buffer = bytearray(sum(sizes))
    if write:
        buffer[:] = bytes(pattern(sum(sizes) // SECTOR + 1, seed=2)[: len(buffer)])
    run = Run(backend, 4, views(buffer, sizes), count, write=write)
    good = min([n for n in bad if n < count], default=count)
    assert run.ends == [(good, 0 if good == count else -EIO)]
    moved = image[4 * SECTOR : (4 + good) * SECTOR] if not write else bytes(buffer[: good * SECTOR])
    assert buffer[: good * SECTOR] == moved
    assert backend.data[4 * SECTOR : (4 + good) * SECTOR] == moved
    if write:
        assert backend.data[(4 + good) * SECTOR :] == image[(4 + good) * SECTOR :]


@pytest.mark.parametrize("piece", [2, 6, 10, 512, 514])
def test_no_request_has_more_pieces_than_preadv_takes(piece: int) -> None:
    """FakeBackend checks that."""
    count = 64
    pieces = -(-count * SECTOR // piece)
    buffer = bytearray(pieces * piece)
    backend = FakeBackend(pattern(count))
    run = Run(backend, 0, views(buffer, [piece] * pieces), count)
    assert run.ends == [(count, 0)]
    assert buffer[: count * SECTOR] == backend.data


@pytest.mark.parametrize("first", [2, 4, 100, 510])
@pytest.mark.parametrize("second", [2, 30])
def test_pieces_that_make_no_whole_sectors_where_a_request_ends(first: int, second: int) -> None:
    """The first 1024 of them end in the middle of a sector, whose beginning then waits for the next request."""
    count = 64
    sizes = [first, second, *[6] * (count * SECTOR // 6)]
    buffer = bytearray(sum(sizes))
    backend = FakeBackend(pattern(count))
    run = Run(backend, 0, views(buffer, sizes), count)
    assert run.ends == [(count, 0)]
    assert buffer[: count * SECTOR] == backend.data
    assert len(backend.log) > 1


def test_large_ones_are_split() -> None:
    backend = FakeBackend(pattern(5000))
    run = Run(backend, 0, [memoryview(bytearray(5000 * SECTOR))], 5000)
    assert run.ends == [(5000, 0)]
    assert [count for _, _, count in backend.log] == [2048, 2048, 904]


def test_what_failed_once_is_read_in_halves() -> None:
    backend = FakeBackend(pattern(64))
    run = Run(backend, 0, [memoryview(bytearray(64 * SECTOR))], 64, bad=True)
    assert run.ends == [(64, 0)]
    assert [count for _, _, count in backend.log] == [32, 16, 8, 4, 2, 1, 1]


def test_cancel_ends_it_after_the_request_under_way() -> None:
    for too_late in (False, True):
        backend = FakeBackend(pattern(5000))
        backend.held = True
        run = Run(backend, 0, [memoryview(bytearray(5000 * SECTOR))], 5000)
        run.mover.cancel()
        assert backend.waiting[0].cancelled
        backend.waiting[0].cancelled = not too_late
        backend.release()
        assert backend.waiting == []
        assert run.ends == [(2048 if too_late else 0, -ECANCELED)]


def test_a_thousand_requests_that_end_at_once_are_no_recursion() -> None:
    backend = FakeBackend(pattern(8))
    ends: list[int] = []
    chain = Discards(
        Device().lock,
        backend,  # type: ignore[arg-type]
        [(n % 8, 1) for n in range(1000)],
        lambda: ends.append(chain.ret),
    )
    limit = sys.getrecursionlimit()
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    sys.setrecursionlimit(depth + 60)
    try:
        chain.start()
    finally:
        sys.setrecursionlimit(limit)
    assert ends == [0]
    assert len(backend.log) == 1000


def test_requests_that_end_at_once_and_later_mixed() -> None:
    backend = FakeBackend(pattern(8))
    ends: list[int] = []
    ranges = [(n, 1) for n in range(8)]
    chain = Discards(Device().lock, backend, ranges, lambda: ends.append(chain.ret))  # type: ignore[arg-type]
    backend.held = True
    chain.start()
    backend.release()
    backend.held = False
    backend.release()
    assert ends == [0]
    assert backend.discarded == ranges
