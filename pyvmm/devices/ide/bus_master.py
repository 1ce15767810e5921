"""BusMaster: one channel's half of a bus master IDE function, the 8 ports that move data without the processor.

"Programming Interface for Bus Master IDE Controller", revision 1.0, section 2, as in Intel's 82371SB (PIIX3); PRD
tables are prd_table.pyx's. Where they are silent QEMU's behaviour: the direction bit is kept and otherwise ignored, the
command says which way the data goes; a table that is too short for the command moves nothing.

How a transfer ended shows in the status register: (INTERRUPT, ACTIVE) is (1, 0) where the table had exactly the
command's length, (1, 1) where it was longer, (0, 0) where it was too short, or, with ERROR, not all in RAM.

A function that may not be bus master moves nothing, and a command waits until it may (PCI 3.0, 6.2.2). One exception is
as in QEMU, whose ide-test would else wait for ever: where the guest sets the start bit for a read, the read ends. The
PRD table then reads as zeros, which are entries of 64 KiB without a last one, and the data is lost. A write waits all
the same: the disk would get zeros.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.ide.prd_table import pieces_of
from pyvmm.devices.ide.registers import (
    BM_ACTIVE,
    BM_COMMAND,
    BM_DRIVES_CAN_DMA,
    BM_ERROR,
    BM_INTERRUPT,
    BM_PRD_TABLE,
    BM_START,
    BM_STATUS,
    BM_TO_MEMORY,
)
from pyvmm.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.device import DeviceLock
    from pyvmm.guest_memory import GuestMemory

    class Transfer(Protocol):
        """A drive's activity that moves data by DMA."""

        @property
        def to_memory(self) -> bool: ...
        def begin(self) -> None: ...
        def stop(self) -> None: ...

PRD_BYTES = 8
PRD_LONGEST_BYTES = 0x10000
TABLE_BOUNDARY_BYTES = 0x10000  # a table lies inside one such block


class BusMaster(Device):
    """``transfer`` is the drive's DMA command, from its first moment; it begins when the guest sets the start bit."""

    __slots__ = ("_enabled", "_memory", "_reaches", "_running", "command", "prd_table", "status", "transfer")

    def __init__(self, lock: DeviceLock, memory: GuestMemory) -> None:
        """``lock`` is the channel's: each calls the other."""
        object.__setattr__(self, "lock", lock)
        self._memory = memory
        self._enabled = True
        self.command = 0
        self.status = 0
        self.prd_table = 0
        self.transfer: Transfer | None = None
        self._running = False  # the transfer has begun
        self._reaches = True  # and it reaches memory: the function was bus master when it began

    @property
    def enabled(self) -> bool:
        """The PCI function may be bus master. Without that nothing moves; with it again, what waits goes on."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        with self.lock:
            self._enabled = enabled
            self._begin()

    # -- registers -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == 2:  # BM_STATUS
            return self.status
        registers = self.command | self.status << 16 | self.prd_table << 32
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == BM_PRD_TABLE and size == 4:
            self.prd_table = value & 0xFFFF_FFFC
            return
        if size == 1:
            self._write_byte(offset, value)
            return
        # From the top: a start must not have its interrupt cleared by the status byte of the same write.
        for n in reversed(range(size)):
            self._write_byte(offset + n, value >> 8 * n & 0xFF)

    def _write_byte(self, offset: int, value: int) -> None:
        if offset >= BM_PRD_TABLE:
            shift = 8 * (offset - BM_PRD_TABLE)
            self.prd_table = (self.prd_table & ~(0xFF << shift) | value << shift) & 0xFFFF_FFFC
        elif offset == BM_COMMAND:
            changed = self.command ^ value
            self.command = value & (BM_START | BM_TO_MEMORY)
            if changed & BM_START:
                if value & BM_START:
                    self.status |= BM_ACTIVE
                    self._begin(by_start_bit=True)
                else:
                    self._stop()
        elif offset == BM_STATUS:
            kept = self.status & (BM_ACTIVE | BM_ERROR | BM_INTERRUPT) & ~(value & (BM_ERROR | BM_INTERRUPT))
            self.status = kept | value & BM_DRIVES_CAN_DMA

    def _stop(self) -> None:
        self.status &= ~BM_ACTIVE
        if self._running and self.transfer is not None:
            self.transfer.stop()

    # -- for the transfers ---------------------------------------------------------------------------------------------

    def attach(self, transfer: Transfer) -> None:
        """A command wants data moved. It begins at once where the guest has set the start bit already."""
        self.transfer = transfer
        self._running = False
        self._begin()

    def _begin(self, by_start_bit: bool = False) -> None:
        transfer = self.transfer
        if transfer is None or self._running or not self.status & BM_ACTIVE:
            return
        if self._enabled or (by_start_bit and transfer.to_memory):
            self._running = True
            self._reaches = self._enabled
            transfer.begin()

    def detach(self, transfer: Transfer) -> None:
        if self.transfer is transfer:
            self.transfer = None

    def end(self, transfer: Transfer, more: bool = False) -> None:
        """The command is over. ``more``: the table is not at its end, so the bus master stays active."""
        if self.transfer is transfer:
            self.transfer = None
            if not more:
                self.status &= ~BM_ACTIVE

    def gather(self, size: int, write: bool) -> tuple[list[memoryview], bool] | None:
        """The guest's memory for ``size`` bytes, by the PRD table, which is read here, once; and whether it is longer.

        ``write``: the memory is going to be written. None, and no longer active, where the table is too short, or where
        it or what it describes is not all in RAM.
        """
        if not self._reaches:
            return self._nowhere(size)
        view = self._memory.view
        try:
            pieces, missing_bytes, more = pieces_of(self._memory, self.prd_table, size)
            if not missing_bytes:
                return [view(address, length, write) for address, length in pieces], more
        except BusError:
            self.status |= BM_ERROR
        self.status &= ~BM_ACTIVE
        return None

    def _nowhere(self, size: int) -> tuple[list[memoryview], bool] | None:
        """As gather(), of a table of zeros from here to its boundary: memory that nobody looks at."""
        entries = (TABLE_BOUNDARY_BYTES - self.prd_table % TABLE_BOUNDARY_BYTES) // PRD_BYTES
        if size > entries * PRD_LONGEST_BYTES:
            self.status &= ~BM_ACTIVE
            return None
        lost = memoryview(bytearray(min(size, PRD_LONGEST_BYTES)))
        return [lost[: min(len(lost), size - at)] for at in range(0, size, len(lost))], True

    # -- state ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.command = 0
        self.status = 0
        self.prd_table = 0

    # Whether it is enabled the PCI function says too: the same.
    STATE = {
        "command": 8,
        "status": 7,
        "prd_table": 32,
        "_enabled": "flag",
        "_running": "flag",
        "_reaches": "flag",
    }

    def go_on(self, transfer: Transfer) -> None:
        """After a load: ``transfer`` is the one that was attached, and had begun or not."""
        self.transfer = transfer
        if self._running:
            transfer.begin()
        else:
            self._begin()
