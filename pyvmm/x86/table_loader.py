"""ACPI tables for firmware that decides itself where they go: QEMU's table loader, as fw_cfg files.

The file etc/table-loader is a script of 128-byte commands: load a file to memory of a kind, add the address of one
file to a field of another, put a checksum right. QEMU docs/specs/fw_cfg.rst names the file; the commands are
described in hw/acpi/bios-linker-loader.c and in SeaBIOS, which carries them out.
"""

from __future__ import annotations

from struct import pack

from pyvmm.x86 import acpi

SCRIPT_FILE = "etc/table-loader"
TABLES_FILE = "etc/acpi/tables"
RSDP_FILE = "etc/acpi/rsdp"

ALLOCATE = 1
ADD_POINTER = 2
ADD_CHECKSUM = 3
COMMAND_BYTES = 128
FILE_NAME_BYTES = 56  # with the zero at the end

# Where a file may be loaded: anywhere below 4 GiB, or where the root pointer is searched (0xf0000-0xfffff).
ZONE_HIGH = 1
ZONE_FSEG = 2
RSDP_ALIGNMENT = 16

# Fields that hold an address: (offset in the table, bytes).
FADT_POINTERS = ((36, 4), (40, 4), (140, 8))  # FACS, DSDT, DSDT again
RSDP_POINTERS = ((16, 4), (24, 8))  # RSDT, XSDT
ROOT_TABLES = {"RSDT": 4, "XSDT": 8}  # bytes of each of their entries
# And the bytes that make sums zero: (offset, start of the range, its length).
RSDP_CHECKSUMS = ((8, 0, acpi.RSDP_V1_BYTES), (32, 0, acpi.RSDP_BYTES))
TABLE_CHECKSUM = 9
NO_CHECKSUM = "FACS"


class Script:
    """The commands so far; ``bytes(script)`` is the file."""

    __slots__ = ("_commands",)

    def __init__(self) -> None:
        self._commands: list[bytes] = []

    def allocate(self, file: str, alignment: int, zone: int) -> None:
        """Load ``file`` into fresh memory of ``zone``. Before any other command about it."""
        self._add(ALLOCATE, _name(file) + pack("<IB", alignment, zone))

    def add_pointer(self, file: str, at: int, size: int, target: str) -> None:
        """Add where ``target`` was loaded to the ``size`` bytes at ``at`` in ``file``, which hold an offset in it."""
        self._add(ADD_POINTER, _name(file) + _name(target) + pack("<IB", at, size))

    def add_checksum(self, file: str, at: int, start: int, length: int) -> None:
        """Subtract the sum of ``length`` bytes from ``start`` from the byte at ``at``. After all else in them."""
        self._add(ADD_CHECKSUM, _name(file) + pack("<III", at, start, length))

    def _add(self, command: int, arguments: bytes) -> None:
        self._commands.append((pack("<I", command) + arguments).ljust(COMMAND_BYTES, b"\0"))

    def __bytes__(self) -> bytes:
        return b"".join(self._commands)


def _name(file: str) -> bytes:
    return file.encode("ascii").ljust(FILE_NAME_BYTES, b"\0")


def acpi_files(tables: acpi.AcpiTables) -> dict[str, bytes]:
    """The three files, by their names in fw_cfg, for tables that were built with base 0: what is an address in
    them is an offset in TABLES_FILE then.
    """
    data = bytearray(max(gpa + len(table) for name, (gpa, table) in tables.tables.items() if name != "RSDP"))
    rsdp = bytearray(tables.tables["RSDP"][1])
    script = Script()
    script.allocate(RSDP_FILE, RSDP_ALIGNMENT, ZONE_FSEG)
    script.allocate(TABLES_FILE, acpi.FACS_ALIGNMENT, ZONE_HIGH)
    for name, (at, table) in tables.tables.items():
        if name == "RSDP":
            continue
        data[at : at + len(table)] = table
        for offset, size in _pointers(name, table):
            script.add_pointer(TABLES_FILE, at + offset, size, TABLES_FILE)
        if name != NO_CHECKSUM:
            data[at + TABLE_CHECKSUM] = 0
            script.add_checksum(TABLES_FILE, at + TABLE_CHECKSUM, at, len(table))
    for offset, size in RSDP_POINTERS:
        script.add_pointer(RSDP_FILE, offset, size, TABLES_FILE)
    for offset, start, length in RSDP_CHECKSUMS:
        rsdp[offset] = 0
        script.add_checksum(RSDP_FILE, offset, start, length)
    return {RSDP_FILE: bytes(rsdp), TABLES_FILE: bytes(data), SCRIPT_FILE: bytes(script)}


def _pointers(name: str, table: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of the addresses in a table."""
    if name == "FACP":
        return list(FADT_POINTERS)
    size = ROOT_TABLES.get(name, 0)
    return [(at, size) for at in range(acpi.HEADER_BYTES, len(table), size)] if size else []
