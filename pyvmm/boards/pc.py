"""The pc board: i440FX and PIIX3 with IDE, PCI, firmware from ROM; what QEMU's machine of that name is.

The recipe is builder.py's; here is what a pc has beyond the devices every machine has. It boots firmware (SeaBIOS),
which finds the disks, reads fw_cfg and loads from them; or a kernel directly, with the chipset as firmware leaves it.
"""

from __future__ import annotations

import os

from pyvmm.errors import ConfigError
from pyvmm.guest_memory import PAGE_BYTES, RamRegion
from pyvmm.memory_map import BUS, RAM, ROM, WINDOW, WINDOW_END
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.options import DriveOptions
    from pyvmm.devices.fw_cfg import FwCfg
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.channel import IdeChannel
    from pyvmm.devices.ide.disk import IdeDisk
    from pyvmm.machine import Machine
    from pyvmm.x86.boot_options import BootOptions

# Where Debian's seabios package and QEMU's builds put it.
FIRMWARE = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin")
FIRMWARE_MAX_BYTES = 8 * layout.MIB  # the flash of a large OVMF; above it are the APICs
ISA_BIOS_BYTES = 0x2_0000  # the last 128 KiB show below 1 MiB as well

PAM = 0xC_0000
SLOT_HOST, SLOT_PIIX = 0, 1
FUNCTION_ISA, FUNCTION_IDE, FUNCTION_PM = 0, 1, 3
UNITS = 4  # two channels of two drives


# -- memory ------------------------------------------------------------------------------------------------------------


def uses_firmware(m: Machine) -> bool:
    """Whether the first instruction is the firmware's: asked for, or nothing else is there to run."""
    config = m.config
    return config.firmware is not None or (config.kernel is None and config.flat is None and config.accel == "kvm")


def boots_directly(m: Machine) -> bool:
    """Whether a kernel is entered that expects the chipset as firmware leaves it."""
    return m.config.accel == "kvm" and not uses_firmware(m)


def add_roms(m: Machine) -> None:
    """The firmware's image below 4 GiB; its end shows below 1 MiB too."""
    if not uses_firmware(m):
        return
    image = m.config.firmware if m.config.firmware is not None else find_firmware()
    data = m._images.get(image, "firmware")
    size = data.nbytes
    if size % PAGE_BYTES or not PAGE_BYTES <= size <= FIRMWARE_MAX_BYTES:
        raise ConfigError(f"firmware of {size} bytes: give an image of whole pages, up to 8 MiB (SeaBIOS's bios.bin)")
    rom = RamRegion(layout.GIB * 4 - size, size, readonly=True, name="bios")
    memoryview(rom)[:] = data
    m.memory.add(rom)


def find_firmware() -> str:
    for path in FIRMWARE:
        if os.path.exists(path):
            return path
    raise ConfigError("no SeaBIOS on this host: install Debian's seabios package, or give firmware=FILE")


def open_window(m: Machine) -> None:
    """0xa0000 to 1 MiB as the i440FX shows it after power-on; or all memory, as a kernel booted directly finds it."""
    isa_rom = None
    for region in m.memory.ram:
        if region.readonly:
            size = min(region.size_bytes, ISA_BIOS_BYTES)
            isa_rom = RamRegion(WINDOW_END - size, size, readonly=True, name="isa-bios")
            memoryview(isa_rom)[:] = memoryview(region)[region.size_bytes - size :]
    m.memory_map.open_window(isa_rom)
    if m.config.vga == "text":
        m.memory_map.show_text_memory(RamRegion(layout.VGA_TEXT, layout.VGA_TEXT_BYTES, name="vga text"))
    shown = RAM if boots_directly(m) else ROM
    m.memory_map.set_window([(WINDOW, PAM - WINDOW, BUS), (PAM, WINDOW_END - PAM, shown)])


# -- devices -----------------------------------------------------------------------------------------------------------


