"""Plain data (state.pyx) as MessagePack, and back: how a state is written into a file.

The MessagePack specification (msgpack/msgpack, spec.md): "Formats", nil to map 32; of its types those that plain data
has. Other programs read it with any library; the tests do with msgspec, whose import takes longer than a machine takes
to go on from a snapshot.

What is read may come from anywhere. Every length is compared with what is left of the data before anything is made of
it, so that nothing grows beyond a few times the data; nesting is bounded; and every fault is a StateError.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pyvmm.errors import StateError

cdef enum:
    DEEPEST = 64    # a machine's state is less than a dozen dicts and lists deep

# First bytes, by the specification's overview of formats.
cdef enum:
    FIXMAP = 0x80
    FIXARRAY = 0x90
    FIXSTR = 0xa0
    NIL = 0xc0
    FALSE = 0xc2
    TRUE = 0xc3
    BIN8 = 0xc4
    BIN16 = 0xc5
    BIN32 = 0xc6
    UINT8 = 0xcc
    UINT16 = 0xcd
    UINT32 = 0xce
    UINT64 = 0xcf
    INT8 = 0xd0
    INT16 = 0xd1
    INT32 = 0xd2
    INT64 = 0xd3
    STR8 = 0xd9
    STR16 = 0xda
    STR32 = 0xdb
    ARRAY16 = 0xdc
    ARRAY32 = 0xdd
    MAP16 = 0xde
    MAP32 = 0xdf
    NEGATIVE = 0xe0


# -- writing ---------------------------------------------------------------------------------------------------------

def pack(value):
    """``value`` as bytes. StateError for what is no plain data, named by its place: ``parts.serial.x``."""
    out = bytearray()
    put(out, value, "", 0)
    return bytes(out)


cdef int put(bytearray out, value, str place, int depth) except -1:
    if depth > DEEPEST:
        raise StateError(f"{place or 'the data'} is more than {DEEPEST} dicts and lists deep")
    if value is None:
        out.append(NIL)
    elif value is True or value is False:
        out.append(TRUE if value else FALSE)
    elif isinstance(value, int):
        put_number(out, value, place)
    elif isinstance(value, str):
        data = value.encode()
        put_head(out, len(data), FIXSTR, 32, STR8, STR16)
        out += data
    elif isinstance(value, (bytes, bytearray, memoryview)):
        size = len(value) if not isinstance(value, memoryview) else value.nbytes
        put_head(out, size, 0, 0, BIN8, BIN16)
        out += value
    elif isinstance(value, dict):
        put_head(out, len(value), FIXMAP, 16, 0, MAP16)
        for key, inner in value.items():
            if not isinstance(key, str):
                raise StateError(f"{place or 'the data'} has a key {key!r}, no string")
            put(out, key, place, depth + 1)
            put(out, inner, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        put_head(out, len(value), FIXARRAY, 16, 0, ARRAY16)
        for n, inner in enumerate(value):
            put(out, inner, f"{place}[{n}]", depth + 1)
    else:
        raise StateError(f"{place or 'the data'} is a {type(value).__name__}, which can't be written down")
    return 0


cdef int put_number(bytearray out, value, str place) except -1:
    if 0 <= value < 0x80:
        out.append(value)
    elif -32 <= value < 0:
        out.append(value + 256)
    elif 0 <= value < 1 << 64:
        kind = UINT8 if value < 1 << 8 else UINT16 if value < 1 << 16 else UINT32 if value < 1 << 32 else UINT64
        out.append(kind)
        out += value.to_bytes(1 << (kind - UINT8), "big")
    elif -(1 << 63) <= value < 0:
        out.append(INT64)
        out += value.to_bytes(8, "big", signed=True)
    else:
        raise StateError(f"{place or 'the data'} is a number of {value.bit_length()} bits: 64 are the most")
    return 0


cdef int put_head(bytearray out, Py_ssize_t size, int short_form, int below, int form8, int form16) except -1:
    """A length in its shortest form. ``form8`` 0: there is none of one byte."""
    if size < below:
        out.append(short_form | size)
    elif form8 and size < 1 << 8:
        out.append(form8)
        out.append(size)
    elif size < 1 << 16:
        out.append(form16)
        out += size.to_bytes(2, "big")
    elif size < 1 << 32:
        out.append(form16 + 1)
        out += size.to_bytes(4, "big")
    else:
        raise StateError(f"{size} bytes or entries in one piece can't be written down")
    return 0


# -- reading ---------------------------------------------------------------------------------------------------------

cdef struct cursor_t:
    const uint8_t *at
    const uint8_t *end


def unpack(data):
    """What ``pack`` was given, from bytes or a view of them; tuples have become lists.

    StateError for anything else: other types, keys that are no strings or come twice, what ends early or goes on.
    """
    # Not a typed memoryview: Cython's own imports collections.
    cdef Py_buffer view
    cdef cursor_t cursor
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        cursor.at = <const uint8_t *>view.buf
        cursor.end = cursor.at + view.len
        value = take(&cursor, 0)
        if cursor.at != cursor.end:
            raise StateError(f"the data goes on for {cursor.end - cursor.at} bytes after its end")
        return value
    finally:
        PyBuffer_Release(&view)


cdef early():
    return StateError("the data ends early: it was cut off")


cdef uint64_t big_endian(cursor_t *cursor, int size) except? 0xfffffffffffffffe:
    cdef uint64_t value = 0
    if cursor.end - cursor.at < size:
        raise early()
    for _ in range(size):
        value = value << 8 | cursor.at[0]
        cursor.at += 1
    return value


cdef take(cursor_t *cursor, int depth):
    cdef int form
    cdef uint64_t raw
    if depth > DEEPEST:
        raise StateError(f"the data is more than {DEEPEST} dicts and lists deep")
    form = <int>big_endian(cursor, 1)
    if form < FIXMAP:
        return form
    if form >= NEGATIVE:
        return form - 256
    if form < FIXARRAY:
        return take_dict(cursor, form & 0x0f, depth)
    if form < FIXSTR:
        return take_list(cursor, form & 0x0f, depth)
    if form < NIL:
        return take_text(cursor, form & 0x1f)
    if form == NIL:
        return None
    if form == TRUE or form == FALSE:
        return form == TRUE
    if BIN8 <= form <= BIN32:
        return take_bytes(cursor, big_endian(cursor, 1 << (form - BIN8)))
    if UINT8 <= form <= UINT64:
        return big_endian(cursor, 1 << (form - UINT8))
    if INT8 <= form <= INT64:
        raw = big_endian(cursor, 1 << (form - INT8))
        if form == INT8:
            return <int8_t>raw
        if form == INT16:
            return <int16_t>raw
        return <int32_t>raw if form == INT32 else <int64_t>raw
    if STR8 <= form <= STR32:
        return take_text(cursor, big_endian(cursor, 1 << (form - STR8)))
    if form == ARRAY16 or form == ARRAY32:
        return take_list(cursor, big_endian(cursor, 2 << (form - ARRAY16)), depth)
    if form == MAP16 or form == MAP32:
        return take_dict(cursor, big_endian(cursor, 2 << (form - MAP16)), depth)
    raise StateError(f"the data has a {form:#x}, which begins no plain data")


cdef int check_left(cursor_t *cursor, uint64_t size) except -1:
    """Each entry takes a byte at least: no list is made that the data can't fill."""
    if <uint64_t>(cursor.end - cursor.at) < size:
        raise early()
    return 0


cdef take_bytes(cursor_t *cursor, uint64_t size):
    check_left(cursor, size)
    value = PyBytes_FromStringAndSize(<const char *>cursor.at, <Py_ssize_t>size)
    cursor.at += size
    return value


cdef take_text(cursor_t *cursor, uint64_t size):
    check_left(cursor, size)
    try:
        value = PyUnicode_DecodeUTF8(<char *>cursor.at, <Py_ssize_t>size, NULL)
    except UnicodeDecodeError:
        raise StateError("the data has a string that is no UTF-8") from None
    cursor.at += size
    return value


cdef take_list(cursor_t *cursor, uint64_t size, int depth):
    check_left(cursor, size)
    cdef list values = []
    for _ in range(size):
        values.append(take(cursor, depth + 1))
    return values


cdef take_dict(cursor_t *cursor, uint64_t size, int depth):
    check_left(cursor, size)
    cdef dict values = {}
    for _ in range(size):
        key = take(cursor, depth + 1)
        if not isinstance(key, str):
            raise StateError("the data has a key that is no string")
        if key in values:
            raise StateError(f"the data has the key {key[:40]!r} twice")
        values[key] = take(cursor, depth + 1)
    return values
