"""DebugExit: QEMU's isa-debug-exit: a guest, a test mostly, ends the machine with a status of its own.

Value v makes the VMM exit with (v << 1) | 1: odd, so that it is never taken for a status of the VMM itself.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class DebugExit(Device):
    """Map 4 bytes. A write of 1, 2 or 4 bytes at any offset calls ``on_exit(value)`` on the vCPU's thread."""

    unaligned = True

    __slots__ = ("_on_exit",)

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value)