def make_devices(m: Machine) -> None:
    """The chipset's functions and the IDE channels with their drives."""
    from pyvmm.devices.pci.host import PciHost
    from pyvmm.devices.pci.i440fx import I440fx
    from pyvmm.devices.pci.piix3 import Piix3Ide, Piix3Isa
    from pyvmm.devices.pci.piix4_pm import Piix4Pm

    isa = Piix3Isa([m.irq_line(n) for n in range(layout.ISA_IRQS)])
    host = PciHost(m.devices["reset_control"], isa.set_intx)
    bridge = I440fx(m.memory_map.set_window)
    channels = make_ide(m)
    ide = Piix3Ide(channels, m.pio)
    pm = Piix4Pm(m.devices["acpi_pm"], m.pio)  # type: ignore[arg-type]  # builder made an AcpiPm
    for device, slot, function in (
        (bridge, SLOT_HOST, 0),
        (isa, SLOT_PIIX, FUNCTION_ISA),
        (ide, SLOT_PIIX, FUNCTION_IDE),
        (pm, SLOT_PIIX, FUNCTION_PM),
    ):
        host.add(device, slot, function)
    m.devices.update(pci=host, i440fx=bridge, piix3=isa, piix3_ide=ide, piix4_pm=pm)
    m.pio.map(layout.PORT_PCI, 8, host, name="pci")
    m.pio.map(layout.PORT_APM, 2, pm.apm, name="apm")
    m.pio.map(layout.PORT_GPE0, 4, pm.gpe, name="gpe0")
    describe(m, m.devices["fw_cfg"])  # type: ignore[arg-type]  # builder made a FwCfg
    if boots_directly(m):
        leave_as_firmware_would(m)
    gather_writes(m)


def leave_as_firmware_would(m: Machine) -> None:
    """A kernel that is booted directly expects that somebody has given the chipset its addresses."""
    m.memory_map.hold()
    for name in ("i440fx", "piix3", "piix3_ide", "piix4_pm"):
        m.devices[name].post_firmware()  # type: ignore[attr-defined]  # each of the four has it
    m.memory_map.release()


def after_reset(m: Machine) -> None:
    """The devices are at power-on again."""
    if m.first_boot:
        after_first_boot(m)
    after_wake(m)


def after_wake(m: Machine) -> None:
    """The devices are at power-on again, or as one that has slept finds them."""
    if boots_directly(m):
        leave_as_firmware_would(m)


# -- drives ------------------------------------------------------------------------------------------------------------


def make_ide(m: Machine) -> tuple[IdeChannel, IdeChannel]:
    """Both channels at the ports that ATA has on every PC, whatever is on them."""
    from pyvmm.devices.ide.channel import IdeChannel

    units: list[IdeDisk | AtapiDrive | None] = [None] * UNITS
    for index, drive in placed(m.config.drives):  # type: ignore[arg-type]  # parsed by the config
        units[index] = make_drive(m, index, drive)
    made = []
    for n, (command, control, irq) in enumerate(layout.IDE_CHANNELS):
        channel = IdeChannel(
            m.irq_line(irq), m.clock, (units[2 * n], units[2 * n + 1]), m.memory, name=f"ide{n}"
        )
        m.devices[f"ide{n}"] = channel
        m.pio.add(command, channel.data)
        m.pio.add(command + 1, channel.region)
        m.pio.add(control, channel.control)
        made.append(channel)
    return made[0], made[1]


def placed(drives: list[DriveOptions]) -> list[tuple[int, DriveOptions]]:
    """(index, drive): 0 and 1 are master and slave of the first channel, 2 and 3 of the second."""
    taken: dict[int, DriveOptions] = {}
    for drive in drives:
        if drive.index is None:
            continue
        if drive.index in taken:
            raise ConfigError(f"drives {taken[drive.index].file} and {drive.file} both want index={drive.index}")
        taken[drive.index] = drive
    for drive in drives:
        if drive.index is None:
            # A CD goes to the second channel first, as everywhere.
            order = (2, 3, 1, 0) if drive.media == "cdrom" else (0, 1, 2, 3)
            index = next((n for n in order if n not in taken), None)
            if index is None:
                raise ConfigError(f"drive {drive.file}: all {UNITS} places on the IDE channels are taken")
            drive.index = index
            taken[index] = drive
    return sorted(taken.items())


