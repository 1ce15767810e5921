"""The PIIX3: Piix3Isa, function 0, routes PCI's interrupt pins to ISA interrupts; Piix3Ide, function 1, is the IDE one.

Intel 82371FB/82371SB (PIIX/PIIX3) data sheet: the configuration registers of function 0 (PIRQRC above all) and of
function 1 (BMIBA, IDETIM, SIDETIM). The bus master's own registers are the channels'.

The registers of the X-bus, the DMA controller and SMIs are kept and do nothing: what they switch is always on, or not
there.
"""

from __future__ import annotations

from pyvmm.devices.pci.device import (
    BAR0,
    COMMAND,
    COMMAND_BUS_MASTER,
    COMMAND_IO,
    COMMAND_MEMORY,
    COMMAND_SERR,
    LATENCY_TIMER,
    STATUS_DEVSEL_MEDIUM,
    STATUS_FAST_BACK_TO_BACK,
    PciDevice,
)
from pyvmm.irq import IrqWire
from pyvmm.region import MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pyvmm.address_space import AddressSpace
    from pyvmm.devices.ide.channel import IdeChannel
    from pyvmm.irq import IrqLine

ISA_DEVICE_ID = 0x7000
ISA_BRIDGE = 0x060100
ISA_COMMAND_FIXED = 0x0007
COMMAND_SPECIAL_CYCLES = 0x0008

PIRQRC = 0x60  # four registers, PIRQA to PIRQD
PIRQ_COUNT = 4
PIRQ_OFF = 0x80
PIRQ_IRQ = 0x0F
PIRQ_IRQS = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)  # the other values are reserved: they route nowhere

# Kept, as they are after a reset: (register, bytes, value, writable bits).
ISA_REGISTERS = (
    (0x4C, 1, 0x4D, 0x7F),  # IORT, I/O recovery timer
    (0x4E, 2, 0x0003, 0x01FF),  # XBCS, X-bus chip selects
    (0x69, 1, 0x02, 0xFE),  # TOM, top of memory
    (0x6A, 2, 0x0000, 0x80D1),  # MSTAT
    (0x70, 1, 0x80, 0xAF),  # MBIRQ0
    (0x76, 1, 0x0C, 0x8F),  # MBDMA0
    (0x77, 1, 0x0C, 0x8F),  # MBDMA1
    (0x78, 2, 0x0002, 0xFFFF),  # PCSC, programmable chip select
    (0x80, 1, 0x00, 0x7F),  # APICBASE
    (0x82, 1, 0x00, 0x0F),  # DLC, deterministic latency
    (0xA0, 1, 0x08, 0x1F),  # SMICNTL
    (0xA2, 2, 0x0000, 0x01FF),  # SMIEN
    (0xA4, 4, 0x0000, 0xA000_FFFF),  # SEE, system events
    (0xA8, 1, 0x0F, 0xFF),  # FTMR, fast off timer
    (0xAA, 2, 0x0000, 0x01FF),  # SMIREQ
    (0xAC, 1, 0x00, 0xFF),  # CTLTMR
    (0xAE, 1, 0x00, 0xFF),  # CTHTMR
)

IDE_DEVICE_ID = 0x7010
IDE_BUS_MASTER_ONLY = 0x010180  # IDE at its legacy ports, and a bus master
BUS_MASTER_BAR = 4
BUS_MASTER_BYTES = 8  # of each channel
IDETIM = 0x40  # two bytes a channel
IDETIM_DECODE = 0x8000
SIDETIM = 0x44


