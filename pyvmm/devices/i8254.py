"""The PC's interval timer: an 8254 with three counters, and port 0x61, which gates and reads the third.

Intel 8254 data sheet (231164-005): programming, read-back, the six modes and their timing diagrams. Port 0x61
is the IBM PC/AT's "system control port B": Intel 82371SB (PIIX3) data sheet, "NMI Status and Control".

A counter is never ticked. It holds its state at one clock pulse and moves to another in closed form, so a
read costs the same after a microsecond and after a week. Pulses are counted from the start of the guest's
virtual clock: what a guest measures here (Linux and SeaBIOS calibrate their TSC by it) is that clock alone.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.clock import Clock
    from pyvmm.irq import IrqLine

FREQUENCY_HZ = 1_193_182
NS_PER_SECOND = 1_000_000_000

# Interrupts of a periodic counter come no closer than this: a guest that asks for one each microsecond loses
# ticks instead of taking the host's event loop for itself.
MIN_INTERVAL_NS = 100_000

# The control word, port offset 3.
CONTROL = 3
COUNTER_SHIFT = 6
READ_BACK = 3  # in place of a counter's number
CONTROL_MASK = 0x3F  # what a counter keeps of it and shows in its status
RW_SHIFT = 4
RW_LATCH, RW_LSB, RW_MSB, RW_WORD = 0, 1, 2, 3
MODE_SHIFT = 1
BCD = 0x01

# The read-back command: both "latch" bits are active low.
READ_BACK_NO_COUNT = 0x20
READ_BACK_NO_STATUS = 0x10
READ_BACK_COUNTER_0 = 0x02

STATUS_OUT_SHIFT = 7
STATUS_NULL_SHIFT = 6

INTERRUPT, ONE_SHOT, RATE, SQUARE, SOFT_STROBE, HARD_STROBE = range(6)
# Modes 6 and 7 are 2 and 3: bit 2 is "don't care" there.
MODES = (INTERRUPT, ONE_SHOT, RATE, SQUARE, SOFT_STROBE, HARD_STROBE, RATE, SQUARE)

# Port 0x61.
GATE_2 = 0x01
SPEAKER_DATA = 0x02
PORT_B_WRITABLE = 0x0F
REFRESH_TOGGLE = 0x10
OUT_2 = 0x20
# The AT refreshes its memory every 18 pulses (15.085 us); the bit changes each time, and old software times
# loops by it.
REFRESH_PULSES = 18


def to_bcd(value: int) -> int:
    return value // 1000 << 12 | value // 100 % 10 << 8 | value // 10 % 10 << 4 | value % 10


def from_bcd(value: int) -> int:
    return (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15)


class Counter:
    """One counter, its state as of clock pulse ``pulse``. Before anything else, advance() it to now."""

    __slots__ = (
        "bcd",
        "control",
        "count",
        "done",
        "first_byte",
        "gate",
        "latch",
        "latch_bytes",
        "loading",
        "mode",
        "null",
        "odd",
        "out",
        "paused",
        "pulse",
        "read_msb",
        "reload",
        "running",
        "rw",
        "status",
        "strobing",
    )

    # All but the pulse, which is relative in a saved state. Counts of 10000 in BCD, 10000h in binary are in both.
    STATE = {
        "bcd": 1,
        "control": 6,
        "count": range(0x10001),
        "done": 1,
        "first_byte": range(-1, 256),
        "gate": 1,
        "latch": 16,
        "latch_bytes": 2,
        "loading": 1,
        "mode": range(6),
        "null": 1,
        "odd": 1,
        "out": 1,
        "paused": 1,
        "read_msb": 1,
        "reload": range(0x10001),
        "running": 1,
        "rw": range(1, 4),
        "status": range(-1, 256),
        "strobing": 1,
    }

    def __init__(self, gate: int, pulse: int = 0) -> None:
        """Power-on, which the data sheet leaves undefined: OUT low, nothing counts until programmed."""
        self.pulse = pulse
        self.gate = gate
        self.write_control(RW_WORD << RW_SHIFT | INTERRUPT << MODE_SHIFT)

    # The software's side

    def write_control(self, value: int) -> None:
        self.control = value & CONTROL_MASK
        self.rw = value >> RW_SHIFT & 3
        self.mode = MODES[value >> MODE_SHIFT & 7]
        self.bcd = value & BCD
        self.out = int(self.mode != INTERRUPT)
        self.reload = 0  # CR as a number of pulses, 1..65536 (10000 in BCD); 0: no count has been written
        self.count = 0  # CE, the counting element, in 0..reload
        self.null = 1  # CR has not gone to CE yet
        self.loading = False  # CE takes CR at the next pulse
        self.running = False  # CE has been loaded since the control word
        self.paused = False  # mode 0: between the two bytes of a new count
        self.done = False  # modes 0, 1, 4, 5: the count has run out; it goes on below zero to no effect
        self.strobing = False  # modes 4, 5: OUT is low for this one pulse
        self.odd = 0  # mode 3: the count loaded last was odd
        self.first_byte = -1  # the low byte, where two make a count
        self.read_msb = False  # the next unlatched read gives the high byte
        self.latch = 0
        self.latch_bytes = 0  # what is left to read of the latch: RW_LSB | RW_MSB
        self.status = -1  # the latched status byte

    def write_count(self, value: int) -> None:
        if self.rw == RW_WORD and self.first_byte < 0:
            self.first_byte = value
            if self.mode == INTERRUPT:
                # Counting stops and OUT falls with the first byte: software may take its time for the second.
                self.paused = True
                self.out = 0
            return
        if self.rw == RW_WORD:
            value = value << 8 | self.first_byte
            self.first_byte = -1
        elif self.rw == RW_MSB:
            value <<= 8
        self.reload = from_bcd(value) % 10_000 or 10_000 if self.bcd else value or 0x10000
        self.null = 1
        if self.mode == INTERRUPT:
            self.out = 0
            self.paused = False
            self.loading = True
        elif self.mode == SOFT_STROBE:
            self.loading = True
        elif self.mode in (RATE, SQUARE) and not self.running:
            # Once running, a new count waits for the end of the period, or of the half.
            self.loading = True

    def set_gate(self, gate: int) -> None:
        rising = gate > self.gate
        self.gate = gate
        if rising and self.reload and self.mode in (ONE_SHOT, RATE, SQUARE, HARD_STROBE):
            self.loading = True
        if not gate and self.mode in (RATE, SQUARE):
            self.out = 1

    def read(self) -> int:
        """The next byte: the latched status, the latched count, or the count itself."""
        if self.status >= 0:
            value, self.status = self.status, -1
            return value
        if self.latch_bytes & RW_LSB:
            self.latch_bytes &= ~RW_LSB
            return self.latch & 0xFF
        if self.latch_bytes:
            self.latch_bytes = 0
            return self.latch >> 8
        msb = self.rw == RW_MSB
        if self.rw == RW_WORD:
            msb = self.read_msb
            self.read_msb = not msb
        return self.digits() >> 8 if msb else self.digits() & 0xFF

    def digits(self) -> int:
        """CE as its sixteen bits: a full count reads as 0, BCD as four digits."""
        return to_bcd(self.count % 10_000) if self.bcd else self.count & 0xFFFF

    def latch_count(self) -> None:
        # A second command before the first is read out is ignored.
        if not self.latch_bytes:
            self.latch = self.digits()
            self.latch_bytes = self.rw

    def latch_status(self) -> None:
        if self.status < 0:
            self.status = self.out << STATUS_OUT_SHIFT | self.null << STATUS_NULL_SHIFT | self.control

    # The clock's side

    def advance(self, pulse: int) -> bool:
        """Move on to ``pulse``. True where OUT has risen on the way, however often and whatever it is now."""
        n = pulse - self.pulse
        if n <= 0:
            return False
        self.pulse = pulse
        rose = False
        if self.strobing:
            self.strobing = False
            self.out = 1
            rose = True
        if self.loading:
            rose |= self._load()
            n -= 1
        if n == 0 or self._halted():
            return rose
        if self.mode == RATE:
            return self._advance_rate(n) or rose
        if self.mode == SQUARE:
            return self._advance_square(n) or rose
        return self._advance_once(n) or rose

    def _halted(self) -> bool:
        return not self.running or self.paused or (not self.gate and self.mode not in (ONE_SHOT, HARD_STROBE))

    def _load(self) -> bool:
        """CR goes to CE. True where that makes OUT rise."""
        before = self.out
        self.loading = False
        self.running = True
        self.done = False
        self._take_reload()
        if self.mode == ONE_SHOT:
            self.out = 0
        elif self.mode == RATE:
            self.out = int(self.count != 1)
        elif self.mode == SQUARE:
            self.out = 1
        return self.out > before

    def _take_reload(self) -> None:
        self.null = 0
        self.count = self.reload
        if self.mode == SQUARE:
            # CE counts down by two, from the even number below.
            self.odd = self.reload & 1
            self.count -= self.odd

    def _advance_once(self, n: int) -> bool:
        """Modes 0, 1, 4 and 5: something happens when the count reaches zero, once."""
        rose = False
        if not self.done and n >= self.count:
            self.done = True
            if self.mode in (SOFT_STROBE, HARD_STROBE):
                self.strobing = n == self.count
                self.out = int(not self.strobing)
                rose = not self.strobing
            else:
                rose = not self.out
                self.out = 1
        self.count = (self.count - n) % (10_000 if self.bcd else 0x10000)
        return rose

    def _advance_rate(self, n: int) -> bool:
        """Mode 2: OUT is low for the pulse at which CE is 1, and CE is loaded anew at the next."""
        rose = False
        if n >= self.count:
            n -= self.count
            self._take_reload()
            # A count of 1 is illegal: OUT then stays low.
            rose = self.reload > 1
            n %= self.reload
        self.count -= n
        self.out = int(self.count != 1)
        return rose

    def _advance_square(self, n: int) -> bool:
        """Mode 3: OUT changes when the count runs out. Of an odd period the high half is one pulse longer."""
        rose = False
        left = self._half_left()
        if n >= left:
            n -= left
            rose = self._turn()
            if self.reload == 1:
                return rose
            if n >= self.reload:
                # Whole periods leave everything as it is, but for the edges.
                rose = True
                n %= self.reload
            left = self._half_left()
            if n >= left:
                n -= left
                rose |= self._turn()
        self.count -= 2 * n
        return rose

    def _half_left(self) -> int:
        return self.count // 2 + (self.odd & self.out)

    def _turn(self) -> bool:
        """The end of a half period. True where OUT rises."""
        before = self.out
        self._take_reload()
        # A count of 1 is illegal: its low half has no length.
        self.out = 1 if self.reload == 1 else before ^ 1
        return self.out > before

    def next_change(self) -> int:
        """The pulse at which OUT changes next if nothing is written, -1 for never.

        Of a low that lasts one pulse (modes 2, 4, 5) it is the end: the fall and the rise are told together.
        """
        if self.strobing:
            return self.pulse + 1
        if self.loading:
            loaded = self.copy()
            loaded.advance(self.pulse + 1)
            return loaded.next_change()
        if self._halted():
            return -1
        if self.mode == RATE:
            return self.pulse + self.count if self.reload > 1 else -1
        if self.mode == SQUARE:
            return self.pulse + self._half_left() if self.out == 0 or self.reload > 1 else -1
        if self.done:
            return -1
        return self.pulse + self.count + int(self.mode in (SOFT_STROBE, HARD_STROBE))

    def copy(self) -> Counter:
        """Another one in the same state."""
        made = Counter(self.gate)
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        return made

    def save(self, pulse: int) -> dict[str, Any]:
        """As plain data, at clock pulse ``pulse``."""
        from pyvmm.state import save_fields

        return {**save_fields(self, self.STATE), "behind": pulse - self.pulse}

    def load(self, state: dict[str, Any], pulse: int) -> None:
        from pyvmm.state import checked_number, load_fields

        load_fields(self, self.STATE, state, ("behind",))
        self.pulse = pulse - checked_number(state["behind"], range(1 << 62), "behind")
        if (self.running or self.loading) and not self.reload:
            raise StateError("reload is 0 of a counter that counts")


class SpeakerPort(Device):
    """Port 0x61: counter 2's gate and output, the speaker's data (never heard), the refresh toggle."""

    impl_sizes = (1, 1)

    def __init__(self, pit: I8254) -> None:
        self.pit = pit

    def read(self, offset: int, size: int) -> int:
        with self.pit.lock:
            pulse = self.pit.pulse()
            counter = self.pit.counters[2]
            counter.advance(pulse)
            value = self.pit.port_b
            if counter.out:
                value |= OUT_2
            if pulse // REFRESH_PULSES & 1:
                value |= REFRESH_TOGGLE
            return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self.pit.lock:
            counter = self.pit.counters[2]
            counter.advance(self.pit.pulse())
            counter.set_gate(value & GATE_2)
            self.pit.port_b = value & PORT_B_WRITABLE


class I8254(Device):
    """The three counters. Map it (4 bytes, port 0x40) and ``speaker`` (1 byte, port 0x61).

    Counter 0 drives ``irq0``. Ticks the host was too late for are not made up for: however many rises of OUT
    have gone by, the line sees one edge. State is saved, loaded and reset here for the speaker port too.
    """

    impl_sizes = (1, 1)

    def __init__(self, clock: Clock, irq0: IrqLine, *, powered_on_ns: int | None = None) -> None:
        """``powered_on_ns``: guest time at power-on, where that is not now."""
        self._clock = clock
        self._irq0 = irq0
        self._timer = clock.timer(self._on_timer)
        self._quiet_until_ns = 0
        self.speaker = SpeakerPort(self)
        self._power_on(self.pulse() if powered_on_ns is None else powered_on_ns * FREQUENCY_HZ // NS_PER_SECOND)

    def _power_on(self, pulse: int) -> None:
        # The gates of counters 0 and 1 are tied high; counter 2's is in port 0x61.
        self.counters = [Counter(1, pulse), Counter(1, pulse), Counter(0, pulse)]
        self.port_b = 0

    def pulse(self) -> int:
        """The number of clock pulses since the guest's time began."""
        return self._clock.now_ns() * FREQUENCY_HZ // NS_PER_SECOND

    def read(self, offset: int, size: int) -> int:
        if offset == CONTROL:
            return 0
        counter = self.counters[offset]
        self._advance(counter)
        return counter.read()

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == CONTROL:
            self._write_control(value)
            return
        counter = self.counters[offset]
        self._advance(counter)
        counter.write_count(value)
        if offset == 0:
            self._settle()

    def _write_control(self, value: int) -> None:
        number = value >> COUNTER_SHIFT
        if number == READ_BACK:
            for n, counter in enumerate(self.counters):
                if value & READ_BACK_COUNTER_0 << n:
                    self._advance(counter)
                    if not value & READ_BACK_NO_COUNT:
                        counter.latch_count()
                    if not value & READ_BACK_NO_STATUS:
                        counter.latch_status()
            return
        counter = self.counters[number]
        self._advance(counter)
        if value >> RW_SHIFT & 3 == RW_LATCH:
            counter.latch_count()
            return
        counter.write_control(value)
        if number == 0:
            self._settle()

    def _advance(self, counter: Counter) -> None:
        """Bring a counter up to now. What OUT of counter 0 did meanwhile goes to the line, late or not."""
        rose = counter.advance(self.pulse())
        if counter is self.counters[0]:
            if rose:
                self._quiet_until_ns = self._clock.now_ns() + MIN_INTERVAL_NS
                self._irq0.set(0)
                self._irq0.set(1)
            self._irq0.set(counter.out)

    def _settle(self) -> None:
        """Counter 0 has been touched: the line shows its output, the timer waits for the next change."""
        counter = self.counters[0]
        self._irq0.set(counter.out)
        pulse = counter.next_change()
        if pulse < 0:
            self._timer.disarm()
            return
        # The first nanosecond that belongs to that pulse.
        deadline_ns = -(-pulse * NS_PER_SECOND // FREQUENCY_HZ)
        if counter.mode in (RATE, SQUARE):
            deadline_ns = max(deadline_ns, self._quiet_until_ns)
        self._timer.arm(deadline_ns)

    def _on_timer(self) -> None:
        with self.lock:
            self._advance(self.counters[0])
            self._settle()

    def reset(self) -> None:
        with self.lock:
            self._power_on(self.pulse())
            self._settle()

    STATE = {"port_b": 4, "_quiet_until_ns": "moment", "_timer": "timer"}

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        with self.lock:
            pulse = self.pulse()
            return {**save_fields(self, self.STATE), "counters": [counter.save(pulse) for counter in self.counters]}

    def load(self, state: dict[str, Any]) -> None:
        """To go on from ``save``, at whatever time the clock shows now."""
        from pyvmm.state import load_fields, value_of

        with self.lock:
            load_fields(self, self.STATE, state, ("counters",))
            saved = value_of(("list", "part", len(self.counters)), state["counters"], "counters")
            pulse = self.pulse()
            for n, counter in enumerate(self.counters):
                try:
                    counter.load(saved[n], pulse)
                except StateError as error:
                    raise StateError(f"counters[{n}].{error}") from None

    def after_load(self) -> None:
        with self.lock:
            self._irq0.set(self.counters[0].out)
            self._timer.go_on()