def make_drive(m: Machine, index: int, drive: DriveOptions) -> IdeDisk | AtapiDrive:
    from pyvmm.block.backend import open_drive
    from pyvmm.devices.ide.atapi import AtapiDrive
    from pyvmm.devices.ide.disk import IdeDisk

    backend = open_drive(drive, loop=m.event_loop, clock=m.clock, on_error=m.drive_error)
    m.backends[backend.name] = backend
    serial = drive.serial if drive.serial is not None else f"PV{index + 1:05}"
    if drive.media == "cdrom":
        return AtapiDrive(backend if backend.inserted else None, serial=serial, **named(drive))
    from pyvmm.boards.geometry import disk_geometry

    geometry, translation = disk_geometry(drive, backend)
    return IdeDisk(backend, serial=serial, geometry=geometry, bios_translation=translation, **named(drive))


def named(drive: DriveOptions) -> dict[str, str]:
    """The model and the firmware's version, where they are given."""
    named = {"model": drive.model, "revision": drive.ver}
    return {name: text for name, text in named.items() if text is not None}


# -- what firmware reads -----------------------------------------------------------------------------------------------


def describe(m: Machine, fw_cfg: FwCfg) -> None:
    """fw_cfg's files and items for firmware, and the CMOS bytes that it looks at."""
    from pyvmm.builder import cpu_identity
    from pyvmm.x86 import firmware_files

    config = m.config
    boot = boot_options(m)
    roms = {}
    if config.kernel is not None and uses_firmware(m):
        roms = hand_over_kernel(m, fw_cfg)
    files = firmware_files.pc_firmware_files(
        config.cpus,
        m.memory.regions,
        option_roms=roms,
        uuid=system_uuid(m),
        cpu_id=cpu_identity(m),
        boot_menu_wait_ms=boot.splash_time_ms,
        boot_fail_wait_ms=boot.reboot_timeout_ms,
        s3=not config.no_s3,
    )
    kernel = next(iter(roms), None)
    if any(boot_paths(m, order, kernel) for order in (boot.order, boot.once or "")):
        files[firmware_files.BOOT_ORDER_FILE] = lambda: firmware_files.boot_order(
            boot_paths(m, boot_order(m), kernel), boot.strict
        )
    for name, data in files.items():
        fw_cfg.add_file(name, data)
    for key, item in firmware_files.pc_firmware_items(uuid=system_uuid(m), boot_menu=boot.menu).items():
        fw_cfg.add(key, item)
    disks = ide_disks(m)
    set_cmos(
        m,
        firmware_files.pc_cmos(
            boot_order(m),
            [firmware_files.TRANSLATION_NONE if disk is None else disk.bios_translation for disk in disks],
            [None if disk is None else disk.geometry for disk in disks],
        ),
    )


def set_cmos(m: Machine, values: list[tuple[int, int]]) -> None:
    for index, value in values:
        m.devices["rtc"].cmos[index] = value  # type: ignore[attr-defined]  # an Rtc


def boot_options(m: Machine) -> BootOptions:
    from pyvmm.x86.boot_options import BootOptions

    return BootOptions(m.config.boot)


def boot_order(m: Machine) -> str:
    """The letters that hold for this boot: ``once`` until the first reset."""
    boot = boot_options(m)
    return boot.order if boot.once is None or not m.first_boot else boot.once


def boot_paths(m: Machine, order: str, kernel: str | None) -> list[str]:
    """Device paths of the drives, and of the kernel's option ROM, in ``order``."""
    from pyvmm.x86 import firmware_files

    drives = [(drive.index, drive.media) for drive in m.config.drives]  # type: ignore[union-attr]  # parsed by the config
    return firmware_files.boot_paths(drives, order, kernel=kernel)  # type: ignore[arg-type]  # all are placed now


def after_first_boot(m: Machine) -> None:
    """Back to the usual order in CMOS, which is the guest's from then on. The file is made anew after every reset."""
    boot = boot_options(m)
    if boot.once is not None:
        from pyvmm.x86 import firmware_files

        set_cmos(m, firmware_files.cmos_boot_order(boot.order))


def system_uuid(m: Machine) -> bytes:
    from pyvmm.x86 import smbios

    return bytes(16) if m.config.uuid is None else smbios.parse_uuid(m.config.uuid)


