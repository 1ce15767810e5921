"""Piix4Pm: function 3 of the PIIX4, which QEMU's PIIX3 has too: where the ACPI block and the SMBus host answer.

Intel 82371AB (PIIX4) data sheet, function 3: configuration (PMBASE, DEVACTB, PMREGMISC, SMBBA, SMBHSTCFG), the APM
ports (APMC, APMS) and the SMBus host registers. The command values for APMC are QEMU's; a guest has them from the FADT.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.acpi_pm import BLOCK_BYTES
from pyvmm.devices.pci.device import (
    COMMAND,
    COMMAND_IO,
    INTERRUPT_LINE,
    STATUS_DEVSEL_MEDIUM,
    STATUS_FAST_BACK_TO_BACK,
    PciDevice,
)
from pyvmm.region import MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.address_space import AddressSpace
    from pyvmm.devices.acpi_pm import AcpiPm

DEVICE_ID = 0x7113
REVISION = 3
BRIDGE_OTHER = 0x068000

PMBASE = 0x40
PMBASE_ADDRESS = 0xFFC0
DEVACTB = 0x58
APMC_EN = 0x0200_0000  # of DEVACTB: writes to 0xb2 make an SMI; to SeaBIOS a sign that SMM is set up already
PMREGMISC = 0x80
PMIOSE = 0x01  # the block at PMBASE is decoded
SMBBA = 0x90
SMBBA_ADDRESS = 0xFFF0
SMBHSTCFG = 0xD2
SMB_HST_EN = 0x01
SMBUS_BYTES = 16
IO_SPACE = 0x1  # the lowest bit of a base register, fixed

# Kept: (register, bytes, writable bits).
REGISTERS = (
    (0x44, 4, 0xFFFF_FFFF),  # CNTA
    (0x48, 4, 0xFFFF_FFFF),  # CNTB
    (0x4C, 4, 0xFFFF_FFFF),  # GPICTL
    (0x50, 4, 0x00FF_FFFF),  # DEVRESD
    (0x54, 4, 0xFFFF_FFFF),  # DEVACTA
    *((register, 4, 0xFFFF_FFFF) for register in range(0x5C, 0x80, 4)),  # DEVRESA to DEVRESJ
    (0xD3, 3, 0xFFFFFF),  # SMBSLVC, SMBSHDW1, SMBSHDW2
)

ACPI_ENABLE = 0xF1
ACPI_DISABLE = 0xF0


class Apm(Device):
    """The APM control and status ports: map 2 bytes at 0xb2. There is no SMM to tell of a command: the two that ask for
    ACPI mode or its end are done here.
    """

    impl_sizes = (1, 1)
    STATE = {"registers": ("bytes", 2)}

    __slots__ = ("_acpi", "registers")

    def __init__(self, acpi: AcpiPm) -> None:
        self._acpi = acpi
        self.registers = bytearray(2)  # APMC, APMS

    def read(self, offset: int, size: int) -> int:
        return self.registers[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        self.registers[offset] = value
        if offset == 0 and value in (ACPI_ENABLE, ACPI_DISABLE):
            self._acpi.set_acpi_mode(value == ACPI_ENABLE)


class SmbusHost(Device):
    """An SMBus host controller with nobody on its bus: each transfer ends at once, with "no device answered".

    16 ports, polled: its interrupt is not wired.
    """

    impl_sizes = (1, 1)
    STATE = {"registers": ("bytes", SMBUS_BYTES)}

    HOST_STATUS = 0
    SLAVE_STATUS = 1
    HOST_CONTROL = 2
    STATUS_DEV_ERR = 0x04
    STATUS_FAILED = 0x10
    HOST_EVENTS = 0x1E
    SLAVE_EVENTS = 0x3C
    KILL = 0x02
    START = 0x40  # reads as zero
    CONTROL_KEPT = 0x1F

    __slots__ = ("registers",)

    def __init__(self) -> None:
        self.registers = bytearray(SMBUS_BYTES)

    def read(self, offset: int, size: int) -> int:
        return self.registers[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == self.HOST_STATUS:
            self.registers[offset] &= ~(value & self.HOST_EVENTS)
        elif offset == self.SLAVE_STATUS:
            self.registers[offset] &= ~(value & self.SLAVE_EVENTS)
        elif offset == self.HOST_CONTROL:
            self.registers[offset] = value & self.CONTROL_KEPT
            if value & self.KILL:
                self.registers[self.HOST_STATUS] |= self.STATUS_FAILED
            elif value & self.START:
                self.registers[self.HOST_STATUS] |= self.STATUS_DEV_ERR
        else:
            self.registers[offset] = value


class Piix4Pm(PciDevice):
    """Moves ``acpi``'s block: do not map that elsewhere. Map ``apm`` (2 ports) at 0xb2.

    Reset, save and load of ``apm`` and the SMBus host are this one's; those of ``acpi`` its own.
    """

    def __init__(self, acpi: AcpiPm, pio: AddressSpace) -> None:
        super().__init__(
            device_id=DEVICE_ID,
            class_code=BRIDGE_OTHER,
            revision=REVISION,
            command_writable=COMMAND_IO,
            status=STATUS_DEVSEL_MEDIUM | STATUS_FAST_BACK_TO_BACK,
            interrupt_pin=1,
        )
        self.apm = Apm(acpi)
        self.smbus = SmbusHost()
        self._blocks: tuple[Apm | SmbusHost, ...] = (self.apm, self.smbus)
        self._pm = self.add_window(pio, [(0, lambda: MemoryRegion(BLOCK_BYTES, acpi, name="acpi_pm"))])
        self._smb = self.add_window(pio, [(0, lambda: MemoryRegion(SMBUS_BYTES, self.smbus, name="smbus"))])
        self.define(PMBASE, 4, IO_SPACE, PMBASE_ADDRESS)
        # No SMM: as QEMU says it without, so that SeaBIOS leaves it alone.
        self.define(DEVACTB, 4, APMC_EN, 0xFFFF_FFFF)
        self.define(PMREGMISC, 1, 0, PMIOSE)
        self.define(SMBBA, 4, IO_SPACE, SMBBA_ADDRESS)
        self.define(SMBHSTCFG, 1, 0, 0x0F)
        for register, size, writable in REGISTERS:
            self.define(register, size, 0, writable)

    @property
    def pm_base(self) -> int | None:
        """The port where the guest has the ACPI block, None where it is not decoded."""
        base = self.get(PMBASE, 4) & PMBASE_ADDRESS
        return base if base and self.config[PMREGMISC] & PMIOSE else None

    @property
    def smbus_base(self) -> int | None:
        base = self.get(SMBBA, 4) & SMBBA_ADDRESS
        return base if base and self.config[SMBHSTCFG] & SMB_HST_EN and self.command & COMMAND_IO else None

    def changed(self, first: int, last: int) -> None:
        super().changed(first, last)
        self.place(self._pm, self.pm_base)
        self.place(self._smb, self.smbus_base)

    def post_firmware(self, pm_base: int, smbus_base: int, sci: int) -> None:
        """The ACPI block and the SMBus host at these ports, and the interrupt that they are wired to."""
        with self._config_lock:
            self.config_write(PMBASE, 4, pm_base)
            self.config_write(PMREGMISC, 1, PMIOSE)
            self.config_write(SMBBA, 4, smbus_base)
            self.config_write(SMBHSTCFG, 1, SMB_HST_EN | 0x08)  # its interrupt would be 9, not an SMI
            self.config_write(COMMAND, 2, COMMAND_IO)
            self.config_write(INTERRUPT_LINE, 1, sci)

    def reset(self) -> None:
        with self._config_lock:
            super().reset()
            for block in self._blocks:
                with block.lock:
                    block.registers[:] = bytes(len(block.registers))

    STATE = {**PciDevice.STATE, "apm": "part", "smbus": "part"}
    STATE_VERSION = 2
