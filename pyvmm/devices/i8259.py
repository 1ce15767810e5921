"""The PC's pair of interrupt controllers: two 8259A chips in cascade, and the edge/level registers.

Intel 8259A data sheet (231468-003) for the chips; Intel 82371AB (PIIX4) data sheet, "ELCR", for the
edge/level registers. For machines whose interrupts stay in user space; KVM's irqchip has a pair of its own.

One lock excludes both chips and the ELCR from each other: an access to one moves the state of another through
the cascade. It is the pair's; each port's Device takes it inside its own, never the other way round.
"""

from __future__ import annotations

from pyvmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The slave's INT pin is wired to this input of the master (IBM PC/AT).
CASCADE = 2
# What a chip answers when the request is gone by the time the CPU acknowledges (data sheet, "Edge and Level
# Triggered Modes").
SPURIOUS = 7

# Port offset 0, written: bit 4 makes it ICW1, else bit 3 tells OCW3 from OCW2.
ICW1_INIT = 0x10
ICW1_LTIM = 0x08  # all eight inputs level triggered
ICW1_SNGL = 0x02  # no cascade: ICW3 is left out
ICW1_IC4 = 0x01  # ICW4 follows
OCW3_SELECT = 0x08
OCW3_ESMM = 0x40  # bit 5 is meant
OCW3_SMM = 0x20
OCW3_POLL = 0x04
OCW3_RR = 0x02  # bit 0 is meant
OCW3_RIS = 0x01
ICW2_BASE = 0xF8
ICW4_SFNM = 0x10
ICW4_AEOI = 0x02
OCW2_LEVEL = 0x07

# OCW2 bits 7..5: R (rotate), SL (specific level), EOI.
OCW2_ROTATE_AEOI_CLEAR, OCW2_EOI, OCW2_NOP, OCW2_EOI_SPECIFIC = 0, 1, 2, 3
OCW2_ROTATE_AEOI_SET, OCW2_EOI_ROTATE, OCW2_SET_PRIORITY, OCW2_EOI_ROTATE_SPECIFIC = 4, 5, 6, 7

POLL_PENDING = 0x80

# Lines that may be made level triggered: not 0, 1, 2, 8 and 13, which the board drives with edges.
ELCR_MASTER_MASK = 0xF8
ELCR_SLAVE_MASK = 0xDE


