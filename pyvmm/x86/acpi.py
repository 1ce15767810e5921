"""The ACPI tables of a machine without firmware: RSDP, RSDT, XSDT, FADT, FACS, MADT, DSDT.

They say what there is and nothing more: a PC with the fixed ACPI hardware at layout.PORT_PM (not
hardware-reduced), a reset register, ISA devices, processors, and where irqchip is on LAPICs and an IOAPIC.

ACPI 6.5: 5.2.5 (RSDP), 5.2.7 and 5.2.8 (RSDT, XSDT), 5.2.9 (FADT), 5.2.10 (FACS), 5.2.12 (MADT), 7.4 (sleep objects).
"""

from __future__ import annotations

from struct import pack

from pyvmm.errors import ConfigError
from pyvmm.x86 import aml, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pyvmm.guest_memory import GuestMemory

OEM_ID = b"PYVMM "
OEM_TABLE_ID = b"PYVMMVM "
OEM_REVISION = 1
CREATOR_ID = b"PYVM"
CREATOR_REVISION = 1
HEADER_BYTES = 36
RSDP_BYTES = 36
RSDP_V1_BYTES = 20  # what its first checksum covers
FACS_BYTES = 64
FACS_ALIGNMENT = 64
FADT_BYTES = 276
FADT_REVISION = 6
FADT_MINOR_REVISION = 5

# FADT flags (table 5.10). A fixed power button and the RTC's wake status are there: bits 4 and 6 are clear.
WBINVD = 1 << 0
PROC_C1 = 1 << 2
SLP_BUTTON_ABSENT = 1 << 5
TMR_VAL_EXT = 1 << 8  # the PM timer has 32 bits, not 24
RESET_REG_SUP = 1 << 10
# IAPC_BOOT_ARCH (table 5.11).
LEGACY_DEVICES = 1 << 0
HAS_8042 = 1 << 1
VGA_NOT_PRESENT = 1 << 2
# A latency above these says that the state is not there (5.2.9: P_LVL2_LAT, P_LVL3_LAT).
NO_C2 = 101
NO_C3 = 1001
CMOS_CENTURY = 0x32
# What SMI_CMD takes where there is one, as the PIIX4's firmware has them.
ACPI_ENABLE = 0xF1
ACPI_DISABLE = 0xF0
PROFILE_UNSPECIFIED = 0

DEVICE_CHANGED = 0x80  # a notification whose meaning is the device's own

SYSTEM_IO = 1  # address space of a Generic Address Structure
BYTE_ACCESS = 1
WORD_ACCESS = 2
DWORD_ACCESS = 3

# MADT (5.2.12).
PCAT_COMPAT = 1 << 0  # a PIC pair is there too
ENABLED = 1 << 0
LOCAL_APIC = 0
IO_APIC = 1
SOURCE_OVERRIDE = 2
LOCAL_APIC_NMI = 4
LOCAL_X2APIC = 9
LOCAL_X2APIC_NMI = 0xA
MAX_XAPIC_ID = 254  # 255 is the broadcast; processors beyond are x2APICs
ALL_PROCESSORS = 0xFF
ALL_X2_PROCESSORS = 0xFFFF_FFFF
LINT1 = 1
# MPS INTI flags (table 5.29).
CONFORMS = 0
ACTIVE_HIGH = 0b01
LEVEL = 0b11 << 2


class AcpiTables:
    """Built tables and where they go. ``rsdp`` is the root pointer's address; ``tables`` maps a signature to
    (gpa, bytes).
    """

    __slots__ = ("rsdp", "tables")

    def __init__(self, rsdp: int, tables: dict[str, tuple[int, bytes]]) -> None:
        self.rsdp = rsdp
        self.tables = tables

    def write(self, memory: GuestMemory) -> None:
        """Put them into guest memory. BusError where there is less than 1 MiB of it."""
        for gpa, data in self.tables.values():
            memory.write(gpa, data)


