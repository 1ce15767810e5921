"""I8042: the PC's keyboard controller with a keyboard on it, ports 0x60 (data) and 0x64 (status and command).

IBM PC/AT Technical Reference, "Keyboard controller", and the PS/2's for the auxiliary port; what SeaBIOS and
Linux expect where those leave a choice. No mouse is plugged in: the auxiliary port is there and answers as
one with nothing on it, so that an operating system finds that out at once instead of after its timeouts.

Nothing here grows: the output buffer has one byte, the controller holds one answer that waits for it, the keyboard 16
bytes. A guest that sends command after command and reads nothing loses the answers between the first and the last, as
with QEMU (hw/input/pckbd.c, kbd_queue: cbdata).

One chip, two regions of one port each: the I8042 itself is the data port, its ``command`` the other one.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.irq import IrqLine
from pyvmm.light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Status register
STATUS_OBF = 0x01  # output buffer full: something to read at the data port
STATUS_SYS = 0x04  # the system flag of the command byte
STATUS_CMD = 0x08  # the last write went to the command port
STATUS_UNLOCKED = 0x10
STATUS_AUX_OBF = 0x20  # what is to be read is of the auxiliary port
STATUS_TIMEOUT = 0x40

# Command byte
CTR_KBD_INT = 0x01
CTR_AUX_INT = 0x02
CTR_SYS = 0x04
CTR_KBD_DISABLE = 0x10
CTR_AUX_DISABLE = 0x20
CTR_TRANSLATE = 0x40

# Output port
OUT_RESET_N = 0x01  # low: the CPU is held in reset
OUT_A20 = 0x02
OUT_OBF = 0x10
OUT_AUX_OBF = 0x20
OUT_ONES = 0xCC

# Controller commands
READ_RAM = 0x20  # to 0x3f; byte 0 is the command byte
WRITE_RAM = 0x60  # to 0x7f
AUX_DISABLE = 0xA7
AUX_ENABLE = 0xA8
AUX_TEST = 0xA9
SELF_TEST = 0xAA
KBD_TEST = 0xAB
KBD_DISABLE = 0xAD
KBD_ENABLE = 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT = 0xD0
WRITE_OUTPUT_PORT = 0xD1
WRITE_KBD_BUFFER = 0xD2
WRITE_AUX_BUFFER = 0xD3
WRITE_AUX = 0xD4
A20_OFF = 0xDD
A20_ON = 0xDF
PULSE = 0xF0  # to 0xff: pulse low those of the output port's bits 3 to 0 that are zero here

SELF_TEST_PASSED = 0x55
INTERFACE_GOOD = 0x00
INPUT_PORT = 0x80  # keyboard not locked

# Keyboard commands and replies
KBD_SET_LEDS = 0xED
KBD_ECHO = 0xEE
KBD_SCANCODE_SET = 0xF0
KBD_IDENTIFY = 0xF2
KBD_SET_RATE = 0xF3
KBD_SCAN_ON = 0xF4
KBD_DEFAULTS_OFF = 0xF5
KBD_DEFAULTS = 0xF6
KBD_KEY_TYPES = range(0xF7, 0xFB)  # scan code set 3 only: all keys
KBD_RESEND = 0xFE
KBD_RESET = 0xFF
KBD_WITH_PARAMETER = (KBD_SET_LEDS, KBD_SCANCODE_SET, KBD_SET_RATE)
ACK = 0xFA
RESEND = 0xFE
SELF_TEST_DONE = 0xAA
IDENTITY = (0xAB, 0x83)
TRANSLATED = {0x83: 0x41, 0x01: 0x43, 0x02: 0x41, 0x03: 0x3F}  # set 2 to set 1, of what is ever sent

DEFAULT_RATE = 0x2B  # 10.9 a second, after 500 ms
KBD_QUEUE_BYTES = 16
RAM_BYTES = 32  # the controller's


class Keyboard:
    """An MF2 keyboard: answers commands, keeps LEDs and rate. Its replies wait in ``queue``."""

    __slots__ = ("_command", "_last", "leds", "queue", "rate", "scancode_set", "scanning")

    def __init__(self) -> None:
        self.queue: deque[int] = deque()
        self._command = 0  # waits for its parameter
        self._last = SELF_TEST_DONE  # what a resend repeats
        self._set_defaults()
        self.leds = 0

    def _set_defaults(self) -> None:
        self.scanning = True
        self.scancode_set = 2
        self.rate = DEFAULT_RATE

    def _reply(self, *values: int) -> None:
        for value in values:
            if len(self.queue) < KBD_QUEUE_BYTES:
                self.queue.append(value)
                self._last = value

    def write(self, value: int) -> None:
        """A byte from the controller: a command, or the parameter of one (a command ends the wait for it)."""
        command, self._command = self._command, 0
        if command and value < KBD_SET_LEDS:
            self._take_parameter(command, value)
        elif value in KBD_WITH_PARAMETER:
            self._command = value
            self._reply(ACK)
        elif value == KBD_ECHO:
            self._reply(KBD_ECHO)
        elif value == KBD_IDENTIFY:
            self._reply(ACK, *IDENTITY)
        elif value in (KBD_SCAN_ON, KBD_DEFAULTS_OFF, KBD_DEFAULTS):
            if value != KBD_SCAN_ON:
                self._set_defaults()
            self.scanning = value != KBD_DEFAULTS_OFF
            self._reply(ACK)
        elif value in KBD_KEY_TYPES:
            self._reply(ACK)
        elif value == KBD_RESEND:
            self._reply(self._last)
        elif value == KBD_RESET:
            self.queue.clear()
            self._set_defaults()
            self.leds = 0
            self._reply(ACK, SELF_TEST_DONE)
        else:
            self._reply(RESEND)

    def _take_parameter(self, command: int, value: int) -> None:
        if command == KBD_SET_LEDS:
            self.leds = value & 7
        elif command == KBD_SET_RATE:
            self.rate = value & 0x7F
        elif value == 0:
            self._reply(ACK, self.scancode_set)
            return
        elif value <= 3:
            self.scancode_set = value
        else:
            self._reply(RESEND)
            return
        self._reply(ACK)

    STATE = {
        "queue": ("list", 8, 0, KBD_QUEUE_BYTES),
        "_command": 8,
        "_last": 8,
        "scanning": "flag",
        "scancode_set": range(1, 4),
        "rate": 7,
        "leds": 3,
    }

    def save(self) -> dict[str, Any]:
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)


class CommandPort(Device):
    """Port 0x64 of an I8042, under the chip's lock."""

    impl_sizes = (1, 1)

    __slots__ = ("_chip",)

    def __init__(self, chip: I8042) -> None:
        self._chip = chip

    def read(self, offset: int, size: int) -> int:
        with self._chip.lock:
            return self._chip.read_status()

    def write(self, offset: int, size: int, value: int) -> None:
        with self._chip.lock:
            self._chip.write_command(value)


