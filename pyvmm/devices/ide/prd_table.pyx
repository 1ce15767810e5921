"""A bus master's PRD table: where in the guest's memory the data of one command goes.

"Programming Interface for Bus Master IDE Controller", revision 1.0, section 1. An entry is a physical address (bit 0 is
ignored) and a byte count (bit 0 is ignored, 0 is 64 KiB); bit 31 of the second word ends the table, which lies inside
one block of 64 KiB: what goes on past that has no end.

A request of a guest whose memory is in pieces has an entry for each page.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pyvmm.errors import BusError
from pyvmm.guest_memory cimport GuestMemory

cdef enum:
    ENTRY_BYTES = 8
    BOUNDARY_BYTES = 0x10000
    LONGEST_BYTES = 0x10000
    COUNT_MASK = 0xFFFE
    ADDRESS_MASK = 0xFFFFFFFE

cdef uint32_t LAST = 0x80000000


def pieces_of(GuestMemory memory not None, uint32_t table, uint64_t size):
    """(pieces, missing_bytes, more): the (address, length) for ``size`` bytes, neighbours joined; how many bytes the
    table has not; whether it is longer than that. Each entry is read once. BusError where one is not in RAM.
    """
    cdef list pieces = []
    cdef uint64_t at = table
    cdef uint64_t boundary = (at | (BOUNDARY_BYTES - 1)) + 1
    cdef uint64_t start = 0, end = 0    # of the piece that may still grow; empty: there is none
    cdef uint64_t address, length
    cdef uint32_t entry[2]
    cdef uint8_t *there
    cdef bint more = False
    while size and at + ENTRY_BYTES <= boundary:
        there = memory.host(at, ENTRY_BYTES)
        if there == NULL:
            raise BusError(f"a PRD entry at guest-physical {at:#x} is not inside RAM")
        memcpy(entry, there, ENTRY_BYTES)
        at += ENTRY_BYTES
        address = entry[0] & ADDRESS_MASK
        length = entry[1] & COUNT_MASK or LONGEST_BYTES
        more = length > size or not entry[1] & LAST
        length = min(length, size)
        if address != end or start == end:
            if start != end:
                pieces.append((start, end - start))
            start = address
        end = address + length
        size -= length
        if entry[1] & LAST:
            break
    if start != end:
        pieces.append((start, end - start))
    return pieces, size, more and not size
