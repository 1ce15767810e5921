"""SMBIOS: what the machine is called and made of, for firmware to place and for an operating system's inventory.

DMTF DSP0134 (SMBIOS reference specification) 2.8: 5.2.1 (entry point), 6.1 (structures and their strings), 7.x (one
structure each). Firmware adds the BIOS's own structure (type 0) where there is none.
"""

from __future__ import annotations

from struct import pack

from pyvmm.errors import ConfigError
from pyvmm.x86 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.guest_memory import GuestMemory

ANCHOR_FILE = "etc/smbios/smbios-anchor"
TABLES_FILE = "etc/smbios/smbios-tables"

VERSION = (2, 8)
ENTRY_POINT_BYTES = 31
INTERMEDIATE_AT = 16  # the second anchor string, from where its own checksum counts

MANUFACTURER = "pyvmm"
PRODUCT = "pc (i440FX + PIIX3)"
BOARD_VERSION = "pc-i440fx"

# Handles: a structure's type in the upper byte, its number in the lower one.
SYSTEM = 0x0100
CHASSIS = 0x0300
PROCESSOR = 0x0400
MEMORY_ARRAY = 0x1000
MEMORY_DEVICE = 0x1100
MEMORY_RANGE = 0x1300
BOOT = 0x2000
END = 0x7F00
NO_HANDLE = 0xFFFF
NO_ERROR_INFORMATION = 0xFFFE

OTHER = 1
UNKNOWN = 2
WAKE_UP_POWER_SWITCH = 6
SAFE = 3
NO_SECURITY = 3
CPU_CENTRAL = 3
CPU_ENABLED = 0x41  # socket populated, enabled
CPU_64BIT = 1 << 2
CPU_MULTI_CORE = 1 << 3
USE_SYSTEM_MEMORY = 3
NO_CORRECTION = 3
LOCATION_OTHER = 1
FORM_DIMM = 9
MEMORY_RAM = 7
MEMORY_DETAIL_OTHER = 1 << 1
EXTENDED_SIZE = 0x7FFF  # of a memory device of 32 GiB or more: look at the extended field
EXTENDED_CAPACITY = 0x8000_0000  # of an array of 2 TiB or more
EXTENDED_ADDRESS = 0xFFFF_FFFF

KIB = 1 << 10
MIB = 1 << 20
DEVICE_BYTES = 16 << 30  # at most this in one memory device
MAX_DEVICES = 256  # by the numbers that handles have for them


class SmbiosTables:
    """``structures``, and how many and how long they are."""

    __slots__ = ("count", "largest_bytes", "structures")

    def __init__(self, structures: Iterable[bytes]) -> None:
        parts = list(structures)
        self.structures = b"".join(parts)
        self.count = len(parts)
        self.largest_bytes = max(map(len, parts))

    def entry_point(self, gpa: int = 0) -> bytes:
        """The 31 bytes that point to the structures at ``gpa`` below 4 GiB; firmware puts its own address there."""
        second = bytearray(
            pack(
                "<5sBHIHB",
                b"_DMI_",
                0,
                len(self.structures),
                gpa,
                self.count,
                VERSION[0] << 4 | VERSION[1],
            )
        )
        second[5] = -sum(second) & 0xFF
        first = pack("<4sBBBBHB5x", b"_SM_", 0, ENTRY_POINT_BYTES, *VERSION, self.largest_bytes, 0)
        data = bytearray(first + second)
        data[4] = -sum(data) & 0xFF
        return bytes(data)

    def write(self, memory: GuestMemory, gpa: int = layout.SMBIOS, end: int = layout.SMBIOS_END) -> None:
        """The entry point at ``gpa``, the structures behind it: as firmware leaves them for an operating system."""
        at = gpa + ENTRY_POINT_BYTES + -ENTRY_POINT_BYTES % 16
        if at + len(self.structures) > end:
            raise ConfigError(f"SMBIOS tables of {len(self.structures)} bytes have no room: give less memory")
        memory.write(gpa, self.entry_point(at))
        memory.write(at, self.structures)

    def files(self) -> dict[str, bytes]:
        """By their names in fw_cfg."""
        return {ANCHOR_FILE: self.entry_point(), TABLES_FILE: self.structures}


def build(
    cpus: int,
    memory: Iterable[tuple[int, int]],
    *,
    uuid: bytes = bytes(16),
    cpu_id: tuple[int, int, str] | None = None,
    serial: str = "",
    product: str = PRODUCT,
) -> SmbiosTables:
    """For ``cpus`` cores of one package and the (gpa, size_bytes) ranges of RAM.

    ``uuid`` has 16 bytes as they are written down; all zeros: not set. ``cpu_id`` is what cpuid.identity says.
    ConfigError for a UUID of another length, or too much memory to list.
    """
    if len(uuid) != 16:
        raise ConfigError(f"a UUID of {len(uuid)} bytes: give 16")
    ranges = list(memory)
    devices = _devices(sum(size for _, size in ranges))
    return SmbiosTables(
        [
            _system(uuid, serial, product),
            _chassis(serial),
            _processor(cpus, *(cpu_id or (0, 0, MANUFACTURER))),
            _memory_array(sum(devices), len(devices)),
            *(_memory_device(n, size) for n, size in enumerate(devices)),
            *(_memory_range(n, base, size) for n, (base, size) in enumerate(ranges)),
            _structure(BOOT, bytes(6) + b"\0"),  # no errors detected
            _structure(END, b""),
        ]
    )


