"""The block layer: from a device's request to the host's file and back.

General layout, in the order a request walks it:

    backend      BlockBackend: what a device sees. Requests, their order, error policies, drain, counters
    throttle     bytes and operations a second
    coroutine    how a request waits without a thread of its own, and where its completion runs
    driver       the two interfaces below: a format, and the protocol it is stored by
    raw          the format: the bytes as they are, or a window of them
    snapshot     a format over two others: an image that stays as it is, and what the guest writes
    blkdebug     a protocol that fails on purpose, in front of another
    file_posix   the protocol: a file or block device of the host, by preadv and pwritev
    thread_pool  its workers; io_uring: the other engine, on uring, a ring of the kernel's
    opening      from options to drivers; image: the file on the host; probe: files that are no raw images
    locking      who else may have the image open
    options      DriveOptions: what a user may say about a drive
"""

from __future__ import annotations

from pyvmm.block.backend import BlockBackend, Request, open_drive
from pyvmm.block.options import DriveOptions
from pyvmm.block.stats import BlockStats

__all__ = ["BlockBackend", "BlockStats", "DriveOptions", "Request", "open_drive"]
