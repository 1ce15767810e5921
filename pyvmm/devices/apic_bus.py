"""The APIC bus: how messages get from I/O APICs and local APICs to local APICs, and ends of interrupt back.

Intel 82093AA data sheet (290566-001), "APIC Bus Communication"; Intel SDM vol. 3, 11.6.2 (destinations) and 11.8
(handling). One lock, the bus's own, guards every APIC on it: a message moves the state of two at once. Each Device
takes it inside its own lock, never the other way round; the callbacks of a local APIC run under it and take no lock
of a device.
"""

from __future__ import annotations

from pyvmm.device import DeviceLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Ioapic(Protocol):
        """What the bus needs of an I/O APIC."""

        def end_of_interrupt(self, vector: int) -> None: ...
        def service_all(self) -> None: ...
        def told(self, pin: int) -> None: ...

    class Lapic(Protocol):
        """And of a local one."""

        @property
        def takes_interrupts(self) -> bool: ...
        @property
        def processor_priority(self) -> int: ...
        def is_addressed(self, destination: int, logical: bool) -> bool: ...
        def accept(self, mode: int, vector: int, level: bool) -> bool: ...

# Delivery modes, as in bits 10..8 of an ICR, an LVT entry or a redirection entry.
FIXED, LOWEST_PRIORITY, SMI, RESERVED, NMI, INIT, STARTUP, EXTINT = range(8)

# Message-signalled interrupts.
MESSAGE_AREA = 0xFEE  # the upper bits of the address
REDIRECTION_HINT, LOGICAL_DESTINATION = 1 << 3, 1 << 2  # of the address
MESSAGE_ASSERT, MESSAGE_LEVEL = 1 << 14, 1 << 15  # of the data

BROADCAST = 0xFF  # as a destination, physical or logical
LOWEST_VECTOR = 16  # vectors below belong to exceptions


class ApicBus:
    """Who hears whom. APICs put themselves on it when they are made."""

    def __init__(self) -> None:
        self.lock = DeviceLock()
        self.lapics: list[Lapic] = []
        self.ioapics: list[Ioapic] = []
        self.ended: list[tuple[Ioapic, int]] = []
        """Pins whose interrupt has ended and who waits for that has still to be told: ``tell_ended``."""
        self.on_end: Callable[[int], None] | None = None
        """Told the pin of an I/O APIC, with no lock of an APIC held: it may drive lines."""

    def tell_ended(self) -> None:
        """After an access that may have ended interrupts, with ``lock`` given back."""
        with self.lock:
            ended, self.ended = self.ended, []
        for ioapic, pin in ended:
            if self.on_end is not None:
                self.on_end(pin)
            ioapic.told(pin)

    def message(self, address: int, data: int) -> bool:
        """A message-signalled interrupt, from any thread. Whether anybody took it.

        SDM vol. 3, 11.11.1 (address: destination, redirection hint, destination mode) and 11.11.2 (data: vector,
        delivery mode, level, trigger mode). Another address is no message, and reaches nobody.
        """
        if address >> 20 != MESSAGE_AREA or (data & MESSAGE_LEVEL and not data & MESSAGE_ASSERT):
            return False
        mode = data >> 8 & 7
        if mode == FIXED and address & REDIRECTION_HINT:
            mode = LOWEST_PRIORITY
        with self.lock:
            return self.deliver(
                address >> 12 & 0xFF,
                bool(address & LOGICAL_DESTINATION),
                mode,
                data & 0xFF,
                bool(data & MESSAGE_LEVEL) and mode in (FIXED, LOWEST_PRIORITY),
            )

    # All of these with ``lock`` held.

    def deliver(self, destination: int, logical: bool, mode: int, vector: int, level: bool) -> bool:
        """A message to one address. Whether anybody took it."""
        return self.hand_over([a for a in self.lapics if a.is_addressed(destination, logical)], mode, vector, level)

    def hand_over(self, lapics: list[Lapic], mode: int, vector: int, level: bool) -> bool:
        """A message to all of ``lapics``, by lowest priority to one of them. Whether anybody took it."""
        if mode == LOWEST_PRIORITY:
            able = [a for a in lapics if a.takes_interrupts]
            lapics = [min(able, key=lambda a: a.processor_priority)] if able else []
        taken = [a.accept(mode, vector, level) for a in lapics]
        return any(taken)

    def end_of_interrupt(self, vector: int) -> None:
        """A processor is done with a level-triggered interrupt."""
        for ioapic in self.ioapics:
            ioapic.end_of_interrupt(vector)

    def retry(self) -> None:
        """A local APIC takes messages again: level-triggered requests that found nobody are sent once more."""
        for ioapic in self.ioapics:
            ioapic.service_all()
