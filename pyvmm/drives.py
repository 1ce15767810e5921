"""Drives: the backends of a machine's drives by name, and what all of them do together."""

from __future__ import annotations

from pyvmm.run_control import IO_ERROR, STATUS_IO_ERROR, ExitStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.block.backend import BlockBackend
    from pyvmm.closers import Closers
    from pyvmm.run_control import RunControl


class Drives:
    """``failed`` is every backend's on_error: where its policy says stop, the request waits and so does the machine."""

    def __init__(self, control: RunControl, closers: Closers) -> None:
        self._control = control
        self._closers = closers
        self.backends: dict[str, BlockBackend] = {}
        self.io_error = ""
        """What the last one was that stopped the machine."""
        self.on_io_error: Callable[[str], object] | None = None

    def add(self, backend: BlockBackend) -> None:
        self.backends[backend.name] = self._closers.add(backend)

    def failed(self, backend: BlockBackend, operation: str, number: int, action: str) -> None:
        """A request failed; ``action`` is what the drive's rerror or werror says."""
        if action != "stop":
            return
        import os

        self.io_error = f"{backend.name}: {operation}: {os.strerror(number)}"
        held_up = ExitStatus(STATUS_IO_ERROR, f"io-error: {self.io_error}")
        self._control.request(lambda: self._control.end(held_up, None, IO_ERROR))
        if self.on_io_error is not None:
            self.on_io_error(self.io_error)

    @property
    def stalled(self) -> bool:
        """Whether one of them has put a request aside."""
        return any(backend.stalled for backend in self.backends.values())

    def resume(self) -> None:
        """Try again what was put aside."""
        for backend in self.backends.values():
            backend.resume()

    def drain(self) -> None:
        """Return when no request is under way. The caller holds no device's lock."""
        for backend in self.backends.values():
            backend.drain()

    def drop_stalled(self) -> None:
        """Forget what was put aside: the drive's controller has forgotten it."""
        for backend in self.backends.values():
            backend.drop_stalled()
