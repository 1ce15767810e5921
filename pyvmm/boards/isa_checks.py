"""What both boards have, ports and fw_cfg files, known before any device is made: an option that wants one of them is
refused before anything is opened. That the boards have just these is tested.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import firmware_files, layout, smbios, table_loader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pyvmm.spec import Spec

    Ports = tuple[int, int, str]  # the first, how many, whose

DEBUG_EXIT_PORTS = 4
E820_FILE = "etc/e820"

# -- ports -------------------------------------------------------------------------------------------------------------

LEGACY: tuple[Ports, ...] = (
    (layout.PORT_PIC_MASTER, 2, "the PIC"),
    (layout.PORT_PIT, 4, "the PIT"),
    (layout.PORT_I8042_DATA, 1, "the keyboard controller"),
    (layout.PORT_SPEAKER, 1, "the PIT"),
    (layout.PORT_I8042_COMMAND, 1, "the keyboard controller"),
    (layout.PORT_RTC, 2, "the RTC"),
    (layout.PORT_POST, 1, "POST codes"),
    (layout.PORT_FAST_A20, 1, "port 0x92"),
    (layout.PORT_PIC_SLAVE, 2, "the PIC"),
    (layout.PORT_COM1, 8, "COM1"),
    (layout.PORT_PIC_ELCR, 2, "the PIC"),
    (layout.PORT_FW_CFG, 2, "fw_cfg"),
    (layout.PORT_FW_CFG_DMA, 8, "fw_cfg"),
    (layout.PORT_GPE0, layout.PORT_GPE0_BYTES, "ACPI's general-purpose events"),
)
MICROVM: tuple[Ports, ...] = (
    (layout.PORT_PM, layout.PM_BYTES, "ACPI's PM block"),
    (layout.PORT_RESET, 1, "the reset register"),
)
PC: tuple[Ports, ...] = (
    (layout.PORT_PCI, 8, "PCI's configuration"),
    (layout.PORT_APM, 2, "the chipset's APM"),
    *((command, 8, "an IDE channel") for command, _control, _irq in layout.IDE_CHANNELS),
    *((control, 1, "an IDE channel") for _command, control, _irq in layout.IDE_CHANNELS),
)
VGA: tuple[Ports, ...] = ((layout.PORT_VGA_MONO, 12, "VGA"), (layout.PORT_VGA, 32, "VGA"))
TESTDEV: tuple[Ports, ...] = ((layout.PORT_TESTDEV, 12, "pc-testdev"), (layout.PORT_TESTDEV_IRQ, 24, "pc-testdev"))
PVPANIC: tuple[Ports, ...] = ((layout.PORT_PVPANIC, 1, "pvpanic"),)
DEBUG_CONSOLE: tuple[Ports, ...] = ((layout.PORT_DEBUG_CONSOLE, 1, "the debug console"),)


def ports_in_use(spec: Spec, chipset: Iterable[Ports], *, debugcon: bool) -> Iterator[Ports]:
    """Those of a board's own devices, but for isa-debug-exit's: ``chipset`` are the ones that only such a board has."""
    yield from LEGACY
    yield from chipset
    if debugcon:
        yield from DEBUG_CONSOLE
    if spec.pvpanic:
        yield from PVPANIC
    if spec.vga == "text":
        yield from VGA
    if spec.testdev:
        yield from TESTDEV


def check_debug_exit(spec: Spec, chipset: Iterable[Ports], *, debugcon: bool) -> None:
    """ConfigError where isa-debug-exit is to be where another device is."""
    port = spec.debug_exit
    if port is None or port == layout.PORT_DEBUG_EXIT:
        return
    for first, count, name in ports_in_use(spec, chipset, debugcon=debugcon):
        if first < port + DEBUG_EXIT_PORTS and port < first + count:
            raise ConfigError(
                f"debug_exit={port:#x}: of its {DEBUG_EXIT_PORTS} ports {name} has {max(first, port):#x}: give another"
                " port, or None"
            )


# -- fw_cfg files ------------------------------------------------------------------------------------------------------


PC_FILES = (
    firmware_files.FAIL_WAIT_FILE,
    firmware_files.SYSTEM_STATES_FILE,
    firmware_files.SERIAL_CONSOLE_FILE,
    table_loader.SCRIPT_FILE,
    table_loader.TABLES_FILE,
    table_loader.RSDP_FILE,
    smbios.ANCHOR_FILE,
    smbios.TABLES_FILE,
)


def files_in_use(firmware: Iterable[str]) -> list[str]:
    """The names of fw_cfg files that a board always has: ``firmware`` are those that only such a board makes."""
    return [E820_FILE, *firmware]


def check_files(spec: Spec, firmware: Iterable[str]) -> None:
    """ConfigError where a file of the embedder's has the name of one that the board makes."""
    for name in files_in_use(firmware):
        if name in spec.fw_cfg:
            raise ConfigError(f"fw_cfg file {name!r}: the board makes it itself, leave it out")