def build(
    cpus: int,
    *,
    irqchip: bool = True,
    devices: Iterable[bytes] = (),
    s3: bool = True,
    vga: bool = False,
    rsdp: int = layout.ACPI_RSDP,
    base: int = layout.ACPI_TABLES,
    end: int = layout.ACPI_TABLES_END,
) -> AcpiTables:
    """The tables for that many processors with APIC ids 0, 1, ...

    ``irqchip`` False leaves the MADT out: one processor, interrupts through the PIC pair. ``devices`` are
    the aml.device terms of what is on the board, for \\_SB. ``s3`` False leaves suspend to RAM out; ``vga``: there is a
    VGA. The tables follow one another from ``base``, the RSDP is at ``rsdp``. ConfigError when they do not fit
    below ``end``.
    """
    others = [("APIC", madt(cpus))] if irqchip else []
    terms = dsdt(cpus, devices, s3=s3)

    def make_fadt(facs: int, dsdt: int) -> bytes:
        return fadt(facs, dsdt, gpe0=layout.PORT_GPE0, gpe0_bytes=layout.PORT_GPE0_BYTES, vga=vga)

    return arrange(terms, make_fadt, others, cpus=cpus, rsdp=rsdp, base=base, end=end)


def arrange(
    dsdt: bytes,
    make_fadt: Callable[[int, int], bytes],
    others: Iterable[tuple[str, bytes]],
    *,
    cpus: int,
    rsdp: int,
    base: int,
    end: int,
) -> AcpiTables:
    """Tables in a row from ``base``, with pointers to one another: FACS, DSDT, the FADT that ``make_fadt(facs, dsdt)``
    gives for their addresses, ``others`` by signature, RSDT and XSDT. ConfigError when they do not fit below ``end``.
    """
    tables: dict[str, tuple[int, bytes]] = {}
    at = base

    def place(signature: str, data: bytes, alignment: int = 16) -> int:
        nonlocal at
        gpa = (at + alignment - 1) & -alignment
        at = gpa + len(data)
        tables[signature] = (gpa, data)
        return gpa

    facs_gpa = place("FACS", facs(), FACS_ALIGNMENT)
    dsdt_gpa = place("DSDT", dsdt)
    roots = [place("FACP", make_fadt(facs_gpa, dsdt_gpa))]
    roots += [place(signature, data) for signature, data in others]
    rsdt_gpa = place("RSDT", table(b"RSDT", 1, pack(f"<{len(roots)}I", *roots)))
    xsdt_gpa = place("XSDT", table(b"XSDT", 1, pack(f"<{len(roots)}Q", *roots)))
    if at > end:
        raise ConfigError(f"the ACPI tables of {cpus} processors are {at - end} bytes too long: use fewer")
    tables["RSDP"] = (rsdp, root_pointer(rsdt_gpa, xsdt_gpa))
    return AcpiTables(rsdp, tables)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A description table: the common 36-byte header with its checksum, then ``body``."""
    header = pack(
        "<4sIBB6s8sI4sI",
        signature,
        HEADER_BYTES + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        CREATOR_ID,
        CREATOR_REVISION,
    )
    data = bytearray(header + body)
    data[9] = checksum(data)
    return bytes(data)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all zero, where its own place holds zero."""
    return -sum(data) & 0xFF


def root_pointer(rsdt: int, xsdt: int) -> bytes:
    """The RSDP, revision 2: a checksum of the first 20 bytes for ACPI 1.0, one of all 36."""
    data = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt, RSDP_BYTES, xsdt, 0))
    data[8] = checksum(data[:RSDP_V1_BYTES])
    data[32] = checksum(data)
    return bytes(data)


def facs() -> bytes:
    """Firmware Control Structure, version 2: no header, no checksum. Both waking vectors are the guest's to set; there
    is no 64-bit environment for the longer one.
    """
    return pack("<4sI24xB", b"FACS", FACS_BYTES, 2).ljust(FACS_BYTES, b"\0")


def gas(port: int, size_bytes: int, access: int) -> bytes:
    """A Generic Address Structure for an I/O port range."""
    return pack("<BBBBQ", SYSTEM_IO, size_bytes * 8, 0, access, port)


