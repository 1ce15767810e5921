"""What PC firmware (SeaBIOS) reads about the board besides its devices: fw_cfg files and items, and CMOS bytes.

SeaBIOS docs/Runtime_config.md; QEMU docs/specs/fw_cfg.rst for the items with a number. Everything that takes time
to make is a callable: a machine that boots without firmware never pays for it.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import TypeAlias

    Data: TypeAlias = bytes | Callable[[], bytes]

# Items by number: devices/fw_cfg.py has all of them, but lies above.
UUID = 0x0002
NOGRAPHIC = 0x0004
BOOT_MENU = 0x000E
IRQ0_OVERRIDE = 0x8002

BOOT_ORDER_FILE = "bootorder"
GEOMETRY_FILE = "bios-geometry"
SERIAL_CONSOLE_FILE = "etc/sercon-port"
MENU_WAIT_FILE = "etc/boot-menu-wait"
FAIL_WAIT_FILE = "etc/boot-fail-wait"
NEVER_RETRY = 0xFFFF_FFFF
SYSTEM_STATES_FILE = "etc/system-states"
STATE_SUPPORTED = 0x80  # with a state's SLP_TYP in the lower bits

# Open Firmware device paths, as SeaBIOS builds them for what it finds.
PCI_ROOT = "/pci@i0cf8"
IDE_CONTROLLER = f"{PCI_ROOT}/ide@1,1"
OPTION_ROM = "/rom@genroms/"

# CMOS: SeaBIOS reads the boot order here for what the file does not name, one nibble a kind of device. The types and
# geometries of the first channel's disks are the AT's: Bochs' BIOS and old systems look there.
CMOS_DISK_TYPES = 0x12  # upper nibble: master, lower: slave; 15: see the byte for it
CMOS_DISK_TYPE = (0x19, 0x1A)
CMOS_DISK_GEOMETRY = (0x1B, 0x24)  # nine bytes each
CMOS_TRANSLATION = 0x39  # two bits a disk: how BIOS geometry comes from the disk's
CMOS_BOOT_FLAG1 = 0x38  # upper nibble: third choice; bit 0: boot floppies without a signature
CMOS_BOOT_FLAG2 = 0x3D  # lower nibble: first choice, upper: second
CMOS_FLOPPY_TYPES = 0x10
BOOT_KINDS = {"a": 1, "b": 1, "c": 2, "d": 3, "n": 4}  # floppies, disk, CD-ROM, network, in QEMU's letters
DEFAULT_ORDER = "cad"  # QEMU's

EXTENDED_TYPE = 0x0F
USER_TYPE = 47  # the geometry is in CMOS
NO_PRECOMPENSATION = 0xFFFF
CONTROL_NO_RETRIES = 0xC0
CONTROL_MANY_HEADS = 0x08  # more than eight

# How far a BIOS call's cylinder (10 bits), head (8) and sector (6) reach.
BIOS_CYLINDERS = 1024
LARGE_LIMIT = 131_072  # cylinders times heads up to which doubling heads helps
TRANSLATION_NONE, TRANSLATION_LBA, TRANSLATION_LARGE, TRANSLATION_RECHS = range(4)


def pc_firmware_files(
    cpus: int,
    memory: Iterable[tuple[int, int]],
    *,
    irqchip: bool = True,
    boot_paths: Iterable[str] = (),
    geometries: Mapping[str, tuple[int, int, int]] | None = None,
    serial_console: int | None = layout.PORT_COM1,
    boot_menu_wait_ms: int | None = None,
    boot_fail_wait_ms: int | None = None,
    option_roms: Mapping[str, bytes] | None = None,
    uuid: bytes = bytes(16),
    cpu_id: tuple[int, int, str] | None = None,
    acpi_devices: Callable[[], Iterable[bytes]] = tuple,
    gpe0: bool = True,
    smi_command: bool = False,
    s3: bool = True,
) -> dict[str, Data]:
    """{name: content} of the fw_cfg files, but for etc/e820.

    memory        (gpa, size_bytes) of the ranges of RAM, as GuestMemory.regions; what is mapped into the hole
                  below 4 GiB does not count.
    irqchip       local APICs and an IOAPIC are there.
    boot_paths    devices in the order to try them: made by boot_paths, or by hand of ide_path and
                  rom_path.
    geometries    BIOS geometry (cylinders, heads, sectors) by device path.
    serial_console  port of the UART that carries the BIOS's console, or None.
    boot_menu_wait_ms  how long the boot menu may be called up, where pc_firmware_items turned it on.
    boot_fail_wait_ms  try again after this time when nothing boots; None: never.
    option_roms   {name: image} of ROMs to run, made by option_rom().
    cpu_id        what cpuid.identity says, for SMBIOS.
    acpi_devices  gives acpi_pc.build's devices, when the tables are wanted.
    gpe0, smi_command, s3  as acpi_pc.build's.
    """
    ranges = [(gpa, size) for gpa, size in memory if not layout.RAM_HOLE <= gpa < layout.RAM_HIGH]
    fail_wait = NEVER_RETRY if boot_fail_wait_ms is None else boot_fail_wait_ms
    files: dict[str, Data] = {FAIL_WAIT_FILE: fail_wait.to_bytes(4, "little"), SYSTEM_STATES_FILE: system_states(s3)}
    if boot_menu_wait_ms is not None:
        files[MENU_WAIT_FILE] = boot_menu_wait_ms.to_bytes(2, "little")
    if serial_console is not None:
        files[SERIAL_CONSOLE_FILE] = serial_console.to_bytes(2, "little")
    paths = list(boot_paths)
    if paths:
        files[BOOT_ORDER_FILE] = boot_order(paths)
    if geometries:
        files[GEOMETRY_FILE] = bios_geometry(geometries)
    for name, image in (option_roms or {}).items():
        files[f"genroms/{name}"] = image
    tables = AcpiFiles(cpus, low_ram(ranges), irqchip, acpi_devices, gpe0, smi_command, s3)
    files.update(tables.callables())
    files.update(SmbiosFiles(cpus, ranges, uuid, cpu_id).callables())
    return files


def pc_firmware_items(*, uuid: bytes = bytes(16), boot_menu: bool = False, irqchip: bool = True) -> dict[int, bytes]:
    """{key: content} of fw_cfg items with a number, beside FwCfg.describe_machine's."""
    return {
        UUID: uuid,
        # The console is a UART by etc/sercon-port; this one would mean the first UART whatever that file says.
        NOGRAPHIC: bytes(2),
        BOOT_MENU: int(boot_menu).to_bytes(2, "little"),
        # Interrupt 0 is wired to pin 2 of the IOAPIC: SeaBIOS's own MP table says so then.
        IRQ0_OVERRIDE: int(irqchip).to_bytes(4, "little"),
    }