class Chip:
    """One 8259A. ``set_int(level)`` is its INT pin, called on a change of level; the owner holds the lock."""

    __slots__ = (
        "_set_int",
        "auto_eoi",
        "base",
        "cascade_mask",
        "elcr",
        "elcr_mask",
        "ended",
        "highest",
        "ic4",
        "icw",
        "imr",
        "intr",
        "irr",
        "isr",
        "lines",
        "ltim",
        "poll",
        "read_isr",
        "rotate_aeoi",
        "sfnm",
        "single",
        "special_mask",
        "watched",
    )

    STATE = {
        "auto_eoi": 2,
        "base": 8,
        "elcr": 8,
        "highest": 3,
        "ic4": 1,
        "icw": range(5),
        "imr": 8,
        "intr": 1,
        "irr": 8,
        "isr": 8,
        "lines": 8,
        "ltim": 4,
        "poll": 1,
        "read_isr": 1,
        "rotate_aeoi": 1,
        "sfnm": 5,
        "single": 2,
        "special_mask": 6,
    }

    def __init__(
        self, elcr_mask: int, cascade_mask: int, set_int: Callable[[int], None] | None = None
    ) -> None:
        self.elcr_mask = elcr_mask
        self.cascade_mask = cascade_mask  # the input another chip is wired to, as a bit
        self._set_int = set_int
        self.watched = 0  # the inputs whose end of interrupt somebody waits for
        self.ended = 0  # those of them that ended and of which nobody was told yet
        self.lines = 0  # levels of the input pins
        self.intr = 0  # level of the output pin
        self.clear()

    def clear(self) -> None:
        """Power-on. The input pins keep their levels: they belong to whoever drives them."""
        self.elcr = 0
        self.base = 0
        self.ltim = 0
        self.single = 0
        self.ic4 = 0
        self.icw = 0  # number of the ICW expected next at offset 1, 0 outside initialisation
        self._clear_modes()

    def _clear_modes(self) -> None:
        """What ICW1 does (data sheet, "Initialization Command Words 1 and 2", a to f)."""
        # The edge detectors are cleared: a line that is high must fall before it can request again.
        self.irr = self.lines & self.level_mask
        self.imr = 0
        self.isr = 0
        self.highest = 0  # the input of highest priority: input 7 is the lowest
        self.special_mask = 0
        self.read_isr = 0
        self.poll = 0
        self.auto_eoi = 0
        self.rotate_aeoi = 0
        self.sfnm = 0

    @property
    def level_mask(self) -> int:
        """The inputs that are level triggered now."""
        return 0xFF if self.ltim else self.elcr

    # Requests and priorities

    def set_input(self, n: int, level: int) -> None:
        """The pin IRn moves to ``level``.

        An edge is kept in the IRR although the line falls again before the acknowledge, where the data sheet makes it a
        spurious IR7: a pulse takes no time here, so the request could never be served. KVM and QEMU do the same.
        """
        bit = 1 << n
        if level:
            if not self.lines & bit:
                self.lines |= bit
                self.irr |= bit
        else:
            self.lines &= ~bit
            self.irr &= ~(bit & self.level_mask)
        self.update()

    def withdraw(self, n: int) -> None:
        """IRn is low and takes its request back, as the data sheet has it for every input."""
        self.irr &= ~(1 << n)
        self.update()

    def set_elcr(self, value: int) -> None:
        self.elcr = value & self.elcr_mask
        level = self.level_mask
        self.irr = (self.irr & ~level) | (self.lines & level)
        self.update()

    def _rank(self, bits: int) -> int:
        """How far down the order of priorities the first of ``bits`` stands: 0 is the top, 8 none at all."""
        # Rotated so that the highest priority is bit 0; then the lowest set bit is the answer.
        bits = ((bits | bits << 8) >> self.highest) & 0xFF
        return (bits & -bits).bit_length() - 1 if bits else 8

    def pending(self) -> int:
        """The input the chip would interrupt for now, -1 for none."""
        rank = self._rank(self.irr & ~self.imr)
        if rank == 8:
            return -1
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.sfnm:
            # Special fully nested: the slave may bring a higher request of its own while one is in service.
            in_service &= ~self.cascade_mask
        return (rank + self.highest) & 7 if rank < self._rank(in_service) else -1

    def update(self) -> None:
        """Drive INT as requests, masks and priorities say."""
        self._drive(int(self.pending() >= 0))

    def _drive(self, level: int) -> None:
        if level != self.intr:
            self.intr = level
            if self._set_int is not None:
                self._set_int(level)

    def accept(self, n: int) -> None:
        """The acknowledge (INTA, or the read after a poll command) takes IRn into service."""
        bit = 1 << n
        if not self.auto_eoi:
            self.isr |= bit
        else:
            self.ended |= bit & self.watched
            if self.rotate_aeoi:
                self.highest = (n + 1) & 7
        self.irr &= ~bit | self.level_mask
        # INT falls with every acknowledge, and rises again where another request waits: a master needs the edge.
        self._drive(0)
        self.update()

    # Registers

    def read(self, offset: int) -> int:
        if self.poll:
            # The next read after a poll command is an acknowledge, whichever port it goes to.
            self.poll = 0
            n = self.pending()
            if n < 0:
                return 0
            self.accept(n)
            return POLL_PENDING | n
        if offset:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, offset: int, value: int) -> None:
        if offset:
            self._write_data(value)
        elif value & ICW1_INIT:
            self.ltim = value & ICW1_LTIM
            self.single = value & ICW1_SNGL
            self.ic4 = value & ICW1_IC4
            self.icw = 2
            self._clear_modes()
        elif value & OCW3_SELECT:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value >> 5, value & OCW2_LEVEL)
        self.update()

    def _write_data(self, value: int) -> None:
        """Offset 1: ICW2 to ICW4 during initialisation, the mask (OCW1) after it."""
        if self.icw == 0:
            self.imr = value
        elif self.icw == 2:
            self.base = value & ICW2_BASE
            self.icw = 3 if not self.single else 4 if self.ic4 else 0
        elif self.icw == 3:
            # Where the slave sits is a matter of the board's wires here, so what ICW3 says changes nothing.
            self.icw = 4 if self.ic4 else 0
        else:
            self.sfnm = value & ICW4_SFNM
            self.auto_eoi = value & ICW4_AEOI
            self.icw = 0

    def _write_ocw3(self, value: int) -> None:
        if value & OCW3_ESMM:
            self.special_mask = value & OCW3_SMM
        if value & OCW3_RR:
            self.read_isr = value & OCW3_RIS
        if value & OCW3_POLL:
            self.poll = 1

    def _write_ocw2(self, command: int, level: int) -> None:
        if command in (OCW2_EOI, OCW2_EOI_ROTATE):
            # In special mask mode an in-service bit that is masked stays (data sheet, "End of Interrupt").
            rank = self._rank(self.isr & ~self.imr if self.special_mask else self.isr)
            if rank == 8:
                return
            level = (rank + self.highest) & 7
        if command & 1:
            self.isr &= ~(1 << level)
            self.ended |= 1 << level & self.watched
        if command in (OCW2_EOI_ROTATE, OCW2_EOI_ROTATE_SPECIFIC, OCW2_SET_PRIORITY):
            # The level named gets the lowest priority.
            self.highest = (level + 1) & 7
        elif command in (OCW2_ROTATE_AEOI_CLEAR, OCW2_ROTATE_AEOI_SET):
            self.rotate_aeoi = int(command == OCW2_ROTATE_AEOI_SET)

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)


