"""A pc's PCI bus with its four functions and nothing else, and the accesses that guests make of it."""

from __future__ import annotations

from typing import Any

from pyvmm.address_space import AddressSpace
from pyvmm.clock import VirtualClock
from pyvmm.device import Device
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.pci.host import PciHost
from pyvmm.devices.pci.i440fx import I440fx
from pyvmm.devices.pci.piix3 import Piix3Ide, Piix3Isa
from pyvmm.devices.pci.piix4_pm import Piix4Pm
from pyvmm.devices.reset_control import ResetControl
from pyvmm.irq import IrqLine, IrqWire

ADDRESS, DATA = 0xCF8, 0xCFC
VENDOR, COMMAND, STATUS, CLASS_REVISION, HEADER = 0x00, 0x04, 0x06, 0x08, 0x0E
BAR4 = 0x20
IO, MEMORY, MASTER = 1, 2, 4
HOST, ISA, IDE, PM = (0, 0), (1, 0), (1, 1), (1, 3)
INITIAL_LAYOUT = [(0xA0000, 0x20000, "mmio"), (0xC0000, 0x40000, "rom")]


class Registers(Device):
    """Bytes that keep what is written."""

    def __init__(self, size: int, fill: int = 0) -> None:
        self.data = bytearray([fill]) * size

    def read(self, offset: int, size: int) -> int:
        assert 0 <= offset <= len(self.data) - size
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= offset <= len(self.data) - size
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class BusMaster(Registers):
    """As much of a channel's as the PCI function sees."""

    def __init__(self, fill: int) -> None:
        super().__init__(8, fill)
        self.enabled = True


class Channel:
    def __init__(self, fill: int) -> None:
        self.bus_master = BusMaster(fill)


class Bus:
    """The guest's way to configuration space, over any PciHost at its ports."""

    def __init__(self, pio: AddressSpace) -> None:
        self.pio = pio

    def select(self, where: tuple[int, int], register: int) -> None:
        slot, function = where
        self.pio.write(ADDRESS, 4, 0x8000_0000 | slot << 11 | function << 8 | register & 0xFC)

    def get(self, where: tuple[int, int], register: int, size: int = 4) -> int:
        self.select(where, register)
        return self.pio.read(DATA + register % 4, size)

    def set(self, where: tuple[int, int], register: int, value: int, size: int = 4) -> None:
        self.select(where, register)
        self.pio.write(DATA + register % 4, size, value)

    def config(self, where: tuple[int, int]) -> bytes:
        return b"".join(self.get(where, register).to_bytes(4, "little") for register in range(0, 256, 4))


class Board(Bus):
    def __init__(self) -> None:
        super().__init__(AddressSpace("pio", 0x10000))
        self.resets = 0
        self.levels: dict[int, int] = {}
        self.layouts: list[list[tuple[int, int, str]]] = []
        self.reset_control = ResetControl(self._count_reset)
        self.sci = IrqLine()
        self.acpi = AcpiPm(VirtualClock(), self.sci, lambda: None, s5_type=0, acpi_mode=False)
        self.isa = Piix3Isa({irq: self._wire(irq) for irq in range(16)})
        self.host = PciHost(self.reset_control, self.isa.intx)
        self._pins: dict[tuple[int, int], IrqLine] = {}
        self.bridge = I440fx(self.layouts.append)
        self.channels = (Channel(0x11), Channel(0x22))
        self.ide = Piix3Ide(self.channels, self.pio)  # type: ignore[arg-type]
        self.pm = Piix4Pm(self.acpi, self.pio)
        functions = ((HOST, self.bridge), (ISA, self.isa), (IDE, self.ide), (PM, self.pm))
        for where, device in functions:
            self.host.add(device, *where)
        self.devices: dict[str, Device] = {
            "acpi": self.acpi,
            "reset": self.reset_control,
            "host": self.host,
            "bridge": self.bridge,
            "isa": self.isa,
            "ide": self.ide,
            "pm": self.pm,
        }
        self.pio.map(ADDRESS, 8, self.host)
        self.pio.map(0xB2, 2, self.pm.apm)

    def _count_reset(self) -> None:
        self.resets += 1

    def _wire(self, irq: int) -> IrqWire:
        def drive(level: int) -> None:
            self.levels[irq] = level

        return IrqWire(drive, irq)

    def set_pin(self, slot: int, pin: int, level: int) -> None:
        """As the function in that slot does."""
        if (slot, pin) not in self._pins:
            self._pins[slot, pin] = self.isa.intx(slot, pin)
        self._pins[slot, pin].set(level)

    def up(self) -> set[int]:
        """The interrupts that are up."""
        return {irq for irq, level in self.levels.items() if level}

    def mapped(self) -> dict[str, int]:
        """Where the regions are that can move."""
        return {r.name: r.base for r in self.pio.regions if r.name in MOVABLE and r.base is not None}

    def post_firmware(self) -> None:
        self.bridge.post_firmware()
        self.isa.post_firmware((10, 10, 11, 11))
        self.ide.post_firmware(0xC000)
        self.pm.post_firmware(0x600, 0x700, 9)

    def reset(self) -> None:
        for device in self.devices.values():
            device.reset()

    def save(self) -> dict[str, Any]:
        return {name: device.save() for name, device in self.devices.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, device in self.devices.items():
            device.load(state[name])
        for device in self.devices.values():
            device.after_load()

    def everything(self) -> tuple[Any, ...]:
        """All that a guest can see of the configuration, and what it moved."""
        configs = tuple(self.config(where) for where in (HOST, ISA, IDE, PM))
        enabled = tuple(channel.bus_master.enabled for channel in self.channels)
        return configs, enabled, self.mapped(), self.bridge.segments(), self.up()


MOVABLE = ("ide0.bus_master", "ide1.bus_master", "acpi_pm", "smbus")
