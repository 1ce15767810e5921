"""ACPI of the pc board: the tables of acpi.py with a PCI host bridge and the PIIX3's interrupt routing in the DSDT.

ACPI 6.5: 6.2.13 (_PRT), 6.1.1 (_ADR), 6.4.3.5 (address spaces); Intel 82371SB (PIIX3) data sheet, 2.1.4 (PIRQRC) and
82371AB (PIIX4), 7.1 (GPE block, SMI command). What QEMU's pc leaves to the chipset's wiring (which pin of which
slot is which PIRQ, where PCI memory begins) is the same here: firmware takes it for granted.
"""

from __future__ import annotations

from struct import pack

from pyvmm.x86 import acpi, aml, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

FW_CFG_BYTES = 12  # selector and data, then the DMA address
VGA_WINDOW = (layout.WINDOW, layout.PAM - 1)

# PCI interrupts. Pin p of slot s is PIRQ (s + p - 1) mod 4; each PIRQ has a routing register in the ISA bridge.
PINS = 4
ISA_BRIDGE = layout.SLOT_PIIX << 16  # _ADR: slot, function 0
PIRQ_ROUTING = 0x60  # PIRQRC[A:D], one byte each
PIRQ_DISABLED = 0x80
PIRQ_IRQ = 0x0F
PIRQ_LINES = "ABCD"
PIRQ_CHOICES = (5, 10, 11)
ANY_FUNCTION = 0xFFFF  # low half of an address in _PRT
IRQ_AT = 5  # where an interrupt descriptor has its number
# _STA: present, enabled, functioning; a disabled link is there all the same.
STA_ENABLED = 0x0B
STA_DISABLED = 0x09


def build(
    cpus: int,
    *,
    ram_below_4g_bytes: int,
    irqchip: bool = True,
    devices: Iterable[bytes] = (),
    gpe0: bool = True,
    smi_command: bool = False,
    s3: bool = True,
    vga: bool = False,
    rsdp: int = layout.ACPI_RSDP,
    base: int = layout.ACPI_TABLES,
    end: int = layout.ACPI_TABLES_END,
) -> acpi.AcpiTables:
    """The pc board's tables, as acpi.build gives them.

    ``devices`` are the aml.device terms of what is on the ISA bus. ``gpe0`` False where nothing answers
    at PORT_GPE0; ``smi_command`` True where port 0xb2 takes ACPI's enable and disable commands; ``s3`` False leaves
    suspend to RAM out; ``vga``: there is a VGA. ConfigError when the tables do not fit below ``end``.
    """

    def fadt(facs: int, dsdt: int) -> bytes:
        return acpi.fadt(
            facs,
            dsdt,
            gpe0=layout.PORT_GPE0 if gpe0 else 0,
            gpe0_bytes=layout.PORT_GPE0_BYTES if gpe0 else 0,
            smi_command=layout.PORT_APM if smi_command else 0,
            vga=vga,
        )

    others = [("APIC", acpi.madt(cpus, sorted({layout.IRQ_SCI, *PIRQ_CHOICES})))] if irqchip else []
    terms = dsdt(cpus, ram_below_4g_bytes, devices, gpe0=gpe0, s3=s3)
    return acpi.arrange(terms, fadt, others, cpus=cpus, rsdp=rsdp, base=base, end=end)


def dsdt(
    cpus: int, ram_below_4g_bytes: int, devices: Iterable[bytes] = (), *, gpe0: bool = True, s3: bool = True
) -> bytes:
    """Revision 2. Of what it says, firmware looks for devices by their _HID: a device's own names come before the
    devices in it, and nothing but names, regions and fields stands outside of methods, since SeaBIOS reads no more.
    """
    bus = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name("_CRS", bridge_windows(ram_below_4g_bytes)),
        aml.name("_PRT", routing()),
        isa_bridge(*devices),
        *([gpe_resources()] if gpe0 else ()),
    )
    body = aml.scope("_SB", *acpi.processors(cpus), bus, *link_helpers(), *map(link, PIRQ_LINES), sci_link())
    return acpi.table(b"DSDT", 2, body + acpi.sleep_states(s3))


def pci_memory_window(ram_below_4g_bytes: int) -> tuple[int, int]:
    """(first, last) address of the hole for PCI devices: from where SeaBIOS begins to give out BARs."""
    low = layout.PCI_MEMORY_LOW if ram_below_4g_bytes <= layout.PCI_MEMORY_LOW else layout.RAM_HOLE
    return low, layout.IOAPIC - 1


