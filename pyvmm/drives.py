"""Drives: the backends of a machine's drives by name, and what all of them do together."""

from __future__ import annotations

from pyvmm.errors import StateError
from pyvmm.light import Lock
from pyvmm.run_control import STATUS_IO_ERROR, ExitStatus
from pyvmm.run_state import RunState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.block.backend import BlockBackend
    from pyvmm.closers import Closers
    from pyvmm.events import Events
    from pyvmm.run_control import RunControl


class Drives:
    """``failed`` is every backend's on_error: where its policy says stop, the request waits and so does the machine."""

    def __init__(self, control: RunControl, events: Events, closers: Closers) -> None:
        self._control = control
        self._events = events
        self._closers = closers
        self.backends: dict[str, BlockBackend] = {}
        self.later = False
        """Images are another process's still: they are claimed when that has given them up."""
        self._resizing = 0  # how many drives, which are ours so long
        self._lock = Lock()  # of these two; nothing is waited for with it
        self.io_error = ""
        """What the last one was that stopped the machine."""

    def add(self, backend: BlockBackend) -> None:
        """It, or what is in its place by then, is closed in the end."""
        backends, name = self.backends, backend.name
        backends[name] = backend
        self._closers.call(lambda: backends[name].close(), lambda: backends[name].abandon())

    def replace(self, backend: BlockBackend) -> None:
        """A drive has another medium. What the old one was asked for is done first."""
        before, self.backends[backend.name] = self.backends[backend.name], backend
        before.close()

    def failed(self, backend: BlockBackend, operation: str, number: int, action: str) -> None:
        """A request failed; ``action`` is what the drive's rerror or werror says."""
        self._events.tell("io-error", drive=backend.name, operation=operation, errno=number, action=action)
        if action != "stop":
            return
        from posix import strerror

        self.io_error = f"{backend.name}: {operation}: {strerror(number)}"
        held_up = ExitStatus(STATUS_IO_ERROR, f"io-error: {self.io_error}")
        self._control.end(RunState.IO_ERROR, held_up)

    @property
    def stalled(self) -> bool:
        """Whether one of them has put a request aside."""
        return bool(self.held_up())

    def held_up(self) -> list[BlockBackend]:
        """Those that have put requests aside."""
        return [backend for backend in self.backends.values() if backend.stalled]

    def resume(self, held_up: list[BlockBackend]) -> None:
        """Have those try again what they have put aside."""
        for backend in held_up:
            backend.resume()

    def drain(self) -> None:
        """Return when no request is under way. The caller holds no device's lock."""
        for backend in self.backends.values():
            backend.drain()

    def claim(self) -> None:
        """Have the images, where another process had them. ConfigError where one has some of them still: then this has
        none.
        """
        if self.later:
            try:
                for backend in self.backends.values():
                    backend.claim()
            except BaseException:
                self.give_up()
                raise
            self.later = False

    def give_up(self) -> None:
        """Let another process have the images: nothing is in flight. StateError where one is being resized."""
        with self._lock:
            if self._resizing:
                raise StateError("a drive is being resized: wait until that is done")
            self.later = True
        for backend in self.backends.values():
            backend.give_up()

    def resize(self, backend: BlockBackend, size_bytes: int | None) -> bool:
        """As BlockBackend.resize. StateError where the image may be another process's."""
        with self._lock:
            if self.later:
                raise StateError(
                    f"drive {backend.name} has no image any more: this machine was moved to another process, and has it"
                    " again where it goes on"
                )
            self._resizing += 1
        try:
            return backend.resize(size_bytes)
        finally:
            with self._lock:
                self._resizing -= 1

    def drop_stalled(self) -> None:
        """Forget what was put aside: the drive's controller has forgotten it."""
        for backend in self.backends.values():
            backend.drop_stalled()
