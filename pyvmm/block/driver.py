"""The two interfaces of the block layer: a format driver above, a protocol driver below it.

A format (raw, and room for others) says where a guest's byte is in the image; a protocol (a file or block device of the
host, or a filter in front of one) moves bytes. Offsets and lengths are bytes. Every ``co_`` function is a coroutine
that returns 0 or more, or a negative errno, and raises only for a mistake of ours. None of them changes ``iov``, and
after the return nobody touches its memory.
"""

from __future__ import annotations

from errno import ENOTSUP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.block.lane import Lane
    from pyvmm.block.options import DriveOptions

    Iov = Sequence[memoryview]

SECTOR_BYTES = 512  # what a guest's disk is made of, and requests to a BlockBackend


class ProtocolDriver:
    """Bytes at an offset. Transfers may be short: whoever called goes on with the rest."""

    size_bytes = 0
    read_only = False
    alignment = 1
    """In bytes. A write that does not begin and end at a multiple of it also reads and writes the rest of the block."""

    async def co_preadv(self, offset: int, iov: Iov, length: int) -> int:
        """Fill the first bytes of ``iov`` (``length`` bytes in all): how many, 0 at the end of the file."""
        raise NotImplementedError

    async def co_pwritev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        """Write the first bytes of ``iov``: how many. ``fua``: on stable storage before it returns."""
        raise NotImplementedError

    async def co_flush(self) -> int:
        """0 when every write that was complete before is on stable storage."""
        raise NotImplementedError

    async def co_pdiscard(self, offset: int, length: int) -> int:
        """A hint that the bytes are no longer needed. -ENOTSUP where the host can't use it."""
        return -ENOTSUP

    async def co_pwrite_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        """Make the bytes read as zeros; ``may_unmap``: their space may be given back."""
        raise NotImplementedError

    def may_grow_to(self, end: int) -> bool:
        """Whether a write may make it longer, up to byte ``end``."""
        return False

    def measure(self, least_bytes: int = 0) -> None:
        """Look again how long it is, after making it ``least_bytes`` long where it is shorter. OSError where that can't
        be; ConfigError likewise, in one sentence.
        """
        raise OSError(ENOTSUP, "it has its size for good")

    def shorten(self, most_bytes: int) -> None:
        """Make it no longer than that, and look again how long it is. OSError and ConfigError as ``measure``."""
        raise OSError(ENOTSUP, "it has its size for good")

    def plug(self) -> None:
        """More requests are about to come, then ``unplug``. Counted."""

    def unplug(self) -> None:
        """What waits for more goes out now."""

    def lane(self, offset: int, size_bytes: int) -> Lane | None:
        """A lane to these bytes, where a transfer is nothing but a system call (lane.pyx)."""
        return None

    def peek(self, offset: int, length: int) -> bytes:
        """What is there now, for a look before the guest runs: read on this thread, outside of any request and of
        blkdebug's rules. Fewer bytes at the end of the file, none where they can't be read.
        """
        return b""

    def claim(self) -> None:
        """Have the image for itself, as the options say, where it was opened without that, or given up. ConfigError
        where somebody else has it.
        """

    def give_up(self) -> None:
        """Let somebody else have the image: nothing is in flight, and no request comes before ``claim``."""

    def ending(self) -> None:
        """The drive is about to be closed: from now on nothing may wait for long, whatever its policy is."""

    def close(self) -> None:
        """Give everything back; nothing is in flight."""

    def abandon(self) -> None:
        """In a child of fork: close this process's descriptors. No lock, no thread, no request."""


class FormatDriver:
    """The guest's disk. Each call carries out the whole request: 0, or a negative errno."""

    format = "raw"  # its name in pyvmm/block/open.py's FORMATS

    size_bytes = 0
    read_only = False
    alignment = 1
    skew = 0
    """A request is aligned where offset + ``skew`` is a multiple of ``alignment``: the disk may begin inside a block.
    """
    backing: FormatDriver | None = None
    """The disk that it stands on."""

    def about(self) -> dict[str, Any]:
        """What the format says of the image, in the words of qemu-img info --output=json."""
        return {}

    async def co_readv(self, offset: int, iov: Iov, length: int) -> int:
        raise NotImplementedError

    async def co_writev(self, offset: int, iov: Iov, length: int, fua: bool) -> int:
        raise NotImplementedError

    async def co_flush(self) -> int:
        raise NotImplementedError

    async def co_discard(self, offset: int, length: int) -> int:
        raise NotImplementedError

    async def co_write_zeroes(self, offset: int, length: int, may_unmap: bool, fua: bool) -> int:
        raise NotImplementedError

    def plug(self) -> None:
        """As ProtocolDriver.plug."""

    def unplug(self) -> None:
        """As ProtocolDriver.unplug."""

    def grow(self, options: DriveOptions, size_bytes: int | None) -> None:
        """The image may be longer by now, or is to be made so that the disk has ``size_bytes``. The attribute says what
        it has then. OSError and ConfigError as ProtocolDriver.measure.
        """
        raise OSError(ENOTSUP, "it has its size for good")

    def shrink(self, size_bytes: int) -> None:
        """Make the disk so short; the attribute says so then. Nobody is on the way to what lies behind, or will be
        before this is over. OSError and ConfigError as ProtocolDriver.measure.
        """
        raise OSError(ENOTSUP, "it has its size for good")

    def claim(self) -> None:
        """As ProtocolDriver.claim."""

    def give_up(self) -> None:
        """As ProtocolDriver.give_up."""

    def unsettled(self) -> bool:
        """Whether something of what was written is in memory only, which ``co_settle`` brings into the file."""
        return False

    async def co_settle(self) -> int:
        """Whoever opens the image from now on finds all that was written: 0. It may not be on stable storage."""
        return 0

    def ends_with_process(self) -> bool:
        """Whether the guest has written something that no other process will find."""
        return False

    def lane(self) -> Lane | None:
        """A lane to the guest's disk, where its bytes are a file's as they are (lane.pyx)."""
        return None

    def peek(self, offset: int, length: int) -> bytes:
        """As ProtocolDriver.peek, of the guest's disk."""
        return b""

    def ending(self) -> None:
        """As ProtocolDriver.ending."""

    def abandon(self) -> None:
        """As a protocol's."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
