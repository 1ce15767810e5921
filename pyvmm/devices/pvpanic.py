"""PvPanic: QEMU's pvpanic (docs/specs/pvpanic.rst): a guest's kernel says that it has panicked.

One port. Reading it tells which events may be said: bit 0, that the kernel has panicked; bit 1, that it has, and goes
on by itself into a kernel that saves what is left of it (kexec). Other bits do nothing.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PANICKED = 0x01
CRASH_LOADED = 0x02
EVENTS = PANICKED | CRASH_LOADED


class PvPanic(Device):
    """Map one byte. ``on_panic()`` and ``on_crash_loaded()`` are called on the vCPU's thread."""

    valid_sizes = (1, 1)

    __slots__ = ("_on_crash_loaded", "_on_panic")

    def __init__(self, on_panic: Callable[[], object], on_crash_loaded: Callable[[], object]) -> None:
        self._on_panic = on_panic
        self._on_crash_loaded = on_crash_loaded

    def read(self, offset: int, size: int) -> int:
        return EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PANICKED:
            self._on_panic()
        elif value & CRASH_LOADED:
            self._on_crash_loaded()
