"""PythonIrqchip: Irqchip with the interrupt controllers and the PIT of devices/, in Python."""

from __future__ import annotations

import os

from pyvmm.devices.i8254 import I8254
from pyvmm.devices.user_irqchip import UserIrqchip
from pyvmm.errors import BusError
from pyvmm.irqchip import Irqchip
from pyvmm.irqfd import Msi
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pyvmm.address_space import AddressSpace
    from pyvmm.clock import Clock
    from pyvmm.cpu_exec import CpuExec
    from pyvmm.device import Device
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.event_loop import EventLoop
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irqfd import IrqFd


class PythonIrqchip(Irqchip):
    """PIC pair, IOAPIC, the local APIC of one processor and the PIT, in Python; irqfds are the event loop's."""

    def __init__(self, clock: Clock, event_loop: EventLoop, memory: GuestMemory) -> None:
        super().__init__()
        self._memory = memory
        self._event_loop = event_loop
        self._processor: CpuExec | None = None
        self._chips = UserIrqchip(clock, self._interrupt)
        self._pit = I8254(clock, self.line(layout.IRQ_TIMER, "pit"))
        self._resampled: dict[int, list[IrqFd]] = {}

    @property
    def devices(self) -> Mapping[str, Device]:
        chips = self._chips
        return {"pic": chips.pic, "ioapic": chips.ioapic, "lapic": chips.lapic, "pit": self._pit}

    @property
    def controllers(self) -> Mapping[str, ControllerPins]:
        return self._chips.controllers

    def place(self, pio: AddressSpace, mmio: AddressSpace) -> None:
        chips, pit = self._chips, self._pit
        pio.map(layout.PORT_PIC_MASTER, 2, chips.pic.master, name="pic.master")
        pio.map(layout.PORT_PIC_SLAVE, 2, chips.pic.slave, name="pic.slave")
        pio.map(layout.PORT_PIC_ELCR, 2, chips.pic.elcr, name="pic.elcr")
        mmio.map(layout.IOAPIC, layout.IOAPIC_BYTES, chips.ioapic, name="ioapic")
        mmio.map(layout.LAPIC, layout.LAPIC_BYTES, chips.lapic, name="lapic")
        pio.map(layout.PORT_PIT, 4, pit, name="pit")
        pio.map(layout.PORT_SPEAKER, 1, pit.speaker, name="speaker")

    def attach(self, loop: CpuExec) -> None:
        loop.acknowledge = self._chips.acknowledge
        loop.on_tpr = self._chips.lapic.look_at_cpu
        self._chips.lapic.cpu = loop
        self._processor = loop

    def _interrupt(self, level: int) -> None:
        if self._processor is not None:
            self._processor.interrupt(level)

    def send(self, address: int, data: int) -> bool:
        return self._chips.message(address, data)

    def write(self, address: int, data: int) -> None:
        try:
            self._memory.write(address, data.to_bytes(4, "little"))
        except BusError:
            pass  # there is nothing

    def _sink(self, gsi: int) -> Callable[[int], object]:
        return lambda level: self._chips.set(gsi, level)

    def _connect(self, irqfd: IrqFd) -> None:
        target = irqfd.target
        if isinstance(target, Msi):
            interrupt: Callable[[], object] = target.fire
        elif irqfd.resample:
            irqfd.line = line = self._wires[target].line()
            interrupt = line.raise_
        else:
            interrupt = self._wires[target].line().pulse

        def on_signal() -> None:
            if irqfd.take():
                interrupt()

        self._event_loop.add_reader(irqfd.fd, on_signal)
        if not isinstance(target, Msi) and irqfd.resample:
            self._resampled[target] = [*self._resampled.get(target, ()), irqfd]
            self._chips.watch_end(target, lambda: self._resample(target))

    def _resample(self, gsi: int) -> None:
        """The guest has ended the interrupt: the irqfds' level goes down, and whoever still wants it writes again."""
        for irqfd in self._resampled.get(gsi, ()):
            if irqfd.line is not None and irqfd.resample_fd >= 0:
                irqfd.line.lower()
                os.eventfd_write(irqfd.resample_fd, 1)

    def _disconnect(self, irqfd: IrqFd) -> None:
        self._event_loop.remove_reader(irqfd.fd)
        if irqfd.line is not None and not isinstance(irqfd.target, Msi):
            gsi = irqfd.target
            left = [each for each in self._resampled[gsi] if each is not irqfd]
            self._resampled[gsi] = left
            if not left:
                self._chips.watch_end(gsi, None)
            irqfd.line.lower()
