"""PythonIrqchip: Irqchip with the interrupt controllers and the PIT of devices/, in Python."""

from __future__ import annotations

from _weakref import ref
from posix import eventfd_write

from pyvmm.errors import BusError
from pyvmm.irqchip import TRACE_MSI, Irqchip
from pyvmm.late import Late
from pyvmm.light import Lock
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pyvmm.address_space import AddressSpace
    from pyvmm.clock import Clock
    from pyvmm.cpu_exec import CpuExec
    from pyvmm.devices.i8254 import I8254
    from pyvmm.devices.irq_pins import ControllerPins
    from pyvmm.devices.user_irqchip import UserIrqchip
    from pyvmm.event_loop import EventLoop
    from pyvmm.guest_memory import GuestMemory
    from pyvmm.irq import IrqLine
    from pyvmm.irqfd import IrqFd


class PythonIrqchip(Irqchip):
    """PIC pair, IOAPIC, the local APIC of one processor and the PIT, in Python, made when the guest looks at them or is
    interrupted (late.py); irqfds are the event loop's.
    """

    def __init__(
        self, clock: Clock, event_loop: EventLoop, memory: GuestMemory, pio: AddressSpace, mmio: AddressSpace
    ) -> None:
        super().__init__()
        self._memory = memory
        self._clock = clock
        self._powered_on_ns = clock.now_ns()
        self._event_loop = event_loop
        self._processors: list[CpuExec] = []  # one, once it is made: the controllers know this list, and not us
        self._made: UserIrqchip | None = None
        self._making = Lock()
        self._resampled: dict[int, list[IrqFd]] = {}
        self._spaces = pio, mmio
        self._devices: Mapping[str, Late] | None = None

    @property
    def devices(self) -> Mapping[str, Late]:
        if self._devices is None:
            self._devices = self._late_devices(*self._spaces)
        return self._devices

    def _late_devices(self, pio: AddressSpace, mmio: AddressSpace) -> dict[str, Late]:
        timer_line = self.line(layout.IRQ_TIMER, "pit")
        return {
            "pic": Late(
                lambda: self._chips.pic,
                (pio, layout.PORT_PIC_MASTER, 2, "pic.master", "master"),
                (pio, layout.PORT_PIC_SLAVE, 2, "pic.slave", "slave"),
                (pio, layout.PORT_PIC_ELCR, 2, "pic.elcr", "elcr"),
            ),
            "ioapic": Late(lambda: self._chips.ioapic, (mmio, layout.IOAPIC, layout.IOAPIC_BYTES, "ioapic", "")),
            "lapic": Late(lambda: self._chips.lapic, (mmio, layout.LAPIC, layout.LAPIC_BYTES, "lapic", "")),
            "pit": Late(
                lambda: self._make_pit(timer_line),
                (pio, layout.PORT_PIT, 4, "pit", ""),
                (pio, layout.PORT_SPEAKER, 1, "speaker", "speaker"),
            ),
        }

    @property
    def controllers(self) -> Mapping[str, ControllerPins]:
        return self._chips.controllers

    @property
    def _chips(self) -> UserIrqchip:
        if self._made is None:
            from pyvmm.devices.user_irqchip import UserIrqchip

            with self._making:
                if self._made is None:
                    processors = self._processors

                    def interrupt(level: int) -> None:
                        for processor in processors:
                            processor.interrupt(level)

                    chips = UserIrqchip(self._clock, interrupt)
                    for processor in processors:
                        self._wire(chips, processor)
                    self._made = chips
        return self._made

    def _make_pit(self, line: IrqLine) -> I8254:
        from pyvmm.devices.i8254 import I8254

        return I8254(self._clock, line, powered_on_ns=self._powered_on_ns)

    def attach(self, loop: CpuExec) -> None:
        with self._making:
            self._processors[:] = [loop]
            if self._made is not None:
                self._wire(self._made, loop)

    @staticmethod
    def _wire(chips: UserIrqchip, loop: CpuExec) -> None:
        loop.acknowledge = chips.acknowledge
        loop.on_tpr = chips.lapic.look_at_cpu
        chips.lapic.cpu = loop

    def close(self) -> None:
        super().close()
        self._processors.clear()
        if self._made is not None:
            self._made.lapic.cpu = None

    def send(self, address: int, data: int) -> bool:
        if (tap := self.tap) is not None:
            tap.mark(TRACE_MSI, address, data)
        return self._chips.message(address, data)

    def write(self, address: int, data: int) -> None:
        try:
            self._memory.write(address, data.to_bytes(4, "little"))
        except BusError:
            pass  # there is nothing

    def _sink(self, gsi: int) -> Callable[[int], object]:
        # A device that outlives its machine keeps its line, and that must not keep the machine.
        me = ref(self)

        def drive(level: int) -> None:
            if (irqchip := me()) is not None:
                irqchip._chips.set(gsi, level)

        return drive

    def _connect(self, irqfd: IrqFd) -> None:
        from pyvmm.irqfd import Msi

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
                eventfd_write(irqfd.resample_fd, 1)

    def _disconnect(self, irqfd: IrqFd) -> None:
        from pyvmm.irqfd import Msi

        self._event_loop.remove_reader(irqfd.fd)
        if irqfd.line is not None and not isinstance(irqfd.target, Msi):
            gsi = irqfd.target
            left = [each for each in self._resampled[gsi] if each is not irqfd]
            self._resampled[gsi] = left
            if not left:
                self._chips.watch_end(gsi, None)
            irqfd.line.lower()
