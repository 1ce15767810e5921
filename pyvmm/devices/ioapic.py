"""The I/O APIC: 24 interrupt pins in, messages to local APICs out. Intel 82093AA data sheet (290566-001).

Pins carry "asserted" and "not asserted": a redirection entry's polarity is kept for whoever reads it and changes
nothing, as with KVM and QEMU, whose guests program it as the tables say while the devices drive one kind of level.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.apic_bus import FIXED, LOWEST_PRIORITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.apic_bus import ApicBus

PINS = 24
VERSION = 0x11

# The two registers in memory (data sheet, 3.1).
IOREGSEL = 0x00
IOWIN = 0x10

# The registers behind them (3.2).
IOAPICID, IOAPICVER, IOAPICARB, IOREDTBL = 0x00, 0x01, 0x02, 0x10
ID_SHIFT = 24
ID_MASK = 0xF
MAX_ENTRY_SHIFT = 16

# A redirection entry.
VECTOR = 0xFF
MODE_SHIFT = 8
MODE = 7
LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14  # level: a local APIC has it and has not told its end yet
LEVEL = 1 << 15
MASKED = 1 << 16
DESTINATION_SHIFT = 56
LOW_HALF = 0xFFFF_FFFF
# Bit 12, delivery status, always reads "idle": a message takes no time here.
WRITABLE = 0xFF << DESTINATION_SHIFT | 0x1_AFFF


def is_level(entry: int) -> bool:
    """Level triggered; only interrupts with a vector can be (3.2.4, "Delivery Mode")."""
    return bool(entry & LEVEL) and entry >> MODE_SHIFT & MODE in (FIXED, LOWEST_PRIORITY)


class Ioapic(Device):
    """Map its page, 4 KiB: offsets without a register read as 0. ``set(pin, level)`` moves a pin."""

    valid_sizes = (1, 8)

    def __init__(self, bus: ApicBus) -> None:
        self._bus = bus
        self._watched = 0  # a bit for each pin whose end of interrupt somebody waits for
        self.lines = 0  # levels of the pins: they belong to whoever drives them, and outlive a reset
        self._power_on()
        bus.ioapics.append(self)

    def _power_on(self) -> None:
        self.id = 0
        self._select = 0
        self.table = [MASKED] * PINS

    # Registers

    def read(self, offset: int, size: int) -> int:
        with self._bus.lock:
            if offset == IOREGSEL:
                return self._select
            return self._read_register(self._select) if offset == IOWIN else 0

    def _read_register(self, index: int) -> int:
        if index in (IOAPICID, IOAPICARB):
            return self.id << ID_SHIFT
        if index == IOAPICVER:
            return PINS - 1 << MAX_ENTRY_SHIFT | VERSION
        pin, high = divmod(index - IOREDTBL, 2)
        if 0 <= pin < PINS:
            return self.table[pin] >> 32 * high & LOW_HALF
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        with self._bus.lock:
            if offset == IOREGSEL:
                self._select = value & 0xFF
            elif offset == IOWIN and size == 4:  # the only size the data sheet knows here
                self._write_register(self._select, value)

    def _write_register(self, index: int, value: int) -> None:
        if index == IOAPICID:
            self.id = value >> ID_SHIFT & ID_MASK
            return
        pin, high = divmod(index - IOREDTBL, 2)
        if not 0 <= pin < PINS:
            return
        mask = LOW_HALF << 32 * high & WRITABLE
        entry = self.table[pin] & ~mask | value << 32 * high & mask
        if not entry & LEVEL:
            # What an APIC of this version offers to those who want to end an interrupt by hand: make it edge
            # triggered for a moment.
            entry &= ~REMOTE_IRR
        self.table[pin] = entry
        self._service(pin)

    # Pins

    def set(self, pin: int, level: int) -> None:
        """Pin ``pin`` (0..23) moves to ``level``. From any thread."""
        with self._bus.lock:
            bit = 1 << pin
            rising = level and not self.lines & bit
            self.lines = self.lines | bit if level else self.lines & ~bit
            entry = self.table[pin]
            if is_level(entry):
                self._service(pin)
            elif rising and not entry & MASKED:
                # An edge on a masked pin is lost (3.2.4, "Interrupt Mask").
                self._send(entry)

    def _service(self, pin: int) -> None:
        """A level-triggered pin that is asserted sends, once until the end of interrupt comes back."""
        entry = self.table[pin]
        idle = is_level(entry) and not entry & (MASKED | REMOTE_IRR)
        if idle and self.lines >> pin & 1 and self._send(entry):
            self.table[pin] |= REMOTE_IRR

    def service_all(self) -> None:
        for pin in range(PINS):
            self._service(pin)

    def _send(self, entry: int) -> bool:
        return self._bus.deliver(
            entry >> DESTINATION_SHIFT,
            bool(entry & LOGICAL),
            entry >> MODE_SHIFT & MODE,
            entry & VECTOR,
            is_level(entry),
        )

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC's EOI message, with the bus's lock held. A pin still asserted sends again."""
        for pin, entry in enumerate(self.table):
            if entry & REMOTE_IRR and entry & VECTOR == vector:
                self.table[pin] &= ~REMOTE_IRR
                if self._watched >> pin & 1:
                    self._bus.ended.append((self, pin))  # serviced when that has been told
                else:
                    self._service(pin)

    def watch_end(self, pin: int, watch: bool) -> None:
        """Whether the bus's ``on_end`` is to be told of ``pin``."""
        with self._bus.lock:
            self._watched = self._watched | 1 << pin if watch else self._watched & ~(1 << pin)

    def told(self, pin: int) -> None:
        """Whoever waited for the end of its interrupt knows. A pin still asserted sends again."""
        with self._bus.lock:
            self._service(pin)

    # The contract

    def reset(self) -> None:
        with self._bus.lock:
            self._power_on()

    STATE = {"id": 4, "_select": 8, "table": ("list", 64, PINS), "lines": PINS}

    def save(self) -> dict[str, Any]:
        with self._bus.lock:
            return super().save()

    def load(self, state: dict[str, Any]) -> None:
        with self._bus.lock:
            super().load(state)
