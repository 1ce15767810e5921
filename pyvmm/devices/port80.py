"""Port80: the POST code port. Firmware tells there how far it got, kernels write to it to wait a moment.

On a PC/AT it is a spare byte of the DMA page registers (PC/AT Technical Reference), and can be read back.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.light import deque

HISTORY = 256


class Port80(Device):
    """Map 1 byte. ``last`` is the last code, ``history`` the latest ones, oldest first (``count`` of them all).
    """

    impl_sizes = (1, 1)

    __slots__ = ("count", "history", "last")

    def __init__(self, history: int = HISTORY) -> None:
        """``history``: how many codes to keep."""
        self.last = 0
        self.count = 0
        self.history: deque[int] = deque(maxlen=history)

    def read(self, offset: int, size: int) -> int:
        return self.last

    def write(self, offset: int, size: int, value: int) -> None:
        self.last = value
        self.count += 1
        self.history.append(value)

    def reset(self) -> None:
        """The byte is zero again. The history stays: it tells what led to the reset."""
        with self.lock:
            self.last = 0

    STATE = {"last": 8, "count": 64, "history": ("list", 8, 0, HISTORY)}