def parse_uuid(text: str) -> bytes:
    """16 bytes from 8-4-4-4-12 hex digits. ConfigError for anything else."""
    digits = text.replace("-", "")
    try:
        if len(digits) == 32 and [len(part) for part in text.split("-")] in ([8, 4, 4, 4, 12], [32]):
            return bytes.fromhex(digits)
    except ValueError:
        pass
    raise ConfigError(f"UUID {text!r}: write it as 8-4-4-4-12 hexadecimal digits")


def _structure(handle: int, body: bytes, *strings: str) -> bytes:
    """Header, formatted part and string set; string n is named by the byte n in the formatted part.

    None of them may be empty: an empty one would end the set.
    """
    head = pack("<BBH", handle >> 8, 4 + len(body), handle)
    texts = b"".join(text.encode("ascii", "replace") + b"\0" for text in strings)
    return head + body + (texts or b"\0") + b"\0"


def _system(uuid: bytes, serial: str, product: str) -> bytes:
    # The first three fields of the UUID are little-endian numbers since 2.6 (7.2.1).
    swapped = uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]
    texts = [MANUFACTURER, product, BOARD_VERSION]
    number = _more(texts, serial)
    body = pack("<4B16sBBB", 1, 2, 3, number, swapped, WAKE_UP_POWER_SWITCH, 0, 0)
    return _structure(SYSTEM, body, *texts)


def _chassis(serial: str) -> bytes:
    texts = [MANUFACTURER, BOARD_VERSION]
    number = _more(texts, serial)
    body = pack("<5B4BIBBBBB", 1, OTHER, 2, number, 0, SAFE, SAFE, SAFE, NO_SECURITY, 0, 0, 1, 0, 0, 0)
    return _structure(CHASSIS, body, *texts)


def _more(texts: list[str], text: str) -> int:
    """The number of a string that may be empty: 0 then, and not in the set."""
    if not text:
        return 0
    texts.append(text)
    return len(texts)


def _processor(cpus: int, signature: int, features: int, vendor: str) -> bytes:
    cores = min(cpus, 0xFF)  # the 16-bit counts came with 3.0
    characteristics = CPU_64BIT | (CPU_MULTI_CORE if cpus > 1 else 0)
    body = pack(
        "<BBBBIIBB3HBB3HBBBBBBHH",
        1,
        CPU_CENTRAL,
        OTHER,  # family
        2,
        signature,
        features,
        3,
        0,  # voltage
        0,  # clocks unknown: external, maximum, current
        0,
        0,
        CPU_ENABLED,
        OTHER,  # no socket to upgrade
        NO_HANDLE,
        NO_HANDLE,
        NO_HANDLE,
        0,
        0,
        0,
        cores,
        cores,
        cores,  # threads
        characteristics,
        OTHER,  # the family once more, in 16 bits
    )
    return _structure(PROCESSOR, body, "CPU 0", vendor, BOARD_VERSION)


def _devices(total_bytes: int) -> list[int]:
    """The sizes of the memory devices that make up all RAM."""
    whole, rest = divmod(total_bytes, DEVICE_BYTES)
    if whole >= MAX_DEVICES:
        raise ConfigError(f"{total_bytes // MIB} MiB of memory are too much to list in SMBIOS: use less than 4 TiB")
    return [DEVICE_BYTES] * whole + ([rest] if rest else [])


def _memory_array(total_bytes: int, devices: int) -> bytes:
    kib = total_bytes // KIB
    capacity, extended = (kib, 0) if kib < EXTENDED_CAPACITY else (EXTENDED_CAPACITY, total_bytes)
    body = pack(
        "<BBBIHHQ",
        LOCATION_OTHER,
        USE_SYSTEM_MEMORY,
        NO_CORRECTION,
        capacity,
        NO_ERROR_INFORMATION,
        devices,
        extended,
    )
    return _structure(MEMORY_ARRAY, body)


def _memory_device(n: int, size_bytes: int) -> bytes:
    mib = size_bytes // MIB
    body = pack(
        "<HHHHHBBBBBHHBBBBBIHHHH",
        MEMORY_ARRAY,
        NO_ERROR_INFORMATION,
        0xFFFF,  # widths unknown: total, data
        0xFFFF,
        min(mib, EXTENDED_SIZE),
        FORM_DIMM,
        0,  # no device set
        1,
        0,
        MEMORY_RAM,
        MEMORY_DETAIL_OTHER,
        0,  # speed unknown
        2,
        0,
        0,
        0,
        0,  # rank unknown
        mib if mib >= EXTENDED_SIZE else 0,
        0,  # configured speed, voltages: unknown
        0,
        0,
        0,
    )
    return _structure(MEMORY_DEVICE + n, body, f"DIMM {n}", MANUFACTURER)


def _memory_range(n: int, base: int, size_bytes: int) -> bytes:
    """A type 19: addresses in KiB where they fit 32 bits, in bytes otherwise."""
    last = base + size_bytes - 1
    if last // KIB < EXTENDED_ADDRESS:
        body = pack("<IIHBQQ", base // KIB, last // KIB, MEMORY_ARRAY, 1, 0, 0)
    else:
        body = pack("<IIHBQQ", EXTENDED_ADDRESS, EXTENDED_ADDRESS, MEMORY_ARRAY, 1, base, last)
    return _structure(MEMORY_RANGE + n, body)