def pc_cmos(
    order: str = DEFAULT_ORDER,
    translations: Iterable[int] = (),
    disks: Sequence[tuple[int, int, int] | None] = (),
) -> list[tuple[int, int]]:
    """(index, value) of CMOS bytes, beside those that Rtc sets by itself (memory, processors, equipment).

    ``order`` has up to three of QEMU's letters, for devices that bootorder does not name. ``translations``: the
    TRANSLATION_ of the disks, primary master first; ``disks`` the geometries (cylinders, heads, sectors a track) of the
    primary master and slave, None for no disk. ConfigError for another letter, or one given twice.
    """
    packed = sum(translation << 2 * n for n, translation in enumerate(translations))
    return [(CMOS_FLOPPY_TYPES, 0), *cmos_boot_order(order), (CMOS_TRANSLATION, packed), *cmos_disks(disks)]


def cmos_boot_order(order: str) -> list[tuple[int, int]]:
    """(index, value) of the two bytes that have it. ConfigError as pc_cmos."""
    if len(order) > 3 or len(set(order)) < len(order) or not set(order) <= set(BOOT_KINDS):
        raise ConfigError(f"boot order {order!r}: use up to three of a, b (floppy), c (disk), d (CD-ROM), n (network)")
    first, second, third = ([BOOT_KINDS[letter] for letter in order] + [0, 0, 0])[:3]
    return [(CMOS_BOOT_FLAG1, third << 4), (CMOS_BOOT_FLAG2, second << 4 | first)]


def cmos_disks(disks: Sequence[tuple[int, int, int] | None]) -> list[tuple[int, int]]:
    """(index, value) of the bytes about the first channel's disks: as QEMU's hw/i386/pc.c has them (cmos_init_hd)."""
    values = []
    types = 0
    for unit, disk in enumerate(disks[:2]):
        if disk is None:
            continue
        cylinders, heads, track = disk
        types |= EXTENDED_TYPE << (0 if unit else 4)
        values.append((CMOS_DISK_TYPE[unit], USER_TYPE))
        control = CONTROL_NO_RETRIES | (CONTROL_MANY_HEADS if heads > 8 else 0)
        low = cylinders.to_bytes(2, "little")
        # The landing zone, behind the control byte, is the end.
        data = (*low, heads, *NO_PRECOMPENSATION.to_bytes(2, "little"), control, *low, track)
        values += [(CMOS_DISK_GEOMETRY[unit] + n, value) for n, value in enumerate(data)]
    return [(CMOS_DISK_TYPES, types), *values] if values else []


def system_states(s3: bool) -> bytes:
    """The file etc/system-states, a byte for each of S0 to S5: whether there is the state, and its SLP_TYP."""
    states = bytearray(6)
    states[0] = STATE_SUPPORTED
    states[3] = layout.SLP_TYP_S3 | (STATE_SUPPORTED if s3 else 0)
    states[5] = layout.SLP_TYP_S5 | STATE_SUPPORTED
    return bytes(states)


def low_ram(ranges: Iterable[tuple[int, int]]) -> int:
    """Bytes of RAM below 4 GiB."""
    return sum(size for gpa, size in ranges if gpa < layout.RAM_HOLE)


