"""ACPI fixed hardware: power management events, sleep control and wake-up, the PM timer and the power button.

ACPI Specification 6.5, sections 4.8.2 (PM timer, power button, RTC alarm) and 4.8.3 (PM1a_EVT, PM1a_CNT, PM_TMR), 16.1
(sleeping states). The FADT names the block's ports. Where it states no SMI command port, the machine is in ACPI mode
from the start and SCI_EN reads as 1 always; where it does, the guest asks for it there (4.8.3.2.1, 16.3.1) and
set_acpi_mode is told.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock
    from pyvmm.irq import IrqLine

PM_TIMER_HZ = 3_579_545
NS_PER_SECOND = 1_000_000_000

# Offsets in the block, which is BLOCK_BYTES long.
PM1_STS = 0
PM1_EN = 2
PM1_CNT = 4
PM_TMR = 8
BLOCK_BYTES = 12

# PM1 status and enable have the same bit for the same event.
TMR = 0x0001
GBL = 0x0020
PWRBTN = 0x0100
SLPBTN = 0x0200
RTC = 0x0400
EVENTS = TMR | GBL | PWRBTN | SLPBTN | RTC
WAK = 0x8000  # status only: the machine was woken
WAKE_EVENTS = PWRBTN | SLPBTN | RTC  # that end a sleep, where they are enabled

# PM1 control.
SCI_EN = 0x0001
BM_RLD = 0x0002
SLP_TYP_SHIFT = 10
SLP_TYP = 0x1C00
SLP_EN = 0x2000  # write only
CNT_KEPT = BM_RLD | SLP_TYP


class AcpiPm(Device):
    """The PM block: map 12 bytes of ports.

    ``sci`` is the level-triggered SCI. ``on_shutdown()`` is called when the guest enters S5, on its vCPU
    thread with ``lock`` held, ``on_suspend()`` when it enters S3, and ``on_wake(events)``, on any thread, when an
    enabled event is to end that. ``s5_type`` and ``s3_type`` are the SLP_TYPs that the DSDT's \\_S5 and \\_S3 name;
    without the latter the guest can't suspend. ``timer_bits`` is 24 or 32: the FADT's TMR_VAL_EXT says which.
    ``acpi_mode``: SCI_EN at power-on; without it no event makes an SCI.
    """

    def __init__(
        self,
        clock: Clock,
        sci: IrqLine,
        on_shutdown: Callable[[], None],
        *,
        s5_type: int,
        s3_type: int | None = None,
        on_suspend: Callable[[], None] = lambda: None,
        on_wake: Callable[[int], None] = lambda events: None,
        timer_bits: int = 32,
        acpi_mode: bool = True,
        powered_on_ns: int | None = None,
    ) -> None:
        """``powered_on_ns``: guest time at power-on, where that is not now."""
        self._clock = clock
        self._sci = sci
        self._on_shutdown = on_shutdown
        self._s5_type = s5_type
        self._s3_type = s3_type
        self._on_suspend = on_suspend
        self._on_wake = on_wake
        self._timer_mask = (1 << timer_bits) - 1
        self._half = 1 << (timer_bits - 1)
        self._timer = clock.timer(self._on_timer)
        self._ticks_offset = 0
        self._starts_in_acpi_mode = acpi_mode
        self._power_on()
        if powered_on_ns is not None:
            self._toggle = self._toggle_after(powered_on_ns * PM_TIMER_HZ // NS_PER_SECOND)

    def _power_on(self) -> None:
        self._status = 0
        self._enable = 0
        self._control = 0
        self._asleep = False
        self._sci_en = SCI_EN if self._starts_in_acpi_mode else 0
        self._toggle = self._toggle_after(self._ticks())
        self._general = False

    def _ticks(self) -> int:
        """The PM timer, not yet cut to its width."""
        return self._clock.now_ns() * PM_TIMER_HZ // NS_PER_SECOND + self._ticks_offset

    def _toggle_after(self, ticks: int) -> int:
        """The tick after ``ticks`` at which the timer's highest bit changes."""
        return (ticks // self._half + 1) * self._half

    # Registers

    def read(self, offset: int, size: int) -> int:
        if offset == PM_TMR:
            # First, because kernels poll it, and nothing else depends on its being read.
            return self._ticks() & self._timer_mask & ((1 << 8 * size) - 1)
        self._update()
        block = self._status | self._enable << 8 * PM1_EN | (self._control | self._sci_en) << 8 * PM1_CNT
        block |= (self._ticks() & self._timer_mask) << 8 * PM_TMR
        return block >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        # The block as one number: any size at any offset touches the registers it covers, and only their bytes.
        mask = ((1 << 8 * size) - 1) << 8 * offset
        value = value << 8 * offset & mask
        self._update()
        self._status &= ~value  # write 1 to clear
        enable_mask = mask >> 8 * PM1_EN & EVENTS
        self._enable = self._enable & ~enable_mask | value >> 8 * PM1_EN & enable_mask
        self._update()
        control_mask = mask >> 8 * PM1_CNT & 0xFFFF
        if control_mask:
            self._write_control(value >> 8 * PM1_CNT & 0xFFFF, control_mask)

    def _write_control(self, value: int, mask: int) -> None:
        kept = mask & CNT_KEPT
        self._control = self._control & ~kept | value & kept
        # A guest that asks for a state that the DSDT does not offer stays awake.
        if value & SLP_EN:
            state = (self._control & SLP_TYP) >> SLP_TYP_SHIFT
            if state == self._s5_type:
                self._on_shutdown()
            elif state == self._s3_type:
                self._asleep = True
                self._on_suspend()
                self._end_sleep()  # an event that came first wakes at once

    def _end_sleep(self) -> None:
        events = self._status & self._enable & WAKE_EVENTS
        if self._asleep and events:
            self._asleep = False
            self._on_wake(events)

    def _update(self) -> None:
        """See what the clock has done since; drive SCI; have the timer call when it must be driven again."""
        if self._ticks() >= self._toggle:
            self._status |= TMR
            self._toggle = self._toggle_after(self._ticks())
        self._drive_sci()
        if self._enable & ~self._status & TMR:
            ticks = self._toggle - self._ticks_offset
            self._timer.arm(-(-ticks * NS_PER_SECOND // PM_TIMER_HZ))
        else:
            self._timer.disarm()
        self._end_sleep()

    def _drive_sci(self) -> None:
        self._sci.set(int(self._sci_en and (self._general or self._status & self._enable != 0)))

    def _on_timer(self) -> None:
        with self.lock:
            self._update()

    # The host's side

    def set_acpi_mode(self, on: bool) -> None:
        """SCI_EN, which the guest can't write: the chipset's SMI command port was asked for ACPI mode, or its end."""
        with self.lock:
            self._sci_en = SCI_EN if on else 0
            self._update()

    def general_event(self, pending: bool) -> None:
        """Whether one of the general-purpose events (acpi_gpe.py) wants an SCI. From any thread."""
        with self.lock:
            self._general = pending
            self._drive_sci()

    def press(self) -> None:
        """The power button, pressed and let go. From any thread. The guest decides what to do about it."""
        with self.lock:
            self._status |= PWRBTN
            self._update()

    def rtc_alarm(self) -> None:
        """The RTC's alarm asserts its interrupt (4.8.2.4). From any thread."""
        with self.lock:
            self._status |= RTC
            self._update()

    def woken(self, events: int) -> None:
        """After the reset that a wake-up brings: tell the guest that it was woken, and by what."""
        with self.lock:
            self._status |= WAK | events
            self._update()

    def reset(self) -> None:
        with self.lock:
            self._power_on()
            self._update()

    STATE = {
        "_status": 16,
        "_enable": 16,
        "_control": 16,
        "_sci_en": 1,
        "_asleep": "flag",
        "_now_ticks": range(-(1 << 62), 1 << 62),
        "_toggle": range(-(1 << 62), 1 << 62),
        "_timer": "timer",
    }

    @property
    def _now_ticks(self) -> int:
        """The PM timer as a field of the state: loaded, it goes on from there, whatever time the clock shows."""
        return self._ticks()

    @_now_ticks.setter
    def _now_ticks(self, ticks: int) -> None:
        self._ticks_offset += ticks - self._ticks()

    def after_load(self) -> None:
        with self.lock:
            self._drive_sci()
            self._timer.go_on()
