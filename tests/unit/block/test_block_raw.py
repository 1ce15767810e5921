"""The raw format: windows, short transfers, sizes that are no whole sectors."""

from __future__ import annotations

from errno import EIO, ENOSPC, ENOTSUP

import pytest
from block_drives import MemoryProtocol, run

from pyvmm.block.formats.raw import RawDriver

DATA = bytes(range(256)) * 8


def views(*lengths: int) -> list[memoryview]:
    return [memoryview(bytearray(b"\xee" * length)) for length in lengths]


def joined(iov: list[memoryview]) -> bytes:
    return b"".join(bytes(view) for view in iov)


@pytest.mark.parametrize("most", [1 << 30, 1000, 512, 100, 1])
@pytest.mark.parametrize("lengths", [(512,), (512, 512), (1, 1000, 23), (0, 1024)])
def test_short_transfers_go_on(most: int, lengths: tuple[int, ...]) -> None:
    file = MemoryProtocol(DATA, most)
    raw = RawDriver(file, 0, len(DATA))
    iov = views(*lengths)
    assert run(raw.co_readv(256, iov, sum(lengths))) == 0
    assert joined(iov) == DATA[256 : 256 + sum(lengths)]
    out = [memoryview(bytes([5]) * length) for length in lengths]
    assert run(raw.co_writev(512, out, sum(lengths), True)) == 0
    assert file.data == DATA[:512] + bytes([5]) * sum(lengths) + DATA[512 + sum(lengths) :]
    assert all(call[3] for call in file.calls if call[0] == "write")


def test_a_read_past_the_end_of_the_file_gives_zeros() -> None:
    raw = RawDriver(MemoryProtocol(DATA[:700]), 0, 1024)  # somebody has cut the file since
    iov = views(600, 424)
    assert run(raw.co_readv(0, iov, 1024)) == 0
    assert joined(iov) == DATA[:700] + bytes(324)


def test_the_missing_part_of_the_last_sector_reads_as_zeros_and_is_not_written() -> None:
    file = MemoryProtocol(DATA[:700])
    raw = RawDriver(file, 0, 700)
    iov = views(512)
    assert run(raw.co_readv(512, iov, 512)) == 0
    assert joined(iov) == DATA[512:700] + bytes(324)
    assert run(raw.co_writev(512, [memoryview(b"x" * 512)], 512, False)) == 0
    assert file.data == DATA[:512] + b"x" * 188


def test_a_window_shows_nothing_of_what_is_around_it() -> None:
    file = MemoryProtocol(DATA)
    raw = RawDriver(file, 100, 600)
    iov = views(512, 512)
    assert run(raw.co_readv(0, iov, 1024)) == 0
    assert joined(iov) == DATA[100:700] + bytes(424)
    assert run(raw.co_writev(512, [memoryview(b"x" * 512)], 512, False)) == 0
    assert file.data == DATA[:612] + b"x" * 88 + DATA[700:]
    assert run(raw.co_write_zeroes(0, 1024, False, True)) == 0
    assert run(raw.co_discard(0, 1024)) == 0
    assert file.calls[-2:] == [("zeroes", 100, 600, False, True), ("discard", 100, 600)]
    assert file.data == DATA[:100] + bytes(600) + DATA[700:]


def test_nothing_of_a_request_behind_the_end_reaches_the_file() -> None:
    file = MemoryProtocol(DATA[:512])
    raw = RawDriver(file, 0, 512)
    iov = views(512)
    assert run(raw.co_readv(512, iov, 512)) == 0
    assert joined(iov) == bytes(512)
    assert run(raw.co_writev(512, iov, 512, False)) == 0
    assert run(raw.co_discard(512, 512)) == 0
    assert run(raw.co_write_zeroes(512, 512, True, False)) == 0
    assert file.calls == []


def test_a_write_without_progress_is_no_space() -> None:
    file = MemoryProtocol(DATA)
    raw = RawDriver(file, 0, len(DATA))
    file.results = [0]
    assert run(raw.co_writev(0, [memoryview(bytes(512))], 512, False)) == -ENOSPC
    file.results = [100, 0]
    assert run(raw.co_writev(0, [memoryview(bytes(512))], 512, False)) == -ENOSPC


@pytest.mark.parametrize("before", [[], [100]])
def test_errors_come_through(before: list[int]) -> None:
    file = MemoryProtocol(DATA)
    raw = RawDriver(file, 0, len(DATA))
    file.results = [*before, -EIO]
    assert run(raw.co_readv(0, views(512), 512)) == -EIO
    file.results = [*before, -ENOSPC]
    assert run(raw.co_writev(0, views(512), 512, False)) == -ENOSPC
    file.results = [-EIO]
    assert run(raw.co_flush()) == -EIO


def test_a_discard_that_the_host_cannot_do_is_done() -> None:
    file = MemoryProtocol(DATA)
    raw = RawDriver(file, 0, len(DATA))
    file.results = [-ENOTSUP]
    assert run(raw.co_discard(0, 512)) == 0
    file.results = [-EIO]
    assert run(raw.co_discard(0, 512)) == -EIO


def test_it_says_how_its_offsets_lie_in_the_blocks_of_the_file() -> None:
    file = MemoryProtocol(DATA)
    file.alignment = 512
    raw = RawDriver(file, 700, 1024)
    assert (raw.alignment, raw.skew) == (512, 188)
    raw.close()
    assert file.closed
