"""Packets of a vsock device: the header and its numbers. OASIS virtio 1.2, 5.10.6."""

from __future__ import annotations

from _struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HOST_CID = 2  # 5.10.4

# struct virtio_vsock_hdr: source and destination CID, source and destination port, len, type, op, flags, buf_alloc,
# fwd_cnt.
HEADER = Struct("<QQIIIHHIII")
HEADER_BYTES = HEADER.size

STREAM, SEQPACKET = 1, 2  # 5.10.6.2

OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

# Flags of OP_SHUTDOWN, 5.10.6.5: the sender of it receives nothing more, sends nothing more.
NO_RECEIVE = 1
NO_SEND = 2
BOTH_WAYS = NO_RECEIVE | NO_SEND


# A flag of OP_RW, 5.10.6.6: it ends a message.
END_OF_MESSAGE = 1


def body(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """The ``size`` bytes behind the header, in pieces; none of them empty."""
    found = []
    skip = HEADER_BYTES
    for view in views:
        length = len(view)
        if skip >= length:
            skip -= length
            continue
        if skip:
            view = view[skip:]
            length -= skip
            skip = 0
        if length >= size:
            if size:
                found.append(view if length == size else view[:size])
            break
        found.append(view)
        size -= length
    return found