class ChipPorts(Device):
    """The two ports of one chip: 0x20 the master's, 0xa0 the slave's."""

    impl_sizes = (1, 1)

    def __init__(self, pair: I8259Pair, chip: Chip) -> None:
        self.pair = pair
        self.chip = chip

    def read(self, offset: int, size: int) -> int:
        with self.pair.lock:
            value = self.chip.read(offset)
            self.pair.drive_intr()
        self.pair.tell_ended()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self.pair.lock:
            self.chip.write(offset, value)
            self.pair.drive_intr()
        self.pair.tell_ended()


class ElcrPorts(Device):
    """0x4d0 and 0x4d1, the edge/level control registers: a bit set makes its line level triggered."""

    impl_sizes = (1, 1)

    def __init__(self, pair: I8259Pair) -> None:
        self.pair = pair

    def read(self, offset: int, size: int) -> int:
        with self.pair.lock:
            return self.pair.chips[offset].elcr

    def write(self, offset: int, size: int, value: int) -> None:
        with self.pair.lock:
            self.pair.chips[offset].set_elcr(value)
            self.pair.drive_intr()


class I8259Pair(Device):
    """Master and slave as the CPU sees them: sixteen lines in, one INTR out, a vector for each acknowledge.

    ``on_intr(level)`` is called on a change of INTR, with ``lock`` held. The pair has no ports of its own: map
    ``master`` (2 bytes), ``slave`` (2 bytes) and ``elcr`` (2 bytes). State is saved, loaded and reset here.

    ``on_end(n)`` is told when the interrupt of an input ends that ``watch_end`` has named, with no lock of the pair's
    held: it may drive lines.
    """

    def __init__(self, on_intr: Callable[[int], None]) -> None:
        self._on_intr = on_intr
        self.on_end: Callable[[int], None] | None = None
        self._line2 = 0
        # Each chip's INT: the master's goes to the CPU when an operation is over (drive_intr), the slave's to the
        # master at once.
        self.chips = (Chip(ELCR_MASTER_MASK, 1 << CASCADE), Chip(ELCR_SLAVE_MASK, 0, self._cascade))
        self.intr = 0
        self.master = ChipPorts(self, self.chips[0])
        self.slave = ChipPorts(self, self.chips[1])
        self.elcr = ElcrPorts(self)

    def set(self, n: int, level: int) -> None:
        """Input ``n`` (0..15) moves to ``level``. From any thread."""
        with self.lock:
            if n == CASCADE:
                # No board has a device here; whoever drives it shares the pin with the slave.
                self._line2 = level
                self._cascade(self.chips[1].intr)
            else:
                self.chips[n >> 3].set_input(n & 7, level)
            self.drive_intr()

    def acknowledge(self) -> int:
        """The CPU takes the interrupt: its vector, 0..255; the spurious one (IRQ 7, 15) if it is gone."""
        with self.lock:
            master, slave = self.chips
            n = master.pending()
            if n < 0:
                # No in-service bit is set: the handler must not send an EOI.
                return master.base + SPURIOUS
            # The master first: it drops the request on its cascade input, so that an edge the slave sends now
            # is a new one.
            master.accept(n)
            vector = master.base + n
            if n == CASCADE:
                n = slave.pending()
                if n >= 0:
                    slave.accept(n)
                else:
                    n = SPURIOUS
                vector = slave.base + n
            self.drive_intr()
        self.tell_ended()
        return vector

    def watch_end(self, n: int, watch: bool) -> None:
        """Whether ``on_end`` is to be told of input ``n`` (0..15)."""
        chip, bit = self.chips[n >> 3], 1 << (n & 7)
        with self.lock:
            chip.watched = chip.watched | bit if watch else chip.watched & ~bit

    def tell_ended(self) -> None:
        """After whatever may have ended an interrupt, with the lock given back."""
        for chip, first in zip(self.chips, (0, 8), strict=True):
            if chip.ended:
                with self.lock:
                    ended, chip.ended = chip.ended, 0
                for n in range(8):
                    if ended >> n & 1 and self.on_end is not None:
                        self.on_end(first + n)

    def drive_intr(self) -> None:
        """Tell the CPU the level of INTR: at the end of each operation, not of its steps.

        The lock is held.
        """
        level = self.chips[0].intr
        if level != self.intr:
            self.intr = level
            self._on_intr(level)

    def _cascade(self, level: int) -> None:
        """The slave's INT pin moves.

        Unlike a device's pulse, a request it takes back (it was masked, say) must not linger: as an IRQ 15.
        """
        master = self.chips[0]
        level |= self._line2
        master.set_input(CASCADE, level)
        if not level:
            master.withdraw(CASCADE)

    def reset(self) -> None:
        with self.lock:
            for chip in self.chips:
                chip.clear()
                chip.update()
            self.drive_intr()

    STATE = {"_master": "part", "_slave": "part", "_line2": 1}

    @property
    def _master(self) -> Chip:
        return self.chips[0]

    @property
    def _slave(self) -> Chip:
        return self.chips[1]

    def after_load(self) -> None:
        with self.lock:
            self.intr = self.chips[0].intr
            self._on_intr(self.intr)
