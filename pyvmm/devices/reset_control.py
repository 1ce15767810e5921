"""The reset control register, port 0xcf9: what the FADT names as RESET_REG and kernels try as "PCI reset".

Intel 82371SB (PIIX3) data sheet, "RC - Reset Control Register".
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SYSTEM_RESET = 0x02  # hard rather than soft: the same thing for a machine without power rails
RESET_CPU = 0x04  # its rising edge resets
FULL_RESET = 0x08  # with a power cycle (ICH and later)
KEPT = SYSTEM_RESET | RESET_CPU | FULL_RESET


class ResetControl(Device):
    """Port 0xcf9: map 1 byte. ``on_reset()`` is called on the guest's vCPU thread with ``lock`` held."""

    impl_sizes = (1, 1)

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        rising = value & ~self._value & RESET_CPU
        self._value = value & KEPT
        if rising:
            self._on_reset()

    def reset(self) -> None:
        self._value = 0

    STATE = {"_value": 4}
