"""An access to a PIT whose state is KVM's struct kvm_pit_state2: what it reads, and what the state is after it.

Intel 8254 data sheet (231164-005), "Programming the 8254" and "Read Operations"; port 0x61: Intel 82371SB (PIIX3) data
sheet, "NMI Status and Control". Where KVM's PIT knows less than the chip it is as KVM has it: no BCD, and gates only
restart. Linux Documentation/virt/kvm/api.rst, KVM_GET_PIT2, has the structure.
"""

from __future__ import annotations

from struct import Struct

from pyvmm.x86 import layout

CONTROL = 3
READ_BACK = 3  # in place of a counter's number
LATCH = 0  # in place of which bytes are accessed
LSB, MSB, WORD, WORD_SECOND = 1, 2, 3, 4
HZ, NS_PER_S, FULL = 1_193_182, 1_000_000_000, 0x10000
REFRESH_NS = 15_085  # 18 pulses: port 0x61's refresh bit changes each time
SPEAKER_DATA_ON = 1 << 1  # KVM_PIT_FLAGS_SPEAKER_DATA_ON
COUNTERS, COUNTER_BYTES, FLAGS_AT = 3, 24, 72

FIELDS = Struct("<IHBBBBBBBBBBq")


class Counter:
    """struct kvm_pit_channel_state. ``loaded_ns`` is in CLOCK_MONOTONIC, 0 where it has never been in KVM."""

    count: int
    latched: int
    status: int
    mode: int
    gate: int

    def __init__(self, state: bytearray, number: int) -> None:
        self._state, self._at = state, number * COUNTER_BYTES
        (
            self.count, self.latched, self.latch, self.has_status, self.status, self.read_state, self.write_state,
            self.first_byte, self.access, self.mode, self.bcd, self.gate, self.loaded_ns,
        ) = FIELDS.unpack_from(state, self._at)  # fmt: skip

    def put(self) -> None:
        FIELDS.pack_into(
            self._state, self._at,
            self.count, self.latched, self.latch, self.has_status, self.status, self.read_state, self.write_state,
            self.first_byte, self.access, self.mode, self.bcd, self.gate, self.loaded_ns,
        )  # fmt: skip

    def _pulses(self, now_ns: int) -> int:
        return max(0, now_ns - self.loaded_ns) * HZ // NS_PER_S if self.loaded_ns else 0

    def _now(self, now_ns: int) -> int:
        gone, count = self._pulses(now_ns), self.count or FULL
        if self.mode in (0, 1, 4, 5):
            return count - gone & 0xFFFF
        return count - (2 * gone if self.mode == 3 else gone) % count & 0xFFFF

    def out(self, now_ns: int) -> int:
        gone, count = self._pulses(now_ns), self.count or FULL
        if self.mode == 1:
            return int(gone < count)
        if self.mode == 2:
            return int(gone > 0 and gone % count == 0)
        if self.mode == 3:
            return int(gone % count < (count + 1) // 2)
        if self.mode in (4, 5):
            return int(gone == count)
        return int(gone >= count)

    def control(self, value: int, now_ns: int) -> None:
        access = value >> 4 & 3
        if access == LATCH:
            self.latch_count(now_ns)
            return
        self.access = self.read_state = self.write_state = access
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = value & 1

    def latch_count(self, now_ns: int) -> None:
        if not self.latch:
            self.latched, self.latch = self._now(now_ns), self.access

    def latch_status(self, now_ns: int) -> None:
        if not self.has_status:
            # Before it has a mode that is 0xff.
            self.status = (self.out(now_ns) << 7 | self.access << 4 | self.mode << 1 | self.bcd) & 0xFF
            self.has_status = 1

    def write(self, value: int) -> bool:
        """Whether that was all of a count."""
        if self.write_state == WORD:
            self.first_byte, self.write_state = value, WORD_SECOND
            return False
        if self.write_state == WORD_SECOND:
            value, self.write_state = value << 8 | self.first_byte, WORD
        elif self.write_state == MSB:
            value <<= 8
        self.count = value or FULL
        return True

    def read(self, now_ns: int) -> int:
        if self.has_status:
            self.has_status = 0
            return self.status
        if self.latch:
            value, second = self.latched, self.latch == MSB
            self.latch = MSB if self.latch == WORD else 0
        else:
            value, second = self._now(now_ns), self.read_state in (MSB, WORD_SECOND)
            self.read_state = {WORD: WORD_SECOND, WORD_SECOND: WORD}.get(self.read_state, self.read_state)
        return value >> 8 if second else value & 0xFF


def write(state: bytearray, port: int, value: int, now_ns: int) -> bool:
    """A byte is written. Whether that loads a counter, which then counts."""
    if port == layout.PORT_SPEAKER:
        counter = Counter(state, 2)
        counter.gate = value & 1
        state[FLAGS_AT] = state[FLAGS_AT] & ~SPEAKER_DATA_ON | value & SPEAKER_DATA_ON
        counter.put()
        return False
    number = port - layout.PORT_PIT
    if number != CONTROL:
        counter = Counter(state, number)
        loaded = counter.write(value)
        counter.put()
        return loaded
    number = value >> 6
    if number != READ_BACK:
        counter = Counter(state, number)
        counter.control(value, now_ns)
        counter.put()
        return False
    for each in range(COUNTERS):
        if value & 2 << each:
            counter = Counter(state, each)
            if not value & 0x20:
                counter.latch_count(now_ns)
            if not value & 0x10:
                counter.latch_status(now_ns)
            counter.put()
    return False


def read(state: bytearray, port: int, now_ns: int) -> int:
    """A byte is read."""
    if port == layout.PORT_SPEAKER:
        counter = Counter(state, 2)
        refresh = now_ns // REFRESH_NS & 1
        return state[FLAGS_AT] & SPEAKER_DATA_ON | counter.gate | counter.out(now_ns) << 5 | refresh << 4
    number = port - layout.PORT_PIT
    if number == CONTROL:
        return 0
    counter = Counter(state, number)
    value = counter.read(now_ns)
    counter.put()
    return value
