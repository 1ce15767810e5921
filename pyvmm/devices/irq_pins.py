"""The pins of an interrupt controller as a board wires them, with room for a probe on them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class IrqPins:
    """``count`` pins that go to ``drive(n, level)``. ``watch(n, level)``, where there is one, is called after it, each
    time a pin is set, and on the same thread: perhaps under a device's lock.
    """

    __slots__ = ("_drive", "count", "watch")

    def __init__(self, count: int, drive: Callable[[int, int], None]) -> None:
        self.count = count
        self.watch: Callable[[int, int], None] | None = None
        self._drive = drive

    def set(self, n: int, level: int) -> None:
        """Drive pin ``n`` (0..count-1) to ``level`` (0 or 1). From any thread."""
        self._drive(n, level)
        watch = self.watch
        if watch is not None:
            watch(n, level)


class ControllerPins:
    """A controller's two rows of pins: requests in, and what it makes of them out."""

    __slots__ = ("inputs", "outputs")

    def __init__(self, inputs: IrqPins, outputs: IrqPins | None = None) -> None:
        self.inputs = inputs
        self.outputs = outputs