class I8042(Device):
    """``on_reset()`` is called, on the vCPU's thread, when the guest pulls the CPU's reset line.

    ``on_a20(enabled)``, if given, is told of each change of the A20 gate. Without ``aux_irq`` the auxiliary
    port has no interrupt.
    """

    impl_sizes = (1, 1)

    __slots__ = (
        "_aux_irq",
        "_expects",
        "_kbd_irq",
        "_last_read",
        "_on_a20",
        "_on_reset",
        "_out",
        "_outport",
        "_ram",
        "_reply_waits",
        "_status",
        "command",
        "keyboard",
    )

    def __init__(
        self,
        kbd_irq: IrqLine,
        on_reset: Callable[[], None],
        *,
        aux_irq: IrqLine | None = None,
        on_a20: Callable[[bool], None] | None = None,
    ) -> None:
        self._kbd_irq = kbd_irq
        self._aux_irq = aux_irq or IrqLine()
        self._on_reset = on_reset
        self._on_a20 = on_a20
        self.command = CommandPort(self)
        """The device to map at the command port; reset, save and load are this one's."""
        self._power_on()

    def _power_on(self) -> None:
        self.keyboard = Keyboard()
        self._ram = bytearray(RAM_BYTES)
        self._ram[0] = CTR_KBD_INT | CTR_AUX_INT
        self._outport = OUT_RESET_N | OUT_A20 | OUT_ONES
        self._status = STATUS_UNLOCKED | STATUS_CMD  # without the bits that tell of the output buffer
        self._expects = 0  # the command whose data byte is to be written next
        # The output buffer, and the controller's answer that waits for it: a byte, and the status bits it comes with.
        self._out: tuple[int, int] | None = None
        self._reply_waits: tuple[int, int] | None = None
        self._last_read = 0
        self._fill()

    # -- data port ------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The output buffer; empty, it shows what it held last."""
        if self._out is not None:
            self._last_read = self._out[0]
            self._out = None
            # Down and up again for the next byte: an edge for each.
            self._kbd_irq.set(0)
            self._aux_irq.set(0)
            self._fill()
        return self._last_read

    def write(self, offset: int, size: int, value: int) -> None:
        self._status &= ~STATUS_CMD
        command, self._expects = self._expects, 0
        if not command:
            self._ram[0] &= ~CTR_KBD_DISABLE  # to send to the keyboard the controller lets go of its clock
            self.keyboard.write(value)
        elif WRITE_RAM <= command < WRITE_RAM + RAM_BYTES:
            self._ram[command - WRITE_RAM] = value
        elif command == WRITE_OUTPUT_PORT:
            self._set_outport(value)
        elif command == WRITE_KBD_BUFFER:
            self._reply(value)
        elif command == WRITE_AUX_BUFFER:
            self._reply(value, STATUS_AUX_OBF)
        else:  # WRITE_AUX: nobody answers there
            self._reply(RESEND, STATUS_AUX_OBF | STATUS_TIMEOUT)
        self._fill()

    # -- command port, the lock held ------------------------------------------------------------------------

    def read_status(self) -> int:
        status = self._status | (STATUS_SYS if self._ram[0] & CTR_SYS else 0)
        if self._out is not None:
            status |= STATUS_OBF | self._out[1]
        return status

    def write_command(self, value: int) -> None:
        self._status |= STATUS_CMD
        self._expects = 0
        if READ_RAM <= value < READ_RAM + RAM_BYTES:
            self._reply(self._ram[value - READ_RAM])
        elif WRITE_RAM <= value < WRITE_RAM + RAM_BYTES or value in (
            WRITE_OUTPUT_PORT,
            WRITE_KBD_BUFFER,
            WRITE_AUX_BUFFER,
            WRITE_AUX,
        ):
            self._expects = value
        elif value in (KBD_DISABLE, KBD_ENABLE):
            self._set_ctr(CTR_KBD_DISABLE, value == KBD_DISABLE)
        elif value in (AUX_DISABLE, AUX_ENABLE):
            self._set_ctr(CTR_AUX_DISABLE, value == AUX_DISABLE)
        elif value == SELF_TEST:
            self._set_ctr(CTR_SYS, True)
            self._reply(SELF_TEST_PASSED)
        elif value in (KBD_TEST, AUX_TEST):
            self._reply(INTERFACE_GOOD)
        elif value == READ_INPUT_PORT:
            self._reply(INPUT_PORT)
        elif value == READ_OUTPUT_PORT:
            self._reply(self._outport | self._outport_obf())
        elif value in (A20_OFF, A20_ON):
            self._set_outport(self._outport & ~OUT_A20 | (OUT_A20 if value == A20_ON else 0))
        elif value >= PULSE and not value & OUT_RESET_N:
            self._on_reset()
        self._fill()

    # -- inside ---------------------------------------------------------------------------------------------

    def _set_ctr(self, bit: int, on: bool) -> None:
        self._ram[0] = self._ram[0] | bit if on else self._ram[0] & ~bit

    def _reply(self, value: int, status: int = 0) -> None:
        """The controller's own answer. It has room for one: a new one takes the place of one that still waits."""
        self._reply_waits = (value, status)

    def _fill(self) -> None:
        """Put the next byte into the output buffer, if it is free, and show what is there.

        A disabled keyboard can't send: its clock is held low, and it keeps what it has.
        """
        ctr = self._ram[0]
        if self._out is None:
            if self._reply_waits is not None:
                self._out, self._reply_waits = self._reply_waits, None
            elif self.keyboard.queue and not ctr & CTR_KBD_DISABLE:
                value = self.keyboard.queue.popleft()
                self._out = (TRANSLATED.get(value, value) if ctr & CTR_TRANSLATE else value, 0)
        self._show()

    def _show(self) -> None:
        """What is in the output buffer, on the lines."""
        ctr = self._ram[0]
        full = self._out is not None
        aux = self._out is not None and self._out[1] & STATUS_AUX_OBF
        self._kbd_irq.set(1 if full and not aux and ctr & CTR_KBD_INT else 0)
        self._aux_irq.set(1 if aux and ctr & CTR_AUX_INT else 0)

    def _outport_obf(self) -> int:
        """What of the output buffer shows at the output port."""
        if self._out is None:
            return 0
        return OUT_OBF | (OUT_AUX_OBF if self._out[1] & STATUS_AUX_OBF else 0)

    def _set_outport(self, value: int) -> None:
        value &= ~(OUT_OBF | OUT_AUX_OBF)
        changed = value ^ self._outport
        self._outport = value
        if changed & OUT_A20 and self._on_a20 is not None:
            self._on_a20(bool(value & OUT_A20))
        if not value & OUT_RESET_N:
            self._on_reset()

    # -- the machine's side ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Power-on: A20 is open, both interrupts enabled, the keyboard has its defaults."""
        with self.lock:
            self._power_on()

    STATE = {
        "keyboard": "part",
        "_ram": ("bytes", RAM_BYTES),
        "_outport": 8,
        "_status": 8,
        "_expects": 8,
        "_out": ("or none", ("list", 8, 2)),
        "_reply_waits": ("or none", ("list", 8, 2)),
        "_last_read": 8,
    }

    def after_load(self) -> None:
        with self.lock:
            self._show()
