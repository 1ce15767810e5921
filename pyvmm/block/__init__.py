"""The block layer: from a device's request to the host's file and back.

General layout, in the order a request walks it:

    backend      BlockBackend: what a device sees. Requests, their order, error policies, drain, counters
    lane         the way past all that follows, for transfers that wait for nothing
    throttle     bytes and operations a second
    coroutine    how a request waits without a thread of its own, and where its completion runs; co_lock: how one
                 request waits for another that works on the same table
    driver       the two interfaces below: a format, and the protocol that its bytes come by
    formats/     raw        the bytes as they are, or a window of them
                 qcow2/     clusters by tables, over other images
                 snapshot   a format over two others: an image that stays as it is, and what the guest writes
    protocols/   blkdebug   a filter that fails on purpose, in front of another protocol
                 file_posix a file or block device of the host, by preadv and pwritev on the workers of thread_pool
                 io_uring   the same by the other engine, on uring, a ring of the kernel's
                 nbd        an export of an NBD server: nbd_address, nbd_handshake, nbd_replies are its tools
                 image      the opened file; locking: who else may have it open; fallocate, bounce: its tools
    open         from options to drivers, by tables of formats and protocols; probe: by how a file begins and ends
    options      DriveOptions: what a user may say about a drive
    image_tool   what `pyvmm image` does, without a machine
"""

from __future__ import annotations

from pyvmm.block.backend import BlockBackend, Request
from pyvmm.block.open import open_drive
from pyvmm.block.options import DriveOptions
from pyvmm.block.stats import BlockStats

__all__ = ["BlockBackend", "BlockStats", "DriveOptions", "Request", "open_drive"]
