"""Activity: what a drive does between a command and its end. Base of the transfers."""

from __future__ import annotations

from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.block import BlockBackend, Request
    from pyvmm.clock import Clock
    from pyvmm.device import DeviceLock
    from pyvmm.devices.ide.bus_master import BusMaster
    from pyvmm.devices.ide.chain import Chain
    from pyvmm.devices.ide.pio_buffer import PioBuffer
    from pyvmm.region import FifoRegion
    from pyvmm.state import Fields

    # A drive's activities, drives and channels know each other. What each needs of the next one up stands here, so that
    # files import downwards only.

    class ChannelSide(Protocol):
        """IdeChannel, as its drives and their activities see it."""

        clock: Clock
        data: FifoRegion
        bus_master: BusMaster
        latched: bool
        on_data_out: Callable[[], object] | None

        @property
        def lock(self) -> DeviceLock: ...
        @property
        def in_reset(self) -> bool: ...
        @property
        def buffer(self) -> PioBuffer: ...
        def open_write(self, buffer: memoryview | bytearray, start: int, size: int | None = None) -> None: ...
        def forget_buffer(self) -> None: ...
        def unlatch(self) -> None: ...
        def interrupt(self, drive: DriveSide) -> None: ...
        def update_irq(self) -> None: ...
        def diagnose(self) -> None: ...

    class DriveSide(Protocol):
        """Drive, as its activities see it."""

        regs: list[int]
        status: int
        error: int
        intrq: bool
        activity: Activity | None

        @property
        def channel(self) -> ChannelSide: ...
        def quiet(self, activity: Activity) -> None: ...
        def finish(self) -> None: ...
        def fail(self, error: int) -> None: ...
        def halt(self) -> None: ...
        def set_count(self, count: int) -> None: ...
        def set_lba(self, lba: int) -> None: ...

    class DiskSide(DriveSide, Protocol):
        """And IdeDisk."""

        backend: BlockBackend
        sectors: int
        power: int


class Activity:
    """``pending`` is the request that the backend has not completed yet. All methods run under the channel's lock.

    Where a reset drops it in the middle of that, the drive stays busy until the backend has called back: a transfer
    that cannot be stopped on the host may still be writing into the guest's memory.
    """

    __slots__ = ("_skipped", "_waiting", "channel", "drive", "dropped", "pending")

    to_memory = False
    """A DMA transfer that writes the guest's memory."""

    def __init__(self, drive: DriveSide) -> None:
        self.drive = drive
        self.channel: ChannelSide = drive.channel
        self.pending: Request | Chain | None = None
        self.dropped = False
        self._waiting = False  # for the backend: no window is open
        self._skipped = 0  # bytes of the open window that were moved before its state was saved and loaded

    @property
    def _moved(self) -> int:
        """Bytes of the open window in the data port that are through."""
        return 0 if self._waiting else self._skipped + self.channel.data.position

    @_moved.setter
    def _moved(self, moved: int) -> None:
        self._skipped = moved

    def drop(self) -> None:
        """Forget it. While something is pending, the drive's ``quiet`` is called once that has ended."""
        self.dropped = True
        if self.pending is not None:
            self.pending.cancel()

    def came_back(self) -> bool:
        """The backend has called back. False where nobody wants to know any more."""
        self.pending = None
        if self.channel.latched:
            self.channel.unlatch()
        if self.dropped:
            self.drive.quiet(self)
        return not self.dropped

    def on_end(self) -> None:
        """The guest has moved the last byte of the window in the data port."""

    def begin(self) -> None:
        """The bus master has been started."""

    def stop(self) -> None:
        """The bus master has been stopped, after ``begin``."""
        if self.pending is not None:
            self.pending.cancel()

    # -- state: what the backend has not brought is asked for again ------------------------------------------------

    KIND = ""
    """Its name in a saved state."""
    STATE: Fields = {}

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return {"kind": self.KIND, **save_fields(self, self.STATE)}

    def load(self, state: dict[str, Any]) -> None:
        """Of an activity that has just been made, and not started."""
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state, ("kind",))
        wrong = self.wrong()
        if wrong:
            raise StateError(f"{self.KIND}: {wrong}")

    def wrong(self) -> str:
        """Which of the loaded numbers do not fit together; empty where all do."""
        return ""

    def go_on(self) -> None:
        """After a load: open the window again, ask the backend again."""
        raise NotImplementedError
