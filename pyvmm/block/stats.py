"""What a drive has done so far, by kind of operation."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.trace.recorder import Tap

# What a drive's tap (trace/tap.pxd) is told of: a request, a system call for one, its end.
TRACE_SUBMIT, TRACE_CALL, TRACE_DONE = 9, 10, 11


class OperationStats:
    """Of one kind of operation.

    operations, bytes  that succeeded.
    merged             how many of them were done by the system call of another one.
    failed             how many failed on the host, also where a policy hides that from the guest or tries again.
    time_ns            from submission to completion, added up over all of them.
    """

    __slots__ = ("bytes", "failed", "merged", "operations", "time_ns")

    def __init__(self) -> None:
        self.operations = 0
        self.bytes = 0
        self.merged = 0
        self.failed = 0
        self.time_ns = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class BlockStats:
    """Counters of one drive; they only grow, but for ``in_flight``. Write-zeroes count as writes."""

    __slots__ = ("discard", "flush", "in_flight", "max_in_flight", "read", "tap", "write")

    def __init__(self) -> None:
        self.tap: Tap | None = None
        """Where requests are recorded, while somebody traces them."""
        self.read = OperationStats()
        self.write = OperationStats()
        self.flush = OperationStats()
        self.discard = OperationStats()
        self.in_flight = 0
        """Requests submitted and not yet complete."""
        self.max_in_flight = 0

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Plain data, for whoever prints or sends it."""
        return {
            "read": self.read.as_dict(),
            "write": self.write.as_dict(),
            "flush": self.flush.as_dict(),
            "discard": self.discard.as_dict(),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
        }
