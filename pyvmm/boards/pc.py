"""The pc board: i440FX and PIIX3 with IDE, PCI, firmware from ROM; what QEMU's machine of that name is.

It boots firmware (SeaBIOS), which finds the disks, reads fw_cfg and loads from them; or a kernel directly, with the
chipset as firmware leaves it.
"""

from __future__ import annotations

from pyvmm.boards.ide_places import PLACES
from pyvmm.boards.isa import IsaBoard
from pyvmm.boards.pc_drives import make_drive
from pyvmm.devices.pci.device import INTERRUPT_LINE
from pyvmm.errors import ConfigError, exists
from pyvmm.guest_memory import PAGE_BYTES, RamRegion
from pyvmm.memory_map import BUS, RAM, ROM
from pyvmm.places import Places
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.boards.isa_checks import Ports
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.channel import IdeChannel
    from pyvmm.devices.ide.disk import IdeDisk
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.spec import Spec

# Where Debian's seabios package and QEMU's builds put it.
FIRMWARE = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin")


class Pc(IsaBoard):
    """``units`` is what is at the four places of its drives."""

    window = range(layout.WINDOW, layout.WINDOW_END)

    # -- memory ------------------------------------------------------------------------------------------------

    @property
    def starts_in_firmware(self) -> bool:
        """Where firmware is asked for, or there is nothing else to run."""
        config = self.config
        return config.firmware is not None or (config.kernel is None and config.flat is None and self.runs_guests)

    @property
    def boots_directly(self) -> bool:
        """Whether a kernel is entered that expects the chipset as firmware leaves it."""
        return self.runs_guests and not self.starts_in_firmware

    def add_roms(self) -> None:
        """The firmware's image below 4 GiB; its end shows below 1 MiB too."""
        if not self.starts_in_firmware:
            return
        image = self.config.firmware if self.config.firmware is not None else find_firmware()
        data = self.images.get(image, "firmware")
        size = data.nbytes
        if size % PAGE_BYTES or not PAGE_BYTES <= size <= layout.FIRMWARE_MAX_BYTES:
            raise ConfigError(
                f"firmware of {size} bytes: give an image of whole pages, up to 8 MiB (SeaBIOS's bios.bin)"
            )
        rom = RamRegion(layout.FIRMWARE_END - size, size, readonly=True, name="bios")
        memoryview(rom)[:] = data
        self.memory.add(rom)

    def open_window(self) -> None:
        """0xa0000 to 1 MiB as the i440FX shows it after power-on; or all memory, as a kernel booted directly finds it.
        """
        isa_rom = None
        for region in self.memory.ram:
            if region.readonly:
                size = min(region.size_bytes, layout.ISA_BIOS_BYTES)
                isa_rom = RamRegion(layout.WINDOW_END - size, size, readonly=True, name="isa-bios")
                memoryview(isa_rom)[:] = memoryview(region)[region.size_bytes - size :]
        self.memory_map.open_window(isa_rom)
        if self.config.vga == "text":
            text = RamRegion(layout.VGA_TEXT, layout.VGA_TEXT_BYTES, name="vga text")
            self.memory_map.show_text_memory(text)
        shown = RAM if self.boots_directly else ROM
        bus = (layout.WINDOW, layout.PAM - layout.WINDOW, BUS)
        self.memory_map.set_window([bus, (layout.PAM, layout.WINDOW_END - layout.PAM, shown)])

    # -- devices -----------------------------------------------------------------------------------------------

    @classmethod
    def chipset_ports(cls) -> tuple[Ports, ...]:
        from pyvmm.boards.isa_checks import PC

        return PC

    @classmethod
    def firmware_files(cls) -> tuple[str, ...]:
        from pyvmm.boards.isa_checks import PC_FILES

        return PC_FILES

    @classmethod
    def has_debugcon(cls, config: Spec) -> bool:
        """Only where somebody listens: SeaBIOS writes its log to one that answers, an exit a character."""
        return config.debugcon not in (None, "none")

    def make_devices(self) -> None:
        from pyvmm.boards.pc_firmware import describe_to_firmware

        self.make_isa_devices()
        self.describe(fw_cfg_aml)
        self._make_chipset()
        self.make_virtio_devices()
        describe_to_firmware(self, self.units)
        if self.boots_directly:
            self.leave_as_firmware_would()

    def _make_chipset(self) -> None:
        """The chipset's functions and the IDE channels with their drives."""
        from pyvmm.devices.pci.host import PciHost
        from pyvmm.devices.pci.i440fx import I440fx
        from pyvmm.devices.pci.piix3 import PIRQ_IRQS, Piix3Ide, Piix3Isa
        from pyvmm.devices.pci.piix4_pm import Piix4Pm

        isa = Piix3Isa({irq: self.irqchip.wire(irq, "PCI") for irq in PIRQ_IRQS})
        host = PciHost(self.reset_control, isa.intx)
        bridge = I440fx(self.memory_map.set_window)
        self.channels = self._make_ide()
        ide = Piix3Ide(self.channels, self.pio)
        pm = Piix4Pm(self.pm, self.pio)
        self.pci_slots = Places("PCI slot", 0, layout.PCI_SLOTS, numbered=True)
        host.add(bridge, self.pci_slots.take(layout.SLOT_HOST, 1, "i440fx"))
        piix = self.pci_slots.take(layout.SLOT_PIIX, 1, "PIIX")
        host.add(isa, piix, layout.FUNCTION_ISA)
        host.add(ide, piix, layout.FUNCTION_IDE)
        host.add(pm, piix, layout.FUNCTION_PM)
        self.pci = self.add("pci", host)
        self.i440fx = self.add("i440fx", bridge)
        self.piix3 = self.add("piix3", isa)
        self.piix3_ide = self.add("piix3_ide", ide)
        self.piix4_pm = self.add("piix4_pm", pm)
        # Where the chipset has it once somebody has programmed it: SeaBIOS, or leave_as_firmware_would.
        self.ports.take(layout.PORT_PM, layout.PM_BYTES, "acpi_pm")
        self.map_ports(layout.PORT_PCI, layout.PORT_PCI_BYTES, host, "pci")
        self.map_ports(layout.PORT_APM, 2, pm.apm, "apm")

    def _make_ide(self) -> tuple[IdeChannel, IdeChannel]:
        """Both channels at the ports that ATA has on every PC, whatever is on them."""
        from pyvmm.devices.ide.channel import IdeChannel

        self.units: list[IdeDisk | AtapiDrive | None] = [None] * PLACES
        for drive in self.config.drives:
            if drive.interface == "ide":
                self.units[drive.index] = self._open_drive(drive)
        made = []
        for n, (command, control, irq) in enumerate(layout.IDE_CHANNELS):
            units = (self.units[2 * n], self.units[2 * n + 1])
            line = self.irq_line(irq, f"ide{n}")
            channel = IdeChannel(line, self.clock, units, self.memory, name=f"ide{n}")
            self.add(f"ide{n}", channel)
            if self.platform.gathers_ports:
                self._gather_writes(channel)
            self.add_ports(command, channel.data)
            self.add_ports(command + 1, channel.region)
            self.add_ports(control, channel.control)
            made.append(channel)
        return made[0], made[1]

    def _open_drive(self, drive: PlacedDrive) -> IdeDisk | AtapiDrive:
        from pyvmm.block.open import open_drive

        drives = self.chassis.drives
        backend = open_drive(
            drive, loop=self.chassis.loop, clock=self.clock, on_error=drives.failed, later=drives.later
        )
        drives.add(backend)
        return make_drive(drive, backend, self.chassis.events)

    def change_medium(self, drive: PlacedDrive, *, force: bool = False) -> bool:
        if drive.interface != "ide" or drive.media != "cdrom":
            return super().change_medium(drive)
        from pyvmm.boards.pc_drives import change_medium

        return change_medium(self, drive, force=force)

    def _gather_writes(self, channel: IdeChannel) -> None:
        """A word of a sector then costs an exit to KVM alone, and user space gets them many at a time, in order, before
        the next exit that it sees. A guest that waits for its interrupt instead makes no such exit: while a window
        stands open for writing, a timer looks after what has been gathered.
        """
        from pyvmm.boards.gathered_writes import GatheredWrites

        channel.gather_writes()
        GatheredWrites(self.clock, self.platform.cpus, channel)

    def add_virtio(self, name: str, device: VirtioDevice, asked: Any = None) -> None:
        from pyvmm.boards.virtio import add_pci

        add_pci(self, name, device, asked)

    def leave_as_firmware_would(self) -> None:
        """A kernel that is booted directly expects that somebody has given the chipset its addresses."""
        with self.memory_map.held:
            self.i440fx.post_firmware()
            self.piix3.post_firmware(layout.PIRQ_IRQS)
            self.piix3_ide.post_firmware(layout.PORT_BUS_MASTER)
            self.piix4_pm.post_firmware(layout.PORT_PM, layout.PORT_SMBUS, layout.IRQ_SCI)
            port, address = layout.PORT_PCI_BARS, layout.PCI_BARS
            for slot, _, function in self.pci.devices:
                if slot > layout.SLOT_PIIX:
                    port, address = function.assign(port, address)
                    irq = layout.PIRQ_IRQS[(slot - 1) % len(layout.PIRQ_IRQS)]
                    function.config_write(INTERRUPT_LINE, 1, irq)

    # -- the guest ---------------------------------------------------------------------------------------------

    def write_tables(self) -> int:
        """ACPI, MP and SMBIOS tables for a kernel booted directly."""
        from pyvmm.boards.pc_firmware import write_tables

        return write_tables(self)

    def after_reset(self) -> None:
        if self.first_boot:
            from pyvmm.boards.pc_firmware import after_first_boot

            after_first_boot(self)
        self.after_wake()

    def after_wake(self) -> None:
        if self.boots_directly:
            self.leave_as_firmware_would()


def find_firmware() -> str:
    for path in FIRMWARE:
        if exists(path):
            return path
    raise ConfigError("no SeaBIOS on this host: install Debian's seabios package, or give firmware=FILE")


def fw_cfg_aml() -> bytes:
    from pyvmm.x86 import acpi_pc

    return acpi_pc.firmware_configuration()
