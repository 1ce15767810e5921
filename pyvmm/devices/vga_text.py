"""VgaText: as much of a VGA as text mode needs, in colour mode 3: 25 lines of 80 characters, no fonts and no graphics.

IBM VGA/XGA Technical Reference (1992), chapter 2: CRT controller, sequencer, graphics and attribute controllers, DAC,
general registers. Registers come up as the VGA BIOS leaves them in mode 3. Text memory is no device: it is RAM that the
board shows at 0xb8000, so that a character costs no exit; this looks into it when somebody asks what is on the screen.
The colour addresses (0x3dx) or the monochrome ones (0x3bx) answer, as the miscellaneous output register says.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.screen import BLANK, COLUMNS, FRAME_BYTES, ROW_BYTES, ROWS, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.clock import Clock

MEMORY_BYTES = 0x8000  # at 0xb8000; addresses wrap there
PORT_FIRST = 0x3C0
PORTS = 32  # 0x3c0 to 0x3df
MONO_PORTS = 12  # 0x3b0 to 0x3bb

# Ports, less 0x300. The monochrome ones are 0x20 below these of the CRT controller.
ATTRIBUTE = 0xC0  # index and data in turn; 0x3c1 reads data
ATTRIBUTE_READ = 0xC1
MISC_WRITE = 0xC2  # reads as input status 0
SEQUENCER = 0xC4
PEL_MASK = 0xC6
DAC_READ_INDEX = 0xC7  # reads as the DAC's state
DAC_WRITE_INDEX = 0xC8
DAC_DATA = 0xC9
FEATURE_READ = 0xCA
MISC_READ = 0xCC
GRAPHICS = 0xCE
CRTC = 0xD4
STATUS_1 = 0xDA  # writes go to feature control

MISC_COLOUR = 0x01  # I/O address select
STATUS_0_SENSE = 0x10  # a colour monitor is there
STATUS_1_BLANK = 0x01  # no character is being sent to the screen
STATUS_1_RETRACE = 0x08

# CRT controller
CURSOR_START = 0x0A
CURSOR_OFF = 0x20
CURSOR_END = 0x0B
CURSOR_SCAN_LINE = 0x1F
START = 0x0C  # high, low: in characters
CURSOR = 0x0E  # high, low
RETRACE_END = 0x11
PROTECT = 0x80  # registers 0 to 7 can't be written, but for LINE_COMPARE_8
OVERFLOW = 0x07
LINE_COMPARE_8 = 0x10
OFFSET = 0x13  # half the characters of a line

CLOCKING_MODE = 0x01  # of the sequencer
SCREEN_OFF = 0x20
GRAPHICS_MISC = 0x06
GRAPHICS_MODE = 0x01
ATTRIBUTE_MODE = 0x10
ENABLE_BLINK = 0x08

# Mode 3, 720 by 400 pixels.
MODE_3_MISC = 0x67
MODE_3_SEQUENCER = bytes.fromhex("0300030002")
MODE_3_CRTC = bytes.fromhex("5f4f50825581bf1f004f0d0e00000000 9c8e8f281f96b9a3ff")
MODE_3_GRAPHICS = bytes.fromhex("0000000000100e00ff")
MODE_3_ATTRIBUTE = bytes.fromhex("00010203040514073839 3a3b3c3d3e3f0c000f0800")
MODE_3 = {
    CRTC: MODE_3_CRTC,
    SEQUENCER: MODE_3_SEQUENCER,
    GRAPHICS: MODE_3_GRAPHICS,
    ATTRIBUTE: MODE_3_ATTRIBUTE,
}
DAC_BYTES = 768
BANK_BYTES = {CRTC: 32, SEQUENCER: 8, GRAPHICS: 16, ATTRIBUTE: 32}
INDEX_MASKS = {CRTC: 0x1F, SEQUENCER: 0x07, GRAPHICS: 0x0F, ATTRIBUTE: 0x1F}
INDEX_BITS = {CRTC: 5, SEQUENCER: 3, GRAPHICS: 4, ATTRIBUTE: 6}  # one more there: the screen is on

# 449 lines of 900 pixels at 28.322 MHz: 70 frames a second. Of the time between two frames retrace is the shorter part;
# all of it shows as retrace, for a guest whose look at the port takes as long as a line would miss the other.
LINE_NS = 31_777
LINE_SHOWN_NS = LINE_NS * 8 // 10
FRAME_NS = 449 * LINE_NS
FRAME_SHOWN_NS = 400 * LINE_NS


class VgaText(Device):
    """Map ``read`` and ``write`` at the 32 ports from 0x3c0, ``read_mono`` and ``write_mono`` at the 12 from 0x3b0.

    ``look()`` gives the MEMORY_BYTES of text memory. ``lines()`` and ``cursor`` say what is on the screen.
    """

    impl_sizes = (1, 1)

    def __init__(self, look: Callable[[], bytes], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._power_on()

    def _power_on(self) -> None:
        self.misc = MODE_3_MISC
        # By the port of the index: the registers, and the index itself.
        self._banks = {port: bytearray(MODE_3[port].ljust(size, b"\0")) for port, size in BANK_BYTES.items()}
        self._index = {CRTC: 0, SEQUENCER: 0, GRAPHICS: 0, ATTRIBUTE: 0x20}
        self._attribute_data = False  # what is written to ATTRIBUTE next is data
        self._feature = 0
        self._dac = bytearray(DAC_BYTES)
        self._dac_at = 0
        self._dac_reads = False
        self._dac_mask = 0xFF

    # -- what is on the screen ------------------------------------------------------------------------------

    def frame(self) -> Frame:
        """The screen as it is now. Blank while it is off, and in graphics modes, which are not there."""
        with self.lock:
            crtc = self._banks[CRTC]
            off = self._banks[SEQUENCER][CLOCKING_MODE] & SCREEN_OFF
            if off or self._banks[GRAPHICS][GRAPHICS_MISC] & GRAPHICS_MODE:
                return BLANK
            pitch = crtc[OFFSET] * 2 or COLUMNS
            start = crtc[START] << 8 | crtc[START + 1]
            at = (crtc[CURSOR] << 8 | crtc[CURSOR + 1]) - start
            lines = (crtc[CURSOR_START] & CURSOR_SCAN_LINE, crtc[CURSOR_END] & CURSOR_SCAN_LINE)
            shown = not crtc[CURSOR_START] & CURSOR_OFF and lines[0] <= lines[1]
            blink = bool(self._banks[ATTRIBUTE][ATTRIBUTE_MODE] & ENABLE_BLINK)
        memory = self._look()
        twice = memory + memory  # a line may wrap
        cells = bytearray()
        for row in range(ROWS):
            begin = 2 * (start + row * pitch) % MEMORY_BYTES
            cells += twice[begin : begin + ROW_BYTES]
        row, column = divmod(at, pitch)
        cursor = (row, column) if shown and 0 <= row < ROWS and column < COLUMNS else None
        return Frame(bytes(cells[:FRAME_BYTES]), cursor, blink)

    def lines(self) -> list[str]:
        """The 25 lines of text, without the blanks at their ends. From any thread."""
        return self.frame().lines()

    @property
    def cursor(self) -> tuple[int, int] | None:
        """Row and column, from 0; None while the guest has it hidden or elsewhere."""
        return self.frame().cursor

    # -- the guest's side -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        port = offset + 0xC0
        if port >= 0xD0:
            return self._read_crtc(port) if self.misc & MISC_COLOUR else 0xFF
        if port in (SEQUENCER, GRAPHICS, ATTRIBUTE):
            return self._index[port]
        if port in (SEQUENCER + 1, GRAPHICS + 1):
            return self._register(port - 1)
        if port == ATTRIBUTE_READ:
            return self._register(ATTRIBUTE)
        if port == MISC_WRITE:
            return STATUS_0_SENSE
        if port == MISC_READ:
            return self.misc
        if port == FEATURE_READ:
            return self._feature
        if PEL_MASK <= port <= DAC_DATA:
            return self._read_dac(port)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        port = offset + 0xC0
        if port >= 0xD0:
            if self.misc & MISC_COLOUR:
                self._write_crtc(port, value)
        elif port in (SEQUENCER, GRAPHICS):
            self._index[port] = value & INDEX_MASKS[port]
        elif port in (SEQUENCER + 1, GRAPHICS + 1):
            self._banks[port - 1][self._index[port - 1]] = value
        elif port == ATTRIBUTE:
            self._write_attribute(value)
        elif port == MISC_WRITE:
            self.misc = value
        elif PEL_MASK <= port <= DAC_DATA:
            self._write_dac(port, value)

    def read_mono(self, offset: int, size: int) -> int:
        return 0xFF if self.misc & MISC_COLOUR else self._read_crtc(offset + 0xD0)

    def write_mono(self, offset: int, size: int, value: int) -> None:
        if not self.misc & MISC_COLOUR:
            self._write_crtc(offset + 0xD0, value)

    def _register(self, bank: int) -> int:
        return self._banks[bank][self._index[bank] & INDEX_MASKS[bank]]

    def _read_crtc(self, port: int) -> int:
        if port == CRTC:
            return self._index[CRTC]
        if port == CRTC + 1:
            return self._register(CRTC)
        if port == STATUS_1:
            self._attribute_data = False  # the next write to the attribute controller is an index
            return self._status_1()
        return 0xFF

    def _write_crtc(self, port: int, value: int) -> None:
        if port == CRTC:
            self._index[CRTC] = value & INDEX_MASKS[CRTC]
        elif port == STATUS_1:
            self._feature = value
        elif port == CRTC + 1:
            crtc, index = self._banks[CRTC], self._index[CRTC]
            if index <= OVERFLOW and crtc[RETRACE_END] & PROTECT:
                if index == OVERFLOW:
                    crtc[index] = crtc[index] & ~LINE_COMPARE_8 | value & LINE_COMPARE_8
                return
            crtc[index] = value

    def _status_1(self) -> int:
        """By guest time: programs wait for one edge and then the other, and games take their pace from it."""
        at = self._clock.now_ns() % FRAME_NS
        if at >= FRAME_SHOWN_NS:
            return STATUS_1_RETRACE | STATUS_1_BLANK
        return STATUS_1_BLANK if at % LINE_NS >= LINE_SHOWN_NS else 0

    def _write_attribute(self, value: int) -> None:
        if self._attribute_data:
            index = self._index[ATTRIBUTE] & INDEX_MASKS[ATTRIBUTE]
            # While the screen is on (index bit 5) the palette is its own.
            if index >= ATTRIBUTE_MODE or not self._index[ATTRIBUTE] & 0x20:
                self._banks[ATTRIBUTE][index] = value
        else:
            self._index[ATTRIBUTE] = value & 0x3F
        self._attribute_data = not self._attribute_data

    def _read_dac(self, port: int) -> int:
        if port == PEL_MASK:
            return self._dac_mask
        if port == DAC_READ_INDEX:
            return 3 if self._dac_reads else 0
        if port == DAC_WRITE_INDEX:
            return self._dac_at // 3
        value = self._dac[self._dac_at]
        self._dac_at = (self._dac_at + 1) % DAC_BYTES
        return value

    def _write_dac(self, port: int, value: int) -> None:
        if port == PEL_MASK:
            self._dac_mask = value
        elif port == DAC_DATA:
            self._dac[self._dac_at] = value & 0x3F
            self._dac_at = (self._dac_at + 1) % DAC_BYTES
        else:
            self._dac_at = value * 3
            self._dac_reads = port == DAC_READ_INDEX

    # -- the machine's side ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """As the VGA BIOS that would run then leaves the registers. Text memory stays."""
        with self.lock:
            self._power_on()

    STATE = {
        "misc": 8,
        "_banks": ("each", {port: ("bytes", size) for port, size in BANK_BYTES.items()}),
        "_index": ("each", INDEX_BITS),
        "_attribute_data": "flag",
        "_feature": 8,
        "_dac": ("bytes", DAC_BYTES),
        "_dac_at": range(DAC_BYTES),
        "_dac_reads": "flag",
        "_dac_mask": 8,
    }
