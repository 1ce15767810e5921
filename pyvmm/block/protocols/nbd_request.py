"""NbdRequest: what a coroutine asks of an NBD server, from its beginning to the answer, over as many connections as
that takes.
"""

from __future__ import annotations

from pyvmm.block.coroutine import Waiter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.block.driver import Iov


class NbdRequest(Waiter):
    """Its result is a transfer's length, 0 of another, or a negative errno."""

    __slots__ = ("cancel_held", "flags", "iov", "kind", "length", "lost_at", "offset")

    def __init__(self, kind: int, flags: int, offset: int, length: int, iov: Iov) -> None:
        super().__init__()
        self.kind = kind
        self.flags = flags
        self.offset = offset
        self.length = length
        self.iov = iov
        self.lost_at = 0.0  # since when it has no answer for want of a connection (monotonic); 0: it was on none yet
        self.cancel_held: Callable[[NbdRequest], None] | None = None

    def cancel(self) -> None:
        if self.cancel_held is not None:
            self.cancel_held(self)
