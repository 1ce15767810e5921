"""fallocate(2) with its modes: Python has posix_fallocate only. For workers; ctypes is imported by the first call."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

libc_fallocate: Callable[[int, int, int, int], int] | None = None


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """OSError where the kernel refuses. Nobody sees EINTR: the call is made again, as Python does by itself (PEP 475).
    """
    import ctypes
    from errno import EINTR

    global libc_fallocate
    if libc_fallocate is None:
        function = ctypes.CDLL(None, use_errno=True).fallocate
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int
        libc_fallocate = function
    while libc_fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """The bytes read as zeros, and their space is free."""
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """The bytes read as zeros, and there is space for them."""
    fallocate(fd, ZERO_RANGE | KEEP_SIZE, offset, length)
