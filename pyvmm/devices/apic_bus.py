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
    from pyvmm.devices.ioapic import Ioapic
    from pyvmm.devices.lapic import Lapic

# Delivery modes, as in bits 10..8 of an ICR, an LVT entry or a redirection entry.
FIXED, LOWEST_PRIORITY, SMI, RESERVED, NMI, INIT, STARTUP, EXTINT = range(8)

BROADCAST = 0xFF  # as a destination, physical or logical
LOWEST_VECTOR = 16  # vectors below belong to exceptions


class ApicBus:
    """Who hears whom. APICs put themselves on it when they are made."""

    def __init__(self) -> None:
        self.lock = DeviceLock()
        self.lapics: list[Lapic] = []
        self.ioapics: list[Ioapic] = []

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
