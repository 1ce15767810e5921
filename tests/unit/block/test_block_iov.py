"""Parts of lists of views."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.block.iov import ZEROS, IovSlice, all_zeros, fill_zeros, iov_length
from pyvmm.block.protocols.bounce import BOUNCE_BYTES, BouncePool, copy_in, copy_out

PIECES = st.lists(st.binary(max_size=40), max_size=6)


@given(PIECES, st.integers(0, 250), st.integers(0, 250))
def test_a_slice_is_that_of_the_whole(pieces: list[bytes], start: int, end: int) -> None:
    iov = [memoryview(piece) for piece in pieces]
    whole = b"".join(pieces)
    assert iov_length(iov) == len(whole)
    with IovSlice(iov, start, end) as parts:
        kept = list(parts)
        assert b"".join(bytes(part) for part in parts) == whole[start:end]
    for part in kept:
        with pytest.raises(ValueError, match="released"):
            len(part)
    assert b"".join(bytes(view) for view in iov) == whole  # the caller's own are not


@given(PIECES, st.integers(0, 250), st.integers(0, 250))
def test_zeros_and_copies_go_where_they_should(pieces: list[bytes], start: int, end: int) -> None:
    iov = [memoryview(bytearray(piece)) for piece in pieces]
    whole = bytearray(b"".join(pieces))
    buffer = memoryview(bytearray(300))
    copy_in(buffer, 7, iov, start, end)
    assert bytes(buffer[7 : 7 + len(whole[start:end])]) == whole[start:end]
    fill_zeros(iov, start, end)
    length = len(whole[start:end])
    cleared = bytearray(whole)
    cleared[start : start + length] = bytes(length)
    assert b"".join(bytes(view) for view in iov) == cleared
    copy_out(buffer, 7, iov, start, end)
    assert b"".join(bytes(view) for view in iov) == whole


@pytest.mark.parametrize("length", [0, 1, 512, len(ZEROS) - 1, len(ZEROS), len(ZEROS) + 1, 3 * len(ZEROS) + 5])
def test_all_zeros(length: int) -> None:
    data = bytearray(length)
    assert all_zeros([memoryview(data), memoryview(bytes(3))])
    for place in {0, length // 3, length // 2, length - 1} if length else ():
        data[place] = 1
        assert not all_zeros([memoryview(bytes(3)), memoryview(data)])
        data[place] = 0


def test_bounce_buffers_are_used_again_and_closed() -> None:
    pool = BouncePool()
    first = pool.take()
    assert len(first.view) == BOUNCE_BYTES
    pool.give(first)
    assert pool.take() is first
    many = [pool.take() for _ in range(10)]
    for bounce in [first, *many]:
        pool.give(bounce)
    pool.close()
    for bounce in [first, *many]:
        with pytest.raises(ValueError, match="released"):
            len(bounce.view)
