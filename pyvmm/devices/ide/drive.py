"""Drive: what every device on an ATA channel has. Its registers, its status, how a command ends, and resets.

ATA/ATAPI-6, chapter 7 for the registers, 9.1 to 9.3 and 9.12 for resets and signatures.
"""

from __future__ import annotations

from pyvmm.devices.ide.registers import (
    ALWAYS_ON,
    BSY,
    COUNT,
    DEV,
    DEVICE,
    EXECUTE_DEVICE_DIAGNOSTIC,
    FAILED,
    FILE_SIZE,
    HEAD,
    HIGHEST_MULTIWORD,
    HIGHEST_PIO,
    HIGHEST_ULTRA,
    LBA,
    LBA_HIGH,
    LBA_LOW,
    LBA_MID,
    MULTIWORD_DMA,
    PASSED,
    PIO_DEFAULT,
    PIO_MODE,
    READY,
    ULTRA_DMA,
)
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.devices.ide.activity import Activity, ChannelSide
    from pyvmm.state import Fields

TRANSFER_MODES = (
    (PIO_DEFAULT, 1),
    (PIO_MODE, HIGHEST_PIO),
    (MULTIWORD_DMA, HIGHEST_MULTIWORD),
    (ULTRA_DMA, HIGHEST_ULTRA),
)


