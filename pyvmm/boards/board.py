"""Board: what a kind of machine is made of besides its processors. Subclass it and write ``make_devices``.

    class Sensors(Board):
        def make_devices(self):
            self.add_serial()
            self.sensor = self.add("sensor", Sensor(self.irq_line(5)))
            self.map_ports(0x300, 4, self.sensor, "sensor")

    Machine(board=Sensors, flat="guest.bin")

builder.py calls the steps in the order in which they stand here; restart.py those for a reset and a wake-up.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError, StateError
from pyvmm.images import image_name
from pyvmm.late import Late, LateSpaces
from pyvmm.memory_map import MemoryMap
from pyvmm.places import Places
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    from pyvmm.announcer import Announcer
    from pyvmm.balloon import Balloon
    from pyvmm.boards.drive_places import PlacedDrive
    from pyvmm.chardev import Chardev
    from pyvmm.chassis import Chassis
    from pyvmm.device import Device
    from pyvmm.devices.serial import Serial
    from pyvmm.devices.vga_text import VgaText
    from pyvmm.devices.virtio.blk import VirtioBlk
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.images import Images
    from pyvmm.irq import IrqLine
    from pyvmm.platform import Platform
    from pyvmm.region import MemoryRegion
    from pyvmm.spec import Spec
    from pyvmm.state import Holder
    from pyvmm.x86.cpu_state import BootState

    Made = TypeVar("Made", bound=Device)

# How long a character of console output may wait for more, after another: nobody sees that, and a write a line is far
# cheaper than a write a character.
CONSOLE_GATHER_NS = 10_000_000


class Board:
    """RAM, a kernel or flat binary in it, and no device: subclasses add those.

    ``ports`` and ``windows`` give out I/O ports and addresses of memory-mapped registers, each once.
    """

    window = range(0)
    """Addresses at which the guest can have the board show RAM, ROM or the bus."""
    may_come_late = False
    """Whether its devices can be made when the guest first looks (``install_late``): what they are is all in the
    address spaces, and none of them changes what shows as memory. A class says so for itself alone: one that derives
    from it may do more.
    """
    vga: VgaText | None = None
    balloon: Balloon | None = None
    announcer: Announcer | None = None
    """Where there are network cards."""
    _late: LateSpaces | None = None  # until they are there

    def __init__(self, config: Spec, chassis: Chassis, images: Images, *, runs_guests: bool) -> None:
        self.config = config
        self.chassis = chassis
        self.memory = chassis.memory
        self.pio, self.mmio = chassis.pio, chassis.mmio
        self.clock = chassis.clock
        self.images = images
        self.runs_guests = runs_guests
        self.powered_on_ns = self.clock.now_ns(), self.clock.wall_ns()
        """Guest time and the wall clock when it was."""
        self.first_boot = True
        """There was no reset yet: what firmware is told for its first boot only still holds."""
        self._parts: dict[str, Device | Late] = {}
        self.disks: dict[str, VirtioBlk] = {}
        """Those on virtio, by the names of their drives."""
        self.ports = Places("port", 0, self.pio.size)
        self.windows = Places("address", 0, self.mmio.size)
        self._aml: list[Callable[[], bytes]] = []
        self._words: list[str] = []
        chassis.closers.call(self._clear, self._parts.clear)

    @classmethod
    def check(cls, config: Spec) -> None:
        """ConfigError for what such a board can't be asked. Nothing has been opened yet."""

    @classmethod
    def begins_late(cls, config: Spec) -> bool:
        """Whether a machine of that Spec, too, can begin its guest without devices: making them opens nothing, nobody
        can refuse them, and nothing that is loaded with the guest tells of them.
        """
        return False

    # -- memory ------------------------------------------------------------------------------------------------

    def lay_out_memory(self) -> MemoryMap:
        """RAM and ROM, and what a processor finds of them at which address."""
        self.add_roms()
        self.memory_map = MemoryMap(self.memory, self.mmio)
        self.chassis.closers.call(self.memory_map.close, self.memory_map.close)
        self.open_window()
        return self.memory_map

    def _take_fixed_places(self) -> None:
        """No device can be where RAM or ROM answers for good. Interrupt controllers and PIT are KVM's or ours, and at
        the same places.
        """
        for section in self.memory_map.sections:
            if section.gpa not in self.window:
                self.mmio.reserve(section.gpa, section.size, section.region.name)
                self.windows.take(section.gpa, section.size, section.region.name)
        self.windows.take(layout.IOAPIC, layout.IOAPIC_BYTES, "IOAPIC")
        self.windows.take(layout.LAPIC, layout.LAPIC_BYTES, "local APIC")
        if self.runs_guests:
            self.windows.take(layout.KVM_PAGES, layout.KVM_PAGES_BYTES, "pages of KVM's own")
        for port, size, name in (
            (layout.PORT_PIC_MASTER, 2, "PIC"),
            (layout.PORT_PIC_SLAVE, 2, "PIC"),
            (layout.PORT_PIC_ELCR, 2, "PIC"),
            (layout.PORT_PIT, 4, "PIT"),
            (layout.PORT_SPEAKER, 1, "PIT"),
        ):
            self.ports.take(port, size, name)

    def add_roms(self) -> None:
        """Add what is in memory besides RAM."""

    def open_window(self) -> None:
        """Say what shows in the board's window at first."""

    # -- devices -----------------------------------------------------------------------------------------------

    def install(self, platform: Platform) -> None:
        """Everything on the board."""
        self.platform = platform
        self.irqchip = platform.irqchip
        self._install()

    def install_late(self, platform: Platform) -> None:
        """The same when somebody first looks for a device, and as if it had been now."""
        self.platform = platform
        self.irqchip = platform.irqchip
        self.make_first_devices()
        now_ns = self.clock.now_ns()
        self._late = LateSpaces((self.pio, self.mmio), lambda: self.clock.in_the_past(now_ns, self._install))

    def after_arrival(self, work: Callable[[], object]) -> None:
        """``work()`` when the devices have been made, before anybody finds them; now, where they are there."""
        if self._late is None:
            work()
        else:
            self._late.then.append(work)

    def arrive(self) -> None:
        """Have everything on the board. Whoever may look at a device, or give the board one, calls this before."""
        if (late := self._late) is not None:
            late.arrive()
            self._late = None

    def _install(self) -> None:
        self._take_fixed_places()
        self.add_late(self.irqchip.devices)
        self.irqchip.place(self.pio, self.mmio)
        self.make_devices()

    def make_first_devices(self) -> None:
        """Map what is there at once, also where the others come late; ``make_devices`` adds it."""

    def make_devices(self) -> None:
        """Make the devices, ``add`` each of them, and map it."""

    def add(self, name: str, device: Made) -> Made:
        """``device`` is part of the board: it is reset with it, and Machine.devices has it by this name. ConfigError
        where another one has that.
        """
        self._take_name(name, device)
        return device

    def _take_name(self, name: str, part: Device | Late) -> None:
        if name in self._parts:
            raise ConfigError(f"two devices with the name {name}: give the one that you have named another id")
        self._parts[name] = part

    def add_late(self, devices: Mapping[str, Late]) -> None:
        """``add`` of devices that are made when somebody wants them, and mapped at the places that they say; those are
        theirs already.
        """
        placed: dict[str, list[tuple[int, MemoryRegion]]] = {self.pio.name: [], self.mmio.name: []}
        for name, late in devices.items():
            self._take_name(name, late)
            for space, address, region in late.regions():
                placed[space.name].append((address, region))
        for space in (self.pio, self.mmio):
            space.add_all(placed[space.name])

    def part(self, name: str) -> Any:
        """The device of that name. KeyError where there is none."""
        return part_of(self._parts, name)

    def holders(self) -> list[tuple[str, Holder]]:
        """What has state on the board, by name and in its order; of a late device what stands for it."""
        return list(self._parts.items())

    def has(self, name: str) -> bool:
        """Whether a device of that name is part of the board."""
        return name in self._parts

    def made(self, name: str) -> Any:
        """The device of that name, where it is made already; None where it is not, or there is none."""
        return made_of(self._parts, name)

    @property
    def parts(self) -> list[tuple[str, Device]]:
        """The devices with their names, in the order in which they were added: a reset goes by it."""
        return [(name, self.part(name)) for name in self._parts]

    def describe(self, aml: Callable[[], bytes] | None = None, words: str = "") -> None:
        """What a device that is placed says of itself to the guest: ``aml()`` makes its term of the DSDT, when tables
        are wanted, and ``words`` go to the end of a kernel's command line ("virtio_mmio.device=512@0xfeb00000:5").
        """
        if aml is not None:
            self._aml.append(aml)
        if words:
            self._words.append(words)

    def add_virtio(self, name: str, device: VirtioDevice, asked: Any = None) -> None:
        """Place a virtio device where this kind of board has them: a transport with its interrupt and its doorbells, a
        thread for the queues. ``device`` and its transport are parts of the board from then on. ``asked``: the options
        that say by which interfaces a driver finds it, where it has such.
        """
        from pyvmm.boards.virtio import add_mmio

        add_mmio(self, name, device)

    def map_ports(self, port: int, size: int, device: Device, name: str, **handlers: Any) -> MemoryRegion:
        """``size`` ports from ``port`` on are ``device``'s; ``handlers`` as AddressSpace.map has them."""
        return self.pio.map(self.ports.take(port, size, name), size, device, name=name, **handlers)

    def add_ports(self, port: int, region: MemoryRegion) -> MemoryRegion:
        """The same for a region."""
        return self.pio.add(self.ports.take(port, region.size, region.name), region)

    def acpi_devices(self) -> list[bytes]:
        """The DSDT's terms of all that is on the board."""
        return [aml() for aml in self._aml]

    @property
    def command_line(self) -> str:
        """The kernel's: what the embedder says, then the devices' words."""
        return " ".join([self.config.append, *self._words] if self.config.append else self._words)

    def irq_line(self, gsi: int, name: str = "a device") -> IrqLine:
        """One more line to a GSI (ISA interrupts have the same numbers) for the device ``name``; ORed with the others.
        """
        return self.irqchip.line(gsi, name)

    def add_serial(self) -> Serial:
        """COM1, with the console that MachineConfig.serial says."""
        consoles = self.chassis.consoles
        irq = self.irq_line(layout.IRQ_COM1, "serial")
        serial = self.make_serial(irq, consoles.open(self.config.serial, "serial"))
        consoles.add_flush(serial.flush)
        self.add_ports(layout.PORT_COM1, serial.region)
        self.describe(serial_aml)
        return self.add("serial", serial)

    def make_serial(self, irq: IrqLine, console: Chardev) -> Serial:
        """A UART at these two."""
        from pyvmm.devices.serial import Serial

        return Serial(irq, console, self.clock, gather_ns=CONSOLE_GATHER_NS if self.runs_guests else 0)

    # -- the guest ---------------------------------------------------------------------------------------------

    @property
    def starts_in_firmware(self) -> bool:
        """Whether the first instruction is a ROM's, which finds the rest by itself."""
        return False

    def load_guest(self, *, clean: bool = True) -> BootState | None:
        """Put tables and images into memory, which is known to be zero where ``clean``. None where there is neither a
        kernel nor a flat binary to enter: the vCPU stays at the reset vector.
        """
        from pyvmm.x86 import boot

        config, images = self.config, self.images
        if config.flat is not None:
            address = config.flat_address
            if address is None:
                address = layout.BOOT_SECTOR if config.flat_mode == "real16" else layout.KERNEL
            return boot.load(
                self.memory,
                images.get(config.flat, "flat binary"),
                name=image_name(config.flat, "flat binary"),
                flat_address=address,
                flat_mode=config.flat_mode,
                clean=clean,
            )
        if config.kernel is None or config.firmware is not None:
            return None  # firmware boots a kernel by itself, out of fw_cfg
        kernel = images.get(config.kernel, "kernel")
        modules = [(images.get(image, "module"), line) for image, line in config.modules]
        initrd = images.get(config.initrd, "initrd") if config.initrd is not None else None
        named = [image for image, _ in config.modules] or ([config.initrd] if config.initrd is not None else [])
        rsdp = self.write_tables()
        return boot.load(
            self.memory,
            kernel,
            name=image_name(config.kernel, "kernel"),
            initrd=modules or initrd,
            module_names=[image_name(image, "module") for image in named],
            append=self.command_line,
            acpi_rsdp=rsdp,
            clean=clean,
        )

    def write_tables(self) -> int:
        """Tables for a kernel that is entered directly; the ACPI root pointer's address, 0 without."""
        return 0

    # -- reset and wake-up: every vCPU is parked, the devices are at power-on again ------------------------------

    def all_devices(self) -> list[Device]:
        """The board's, and whatever the embedder has mapped; each once."""
        mapped = [r.device for space in (self.pio, self.mmio) for r in space.regions if r.device is not None]
        own = [device for _, device in self.parts]
        return list({id(device): device for device in [*own, *mapped]}.values())

    def after_reset(self) -> None:
        """What the board has to do beyond its devices' own reset."""

    def after_wake(self) -> None:
        """The same where the guest has been suspended to RAM: memory is as it was."""

    def waking_state(self) -> BootState | None:
        """Where a guest goes on that was suspended to RAM; None: at the reset vector."""
        from pyvmm.x86.wake import waking_state

        if not self.runs_guests:
            return None
        # A guest that has left no vector is started again, as firmware would do.
        return waking_state(self.memory) or self.load_guest(clean=False)

    def woken(self, events: int) -> None:
        """Tell the guest that it was, and by what: bits of PM1's status."""

    def new_generation(self) -> None:
        """The guest goes on as a twin of another machine: its cards have addresses of their own, and it is told."""
        for net in self.config.nets:
            self.part(str(net.id)).take_own_address()

    # -- the embedder's hands ------------------------------------------------------------------------------------

    def change_medium(self, drive: PlacedDrive, *, force: bool = False) -> bool:
        """Put the medium that ``drive`` names into the drive of its name; none: take out what is there. False where the
        guest holds it (``force`` takes it all the same). ConfigError where the medium can't be had, or not be changed.
        """
        raise ConfigError(f"drive {drive.id} has no medium that can be changed: only a CD drive on IDE has")

    def press_power_button(self) -> None:
        raise StateError("this board has no power button: stop() the machine")

    # -- the end -------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        """Nothing is mapped any more, and nobody keeps the devices."""
        if self._late is not None:
            self._late.forget()
            self._late = None
        self.pio.unmap_all()
        self.mmio.unmap_all()
        for part in self._parts.values():
            if isinstance(part, Late):
                part.forget()
        self._parts.clear()
        self.disks.clear()


def part_of(parts: Mapping[str, Device | Late], name: str) -> Any:
    """Board.part, of a board's parts."""
    part = parts[name]
    return part.device if isinstance(part, Late) else part


def made_of(parts: Mapping[str, Device | Late], name: str) -> Any:
    """Board.made, of a board's parts."""
    part = parts.get(name)
    if isinstance(part, Late):
        return part.device if part.made else None
    return part


def serial_aml() -> bytes:
    from pyvmm.x86 import acpi

    return acpi.serial_port()
