"""A device for testing a VMM: the registers of QEMU's pc-testdev, which kvm-unit-tests drives.

As QEMU's hw/misc/pc-testdev.c behaves: one 32-bit latch seen through two windows, a register that makes the hypervisor
drop its mapping of a page, interrupt lines under the guest's own control, and a page range that is emulated memory.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.irq import IrqLine

IRQ_LINES = 24
MEMORY_BYTES = 0x10000
PAGE_MASK = 0xFFF


class LatchBytes(Device):
    """The second window on the latch (0xe8, 4 bytes): an access is taken apart into single bytes."""

    impl_sizes = (1, 1)

    def __init__(self, testdev: TestDev) -> None:
        self._testdev = testdev

    def read(self, offset: int, size: int) -> int:
        with self._testdev.lock:
            return self._testdev.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._testdev.lock:
            self._testdev.write(offset, size, value)


class FlushPort(Device):
    """0xe4, 4 bytes, write only: an address in the page whose mapping the hypervisor is to drop."""

    valid_sizes = (4, 4)

    def __init__(self, flush_page: Callable[[int], None]) -> None:
        self._flush_page = flush_page

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        try:
            self._flush_page(value & ~PAGE_MASK)
        except BusError:
            pass  # no RAM there: nothing is mapped, so nothing is to drop


class IrqPorts(Device):
    """0x2000, 24 bytes, write only: byte n is GSI n's level."""

    valid_sizes = (1, 1)

    def __init__(self, lines: Sequence[IrqLine]) -> None:
        self._lines = lines

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._lines[offset].set(value)

    def reset(self) -> None:
        with self.lock:
            for line in self._lines:
                line.lower()

    STATE = {"_levels": IRQ_LINES}

    @property
    def _levels(self) -> int:
        return sum(line.level << n for n, line in enumerate(self._lines))

    @_levels.setter
    def _levels(self, levels: int) -> None:
        self._loaded_levels = levels

    def after_load(self) -> None:
        with self.lock:
            for n, line in enumerate(self._lines):
                line.set(self._loaded_levels >> n & 1)


class TestDev(Device):
    """The latch, and the owner of the other parts. Map

    - itself at 0xe0, 4 bytes: the latch, accesses of 1, 2 or 4 bytes as they come;
    - ``flush`` at 0xe4, 4 bytes; ``latch_bytes`` at 0xe8, 4 bytes; ``irqs`` at 0x2000, 24 bytes;
    - ``memory``, a bytearray of 64 KiB, as a BufferRegion at 0xff000000.

    ``flush_page(gpa)`` takes a page's guest-physical address and may raise BusError where there is no RAM.
    ``lines`` are those of GSI 0 to 23. State is saved, loaded and reset here for all parts.
    """

    __test__ = False  # to pytest the name looks like a test

    def __init__(self, flush_page: Callable[[int], None], lines: Sequence[IrqLine]) -> None:
        self._latch = 0
        self.latch_bytes = LatchBytes(self)
        self.flush = FlushPort(flush_page)
        self.irqs = IrqPorts(lines)
        self.memory = bytearray(MEMORY_BYTES)

    def read(self, offset: int, size: int) -> int:
        return self._latch >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        mask = ((1 << 8 * size) - 1) << 8 * offset
        self._latch = self._latch & ~mask | value << 8 * offset & mask

    def reset(self) -> None:
        with self.lock:
            self._latch = 0
            # In place: the region holds this very buffer.
            self.memory[:] = bytes(MEMORY_BYTES)
        self.irqs.reset()

    STATE = {"_latch": 32, "memory": ("bytes", MEMORY_BYTES), "irqs": "part"}

    def after_load(self) -> None:
        self.irqs.after_load()
