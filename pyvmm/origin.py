"""Origin: what a machine's memory is a mapping of, held for as long as it is."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, Self

    class Held(Protocol):
        """Of Snapshot (snapshot.py)."""

        def hold(self) -> Self: ...
        def close(self) -> None: ...
        def abandon(self) -> None: ...


class Origin:
    """``snapshot`` is held until ``take`` brings another one, or ``close``; None: the memory is the machine's own."""

    def __init__(self, snapshot: Held | None) -> None:
        self.snapshot = None if snapshot is None else snapshot.hold()

    def take(self, snapshot: Held) -> None:
        """The memory is a mapping of this one from here on."""
        before, self.snapshot = self.snapshot, snapshot.hold()
        if before is not None:
            before.close()

    def complete(self) -> None:
        """Memory that is filled when it is touched (served_memory.py) is to be all there."""

    def close(self) -> None:
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is not None:
            snapshot.close()

    def abandon(self) -> None:
        """In a child of fork."""
        if self.snapshot is not None:
            self.snapshot.abandon()