# Boot order


def ide_path(index: int) -> str:
    """The device path of IDE drive 0 (primary master) to 3 (secondary slave)."""
    return f"{IDE_CONTROLLER}/drive@{index // 2}/disk@{index % 2}"


def virtio_path(slot: int) -> str:
    """The device path of a disk on virtio in a PCI slot."""
    return f"{PCI_ROOT}/scsi@{slot:x}/disk@0,0"


def rom_path(name: str) -> str:
    """The device path of the option ROM genroms/``name``."""
    return OPTION_ROM + name


def boot_paths(
    drives: Iterable[tuple[int, str]],
    order: str = DEFAULT_ORDER,
    *,
    kernel: str | None = None,
    virtio_slots: Iterable[int] = (),
) -> list[str]:
    """Of (index, media) drives on IDE, media as DriveOptions has it, and of disks on virtio in these PCI slots: by the
    letters of ``order``, on IDE lower index first, then those on virtio.

    Kinds that ``order`` does not name are left out. ``kernel`` is the name of an option ROM that boots one: where
    ``order`` does not say when (n), before all else.
    """
    letters = {"disk": "c", "cdrom": "d"}
    ranked = [(order.index(letters[media]), ide_path(n)) for n, media in sorted(drives) if letters[media] in order]
    if letters["disk"] in order:
        ranked += [(order.index(letters["disk"]), virtio_path(slot)) for slot in virtio_slots]
    if kernel is not None:
        ranked.append((order.find("n"), rom_path(kernel)))
    return [path for _, path in sorted(ranked, key=lambda each: each[0])]


def boot_order(paths: Iterable[str], strict: bool = False) -> bytes:
    """The file ``bootorder``: a path a line, and the zero that QEMU ends it with. ``strict``: nothing else is tried."""
    if strict:
        paths = [*paths, "HALT"]
    return "\n".join(paths).encode("ascii") + b"\0"


def bios_geometry(geometries: Mapping[str, tuple[int, int, int]]) -> bytes:
    """The file ``bios-geometry``: path, cylinders, heads and sectors a track of each disk that has its own."""
    lines = [f"{path} {c} {h} {s}" for path, (c, h, s) in geometries.items()]
    return "\n".join(lines).encode("ascii") + b"\0"


# Files made when they are wanted


class AcpiFiles:
    """etc/acpi/tables, etc/acpi/rsdp and etc/table-loader, built together at the first look at one of them."""

    __slots__ = ("_arguments", "_files")

    def __init__(
        self,
        cpus: int,
        ram_below_4g_bytes: int,
        irqchip: bool,
        devices: Callable[[], Iterable[bytes]],
        gpe0: bool,
        smi_command: bool,
        s3: bool,
    ) -> None:
        self._arguments = (cpus, ram_below_4g_bytes, irqchip, devices, gpe0, smi_command, s3)
        self._files: dict[str, bytes] = {}

    def callables(self) -> dict[str, Data]:
        from pyvmm.x86.table_loader import RSDP_FILE, SCRIPT_FILE, TABLES_FILE

        return {
            RSDP_FILE: lambda: self._file(RSDP_FILE),
            TABLES_FILE: lambda: self._file(TABLES_FILE),
            SCRIPT_FILE: lambda: self._file(SCRIPT_FILE),
        }

    def _file(self, name: str) -> bytes:
        if not self._files:
            from pyvmm.x86 import acpi_pc, table_loader

            cpus, low, irqchip, devices, gpe0, smi_command, s3 = self._arguments
            tables = acpi_pc.build(
                cpus,
                ram_below_4g_bytes=low,
                irqchip=irqchip,
                devices=devices(),
                gpe0=gpe0,
                smi_command=smi_command,
                s3=s3,
                rsdp=0,
                base=0,
                end=layout.MIB,
            )
            self._files = table_loader.acpi_files(tables)
        return self._files[name]


class SmbiosFiles:
    """etc/smbios/smbios-anchor and etc/smbios/smbios-tables, built together at the first look at one of them."""

    __slots__ = ("_cpu_id", "_cpus", "_files", "_ranges", "_uuid")

    def __init__(
        self, cpus: int, ranges: list[tuple[int, int]], uuid: bytes, cpu_id: tuple[int, int, str] | None
    ) -> None:
        self._cpus = cpus
        self._ranges = ranges
        self._uuid = uuid
        self._cpu_id = cpu_id
        self._files: dict[str, bytes] = {}

    def callables(self) -> dict[str, Data]:
        from pyvmm.x86.smbios import ANCHOR_FILE, TABLES_FILE

        return {ANCHOR_FILE: lambda: self._file(ANCHOR_FILE), TABLES_FILE: lambda: self._file(TABLES_FILE)}

    def _file(self, name: str) -> bytes:
        if not self._files:
            from pyvmm.x86 import smbios

            tables = smbios.build(self._cpus, self._ranges, uuid=self._uuid, cpu_id=self._cpu_id)
            self._files = tables.files()
        return self._files[name]
