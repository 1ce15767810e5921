"""Port92: system control port A of the PS/2, at port 0x92: a quick way to gate A20 and to reset the CPU.

IBM PS/2 Hardware Interface Technical Reference, "System control port A". The gate is only remembered: the
processors KVM runs have no A20 mask pin, and nothing of this century wants addresses to wrap at 1 MiB.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FAST_RESET = 0x01  # its rising edge resets
A20 = 0x02


class Port92(Device):
    """Map 1 byte. ``on_reset()`` is called on the vCPU's thread, ``on_a20(enabled)`` on each change of the gate.
    """

    impl_sizes = (1, 1)

    __slots__ = ("_on_a20", "_on_reset", "_value")

    def __init__(self, on_reset: Callable[[], None], on_a20: Callable[[bool], None] | None = None) -> None:
        self._on_reset = on_reset
        self._on_a20 = on_a20
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        changed = value ^ self._value
        self._value = value
        if changed & A20 and self._on_a20 is not None:
            self._on_a20(bool(value & A20))
        if changed & value & FAST_RESET:
            self._on_reset()

    def reset(self) -> None:
        """The gate stays as it is."""
        with self.lock:
            self._value &= ~FAST_RESET

    STATE = {"_value": 8}
