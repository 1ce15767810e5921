"""The MP tables: processors, IOAPIC and interrupt wiring for kernels that do not read ACPI's MADT.

Intel MultiProcessor Specification 1.4, chapter 4 and appendix D.
"""

from __future__ import annotations

from struct import pack

from pyvmm.x86 import layout
from pyvmm.x86.acpi import checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.guest_memory import GuestMemory

FLOATING_BYTES = 16
HEADER_BYTES = 44
SPEC_REVISION = 4  # 1.4
OEM_ID = b"PYVMM   "
PRODUCT_ID = b"PYVMM VM    "
MAX_PROCESSORS = 255  # APIC ids have eight bits here, the last is the broadcast

# Entry types.
PROCESSOR = 0
BUS = 1
IOAPIC = 2
IO_INTERRUPT = 3
LOCAL_INTERRUPT = 4

LAPIC_VERSION = 0x14  # integrated, as KVM's reads
IOAPIC_VERSION = 0x11  # 82093AA, as KVM's reads
IOAPIC_ID = 0
CPU_ENABLED = 1 << 0
CPU_BOOTSTRAP = 1 << 1
IOAPIC_ENABLED = 1 << 0
ISA_BUS = 0

# Interrupt types, and flags of polarity and trigger mode.
INT = 0
NMI = 1
EXT_INT = 3
CONFORMS = 0
ACTIVE_HIGH = 0b01
LEVEL = 0b11 << 2
LINT0 = 0
LINT1 = 1
ALL_LAPICS = 0xFF


def build(cpus: int, *, gpa: int = layout.MP_TABLE, signature: int = 0x600, features: int = 0x201) -> bytes:
    """Floating pointer and configuration table for APIC ids from 0 up, to stand at ``gpa`` (16-byte aligned).

    ``signature`` and ``features`` are CPUID leaf 1's EAX and EDX. Processors past 255 are ACPI's alone.
    """
    processors = [
        pack(
            "<BBBBII8x",
            PROCESSOR,
            n,
            LAPIC_VERSION,
            CPU_ENABLED | (0 if n else CPU_BOOTSTRAP),
            signature & 0xFFF,
            features,
        )
        for n in range(min(cpus, MAX_PROCESSORS))
    ]
    entries = [
        *processors,
        pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        pack("<BBBBI", IOAPIC, IOAPIC_ID, IOAPIC_VERSION, IOAPIC_ENABLED, layout.IOAPIC),
        *_isa_interrupts(),
        pack("<BBHBBBB", LOCAL_INTERRUPT, EXT_INT, CONFORMS, ISA_BUS, 0, 0, LINT0),
        pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, CONFORMS, ISA_BUS, 0, ALL_LAPICS, LINT1),
    ]
    table = _configuration(b"".join(entries), len(entries))
    floating = bytearray(
        pack("<4sIBBB5x", b"_MP_", gpa + FLOATING_BYTES, FLOATING_BYTES // 16, SPEC_REVISION, 0)
    )
    floating[10] = checksum(floating)
    return bytes(floating) + table


def write(memory: GuestMemory, cpus: int, *, signature: int = 0x600, features: int = 0x201) -> None:
    """Put the tables at layout.MP_TABLE."""
    memory.write(layout.MP_TABLE, build(cpus, signature=signature, features=features))


def _isa_interrupts() -> list[bytes]:
    """ISA interrupt n on IOAPIC pin n; the timer on pin 2, whose own number is the PIC's cascade; the SCI level.
    """
    entries = []
    for irq in range(layout.ISA_IRQS):
        if irq == layout.GSI_TIMER:
            continue
        pin = layout.GSI_TIMER if irq == layout.IRQ_TIMER else irq
        flags = ACTIVE_HIGH | LEVEL if irq == layout.IRQ_SCI else CONFORMS
        entries.append(pack("<BBHBBBB", IO_INTERRUPT, INT, flags, ISA_BUS, irq, IOAPIC_ID, pin))
    return entries


def _configuration(entries: bytes, count: int) -> bytes:
    table = bytearray(
        pack(
            "<4sHBB8s12sIHHIHBx",
            b"PCMP",
            HEADER_BYTES + len(entries),
            SPEC_REVISION,
            0,
            OEM_ID,
            PRODUCT_ID,
            0,  # no OEM table
            0,
            count,
            layout.LAPIC,
            0,  # no extended table
            0,
        )
        + entries
    )
    table[7] = checksum(table)
    return bytes(table)