class Drive:
    """One device, or the absence of one: every register reads as zero, no command is taken.

    ``regs`` holds the registers as the guest has written them, with the previous contents from HOB on. ``status`` and
    ``error`` are what it reads. ``lba48`` says how the last command gave its address.
    """

    __slots__ = (
        "activity",
        "channel",
        "error",
        "intrq",
        "lba48",
        "lingering",
        "regs",
        "resetting",
        "status",
        "transfer_mode",
        "unit",
    )

    present = False

    def __init__(self) -> None:
        self.regs = [0] * FILE_SIZE
        self.status = 0
        self.error = 0
        self.intrq = False  # an interrupt is pending: INTRQ, while this drive is selected
        self.lba48 = False
        self.activity: Activity | None = None
        self.lingering: Activity | None = None  # one that was dropped while the backend was at work for it
        self.resetting = False
        self.transfer_mode = PIO_DEFAULT
        self.unit = 0
        self.channel: ChannelSide

    def attach(self, channel: ChannelSide, unit: int) -> None:
        self.channel = channel
        self.unit = unit

    def execute(self, opcode: int) -> None:
        """A command; the drive is selected and idle."""
        if opcode == EXECUTE_DEVICE_DIAGNOSTIC:
            self.channel.diagnose()

    def device_reset(self) -> None:
        """DEVICE RESET, whatever the drive is doing: only packet devices know it (8.7)."""

    def settings_power_on(self) -> None:
        """Settings as they are when the power comes on."""

    def settings_soft_reset(self) -> None:
        """Settings as a software reset leaves them."""

    def choose_transfer_mode(self) -> bool:
        """SET FEATURES 03h: the mode in the count register, which only shows in IDENTIFY. False for none there is."""
        mode = self.regs[COUNT]
        for kind, highest in TRANSFER_MODES:
            if kind <= mode <= kind + highest:
                self.transfer_mode = mode
                return True
        return False

    # -- how commands end ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        self.activity = None
        self.status = READY
        self.channel.interrupt(self)

    def fail(self, error: int) -> None:
        self.activity = None
        self.status = FAILED
        self.error = error
        self.channel.interrupt(self)

    def halt(self) -> None:
        """The end of a DMA command whose PRD table is no good: no interrupt, as the bus master's document has it."""
        self.activity = None
        self.status = READY

    # -- resets --------------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Stop what is being done; the backend may go on for a while, see Activity."""
        activity = self.activity
        if activity is None:
            return
        self.activity = None
        self.channel.data.close()
        self.channel.bus_master.detach(activity)
        # Set first, because the callback may come while drop runs.
        self.lingering = activity
        activity.drop()
        if activity.pending is None:
            self.lingering = None
        else:
            self.channel.forget_buffer()

    def quiet(self, activity: Activity) -> None:
        """The backend is done with what was dropped."""
        if self.lingering is activity:
            self.lingering = None
            if self.resetting and not self.channel.in_reset:
                self.end_reset()

    def begin_reset(self) -> None:
        """SRST is set, or DEVICE RESET came."""
        self.drop()
        self.resetting = True
        self.intrq = False
        self.channel.unlatch()
        self.status = BSY

    def end_reset(self) -> None:
        """SRST is clear again: busy until the last callback has come, then the signature."""
        if self.lingering is None:
            self.resetting = False
            self.settings_soft_reset()
            self.set_signature()
            self.channel.unlatch()

    def power_on(self) -> None:
        self.drop()
        self.lingering = None
        self.resetting = False
        self.intrq = False
        self.lba48 = False
        self.regs[:] = [0] * FILE_SIZE
        self.settings_power_on()
        self.set_signature()

    def set_signature(self) -> None:
        """What tells the kinds of devices apart after a reset or a diagnostic (9.12), and its result: a disk's."""
        regs = self.regs
        regs[COUNT] = regs[LBA_LOW] = 1
        regs[LBA_MID] = regs[LBA_HIGH] = 0
        regs[DEVICE] = ALWAYS_ON | (regs[DEVICE] & DEV)
        self.error = PASSED
        self.status = READY

    # -- addresses -----------------------------------------------------------------------------------------------------

    def set_count(self, count: int) -> None:
        regs = self.regs
        regs[COUNT] = count & 0xFF
        if self.lba48:
            regs[9] = count >> 8 & 0xFF

    def set_lba(self, lba: int) -> None:
        """``lba`` into the registers, in the form of the command's address."""
        regs = self.regs
        regs[LBA_LOW] = lba & 0xFF
        regs[LBA_MID] = lba >> 8 & 0xFF
        regs[LBA_HIGH] = lba >> 16 & 0xFF
        if self.lba48:
            regs[10] = lba >> 24 & 0xFF
            regs[11] = lba >> 32 & 0xFF
            regs[12] = lba >> 40 & 0xFF
        elif regs[DEVICE] & LBA:
            regs[DEVICE] = regs[DEVICE] & ~HEAD | lba >> 24 & HEAD
        else:
            self.set_chs(lba)

    def set_chs(self, lba: int) -> None:
        """As ``set_lba``, for a command that gave cylinder, head and sector."""

    # -- state ---------------------------------------------------------------------------------------------------------

    STATE: Fields = {
        "regs": ("list", 8, FILE_SIZE),
        "status": 8,
        "error": 8,
        "intrq": "flag",
        "lba48": "flag",
        "resetting": "flag",
        "transfer_mode": 8,
    }

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        activity = None if self.activity is None else self.activity.save()
        return {**save_fields(self, self.STATE), "activity": activity}

    def load(self, state: dict[str, Any]) -> None:
        """The channel has been loaded but for its drives."""
        from pyvmm.state import load_fields, part, shown, value_of

        load_fields(self, self.STATE, state, ("activity",))
        self.forget()
        saved = value_of(("or none", "part"), state["activity"], "activity")
        if saved is not None:
            activity = self.made(str(saved.get("kind")))
            if activity is None:
                raise StateError(f"activity.kind is {shown(saved.get('kind'))}, which this drive does not do")
            part("activity", activity, saved)
            self.activity = activity

    def forget(self) -> None:
        """What was being done before a load is nobody's any more; whoever loads has drained the backend."""
        if self.activity is not None:
            self.activity.dropped = True
        self.activity = self.lingering = None

    def made(self, kind: str) -> Activity | None:
        """A new activity of that KIND, not started; None where there is none."""
        return None

    def after_load(self) -> None:
        if self.resetting and not self.channel.in_reset:
            self.end_reset()  # what it was waiting for is not here
        elif self.activity is not None:
            self.activity.go_on()