class Piix3Isa(PciDevice):
    """``wires`` are those of the ISA interrupts that PCI's may be routed to, by their number."""

    def __init__(self, wires: Mapping[int, IrqWire]) -> None:
        super().__init__(
            device_id=ISA_DEVICE_ID,
            class_code=ISA_BRIDGE,
            command=ISA_COMMAND_FIXED,
            command_writable=COMMAND_SPECIAL_CYCLES | COMMAND_SERR,
        )
        self._wires = wires
        self._pirqs = [IrqWire() for _ in range(PIRQ_COUNT)]  # they keep what drives them when nothing is routed
        for n in range(PIRQ_COUNT):
            self.define(PIRQRC + n, 1, PIRQ_OFF, PIRQ_OFF | PIRQ_IRQ)
        for register, size, value, writable in ISA_REGISTERS:
            self.define(register, size, value, writable)

    def intx(self, slot: int, pin: int) -> IrqLine:
        """A line to INTA to INTD (``pin`` 0 to 3) of a slot: what PciHost asks for each function that interrupts.

        Each slot's pins are wired to the four wires one further than the slot's before, slot 1's INTA to PIRQA: as in
        QEMU, and as SeaBIOS has it.
        """
        return self._pirqs[(slot - 1 + pin) % PIRQ_COUNT].line()

    def route(self, pirq: int) -> int | None:
        """The ISA interrupt that PIRQA to PIRQD (0 to 3) goes to, None for none."""
        value = self.config[PIRQRC + pirq]
        irq = value & PIRQ_IRQ
        return irq if not value & PIRQ_OFF and irq in PIRQ_IRQS else None

    def changed(self, first: int, last: int) -> None:
        super().changed(first, last)
        self._connect(pirq for pirq in range(PIRQ_COUNT) if first <= PIRQRC + pirq <= last)

    def _connect(self, pirqs: Iterable[int]) -> None:
        """Each of these goes to the interrupt that its register says."""
        for pirq in pirqs:
            irq = self.route(pirq)
            self._pirqs[pirq].connect(None if irq is None else self._wires.get(irq))

    def post_firmware(self, irqs: Sequence[int]) -> None:
        """PIRQA to PIRQD to these interrupts, which the board is to make level sensitive (ELCR)."""
        with self._config_lock:
            for n, irq in enumerate(irqs):
                self.config_write(PIRQRC + n, 1, irq)

    def after_load(self) -> None:
        with self._config_lock:
            super().after_load()
            self._connect(range(PIRQ_COUNT))


class Piix3Ide(PciDevice):
    """The two channels' bus masters at BAR 4. The channels themselves are at their legacy ports, decoded always."""

    def __init__(self, channels: tuple[IdeChannel, IdeChannel], pio: AddressSpace) -> None:
        super().__init__(
            device_id=IDE_DEVICE_ID,
            class_code=IDE_BUS_MASTER_ONLY,
            # The data sheet (PCICMD of function 1) does not implement the enable of memory accesses, of which the
            # function takes none. It can be set all the same, as QEMU's can: software that enables a device's I/O,
            # memory and bus mastering at once and reads it back (QEMU's libqos) takes it for broken else.
            command_writable=COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER,
            status=STATUS_DEVSEL_MEDIUM | STATUS_FAST_BACK_TO_BACK,
        )
        self._bus_masters = [channel.bus_master for channel in channels]
        first, second = self._bus_masters
        parts = (
            (0, lambda: MemoryRegion(BUS_MASTER_BYTES, first, name="ide0.bus_master")),
            (BUS_MASTER_BYTES, lambda: MemoryRegion(BUS_MASTER_BYTES, second, name="ide1.bus_master")),
        )
        self.add_io_bar(BUS_MASTER_BAR, 2 * BUS_MASTER_BYTES, pio, parts)
        self.define(LATENCY_TIMER, 1, 0, 0xF0)
        self.define(IDETIM, 2, 0, 0xFFFF)
        self.define(IDETIM + 2, 2, 0, 0xFFFF)
        self.define(SIDETIM, 1, 0, 0xFF)
        self.bus_master_changed(False)

    def bus_master_changed(self, enabled: bool) -> None:
        for bus_master in self._bus_masters:
            bus_master.enabled = enabled

    def post_firmware(self, base: int) -> None:
        """The bus masters at ``base``, both channels' decoders on."""
        with self._config_lock:
            self.config_write(BAR0 + 4 * BUS_MASTER_BAR, 4, base)
            self.config_write(IDETIM, 2, IDETIM_DECODE)
            self.config_write(IDETIM + 2, 2, IDETIM_DECODE)
            self.config_write(COMMAND, 2, COMMAND_IO | COMMAND_BUS_MASTER)