def fadt(
    facs_gpa: int, dsdt_gpa: int, *, gpe0: int = 0, gpe0_bytes: int = 0, smi_command: int = 0, vga: bool = False
) -> bytes:
    """Fixed ACPI Description Table.

    ``gpe0`` is the port of a general purpose event block, of ``gpe0_bytes``: half status, half enable. Without
    ``smi_command``, the port that takes ACPI_ENABLE and ACPI_DISABLE, the machine is in ACPI mode from the start
    (SCI_EN reads one).
    """
    pm1a_evt = layout.PORT_PM + layout.PM1A_EVT
    pm1a_cnt = layout.PORT_PM + layout.PM1A_CNT
    pm_tmr = layout.PORT_PM + layout.PM_TMR
    parts = (
        pack("<IIxBH", facs_gpa, dsdt_gpa, PROFILE_UNSPECIFIED, layout.IRQ_SCI),
        pack("<IBBxx", smi_command, *((ACPI_ENABLE, ACPI_DISABLE) if smi_command else (0, 0))),
        # PM1a and PM1b event, PM1a and PM1b control, PM2 control, timer, GPE0, GPE1
        pack("<8I", pm1a_evt, 0, pm1a_cnt, 0, 0, pm_tmr, gpe0, 0),
        pack("<4B", layout.PM1A_EVT_BYTES, layout.PM1A_CNT_BYTES, 0, layout.PM_TMR_BYTES),
        pack("<Bxxx", gpe0_bytes),  # then GPE1 length and base, CST_CNT
        pack("<HHHHBB", NO_C2, NO_C3, 0, 0, 0, 0),  # latencies, cache flush size and stride, duty cycle
        pack("<BBB", 0, 0, CMOS_CENTURY),  # RTC alarm's day and month: not there
        pack("<Hx", LEGACY_DEVICES | HAS_8042 | (0 if vga else VGA_NOT_PRESENT)),
        pack("<I", WBINVD | PROC_C1 | SLP_BUTTON_ABSENT | TMR_VAL_EXT | RESET_REG_SUP),
        gas(layout.PORT_RESET, 1, BYTE_ACCESS),
        pack("<BHB", layout.RESET_VALUE, 0, FADT_MINOR_REVISION),  # then ARM boot flags
        pack("<QQ", 0, dsdt_gpa),  # X_FIRMWARE_CTRL is zero where the 32-bit field is used
        gas(pm1a_evt, layout.PM1A_EVT_BYTES, WORD_ACCESS),
        bytes(12),
        gas(pm1a_cnt, layout.PM1A_CNT_BYTES, WORD_ACCESS),
        bytes(12 + 12),  # PM1b control, PM2 control
        gas(pm_tmr, layout.PM_TMR_BYTES, DWORD_ACCESS),
        gas(gpe0, gpe0_bytes, BYTE_ACCESS) if gpe0 else bytes(12),
        bytes(12),  # GPE1
        bytes(12 + 12 + 8),  # sleep registers of hardware-reduced machines, hypervisor vendor
    )
    return table(b"FACP", FADT_REVISION, b"".join(parts))


def madt(cpus: int, level_irqs: Iterable[int] = (layout.IRQ_SCI,)) -> bytes:
    """Multiple APIC Description Table. Processor n has APIC id n and ACPI UID n.

    ``level_irqs`` are the ISA interrupts that are level-triggered and active high: the SCI and PCI's.
    """
    entries = [pack("<II", layout.LAPIC, PCAT_COMPAT)]
    for n in range(cpus):
        if n <= MAX_XAPIC_ID:
            entries.append(pack("<BBBBI", LOCAL_APIC, 8, n, n, ENABLED))
        else:
            entries.append(pack("<BBHIII", LOCAL_X2APIC, 16, 0, n, ENABLED, n))
    entries.append(pack("<BBBxII", IO_APIC, 12, 0, layout.IOAPIC, 0))
    entries.append(_override(layout.IRQ_TIMER, layout.GSI_TIMER, CONFORMS))
    entries += [_override(irq, irq, ACTIVE_HIGH | LEVEL) for irq in level_irqs]
    entries.append(pack("<BBBHB", LOCAL_APIC_NMI, 6, ALL_PROCESSORS, CONFORMS, LINT1))
    if cpus > MAX_XAPIC_ID + 1:
        entries.append(pack("<BBHIB3x", LOCAL_X2APIC_NMI, 12, CONFORMS, ALL_X2_PROCESSORS, LINT1))
    return table(b"APIC", 5, b"".join(entries))


