"""Activity: what a drive does between a command and its end. Base of the transfers."""

from __future__ import annotations

from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block import Request
    from pyvmm.devices.ide.chain import Chain
    from pyvmm.devices.ide.channel import IdeChannel
    from pyvmm.devices.ide.drive import Drive
    from pyvmm.state import Fields


class Activity:
    """``pending`` is the request that the backend has not completed yet. All methods run under the channel's lock.

    Where a reset drops it in the middle of that, the drive stays busy until the backend has called back: a transfer
    that cannot be stopped on the host may still be writing into the guest's memory.
    """

    __slots__ = ("channel", "drive", "dropped", "pending")

    to_memory = False
    """A DMA transfer that writes the guest's memory."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.channel: IdeChannel = drive.channel
        self.pending: Request | Chain | None = None
        self.dropped = False

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
