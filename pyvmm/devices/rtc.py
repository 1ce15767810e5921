"""Rtc: the MC146818 real-time clock with 128 bytes of CMOS RAM, ports 0x70 (index) and 0x71 (data) on a PC.

Motorola MC146818A data sheet ("Register A" to "Register D", "Update cycle"); where a PC differs (century
byte, memory sizes), the layout SeaBIOS reads and QEMU writes.

Nothing ticks while nobody waits for a tick: the time and the flags of register C are worked out when they are
looked at, and a timer is armed only for an interrupt that is enabled and not pending yet.
"""

from __future__ import annotations

from time import gmtime

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock
    from pyvmm.irq import IrqLine

# CMOS indices
SECONDS = 0x00
SECONDS_ALARM = 0x01
MINUTES = 0x02
MINUTES_ALARM = 0x03
HOURS = 0x04
HOURS_ALARM = 0x05
DAY_OF_WEEK = 0x06  # 1: Sunday
DAY_OF_MONTH = 0x07
MONTH = 0x08
YEAR = 0x09
REG_A = 0x0A
REG_B = 0x0B
REG_C = 0x0C
REG_D = 0x0D
SHUTDOWN = 0x0F  # why the CPU was reset: kept by the battery over that reset
SHUTDOWN_S3 = 0xFE  # to firmware: the reset ends suspend to RAM (QEMU hw/rtc/mc146818rtc.c, rtc_notify_suspend)
EQUIPMENT = 0x14
BASE_MEMORY_KIB = 0x15  # 2 bytes
EXTENDED_KIB = 0x17  # 2 bytes: from 1 MiB, up to 64 MiB
EXTENDED_KIB_COPY = 0x30
CENTURY = 0x32
ABOVE_16M_64KIB = 0x34  # 2 bytes: from 16 MiB to 4 GiB, in units of 64 KiB
CENTURY_PS2 = 0x37  # the same byte where IBM's PS/2 has it
ABOVE_4G_64KIB = 0x5B  # 3 bytes
LAST_CPU = 0x5F  # number of CPUs less one
CMOS_BYTES = 128

TIME_REGISTERS = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY)

A_UIP = 0x80  # update in progress
A_DIVIDER = 0x70
A_DIVIDER_32KHZ = 0x20  # up to this one the clock runs
A_DIVIDER_RESET = 0x60  # both upper bits: the divider chain is held
A_RATE = 0x0F
B_SET = 0x80  # the update of the time registers is held
B_PIE = 0x40
B_AIE = 0x20
B_UIE = 0x10
B_SQWE = 0x08
B_BINARY = 0x04
B_24H = 0x02
C_IRQF = 0x80
C_PF = 0x40
C_AF = 0x20
C_UF = 0x10
C_FLAGS = C_PF | C_AF | C_UF  # at the places of their enable bits in B
D_VALID = 0x80
HOUR_PM = 0x80  # in 12-hour mode
ALARM_ANY = 0xC0  # an alarm byte with both bits set matches every value

EQUIPMENT_FPU = 0x02
EQUIPMENT_MOUSE = 0x04

NS_PER_S = 1_000_000_000
S_PER_DAY = 86_400
CRYSTAL_HZ = 32_768
UIP_NS = 8 * NS_PER_S // CRYSTAL_HZ  # UIP is up 244 us before the registers change
FIRST_UPDATE_NS = NS_PER_S // 2  # after the divider's reset is removed

# What a guest can make of eight bytes of BCD or binary, and a long uptime: 34,800 years to both sides of 1970.
DATES_S = range(-(1 << 40), 1 << 40)

MIB = 1 << 20


