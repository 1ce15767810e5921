"""DebugCon: the debug console of Bochs and QEMU (isa-debugcon), where SeaBIOS and OVMF write their logs.

A write sends one character. A read gives 0xe9, by which firmware knows that somebody listens.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev import Chardev

READBACK = 0xE9
LINE_BYTES = 1024  # a longer line goes out in pieces
NEWLINE = 10


class DebugCon(Device):
    """Map 1 byte. Characters are collected: ``chardev`` gets whole lines, an open one on reset and ``flush``.
    """

    valid_sizes = (1, 1)
    impl_sizes = (1, 1)

    __slots__ = ("_chardev", "_line", "readback")

    def __init__(self, chardev: Chardev, *, readback: int = READBACK) -> None:
        self._chardev = chardev
        self._line = bytearray()
        self.readback = readback

    def read(self, offset: int, size: int) -> int:
        return self.readback

    def write(self, offset: int, size: int, value: int) -> None:
        line = self._line
        line.append(value)
        if value == NEWLINE or len(line) >= LINE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what there is of the line: at the end of a run it may be the most telling one."""
        with self.lock:
            if self._line:
                data = bytes(self._line)
                self._line.clear()
                self._chardev.write(data)

    def reset(self) -> None:
        self.flush()

    STATE = {"_line": ("bytes", 0, LINE_BYTES - 1)}
