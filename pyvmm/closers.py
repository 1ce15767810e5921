"""Closers: what a machine is made of is given back in the other order, and all of it, whatever one step raises."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    class Closable(Protocol):
        def close(self) -> object: ...
        def abandon(self) -> object: ...

    Made = TypeVar("Made", bound=Closable)
    Step = Callable[[], object]


class Closers:
    """A list of steps; each is added when its thing has been made."""

    def __init__(self) -> None:
        self._steps: list[tuple[Step, Step | None]] = []

    def add(self, made: Made) -> Made:
        """Close ``made`` at the end, or ``abandon`` it in a child of fork. Returns it."""
        self._steps.append((made.close, made.abandon))
        return made

    def call(self, close: Step, abandon: Step | None = None) -> None:
        """A step by its functions; without ``abandon`` there is nothing to do in a child of fork."""
        self._steps.append((close, abandon))

    def close(self) -> None:
        """Run every step, the last one first. What the first one to fail raised comes out when all are done. Where an
        interrupt comes through (KeyboardInterrupt), the next call goes on with the steps that are left.
        """
        first: Exception | None = None
        steps = self._steps
        while steps:
            try:
                steps.pop()[0]()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def abandon(self) -> None:
        """In a child of fork: give its copies of descriptors and mappings back, and touch nothing that the parent has
        too. No lock is taken: at the moment of the fork it may have been held by a thread that only the parent has.
        """
        # As close(), of the other halves.
        self._steps = [(abandon, abandon) for _close, abandon in self._steps if abandon is not None]
        self.close()
