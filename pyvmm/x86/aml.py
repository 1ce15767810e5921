"""A small encoder of AML, the byte code of the DSDT. Each function returns the bytes of one term.

ACPI 6.5, chapter 20 (AML grammar) and 6.4 (resource descriptors). Names, packages, buffers, scopes, devices, resource
templates, and of methods what a few lines that read and write a register take. A further device is one call:

    device("VM00", name("_HID", "LNRO0005"), name("_UID", 0), name("_CRS", resources(memory32(base, 512),
    interrupt(5))))
"""

from __future__ import annotations

from struct import pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    Value = int | str | bytes

ZERO_OP = 0x00
ONE_OP = 0x01
NAME_OP = 0x08
BYTE_PREFIX = 0x0A
WORD_PREFIX = 0x0B
DWORD_PREFIX = 0x0C
STRING_PREFIX = 0x0D
QWORD_PREFIX = 0x0E
SCOPE_OP = 0x10
BUFFER_OP = 0x11
PACKAGE_OP = 0x12
METHOD_OP = 0x14
DUAL_NAME_PREFIX = 0x2E
MULTI_NAME_PREFIX = 0x2F
EXT_PREFIX = 0x5B
DEVICE_OP = 0x82  # behind EXT_PREFIX
RETURN_OP = 0xA4
OP_REGION_OP = 0x80  # behind EXT_PREFIX
FIELD_OP = 0x81  # behind EXT_PREFIX
LOCAL0 = b"\x60"
ARG0 = b"\x68"
STORE_OP = 0x70
AND_OP = 0x7B
OR_OP = 0x7D
NOTIFY_OP = 0x86
CREATE_DWORD_FIELD_OP = 0x8A
IF_OP = 0xA0
ELSE_OP = 0xA1
PCI_CONFIG = 2  # address space of an operation region
BYTE_ACCESS = 1  # of a field: byte by byte, no lock, bits beside it preserved

# Resource descriptors: small ones carry their length in the low three bits, large ones in a word behind the tag.
IRQ_TAG = 0x22  # without the flags byte: edge, active high, exclusive
IO_TAG = 0x47
END_TAG = 0x79
MEMORY32_FIXED_TAG = 0x86
DWORD_ADDRESS_TAG = 0x87
WORD_ADDRESS_TAG = 0x88
EXTENDED_INTERRUPT_TAG = 0x89
DECODE_16 = 1  # IO: the device looks at all 16 address lines
CONSUMER = 1 << 0
EDGE = 1 << 1
ACTIVE_LOW = 1 << 2
SHARED = 1 << 3
# Address space descriptors (6.4.3.5): resource type, general flags, type flags.
MEMORY_RANGE, IO_RANGE, BUS_RANGE = 0, 1, 2
FIXED = 1 << 2 | 1 << 3  # both ends are, and it is produced: handed on to the devices behind the bridge
ENTIRE_IO = 3  # no holes where ISA devices alias
READ_WRITE = 1
CACHEABLE = 1 << 1


def integer(value: int) -> bytes:
    """The shortest form of an unsigned constant of at most 64 bits."""
    if value < 2:
        return bytes((ZERO_OP, ONE_OP)[value : value + 1])
    for prefix, form, bits in ((BYTE_PREFIX, "<BB", 8), (WORD_PREFIX, "<BH", 16), (DWORD_PREFIX, "<BI", 32)):
        if value >> bits == 0:
            return pack(form, prefix, value)
    return pack("<BQ", QWORD_PREFIX, value)


def string(text: str) -> bytes:
    return bytes((STRING_PREFIX,)) + text.encode("ascii") + b"\0"


def value(what: Value) -> bytes:
    """A constant as its type says: int, str, or bytes that are already AML."""
    if isinstance(what, int):
        return integer(what)
    return string(what) if isinstance(what, str) else what


def name_string(path: str) -> bytes:
    """A name or path such as COM1, \\_SB.PCI0 or ^_CRS; segments shorter than four characters are padded with '_'.
    """
    bare = path.lstrip("\\^")
    prefix = path[: len(path) - len(bare)].encode("ascii")
    segments = [segment.ljust(4, "_").encode("ascii") for segment in bare.split(".")] if bare else []
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"{path!r} has a name of more than four characters")
    if not segments:
        return prefix + b"\0"
    if len(segments) == 1:
        return prefix + segments[0]
    if len(segments) == 2:
        return prefix + bytes((DUAL_NAME_PREFIX,)) + segments[0] + segments[1]
    return prefix + bytes((MULTI_NAME_PREFIX, len(segments))) + b"".join(segments)