def bridge_windows(ram_below_4g_bytes: int) -> bytes:
    """_CRS of the host bridge: one bus, all ports but its own, the video window and the hole."""
    return aml.resources(
        aml.bus_range(0, 0),
        # Configuration mechanism 1 is the bridge's own; ports on both sides of it are handed on.
        aml.io(layout.PORT_PCI, layout.PORT_PCI_BYTES),
        aml.io_range(0, layout.PORT_PCI - 1),
        aml.io_range(layout.PORT_PCI + layout.PORT_PCI_BYTES, layout.LAST_PORT),
        aml.memory_range(*VGA_WINDOW, cacheable=True),
        aml.memory_range(*pci_memory_window(ram_below_4g_bytes)),
    )


def isa_bridge(*devices: bytes) -> bytes:
    """The PIIX3's function 0 with its PIRQ routing registers, and the devices on the ISA bus."""
    return aml.device(
        "ISA",
        aml.name("_ADR", ISA_BRIDGE),
        aml.operation_region("PIRQ", aml.PCI_CONFIG, PIRQ_ROUTING, len(PIRQ_LINES)),
        aml.byte_fields("PIRQ", *(f"PRQ{line}" for line in PIRQ_LINES)),
        *devices,
    )


def firmware_configuration() -> bytes:
    """fw_cfg, by the name that QEMU's documentation gives it."""
    return aml.device(
        "FWCF",
        aml.name("_HID", "QEMU0002"),
        aml.name("_STA", STA_ENABLED),
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_FW_CFG, FW_CFG_BYTES))),
    )


def gpe_resources() -> bytes:
    """The GPE block: the FADT names it too, but only a resource keeps BARs away from it."""
    return aml.device(
        "GPE0",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", "GPE0 resources"),
        aml.name("_STA", STA_ENABLED),
        aml.name("_CRS", aml.resources(aml.io(layout.PORT_GPE0, layout.PORT_GPE0_BYTES))),
    )


def pirq(slot: int, pin: int) -> int:
    """Which of the PIRQ lines, 0 for A, pin 0 (INTA) to 3 of a slot is wired to."""
    return (slot + pin - 1) % PINS


def routing() -> bytes:
    """_PRT: (slot and any function, pin, link, 0) of every pin."""
    links = [aml.name_string(f"LNK{line}") for line in PIRQ_LINES]
    entries = []
    for slot in range(layout.PCI_SLOTS):
        address = pack("<BHH", aml.DWORD_PREFIX, ANY_FUNCTION, slot)
        for pin in range(PINS):
            wire = links[pirq(slot, pin)]
            if (slot, pin) == (layout.SLOT_PIIX, 0):
                wire = aml.name_string("LNKS")  # the power management function: its interrupt is the SCI
            entries.append(aml.package(address if slot else ANY_FUNCTION, pin, wire, 0))
    return aml.package(*entries)


def link_helpers() -> tuple[bytes, bytes]:
    """Of a routing register's value: LSTA its link's _STA, LCRS its _CRS."""
    disabled = aml.bit_and(aml.ARG0, PIRQ_DISABLED)
    number = aml.name_string("LIRQ")
    status = aml.method("LSTA", aml.when(disabled, aml.returns(STA_DISABLED)), aml.returns(STA_ENABLED), args=1)
    resources = aml.method(
        "LCRS",
        aml.store(aml.resources(aml.interrupt(0, shared=True)), aml.LOCAL0),
        aml.create_dword_field(aml.LOCAL0, IRQ_AT, "LIRQ"),
        aml.when(disabled, aml.store(0, number)),
        aml.otherwise(aml.bit_and(aml.ARG0, PIRQ_IRQ, number)),
        aml.returns(aml.LOCAL0),
        args=1,
        serialized=True,
    )
    return status, resources


def link(line: str) -> bytes:
    """The link device of PIRQ ``line`` (A to D): which ISA interrupt it is routed to."""
    register = aml.name_string(f"^^PCI0.ISA.PRQ{line}")  # from within a method of the link
    choose = aml.method(
        "_SRS",
        aml.create_dword_field(aml.ARG0, IRQ_AT, "LIRQ"),
        aml.store(aml.name_string("LIRQ"), register),
        args=1,
        serialized=True,
    )
    return aml.device(
        f"LNK{line}",
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", PIRQ_LINES.index(line)),
        aml.name("_PRS", aml.resources(aml.interrupt(*PIRQ_CHOICES, shared=True))),
        aml.method("_STA", aml.returns(aml.name_string("LSTA") + register)),
        aml.method("_DIS", aml.bit_or(register, PIRQ_DISABLED, register)),
        aml.method("_CRS", aml.returns(aml.name_string("LCRS") + register)),
        choose,
    )


def sci_link() -> bytes:
    """The power management function's interrupt: wired to the SCI, whatever is asked for."""
    wired = aml.resources(aml.interrupt(layout.IRQ_SCI, shared=True))
    return aml.device(
        "LNKS",
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", len(PIRQ_LINES)),
        aml.name("_PRS", wired),
        aml.name("_CRS", wired),
        aml.name("_STA", STA_ENABLED),
        aml.method("_DIS"),
        aml.method("_SRS", args=1),
    )
