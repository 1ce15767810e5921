"""A small encoder of AML, the byte code of the DSDT. Each function returns the bytes of one term.

ACPI 6.5, chapter 20 (AML grammar) and 6.4 (resource descriptors). Only what tables of constants need: names,
packages, buffers, scopes, devices, methods, resource templates. A further device is one call:

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

# Resource descriptors: small ones carry their length in the low three bits, large ones in a word behind the
# tag.
IRQ_TAG = 0x22  # without the flags byte: edge, active high, exclusive
IO_TAG = 0x47
END_TAG = 0x79
MEMORY32_FIXED_TAG = 0x86
EXTENDED_INTERRUPT_TAG = 0x89
DECODE_16 = 1  # IO: the device looks at all 16 address lines
CONSUMER = 1 << 0
EDGE = 1 << 1
ACTIVE_LOW = 1 << 2


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
    """A name or path such as COM1, \\_SB.PCI0 or ^_CRS; segments shorter than four characters are padded with
    '_'.
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
    """PkgLength of a body: it counts itself. One byte holds 6 bits of it, or its low 4 with up to three more
    bytes.
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


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0501"): three letters of five bits and four hex digits, big-endian in a 32-bit constant
    (6.1.5).
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


def interrupt(gsi: int, *, edge: bool = False, active_low: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, ...) {gsi}: level and active high unless said."""
    flags = CONSUMER | (EDGE if edge else 0) | (ACTIVE_LOW if active_low else 0)
    return pack("<BHBBI", EXTENDED_INTERRUPT_TAG, 6, flags, 1, gsi)
