"""Lists of memoryviews: parts of them, filling them with zeros, looking for zeros. Views made here are released here.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

ZEROS = bytes(65536)


class IovSlice:
    """``iov`` from byte ``start`` to ``end``, as a list of views of its own: ``with IovSlice(...) as part``."""

    __slots__ = ("_parts",)

    def __init__(self, iov: Sequence[memoryview], start: int, end: int) -> None:
        parts: list[memoryview] = []
        self._parts = parts
        position = 0
        for view in iov:
            after = position + len(view)
            if after > start and position < end:
                parts.append(view[max(0, start - position) : min(after, end) - position])
            position = after
            if position >= end:
                break

    def __enter__(self) -> list[memoryview]:
        return self._parts

    def __exit__(self, *exc: object) -> None:
        for view in self._parts:
            view.release()


def iov_length(iov: Sequence[memoryview]) -> int:
    """Bytes in all."""
    if len(iov) == 1:
        return len(iov[0])
    length = 0
    for view in iov:
        length += len(view)
    return length


def fill_zeros(iov: Sequence[memoryview], start: int, end: int) -> None:
    """Zeros from byte ``start`` to ``end``."""
    with IovSlice(iov, start, end) as parts:
        for view in parts:
            for begin in range(0, len(view), len(ZEROS)):
                count = min(len(ZEROS), len(view) - begin)
                view[begin : begin + count] = ZEROS[:count]


def all_zeros(iov: Sequence[memoryview]) -> bool:
    """Whether there is no other byte. It looks at the ends first: data that is not zero mostly shows there."""
    for view in iov:
        if len(view) and (view[0] or view[-1]):
            return False
    for view in iov:
        for begin in range(0, len(view), len(ZEROS)):
            with view[begin : begin + len(ZEROS)] as piece:
                if piece.tobytes() != (ZEROS if len(piece) == len(ZEROS) else ZEROS[: len(piece)]):
                    return False
    return True
