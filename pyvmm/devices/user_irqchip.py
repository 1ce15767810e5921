"""A PC's interrupt controllers in Python, wired up: the PIC pair, the I/O APIC and the local APIC of one processor.

For machines without KVM's irqchip, and for those without KVM. The wires are the ones KVM's default routing has: ISA
interrupt n reaches input n of the PIC pair and pin n of the I/O APIC, but the timer's goes to pin 2 there, and nothing
else does; from 16 on there is only the I/O APIC. The pair's INTR is the local APIC's LINT0.
"""

from __future__ import annotations

from pyvmm.devices.apic_bus import ApicBus
from pyvmm.devices.i8259 import I8259Pair
from pyvmm.devices.ioapic import PINS, Ioapic
from pyvmm.devices.irq_pins import ControllerPins, IrqPins
from pyvmm.devices.lapic import Lapic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock

ISA_IRQS = 16
TIMER, TIMER_PIN = 0, 2


class UserIrqchip:
    """``on_output(level)`` is called when the processor's interrupt request changes, from any thread, under locks of
    the controllers: it takes none itself. The processor then calls ``acknowledge()``.

    ``pic``, ``ioapic`` and ``lapic`` are Devices to be mapped, reset and saved each for itself. ``controllers`` has
    the pins of "pic" and "ioapic", for whoever wants to watch them.
    """

    def __init__(self, clock: Clock, on_output: Callable[[int], None] | None = None) -> None:
        self.bus = ApicBus()
        self._intr = IrqPins(1, lambda _n, level: self.lapic.set_lint(0, level))
        self.pic = I8259Pair(lambda level: self._intr.set(0, level))
        self.ioapic = Ioapic(self.bus)
        self.lapic = Lapic(self.bus, clock, on_output=on_output, acknowledge_pic=self.pic.acknowledge)
        self._on_end: dict[int, Callable[[], None]] = {}
        self.pic.on_end = self._ended
        self.bus.on_end = lambda pin: self._ended(TIMER if pin == TIMER_PIN else pin)
        self._pic_inputs = IrqPins(ISA_IRQS, self.pic.set)
        # The I/O APIC's are watched where the board's wires start: the timer as 0.
        self._ioapic_inputs = IrqPins(PINS, self._set_ioapic)
        self.controllers = {
            "pic": ControllerPins(self._pic_inputs, self._intr),
            "ioapic": ControllerPins(self._ioapic_inputs),
        }

    def _set_ioapic(self, n: int, level: int) -> None:
        if n != TIMER_PIN:
            self.ioapic.set(TIMER_PIN if n == TIMER else n, level)

    def set(self, gsi: int, level: int) -> None:
        """Global system interrupt ``gsi`` (0..23) moves to ``level`` (0 or 1). From any thread."""
        if gsi < ISA_IRQS:
            self._pic_inputs.set(gsi, level)
        self._ioapic_inputs.set(gsi, level)

    def message(self, address: int, data: int) -> bool:
        """A message-signalled interrupt. From any thread. Whether a local APIC took it."""
        return self.bus.message(address, data)

    def watch_end(self, gsi: int, on_end: Callable[[], None] | None) -> None:
        """Have ``on_end()`` called each time the guest ends the interrupt of ``gsi`` at either controller, before that
        looks at the pin again. It may drive lines.
        """
        if on_end is None:
            self._on_end.pop(gsi, None)
        else:
            self._on_end[gsi] = on_end
        if gsi < ISA_IRQS:
            self.pic.watch_end(gsi, on_end is not None)
        if gsi != TIMER_PIN:
            self.ioapic.watch_end(TIMER_PIN if gsi == TIMER else gsi, on_end is not None)

    def _ended(self, gsi: int) -> None:
        on_end = self._on_end.get(gsi)
        if on_end is not None:
            on_end()

    @property
    def output(self) -> int:
        """Level of the processor's interrupt request."""
        return self.lapic.output

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector, or -1 where none is left."""
        return self.lapic.acknowledge()
