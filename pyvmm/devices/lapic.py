"""The local APIC of one processor: what interrupts it and when, its timer, messages to the others.

Intel SDM vol. 3, chapter 11 (in earlier editions 10), in xAPIC mode: registers in memory. Not offered, and reading as
such: x2APIC, TSC-deadline mode of the timer, suppression of EOI broadcasts.

The two LINT pins carry "asserted" and "not asserted", whatever polarity the LVT states. LINT0 comes from the PIC pair.
State is guarded by the APIC bus's lock (apic_bus.py).
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.devices.apic_bus import (
    BROADCAST,
    EXTINT,
    FIXED,
    INIT,
    LOWEST_PRIORITY,
    LOWEST_VECTOR,
    NMI,
    STARTUP,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.clock import Clock
    from pyvmm.devices.apic_bus import ApicBus

    class CpuRegisters(Protocol):
        """What of the local APIC lives in the processor, where software changes it without telling."""

        cr8: int  # the upper half of the TPR

        @property
        def apic_base(self) -> int: ...  # IA32_APIC_BASE


BASE_ENABLE = 1 << 11  # of IA32_APIC_BASE: cleared, the processor has no local APIC at all
FREQUENCY_HZ = 1_000_000_000  # of the timer, before its divider; KVM's and QEMU's count nanoseconds too
NS_PER_SECOND = 1_000_000_000
# A periodic timer interrupts no more often than this: a guest that asks for one each microsecond loses ticks instead
# of taking the host's event loop for itself.
MIN_INTERVAL_NS = 100_000

# Registers (SDM table 11-1): 32 bits each, 16 bytes apart.
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR = 0x100, 0x180, 0x200  # eight registers each
ESR, ICR_LOW, ICR_HIGH = 0x280, 0x300, 0x310
LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
INITIAL_COUNT, CURRENT_COUNT, DIVIDE = 0x380, 0x390, 0x3E0
LVT_LINT = (LVT_LINT0, LVT_LINT1)
BITMAP_BYTES = 0x80
ALL_ONES = 0xFFFF_FFFF

ID_SHIFT = 24
# An integrated APIC with six LVT entries.
VERSION_VALUE = 5 << 16 | 0x14
SVR_ENABLE = 0x100
SVR_WRITABLE = 0x3FF  # vector, enable, focus checking
SVR_RESET = 0xFF
DFR_FLAT = 0xF
DFR_FIXED = 0x0FFF_FFFF

# LVT entries and the ICR share this layout.
VECTOR = 0xFF
MODE_SHIFT = 8
MODE = 7
LOGICAL = 1 << 11
REMOTE_IRR = 1 << 14
ASSERT = 1 << 14  # the same bit in the ICR
LEVEL = 1 << 15
MASKED = 1 << 16
PERIODIC = 1 << 17
LVT_WRITABLE = {
    LVT_TIMER: PERIODIC | MASKED | VECTOR,
    LVT_THERMAL: MASKED | MODE << MODE_SHIFT | VECTOR,
    LVT_PERFORMANCE: MASKED | MODE << MODE_SHIFT | VECTOR,
    LVT_LINT0: MASKED | LEVEL | 1 << 13 | MODE << MODE_SHIFT | VECTOR,
    LVT_LINT1: MASKED | LEVEL | 1 << 13 | MODE << MODE_SHIFT | VECTOR,
    LVT_ERROR: MASKED | VECTOR,
}
ICR_WRITABLE = 0xC_CFFF
SHORTHAND_SHIFT = 18
TO_ADDRESS, TO_SELF, TO_ALL, TO_OTHERS = range(4)
DIVIDE_WRITABLE = 0b1011

# ESR (figure 11-9).
SEND_ILLEGAL_VECTOR, RECEIVE_ILLEGAL_VECTOR, ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7

# What an access may be for without being an error; the bitmaps are apart.
REGISTERS = {ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR, ESR, ICR_LOW, ICR_HIGH, *LVT_WRITABLE}
REGISTERS |= {INITIAL_COUNT, CURRENT_COUNT, DIVIDE}


class Lapic(Device):
    """Map its page, 4 KiB. ``bootstrap``: its LINT0 passes the PIC's interrupts on from reset, as KVM and QEMU have it
    for guests that never program it.

    All callbacks run with the bus's lock held: ``on_output(level)`` when the processor's interrupt request changes,
    ``on_nmi()``, ``on_init()`` and ``on_startup(vector)`` for messages to the processor itself. ``acknowledge_pic()``
    is called without it. ``cpu`` may be set to the processor's registers; without, IA32_APIC_BASE stays enabled and
    the TPR is the register in memory alone.
    """

    valid_sizes = (1, 8)
    impl_sizes = (4, 4)

    STATE = {
        "id": 8,
        "tpr": 8,
        "ldr": 32,
        "dfr": 32,
        "svr": 10,
        "isr": 256,
        "irr": 256,
        "tmr": 256,
        "esr": 8,
        "icr": 64,
        "lvt": ("each", dict.fromkeys(LVT_WRITABLE, 18)),
        "_pins": ("list", 1, 2),
        "_enabled": "flag",
        "_errors": 8,
        "_external": "flag",
        "_divide": 4,
        "_initial": 32,
        "_count": 32,
        "_start": "moment",  # a tick of the timer is a nanosecond
        "_due": ("or none", "moment"),
        "_quiet_until_ns": "moment",
        "_timer": "timer",
    }

    def __init__(
        self,
        bus: ApicBus,
        clock: Clock,
        apic_id: int = 0,
        *,
        bootstrap: bool = True,
        on_output: Callable[[int], None] | None = None,
        acknowledge_pic: Callable[[], int] | None = None,
        on_nmi: Callable[[], None] | None = None,
        on_init: Callable[[], None] | None = None,
        on_startup: Callable[[int], None] | None = None,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._timer = clock.timer(self._on_timer)
        self._hardware_id = apic_id
        self._bootstrap = bootstrap
        self._on_output = on_output
        self._acknowledge_pic = acknowledge_pic
        self._on_nmi = on_nmi
        self._on_init = on_init
        self._on_startup = on_startup
        self.cpu: CpuRegisters | None = None
        self.output = 0
        self._pins = [0, 0]  # LINT0, LINT1: their levels belong to whoever drives them, and outlive a reset
        self._enabled = True  # by IA32_APIC_BASE
        self.id = apic_id
        self._power_on()
        bus.lapics.append(self)

    def _power_on(self) -> None:
        """The state after reset and INIT (11.4.7.1, 11.4.7.3), but for the id."""
        self.tpr = 0
        self.ldr = 0
        self.dfr = ALL_ONES
        self.svr = SVR_RESET
        self.isr = self.irr = self.tmr = 0
        self.esr = 0
        self._errors = 0  # what the next write to the ESR shows
        self.icr = 0
        self.lvt = dict.fromkeys(LVT_WRITABLE, MASKED)
        if self._bootstrap:
            self.lvt[LVT_LINT0] = EXTINT << MODE_SHIFT
        self._external = False  # an ExtINT message is waiting
        self._divide = 0
        self._initial = 0
        # The count was _count at tick _start; now it is _count_at(now). Ticks are those before the divider.
        self._count = 0
        self._start = 0
        self._due: int | None = None  # the tick at which the timer interrupts next, None for never
        self._quiet_until_ns = 0
        self._timer.disarm()

    # -- to and from the processor -------------------------------------------------------------------------------

    @property
    def takes_interrupts(self) -> bool:
        return self._enabled and bool(self.svr & SVR_ENABLE)

    @property
    def processor_priority(self) -> int:
        """The PPR (11.8.3.1): a vector of this class or below waits."""
        in_service = highest(self.isr) & 0xF0 if self.isr else 0
        return self.tpr if self.tpr & 0xF0 >= in_service else in_service

    def _pending(self) -> int:
        """The vector the processor may take now, or -1."""
        if not self.irr:
            return -1
        vector = highest(self.irr)
        return vector if vector & 0xF0 > self.processor_priority & 0xF0 else -1

    def _wants_pic(self) -> bool:
        """The PIC's interrupt is to be taken: no priority holds it back."""
        if not self._enabled:
            return bool(self._pins[0])  # the pin is the processor's INTR then
        if self._external:
            return True
        return any(
            level and self.lvt[entry] & (MASKED | MODE << MODE_SHIFT) == EXTINT << MODE_SHIFT
            for entry, level in zip(LVT_LINT, self._pins, strict=True)
        )

    def _update(self) -> None:
        output = int(self._wants_pic() or (self._enabled and self._pending() >= 0))
        if output != self.output:
            self.output = output
            if self._on_output is not None:
                self._on_output(output)

    def acknowledge(self) -> int:
        """The processor takes the interrupt: its vector, or -1 where none is left to take."""
        with self._bus.lock:
            self._look_at_cpu()
            if not self._wants_pic():
                vector = self._pending() if self._enabled else -1
                if vector >= 0:
                    self.irr &= ~(1 << vector)
                    self.isr |= 1 << vector
                self._update()
                return vector
            self._external = False
            self._update()
        # Without the bus's lock: the PIC, with its own held, moves LINT0.
        return self._acknowledge_pic() if self._acknowledge_pic is not None else -1

    def look_at_cpu(self) -> None:
        """The processor's own registers may have changed: CR8 was written, or IA32_APIC_BASE."""
        with self._bus.lock:
            self._look_at_cpu()

    def _look_at_cpu(self) -> None:
        if self.cpu is None:
            return
        enabled = bool(self.cpu.apic_base & BASE_ENABLE)
        if enabled != self._enabled:
            # Enabled again, it starts as after a reset (11.4.3).
            self._enabled = enabled
            self._power_on()
            self._update()
        cr8 = self.cpu.cr8 & 0xF
        if cr8 != self.tpr >> 4:
            self.tpr = cr8 << 4
            self._update()

    def _set_tpr(self, value: int) -> None:
        self.tpr = value
        if self.cpu is not None:
            self.cpu.cr8 = value >> 4

    # -- messages ------------------------------------------------------------------------------------------------

    def is_addressed(self, destination: int, logical: bool) -> bool:
        """Whether a message to that address is for this one (11.6.2)."""
        if destination == BROADCAST:
            return True
        if not logical:
            return destination == self.id
        mine = self.ldr >> ID_SHIFT
        if self.dfr >> 28 == DFR_FLAT:
            return bool(destination & mine)
        # Four bits name the cluster, four its members.
        return destination >> 4 in (mine >> 4, 0xF) and bool(destination & mine & 0xF)

    def accept(self, mode: int, vector: int, level: bool) -> bool:
        """A message has come, with the bus's lock held. Whether it was taken."""
        if not self._enabled:
            return False
        if mode in (FIXED, LOWEST_PRIORITY):
            if not self.svr & SVR_ENABLE:
                return False
            if vector < LOWEST_VECTOR:
                self._error(RECEIVE_ILLEGAL_VECTOR)
                return True
            bit = 1 << vector
            self.irr |= bit
            self.tmr = self.tmr | bit if level else self.tmr & ~bit
        elif mode == EXTINT:
            self._external = True
        elif mode == NMI:
            if self._on_nmi is not None:
                self._on_nmi()
        elif mode == INIT:
            self._power_on()
            if self._on_init is not None:
                self._on_init()
        elif mode == STARTUP and self._on_startup is not None:
            self._on_startup(vector)
        # SMI: there is no system management mode to enter.
        self._update()
        return True

    def _error(self, bit: int) -> None:
        new = bit & ~self._errors
        self._errors |= bit
        entry = self.lvt[LVT_ERROR]
        # An error entry that is itself illegal reports nothing: it would report itself for ever.
        if new and not entry & MASKED and entry & VECTOR >= LOWEST_VECTOR:
            self.accept(FIXED, entry & VECTOR, False)

    def _send(self) -> None:
        """The ICR's low half was written: an interprocessor interrupt (11.6.1)."""
        low = self.icr & ALL_ONES
        mode, vector, shorthand = low >> MODE_SHIFT & MODE, low & VECTOR, low >> SHORTHAND_SHIFT
        if mode in (FIXED, LOWEST_PRIORITY) and vector < LOWEST_VECTOR:
            self._error(SEND_ILLEGAL_VECTOR)
            return
        if mode == INIT and low & LEVEL and not low & ASSERT:
            return  # "INIT level de-assert" means nothing to processors since the Pentium 4
        if shorthand in (TO_SELF, TO_ALL) and mode != FIXED:
            return  # table 11-3: not valid
        bus = self._bus
        if shorthand == TO_ADDRESS:
            bus.deliver(self.icr >> 56, bool(low & LOGICAL), mode, vector, False)
        elif shorthand == TO_SELF:
            bus.hand_over([self], mode, vector, False)
        else:
            bus.hand_over([a for a in bus.lapics if shorthand == TO_ALL or a is not self], mode, vector, False)

    def _end_of_interrupt(self) -> None:
        if not self.isr:
            return
        vector = highest(self.isr)
        bit = 1 << vector
        self.isr &= ~bit
        if self.tmr & bit:
            self._bus.end_of_interrupt(vector)
            for n, entry in enumerate(LVT_LINT):
                if self.lvt[entry] & REMOTE_IRR and self.lvt[entry] & VECTOR == vector:
                    self.lvt[entry] &= ~REMOTE_IRR
                    self._service_pin(n)
        self._update()

    # -- local interrupts ----------------------------------------------------------------------------------------

    def set_lint(self, n: int, level: int) -> None:
        """Pin LINT0 or LINT1 moves to ``level``. From any thread."""
        with self._bus.lock:
            rising = level and not self._pins[n]
            self._pins[n] = level
            entry = self.lvt[LVT_LINT[n]]
            mode = entry >> MODE_SHIFT & MODE
            if rising and not entry & MASKED and self._enabled and mode != EXTINT and not is_level(entry):
                self.accept(mode, entry & VECTOR, False)
            self._service_pin(n)
            self._update()

    def _service_pin(self, n: int) -> None:
        """A level-triggered pin that is asserted interrupts, once until its end of interrupt."""
        entry = self.lvt[LVT_LINT[n]]
        idle = is_level(entry) and not entry & (MASKED | REMOTE_IRR)
        if idle and self._pins[n] and self.accept(FIXED, entry & VECTOR, True):
            self.lvt[LVT_LINT[n]] |= REMOTE_IRR

    def _write_lvt(self, entry: int, value: int) -> None:
        writable = LVT_WRITABLE[entry]
        if not self.svr & SVR_ENABLE:
            value |= MASKED  # 11.4.7.2
        now = self._now()
        if entry == LVT_TIMER:
            self._rebase(now)
        self.lvt[entry] = self.lvt[entry] & REMOTE_IRR | value & writable
        if entry in LVT_LINT:
            if not is_level(value):
                self.lvt[entry] &= ~REMOTE_IRR
            self._service_pin(LVT_LINT.index(entry))
        elif entry == LVT_TIMER:
            self._arm(now)

    def _write_svr(self, value: int) -> None:
        before, now = self.svr, self._now()
        self._rebase(now)
        self.svr = value & SVR_WRITABLE
        if not self.svr & SVR_ENABLE:
            for entry in self.lvt:
                self.lvt[entry] |= MASKED
            self._arm(now)
        elif not before & SVR_ENABLE:
            self._bus.retry()

    # -- the timer (11.5.4) --------------------------------------------------------------------------------------

    def _now(self) -> int:
        return self._clock.now_ns() * FREQUENCY_HZ // NS_PER_SECOND

    @property
    def _shift(self) -> int:
        """The divider is 1 << this: 111 means 1, the rest count up from 2."""
        return ((self._divide & 3 | self._divide >> 1 & 4) + 1) & 7

    def _count_at(self, now: int) -> int:
        left = self._count - (now - self._start >> self._shift)
        if left > 0:
            return left
        if not self.lvt[LVT_TIMER] & PERIODIC or not self._initial:
            return 0
        return self._initial - -left % self._initial

    # Each access looks at the clock once: time goes on while these functions run, and a count may be shorter than that.

    def _expire(self, now: int) -> None:
        """Interrupt where the time has come: a write of the guest's may be earlier than the timer's own callback."""
        if self._due is not None and self._due <= now:
            self._due = None
            self.accept(FIXED, self.lvt[LVT_TIMER] & VECTOR, False)

    def _rebase(self, now: int) -> None:
        """Make now the start: the mode or the divider is about to change, and what has been counted stays counted."""
        self._expire(now)
        self._count = self._count_at(now)
        # The part of a count that is under way already is kept.
        self._start = now - (now - self._start & (1 << self._shift) - 1)

    def _arm(self, now: int) -> None:
        entry = self.lvt[LVT_TIMER]
        count = self._count_at(now)
        if entry & MASKED or not count:
            self._due = None
            self._timer.disarm()
            return
        elapsed = now - self._start >> self._shift
        self._due = self._start + (elapsed + count << self._shift)
        due_ns = -(-self._due * NS_PER_SECOND // FREQUENCY_HZ)
        if entry & PERIODIC:
            due_ns = max(due_ns, self._quiet_until_ns)
        self._timer.arm(due_ns)

    def _on_timer(self) -> None:
        with self._bus.lock:
            now = self._now()
            self._expire(now)
            if self.lvt[LVT_TIMER] & PERIODIC:
                self._quiet_until_ns = self._clock.now_ns() + MIN_INTERVAL_NS
                self._arm(now)

    # -- registers -----------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._bus.lock:
            self._look_at_cpu()
            if not self._enabled:
                return ALL_ONES
            return self._read(offset) if not offset & 0xF else 0

    def _read(self, offset: int) -> int:
        for base, bitmap in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            if base <= offset < base + BITMAP_BYTES:
                return bitmap >> 2 * (offset - base) & ALL_ONES
        if offset in self.lvt:
            return self.lvt[offset]
        if offset == TPR:
            return self.tpr
        if offset == ID:
            return self.id << ID_SHIFT
        if offset == VERSION:
            return VERSION_VALUE
        if offset == PPR:
            return self.processor_priority
        if offset == LDR:
            return self.ldr
        if offset == DFR:
            return self.dfr
        if offset == SVR:
            return self.svr
        if offset == ESR:
            return self.esr
        if offset == ICR_LOW:
            return self.icr & ALL_ONES  # bit 12: a message takes no time here
        if offset == ICR_HIGH:
            return self.icr >> 32
        if offset == INITIAL_COUNT:
            return self._initial
        if offset == CURRENT_COUNT:
            return self._count_at(self._now())
        if offset == DIVIDE:
            return self._divide
        if offset not in REGISTERS:
            self._error(ILLEGAL_REGISTER)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        with self._bus.lock:
            self._look_at_cpu()
            if self._enabled and not offset & 0xF:
                self._write(offset, value)
                self._update()
        if self._bus.ended:
            self._bus.tell_ended()

    def _write(self, offset: int, value: int) -> None:
        if offset == EOI:
            self._end_of_interrupt()
        elif offset == TPR:
            self._set_tpr(value & 0xFF)
        elif offset == ICR_LOW:
            self.icr = self.icr & ~ALL_ONES | value & ICR_WRITABLE
            self._send()
        elif offset == ICR_HIGH:
            self.icr = self.icr & ALL_ONES | (value & 0xFF << ID_SHIFT) << 32
        elif offset == INITIAL_COUNT:
            now = self._now()
            self._expire(now)
            self._initial = self._count = value
            self._start = now
            self._arm(now)
        elif offset in LVT_WRITABLE:
            self._write_lvt(offset, value)
        elif offset == DIVIDE:
            now = self._now()
            self._rebase(now)
            self._divide = value & DIVIDE_WRITABLE
            self._arm(now)
        elif offset == SVR:
            self._write_svr(value)
        elif offset == LDR:
            self.ldr = value & 0xFF << ID_SHIFT
        elif offset == DFR:
            self.dfr = value & ~DFR_FIXED & ALL_ONES | DFR_FIXED
        elif offset == ID:
            self.id = value >> ID_SHIFT
        elif offset == ESR:
            # A write shows what has gone wrong since the one before (11.5.3).
            self.esr = self._errors
            self._errors = 0
        elif offset not in REGISTERS and not ISR <= offset < IRR + BITMAP_BYTES:
            self._error(ILLEGAL_REGISTER)

    # -- the contract --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._bus.lock:
            self.id = self._hardware_id
            self._enabled = True
            self._power_on()
            self._set_tpr(0)
            self._update()

    def save(self) -> dict[str, Any]:
        with self._bus.lock:
            return super().save()

    def load(self, state: dict[str, Any]) -> None:
        with self._bus.lock:
            super().load(state)

    def after_load(self) -> None:
        with self._bus.lock:
            self._timer.go_on()
            # Said whatever the level was before: the processor's side begins anew with a load.
            self.output = int(self._wants_pic() or (self._enabled and self._pending() >= 0))
            if self._on_output is not None:
                self._on_output(self.output)


def highest(bitmap: int) -> int:
    """The highest vector in a bitmap that is not empty."""
    return bitmap.bit_length() - 1


def is_level(entry: int) -> bool:
    """Whether an LVT LINT entry is level triggered; only fixed interrupts can be (11.5.1, "Trigger Mode")."""
    return bool(entry & LEVEL) and entry >> MODE_SHIFT & MODE == FIXED