class Rtc(Device):
    """Shows UTC from the host's wall clock at power-on, then follows guest time.

    The divider chain is guest time since ``_chain_start_ns``: seconds, periodic edges and UIP are phases of
    it. ``_base_s`` is the date at the chain's start, in seconds since 1970.
    """

    impl_sizes = (1, 1)

    __slots__ = (
        "_base_s",
        "_chain_start_ns",
        "_clock",
        "_index",
        "_irq",
        "_looked_ns",
        "_on_alarm",
        "_timer",
        "cmos",
        "nmi_masked",
    )

    def __init__(
        self,
        irq: IrqLine,
        clock: Clock,
        *,
        ram_below_4g_bytes: int = 0,
        ram_above_4g_bytes: int = 0,
        cpus: int = 1,
        on_alarm: Callable[[], None] | None = None,
        powered_on_ns: tuple[int, int] | None = None,
    ) -> None:
        """``on_alarm()`` is called when the alarm asserts the interrupt, with ``lock`` held. ``cmos`` may be set
        directly for what firmware looks up besides: boot order, disk types. ``powered_on_ns``: the guest's time and the
        host's at power-on, where that is not now.
        """
        self._irq = irq
        self._clock = clock
        self._on_alarm = on_alarm
        self._timer = clock.timer(self._on_timer)
        self._index = 0
        self.nmi_masked = False
        """Bit 7 of the last write to the index port: the board's NMI mask."""
        self.cmos = bytearray(CMOS_BYTES)
        self.cmos[REG_A] = A_DIVIDER_32KHZ | 0x06  # 1024 Hz
        self.cmos[REG_B] = B_24H
        self.cmos[EQUIPMENT] = EQUIPMENT_FPU | EQUIPMENT_MOUSE
        # SeaBIOS takes the larger of this and fw_cfg's sixteen bits.
        self.cmos[LAST_CPU] = min(cpus - 1, 0xFF)
        self._put_memory_sizes(ram_below_4g_bytes, ram_above_4g_bytes)
        now_ns, wall_ns = powered_on_ns or (clock.now_ns(), clock.wall_ns())
        self._chain_start_ns = now_ns - wall_ns % NS_PER_S
        self._base_s = wall_ns // NS_PER_S
        # How far the chain's edges have gone into the flags of register C.
        self._looked_ns = now_ns - self._chain_start_ns
        self._refresh_time()

    def _put_memory_sizes(self, below_4g_bytes: int, above_4g_bytes: int) -> None:
        extended_kib = min(max(0, below_4g_bytes - MIB) >> 10, 0xFFFF)
        for index, size, value in (
            (BASE_MEMORY_KIB, 2, min(below_4g_bytes >> 10, 640)),
            (EXTENDED_KIB, 2, extended_kib),
            (EXTENDED_KIB_COPY, 2, extended_kib),
            (ABOVE_16M_64KIB, 2, min(max(0, below_4g_bytes - 16 * MIB) >> 16, 0xFFFF)),
            (ABOVE_4G_64KIB, 3, min(above_4g_bytes >> 16, 0xFFFFFF)),
        ):
            self.cmos[index : index + size] = value.to_bytes(size, "little")

    # -- the guest's side -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # the index can't be read back
        index = self._index
        if index in TIME_REGISTERS:
            self._refresh_time()
        elif index == REG_A:
            return self.cmos[REG_A] | (A_UIP if self._update_in_progress() else 0)
        elif index == REG_C:
            return self._read_c()
        elif index == REG_D:
            return D_VALID
        return self.cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.nmi_masked = bool(value & 0x80)
            index = value & 0x7F
            self._index = CENTURY if index == CENTURY_PS2 else index
            return
        index = self._index
        if index in TIME_REGISTERS:
            self._refresh_time()
            self._look()
            self.cmos[index] = value
            if self._running():
                self._take_time()
            self._plan()
        elif index == REG_A:
            self._write_a(value & ~A_UIP)
        elif index == REG_B:
            self._write_b(value)
        elif index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
            self._look()
            self.cmos[index] = value
            self._plan()
        elif index not in (REG_C, REG_D):  # both are read-only
            self.cmos[index] = value

    def _read_c(self) -> int:
        """Reading gives the flags and clears them, and lowers the interrupt."""
        self._look()
        flags = self.cmos[REG_C]
        self.cmos[REG_C] = 0
        self._irq.set(0)
        self._plan()
        return flags

    def _write_a(self, value: int) -> None:
        self._refresh_time()
        self._look()
        was_held = self._chain_held()
        was_running = self._running()
        self.cmos[REG_A] = value
        if was_held and not self._chain_held():
            self._chain_start_ns = self._clock.now_ns() - FIRST_UPDATE_NS
            self._looked_ns = FIRST_UPDATE_NS
        if self._running() and not was_running:
            self._take_time()
        self._plan()

    def _write_b(self, value: int) -> None:
        self._refresh_time()
        self._look()
        was_running = self._running()
        self.cmos[REG_B] = value & ~B_UIE if value & B_SET else value  # data sheet: SET clears UIE
        if self._running() and not was_running:
            self._take_time()
        self._show_irq()
        self._plan()

    # -- time -----------------------------------------------------------------------------------------------

    def _chain_held(self) -> bool:
        return self.cmos[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET

    def _running(self) -> bool:
        """Whether the time registers advance."""
        return self.cmos[REG_A] & A_DIVIDER <= A_DIVIDER_32KHZ and not self.cmos[REG_B] & B_SET

    def _chain_ns(self) -> int:
        return self._clock.now_ns() - self._chain_start_ns

    def _update_in_progress(self) -> bool:
        return self._running() and self._chain_ns() % NS_PER_S >= NS_PER_S - UIP_NS

    def _refresh_time(self) -> None:
        """Bring the time registers up to date, if they advance at all."""
        if self._running():
            cmos = self.cmos
            date = gmtime(self._base_s + self._chain_ns() // NS_PER_S)
            cmos[SECONDS] = self._encode(date.tm_sec)
            cmos[MINUTES] = self._encode(date.tm_min)
            cmos[HOURS] = self._encode_hour(date.tm_hour)
            cmos[DAY_OF_WEEK] = self._encode((date.tm_wday + 1) % 7 + 1)
            cmos[DAY_OF_MONTH] = self._encode(date.tm_mday)
            cmos[MONTH] = self._encode(date.tm_mon)
            cmos[YEAR] = self._encode(date.tm_year % 100)
            cmos[CENTURY] = self._encode(date.tm_year // 100)

    def _take_time(self) -> None:
        """The guest set the time registers: count on from there. The phase within the second stays."""
        cmos = self.cmos
        year = self._decode(cmos[CENTURY]) * 100 + self._decode(cmos[YEAR])
        hour = self._decode(cmos[HOURS] & ~HOUR_PM)
        if not cmos[REG_B] & B_24H:
            hour = hour % 12 + (12 if cmos[HOURS] & HOUR_PM else 0)
        days = days_since_1970(year, self._decode(cmos[MONTH]), self._decode(cmos[DAY_OF_MONTH]))
        seconds = hour * 3600 + self._decode(cmos[MINUTES]) * 60 + self._decode(cmos[SECONDS])
        self._base_s = days * S_PER_DAY + seconds - self._chain_ns() // NS_PER_S

    def _encode(self, value: int) -> int:
        return (value if self.cmos[REG_B] & B_BINARY else value // 10 << 4 | value % 10) & 0xFF

    def _decode(self, value: int) -> int:
        return value if self.cmos[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self.cmos[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (HOUR_PM if hour >= 12 else 0)

    # -- flags and interrupts -------------------------------------------------------------------------------

    def _look(self) -> None:
        """Set in register C the flags of those edges of the chain that have passed since the last look."""
        if self._chain_held():
            return
        before_ns, now_ns = self._looked_ns, self._chain_ns()
        self._looked_ns = now_ns
        flags = 0
        second = now_ns // NS_PER_S
        if second > before_ns // NS_PER_S:
            flags |= C_UF
            if self._running():
                alarm_s = self._next_alarm(self._base_s + before_ns // NS_PER_S)
                if alarm_s is not None and alarm_s <= self._base_s + second:
                    flags |= C_AF
        period = self._period_ticks()
        if period and ticks(now_ns) // period > ticks(before_ns) // period:
            flags |= C_PF
        alarm = flags & ~self.cmos[REG_C] & self.cmos[REG_B] & C_AF
        self.cmos[REG_C] |= flags
        self._show_irq()
        if alarm and self._on_alarm is not None:
            self._on_alarm()

    def _show_irq(self) -> None:
        pending = self.cmos[REG_C] & self.cmos[REG_B] & C_FLAGS
        self.cmos[REG_C] = self.cmos[REG_C] & C_FLAGS | (C_IRQF if pending else 0)
        self._irq.set(1 if pending else 0)

    def _period_ticks(self) -> int:
        """The periodic interrupt's period in ticks of the crystal, 0 for none (data sheet, table 5)."""
        rate = self.cmos[REG_A] & A_RATE
        if not rate:
            return 0
        return 1 << (rate + 6 if rate <= 2 else rate - 1)

    def _next_alarm(self, after_s: int) -> int | None:
        """The first second after ``after_s`` (since 1970) at which the alarm matches; None: it never does."""
        hours = self._matching(HOURS_ALARM, 24, self._encode_hour)
        minutes = self._matching(MINUTES_ALARM, 60, self._encode)
        seconds = self._matching(SECONDS_ALARM, 60, self._encode)
        if not (hours and minutes and seconds):
            return None
        midnight_s = (after_s + 1) // S_PER_DAY * S_PER_DAY
        for day_s in (midnight_s, midnight_s + S_PER_DAY):
            for hour in hours:
                hour_s = day_s + hour * 3600
                if hour_s + 3599 <= after_s:
                    continue
                for minute in minutes:
                    minute_s = hour_s + minute * 60
                    if minute_s + 59 <= after_s:
                        continue
                    for second in seconds:
                        if minute_s + second > after_s:
                            return minute_s + second
        return None

    def _matching(self, index: int, count: int, encode: Callable[[int], int]) -> list[int]:
        """Which of the values 0 to ``count`` - 1 the alarm byte at ``index`` matches."""
        alarm = self.cmos[index]
        if alarm & ALARM_ANY == ALARM_ANY:
            return list(range(count))
        return [value for value in range(count) if encode(value) == alarm]

    def _plan(self) -> None:
        """Arm the timer for the next interrupt there can be. One that is up waits for a read of C."""
        wanted = self.cmos[REG_B] & C_FLAGS
        if self.cmos[REG_C] & C_IRQF:
            # But an alarm may have to wake the machine.
            wanted = 0 if self._on_alarm is None else wanted & C_AF & ~self.cmos[REG_C]
        if not wanted or self._chain_held():
            self._timer.disarm()
            return
        chain_ns = self._looked_ns
        edges_ns = []
        if wanted & C_UF:
            edges_ns.append((chain_ns // NS_PER_S + 1) * NS_PER_S)
        if wanted & C_AF and self._running():
            alarm_s = self._next_alarm(self._base_s + chain_ns // NS_PER_S)
            if alarm_s is not None:
                edges_ns.append((alarm_s - self._base_s) * NS_PER_S)
        period = self._period_ticks()
        if wanted & C_PF and period:
            edge = (ticks(chain_ns) // period + 1) * period
            edges_ns.append(-(-edge * NS_PER_S // CRYSTAL_HZ))
        if edges_ns:
            self._timer.arm(self._chain_start_ns + min(edges_ns))
        else:
            self._timer.disarm()

    def _on_timer(self) -> None:
        with self.lock:
            if not self._timer.armed:  # else the guest was faster, and this is no longer the edge waited for
                self._look()
                self._plan()

    # -- the machine's side ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """The RESET pin (data sheet, "Pin descriptions"): time, alarm and CMOS RAM go on as they are."""
        with self.lock:
            self._look()
            self.cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            self.cmos[REG_C] = 0
            self._show_irq()
            self._plan()

    STATE = {
        "_index": 7,
        "nmi_masked": "flag",
        "cmos": ("bytes", CMOS_BYTES),
        "_base_s": DATES_S,
        "_chain_start_ns": "moment",
        "_looked_ns": range(-(1 << 62), 1 << 62),
        "_timer": "timer",
    }

    def after_load(self) -> None:
        """The clock goes on from the time it showed when it was saved."""
        with self.lock:
            self._irq.set(1 if self.cmos[REG_C] & C_IRQF else 0)
            self._timer.go_on()


def ticks(chain_ns: int) -> int:
    """Whole periods of the crystal in that time."""
    return chain_ns * CRYSTAL_HZ // NS_PER_S


def days_since_1970(year: int, month: int, day: int) -> int:
    """Proleptic Gregorian calendar, any integers, for a guest may have set anything.

    Month 13 is January of the next year, day 0 the day before the first.
    """
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days += (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)[month - 1] + (leap and month > 2)
    return days + day - 1 - 719_162