def _override(isa_irq: int, gsi: int, flags: int) -> bytes:
    """An ISA interrupt that is not plainly GSI = its number, edge, active high."""
    return pack("<BBBBIH", SOURCE_OVERRIDE, 10, 0, isa_irq, gsi, flags)


def dsdt(cpus: int, devices: Iterable[bytes] = (), *, s3: bool = True) -> bytes:
    """Differentiated System Description Table, revision 2: integers have 64 bits."""
    return table(b"DSDT", 2, aml.scope("_SB", *processors(cpus), *devices) + sleep_states(s3))


def sleep_states(s3: bool) -> bytes:
    """\\_S5 and \\_S3. Two of the four numbers count: SLP_TYP for PM1a and PM1b control (7.4.2)."""
    soft_off = aml.name("_S5", aml.package(layout.SLP_TYP_S5, 0, 0, 0))
    suspend = aml.name("_S3", aml.package(layout.SLP_TYP_S3, layout.SLP_TYP_S3, 0, 0))
    return suspend + soft_off if s3 else soft_off


def processors(cpus: int) -> list[bytes]:
    """One ACPI0007 device for each MADT entry, matched by _UID."""
    return [aml.device(f"C{n:03X}", aml.name("_HID", "ACPI0007"), aml.name("_UID", n)) for n in range(cpus)]


# The ISA devices an operating system learns of, or is sure of, by ACPI only.


def rtc() -> bytes:
    return _isa("RTC0", "PNP0B00", aml.resources(aml.io(layout.PORT_RTC, 2), aml.irq(layout.IRQ_RTC)))


def keyboard() -> bytes:
    ports = aml.io(layout.PORT_I8042_DATA, 1), aml.io(layout.PORT_I8042_COMMAND, 1)
    return _isa("KBD0", "PNP0303", aml.resources(*ports, aml.irq(layout.IRQ_KEYBOARD)))


def serial_port() -> bytes:
    return _isa("COM1", "PNP0501", aml.resources(aml.io(layout.PORT_COM1, 8), aml.irq(layout.IRQ_COM1)), uid=1)


def pvpanic() -> bytes:
    """As QEMU's, by whose name Linux and Windows know it."""
    return aml.scope("\\_SB", _isa_status("PEVT", "QEMU0001", aml.resources(aml.io(layout.PORT_PVPANIC, 1))))


def virtio_mmio(uid: int, base: int, gsi: int) -> bytes:
    """A virtio-mmio transport, as Linux and QEMU know it. Its interrupt is an edge."""
    registers = aml.memory32(base, layout.VIRTIO_MMIO_BYTES)
    return aml.device(
        f"VR{uid:02X}",
        aml.name("_HID", "LNRO0005"),
        aml.name("_UID", uid),
        aml.name("_CCA", 1),
        aml.name("_CRS", aml.resources(registers, aml.interrupt(gsi, edge=True))),
    )


def vm_generation_id() -> bytes:
    """By the names of Microsoft's specification: where the number is; and that it has changed, by the event that says
    so. Its paths are absolute, so that it can stand within any device.
    """
    address = aml.package(layout.VM_GENERATION_ID & 0xFFFF_FFFF, layout.VM_GENERATION_ID >> 32)
    device = aml.device(
        "VGEN",
        aml.name("_HID", "PYVM0001"),
        aml.name("_CID", "VM_Gen_Counter"),
        aml.name("_DDN", "VM_Gen_Counter"),
        aml.name("ADDR", address),
    )
    happened = aml.method(f"_E{layout.GPE_VM_GENERATION:02X}", aml.notify("\\_SB.VGEN", DEVICE_CHANGED))
    return aml.scope("\\_SB", device) + aml.scope("\\_GPE", happened)


def _isa_status(path: str, hid: str, crs: bytes) -> bytes:
    """With a name that is no PNP identifier, and a status: present, in use, shown, working (ACPI 6.5, 6.3.7)."""
    return aml.device(path, aml.name("_HID", hid), aml.name("_STA", 0x0F), aml.name("_CRS", crs))


def _isa(path: str, hid: str, crs: bytes, uid: int | None = None) -> bytes:
    terms = [aml.name("_HID", aml.eisa_id(hid))]
    if uid is not None:
        terms.append(aml.name("_UID", uid))
    return aml.device(path, *terms, aml.name("_CRS", crs))
