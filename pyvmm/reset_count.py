"""ResetCount: how often a guest has reset itself, by what the last time, and whether it does so again and again."""

from __future__ import annotations

from time import monotonic_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# So many within so long is no restart that anybody wanted: a guest that dies as it starts looks alive from outside.
OFTEN = 3
WITHIN_NS = 1_000_000_000


class ResetCount:
    """``count`` resets by the guest itself so far, the last by ``why``.

    ``on_often(sentence)`` is called once, on the vCPU's thread at the third reset within a second.
    """

    __slots__ = ("_recent_ns", "count", "on_often", "why")

    def __init__(self) -> None:
        self.count = 0
        self.why = ""
        self.on_often: Callable[[str], object] | None = None
        self._recent_ns: tuple[int, ...] = ()

    def note(self, why: str) -> None:
        """The guest resets itself now."""
        self.count += 1
        self.why = why
        now_ns = monotonic_ns()
        self._recent_ns = (*self._recent_ns[1 - OFTEN :], now_ns)
        if len(self._recent_ns) == OFTEN and now_ns - self._recent_ns[0] <= WITHIN_NS:
            tell, self.on_often = self.on_often, None
            if tell is not None:
                tell(f"the guest resets itself again and again: {self.sentence()}")

    def sentence(self, since: int = 0) -> str:
        """How often it was, after the first ``since`` of them, and why last. Empty where it never was."""
        count = self.count - since
        if count < 1:
            return ""
        return f"{count} reset{'s' if count > 1 else ''}, the last by {self.why}"