def package_length(content_bytes: int) -> bytes:
    """PkgLength of a body: it counts itself. One byte holds 6 bits of it, or its low 4 with up to three more bytes.
    """
    if content_bytes + 1 < 1 << 6:
        return bytes((content_bytes + 1,))
    for extra in (1, 2, 3):
        total = content_bytes + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes((extra << 6 | total & 0xF,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"{content_bytes} bytes are too many for one AML package")


def _sized(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def name(path: str, what: Value) -> bytes:
    """Name (path, constant)"""
    return bytes((NAME_OP,)) + name_string(path) + value(what)


def package(*elements: Value) -> bytes:
    """Package () {elements}"""
    return _sized(bytes((PACKAGE_OP,)), bytes((len(elements),)) + b"".join(map(value, elements)))


def buffer(data: bytes) -> bytes:
    """Buffer () {data}"""
    return _sized(bytes((BUFFER_OP,)), integer(len(data)) + data)


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {terms}"""
    return _sized(bytes((SCOPE_OP,)), name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {terms}"""
    return _sized(bytes((EXT_PREFIX, DEVICE_OP)), name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes, args: int = 0, serialized: bool = False) -> bytes:
    """Method (path, args) {terms}"""
    flags = args & 7 | (1 << 3 if serialized else 0)
    return _sized(bytes((METHOD_OP,)), name_string(path) + bytes((flags,)) + b"".join(terms))


def returns(what: Value) -> bytes:
    """Return (constant)"""
    return bytes((RETURN_OP,)) + value(what)


def notify(path: str, what: int) -> bytes:
    """Notify (path, constant)"""
    return bytes((NOTIFY_OP,)) + name_string(path) + value(what)


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0501"): three letters of five bits and four hex digits, big-endian in a 32-bit constant (6.1.5).
    """
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - ord("A") + 1
    return pack("<B", DWORD_PREFIX) + pack(">HH", letters, int(text[3:], 16))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}. The end tag's checksum is left zero, which means: not checked."""
    return buffer(b"".join(descriptors) + bytes((END_TAG, 0)))


def io(base: int, length: int, alignment: int = 1) -> bytes:
    """IO (Decode16, base, base, alignment, length)"""
    return pack("<BBHHBB", IO_TAG, DECODE_16, base, base, alignment, length)


def irq(number: int) -> bytes:
    """IRQNoFlags () {number}: an ISA interrupt, edge, active high."""
    return pack("<BH", IRQ_TAG, 1 << number)


def memory32(base: int, length: int, writable: bool = True) -> bytes:
    """Memory32Fixed (ReadWrite, base, length)"""
    return pack("<BHBII", MEMORY32_FIXED_TAG, 9, int(writable), base, length)


def interrupt(*gsis: int, edge: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, ...) {gsis}: level, active high and exclusive unless said."""
    flags = CONSUMER | (EDGE if edge else 0) | (ACTIVE_LOW if active_low else 0) | (SHARED if shared else 0)
    count = len(gsis)
    return pack(f"<BHBB{count}I", EXTENDED_INTERRUPT_TAG, 2 + 4 * count, flags, count, *gsis)


def bus_range(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, ...): the buses behind a host bridge."""
    return _word_address(BUS_RANGE, 0, first, last)


def io_range(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, ..., EntireRange, ...): ports that a bridge hands on."""
    return _word_address(IO_RANGE, ENTIRE_IO, first, last)


def memory_range(first: int, last: int, *, cacheable: bool = False) -> bytes:
    """DWordMemory (ResourceProducer, ..., ReadWrite, ...): addresses that a bridge hands on."""
    flags = READ_WRITE | (CACHEABLE if cacheable else 0)
    size = last - first + 1
    return pack("<BHBBB5I", DWORD_ADDRESS_TAG, 23, MEMORY_RANGE, FIXED, flags, 0, first, last, 0, size)


def _word_address(kind: int, flags: int, first: int, last: int) -> bytes:
    size = last - first + 1
    return pack("<BHBBB5H", WORD_ADDRESS_TAG, 13, kind, FIXED, flags, 0, first, last, 0, size)


# Registers, and the expressions of methods. An operand is a constant, or AML: LOCAL0, ARG0, name_string("X").


def operation_region(path: str, space: int, offset: int, length: int) -> bytes:
    """OperationRegion (path, space, offset, length)"""
    head = bytes((EXT_PREFIX, OP_REGION_OP)) + name_string(path) + bytes((space,))
    return head + integer(offset) + integer(length)


def byte_fields(region: str, *names: str) -> bytes:
    """Field (region, ByteAcc, NoLock, Preserve) {names, 8 bits each}"""
    # The length of a field has the form of a package's, but is of bits and does not count itself.
    fields = b"".join(name_string(field) + bytes((8,)) for field in names)
    return _sized(bytes((EXT_PREFIX, FIELD_OP)), name_string(region) + bytes((BYTE_ACCESS,)) + fields)


def store(what: Value, target: bytes) -> bytes:
    """Store (what, target)"""
    return bytes((STORE_OP,)) + value(what) + target


def bit_and(left: Value, right: Value, target: bytes = b"\0") -> bytes:
    """And (left, right, target); without a target the value alone."""
    return bytes((AND_OP,)) + value(left) + value(right) + target


def bit_or(left: Value, right: Value, target: bytes = b"\0") -> bytes:
    """Or (left, right, target); without a target the value alone."""
    return bytes((OR_OP,)) + value(left) + value(right) + target


def create_dword_field(source: bytes, byte: int, path: str) -> bytes:
    """CreateDWordField (source, byte, path)"""
    return bytes((CREATE_DWORD_FIELD_OP,)) + source + integer(byte) + name_string(path)


def when(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) {terms}"""
    return _sized(bytes((IF_OP,)), condition + b"".join(terms))


def otherwise(*terms: bytes) -> bytes:
    """Else {terms}, right behind ``when``."""
    return _sized(bytes((ELSE_OP,)), b"".join(terms))
