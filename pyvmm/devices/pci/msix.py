"""Msix: MSI-X, a function's interrupts as messages. PCI Local Bus Specification 3.0, 6.8.2.

The table and the pending bits are in a BAR, the control register in configuration space, whose owner tells of it by
``update``. The lock is the last to be taken: whoever interrupts may hold a queue's.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Message(Protocol):
        """irqfd.py's Msi."""

        @property
        def message(self) -> tuple[int, int] | None: ...
        def fire(self) -> bool: ...
        def change(self, address: int, data: int) -> None: ...

    class Signal(Protocol):
        """irqfd.py's IrqFd."""

        @property
        def fd(self) -> int: ...

    class Interrupts(Protocol):
        """Who sends them, and has eventfds that do."""

        def msi(self, address: int, data: int) -> Message: ...
        def irqfd(self, message: Message) -> Signal | None: ...

ENTRY_BYTES = 16
MASKED = 1  # of an entry's vector control
ENABLE = 0x8000  # of the control register
FUNCTION_MASK = 0x4000
BAR_BYTES = 0x1000
PENDING = 0x800  # where the pending bits are in the BAR
MOST = PENDING // ENTRY_BYTES


class Msix(Device):
    """``count`` vectors. ``changed()`` is called when what ``fd`` says of one may be different, with no lock held."""

    valid_sizes = (4, 8)
    impl_sizes = (4, 4)

    def __init__(self, count: int, interrupts: Interrupts, changed: Callable[[], object]) -> None:
        if not 1 <= count <= MOST:
            raise ConfigError(f"{count} MSI-X vectors: give 1 to {MOST}")
        self.count = count
        self.enabled = False
        self._function_masked = False
        self._interrupts = interrupts
        self._changed = changed
        self._table = bytearray(count * ENTRY_BYTES)
        self._pending = 0
        self._messages: list[Message | None] = [None] * count
        self._signals: list[Signal | None] = [None] * count
        self._sent = [(0, 0)] * count  # address and data of each message
        self._forget()
        self.STATE = {"_table": ("bytes", len(self._table)), "_pending": count}

    def _forget(self) -> None:
        self._table[:] = (bytes(12) + MASKED.to_bytes(4, "little")) * self.count
        self._pending = 0

    # -- interrupting: from any thread -------------------------------------------------------------------------------

    def notify(self, vector: int) -> None:
        """Send the message of ``vector``, or note that it is pending."""
        with self.lock:
            if vector >= self.count:
                return
            message = self._messages[vector]
            if self._open(vector) and message is not None:
                message.fire()
            else:
                self._pending |= 1 << vector

    def fd(self, vector: int) -> int:
        """The eventfd that sends the message of ``vector``; -1 while it must not be sent, and where there is none."""
        with self.lock:
            if vector >= self.count or not self._open(vector):
                return -1
            signal = self._signals[vector]
            return -1 if signal is None else signal.fd

    def _open(self, vector: int) -> bool:
        return self.enabled and not self._function_masked and not self._table[vector * ENTRY_BYTES + 12] & MASKED

    # -- the guest's side --------------------------------------------------------------------------------------------

    def update(self, control: int) -> None:
        """The control register has this value."""
        with self.lock:
            enabled, masked = bool(control & ENABLE), bool(control & FUNCTION_MASK)
            if (enabled, masked) == (self.enabled, self._function_masked):
                return
            self.enabled, self._function_masked = enabled, masked
            for vector in range(self.count):
                self._bring(vector)
        self._changed()

    def read_table(self, offset: int, size: int) -> int:
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        vector, at = divmod(offset, ENTRY_BYTES)
        with self.lock:
            if at == 12:
                value &= MASKED  # the rest is reserved
            new = value.to_bytes(4, "little")
            if self._table[offset : offset + 4] == new:
                return
            self._table[offset : offset + 4] = new
            self._bring(vector)
        self._changed()

    def read_pending(self, offset: int, size: int) -> int:
        with self.lock:
            return self._pending >> 8 * offset & (1 << 8 * size) - 1

    def write_pending(self, offset: int, size: int, value: int) -> None:
        """They are read-only."""

    def _bring(self, vector: int) -> None:
        """The lock is held: what ``vector`` sends is what the table says; and if it is pending and may be, it is sent.
        """
        if not self._open(vector):
            return
        at = vector * ENTRY_BYTES
        address = int.from_bytes(self._table[at : at + 8], "little")
        data = int.from_bytes(self._table[at + 8 : at + 12], "little")
        message = self._messages[vector]
        if message is None:
            message = self._messages[vector] = self._interrupts.msi(address, data)
            self._signals[vector] = self._interrupts.irqfd(message)
        elif (address, data) != self._sent[vector]:
            message.change(address, data)
        self._sent[vector] = address, data
        if self._pending >> vector & 1:
            self._pending &= ~(1 << vector)
            message.fire()

    # -- the machine's side ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self.lock:
            self._forget()

    def after_load(self) -> None:
        with self.lock:
            for vector in range(self.count):
                self._bring(vector)
        self._changed()
