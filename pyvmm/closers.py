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


class Closers:
    """A list of steps; each is added when its thing has been made."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[[], object], Callable[[], object] | None]] = []

    def add(self, made: Made) -> Made:
        """Close ``made`` at the end, or ``abandon`` it in a child of fork. Returns it."""
        self.call(made.close, made.abandon)
        return made

    def call(self, close: Callable[[], object], abandon: Callable[[], object] | None = None) -> None:
        """A step by its functions; without ``abandon`` there is nothing to do in a child of fork."""
        self._steps.append((close, abandon))

    def close(self) -> None:
        """Run every step, the last one first. What the first one to fail raised comes out when all are done."""
        self._run([close for close, _ in self._taken()])

    def abandon(self) -> None:
        """In a child of fork: give its copies of descriptors and mappings back, and touch nothing that the parent has
        too. No lock is taken: at the moment of the fork it may have been held by a thread that only the parent has.
        """
        self._run([abandon for _, abandon in self._taken() if abandon is not None])

    def _taken(self) -> list[tuple[Callable[[], object], Callable[[], object] | None]]:
        steps, self._steps = self._steps[::-1], []
        return steps

    def _run(self, steps: list[Callable[[], object]]) -> None:
        first: Exception | None = None
        for step in steps:
            try:
                step()
            except Exception as error:
                first = first or error
        if first is not None:
            raise first