def hand_over_kernel(m: Machine, fw_cfg: FwCfg) -> dict[str, bytes]:
    """The kernel and its initrd into fw_cfg; the option ROM that fetches and starts them, by its name."""
    from pyvmm import guests
    from pyvmm.x86 import linuxboot

    config, images = m.config, m._images
    assert config.kernel is not None
    if config.modules:
        raise ConfigError("a kernel that firmware boots takes no modules: give an initrd, or leave the firmware out")
    items = linuxboot.kernel_items(
        m.memory,
        images.get(config.kernel, "kernel"),
        name=os.fsdecode(config.kernel) if isinstance(config.kernel, (str, os.PathLike)) else "kernel",
        initrd=None if config.initrd is None else images.get(config.initrd, "initrd"),
        append=config.append,
    )
    for key, data in items.items():
        fw_cfg.add(key, data)
    return {linuxboot.ROM_NAME: linuxboot.option_rom(guests.image("linuxboot"))}


def ide_disks(m: Machine) -> list[IdeDisk | None]:
    """The four places, primary master first; None where there is no disk."""
    from pyvmm.devices.ide.disk import IdeDisk

    drives = [*m.devices["ide0"].drives, *m.devices["ide1"].drives]  # type: ignore[attr-defined]  # IdeChannels
    return [drive if isinstance(drive, IdeDisk) else None for drive in drives]


def write_tables(m: Machine) -> int:
    """ACPI, MP and SMBIOS tables for a kernel booted directly; the ACPI root pointer's address."""
    from pyvmm.builder import cpu_identity
    from pyvmm.x86 import acpi_pc, mptable, smbios

    low = min(m.memory.size_bytes, layout.RAM_HOLE)
    tables = acpi_pc.build(m.config.cpus, ram_below_4g_bytes=low, s3=not m.config.no_s3, vga=m.vga is not None)
    tables.write(m.memory)
    mptable.write(m.memory, m.config.cpus)
    ranges = [(gpa, size) for gpa, size in m.memory.regions if not layout.RAM_HOLE <= gpa < layout.RAM_HIGH]
    smbios.build(m.config.cpus, ranges, uuid=system_uuid(m), cpu_id=cpu_identity(m)).write(m.memory)
    return tables.rsdp


# -- gathered writes ---------------------------------------------------------------------------------------------------


def gather_writes(m: Machine) -> None:
    """Let KVM gather what the guest writes to the data ports and the registers before the command's.

    A word of a sector then costs an exit to KVM alone, and user space gets them many at a time, in order, before the
    next exit that it sees. A guest that waits for its interrupt instead makes no such exit: while a window stands open
    for writing, a timer looks after what has been gathered.
    """
    if m.config.accel != "kvm" or not m.kvm.check_extension("KVM_CAP_COALESCED_PIO"):
        return
    for n, (command, _control, _irq) in enumerate(layout.IDE_CHANNELS):
        m._coalesced.append((m.pio, command, layout.IDE_GATHERED_BYTES))
        channel = m.devices[f"ide{n}"]
        GatheredWrites(m, channel)  # type: ignore[arg-type]  # make_ide made an IdeChannel


class GatheredWrites:
    """While ``channel`` takes data from the guest, makes the vCPUs deliver what KVM has gathered of it.

    Only where a whole period has brought nothing: a guest that goes on writing, or polls, comes out by itself, and a
    kick costs it as much as many words.
    """

    PERIOD_NS = 5_000_000

    __slots__ = ("_channel", "_machine", "_moved", "_timer")

    def __init__(self, m: Machine, channel: IdeChannel) -> None:
        self._machine = m
        self._channel = channel
        self._moved = 0
        self._timer = m.clock.timer(self._look)
        channel.on_data_out = self._begin

    def _begin(self) -> None:
        """A write command has asked for its data; the channel's lock is held."""
        if not self._timer.armed:
            self._timer.arm(self._machine.clock.now_ns() + self.PERIOD_NS)

    def _look(self) -> None:
        # With the lock: between two blocks of one command no window is open for a moment.
        with self._channel.lock:
            if not self._channel.data.writing:
                return
            moved = self._channel.data.count
        if moved == self._moved:
            for cpu in self._machine.cpus:
                cpu.exec.drain()
        self._moved = moved
        self._timer.arm(self._machine.clock.now_ns() + self.PERIOD_NS)
