"""TerminalScreen: a text screen on the terminal, drawn again as often as anybody looks, and only what has changed."""

from __future__ import annotations

from pyvmm import screen
from pyvmm.light import Lock
from pyvmm.terminal import Screen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock
    from pyvmm.screen import Frame

REFRESH_NS = 40_000_000  # between two looks at what the guest has made of it


class TerminalScreen(Screen):
    """``look()`` gives the frame to be shown, ``on_key`` takes what is typed meanwhile. ``ready()``: the terminal keeps
    up; what is to be drawn while it does not is left for later.
    """

    def __init__(
        self,
        look: Callable[[], Frame],
        clock: Clock,
        on_key: Callable[[bytes], None],
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self._look = look
        self._clock = clock
        self._timer = clock.timer(self._on_timer)
        self._on_key = on_key
        self._ready = ready
        self._lock = Lock()
        self._write: Callable[[bytes], None] | None = None
        self._shown: Frame | None = None

    def show(self, write: Callable[[bytes], None]) -> None:
        with self._lock:
            write(screen.ENTER)
            self._write = write
            self._shown = None
        self.refresh()
        self._timer.arm(self._clock.now_ns() + REFRESH_NS)

    def hide(self) -> None:
        self.refresh()
        with self._lock:
            self._timer.disarm()
            if self._write is not None:
                self._write(screen.LEAVE)
            self._write = None

    def type(self, data: bytes) -> None:
        self._on_key(data)

    def refresh(self) -> None:
        """Draw what has changed, if it is shown at all. From any thread."""
        frame = self._look()
        with self._lock:
            if self._write is None or not self._ready() or (self._shown is not None and self._shown.same(frame)):
                return
            if drawn := screen.draw(self._shown, frame):
                self._write(drawn)
            self._shown = frame

    def last_words(self) -> bytes:
        """What is on it as plain lines: for a terminal that shows it no more. Empty where nothing is."""
        lines = self._look().lines()
        while lines and not lines[-1]:
            lines.pop()
        return "".join(f"{line}\n" for line in lines).encode()

    def _on_timer(self) -> None:
        self.refresh()
        with self._lock:
            if self._write is not None:
                self._timer.arm(self._clock.now_ns() + REFRESH_NS)
