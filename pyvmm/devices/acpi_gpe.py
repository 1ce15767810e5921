"""GpeBlock: ACPI's general-purpose events, by which a machine tells its guest of things that have no bit of their own.

ACPI Specification 6.5, 4.8.4.1: a status bit, which a one written clears, and an enable bit for each event; one with
both makes an SCI. The guest then runs the method _Exx of \\_GPE, and clears the status (5.6.4.1).
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

EVENTS = 16


class GpeBlock(Device):
    """Sixteen events, status and enable of 2 bytes each: map 4 bytes of ports. ``pending(whether)`` hears whether one
    of them wants an SCI; it is called with ``lock`` held.
    """

    STATE = {"_status": EVENTS, "_enable": EVENTS}

    __slots__ = ("_enable", "_pending", "_status")

    def __init__(self, pending: Callable[[bool], object]) -> None:
        self._pending = pending
        self._status = 0
        self._enable = 0

    def read(self, offset: int, size: int) -> int:
        return (self._status | self._enable << EVENTS) >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        # Both as one number: any size at any offset touches the registers it covers, and only their bytes.
        mask = ((1 << 8 * size) - 1) << 8 * offset
        value = value << 8 * offset & mask
        self._status &= ~value
        self._enable = self._enable & ~(mask >> EVENTS) | value >> EVENTS
        self._update()

    def _update(self) -> None:
        self._pending(self._status & self._enable != 0)

    def happen(self, event: int) -> None:
        """The event has happened. From any thread."""
        with self.lock:
            self._status |= 1 << event
            self._update()

    def reset(self) -> None:
        with self.lock:
            self._status = self._enable = 0
            self._update()

    def after_load(self) -> None:
        with self.lock:
            self._update()
