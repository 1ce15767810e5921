"""Serial: a 16550A UART, eight ports.

National Semiconductor PC16550D data sheet (registers: section 8). Where it is silent or software expects
other things, QEMU's behaviour: transmission takes no time; writing IER with ETBEI newly set raises the THRE
interrupt while the holding register is empty; OUT2 is kept but does not gate the interrupt line; MCR comes up
with OUT2, MSR with a carrier, the divisor with 9600 baud. LCR comes up with zero as table I says, but a word has 8 bits
until the guest writes LCR: much that runs without firmware sends text and never sets the line up.

A console's output is two exits a character, LSR read and THR written. ``region`` answers the first without Python and,
where ``gather_ns`` is given, keeps the second: a byte after a silence goes out at once, those that follow it within
``gather_ns`` are gathered and go out with the next newline, when there are many, or after that time.
"""

from __future__ import annotations

from pyvmm.device import Device
from pyvmm.light import deque
from pyvmm.region import RegisterRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.chardev import Chardev
    from pyvmm.clock import Clock
    from pyvmm.irq import IrqLine

# Offsets. The first two are the divisor latch while LCR.DLAB is set; FCR is IIR's place for writes.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

# Interrupt Enable Register
IER_RDI = 0x01  # ERBFI: received data, and the character timeout
IER_THRI = 0x02  # ETBEI: transmitter holding register empty
IER_RLSI = 0x04  # ELSI: receiver line status
IER_MSI = 0x08  # EDSSI: modem status

# Interrupt Identification Register, in the order of priority
IIR_RLSI = 0x06
IIR_CTI = 0x0C
IIR_RDI = 0x04
IIR_THRI = 0x02
IIR_MSI = 0x00
IIR_NO_INT = 0x01
IIR_FIFO = 0xC0

# FIFO Control Register
FCR_ENABLE = 0x01
FCR_CLEAR_RX = 0x02
FCR_CLEAR_TX = 0x04
FCR_KEPT = 0xC9  # enable, DMA mode, trigger level; the resets clear themselves
TRIGGER_LEVELS = (1, 4, 8, 14)  # by bits 7:6

# Line Control Register
LCR_WORD = 0x03  # 5 bits and up
WORD_MASKS = (0x1F, 0x3F, 0x7F, 0xFF)  # by LCR_WORD: the bits of a byte that go over the line
LCR_STOP = 0x04
LCR_PARITY = 0x08
LCR_BREAK = 0x40
LCR_DLAB = 0x80

# Modem Control Register
MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_BITS = 0x1F

# Line Status Register
LSR_DR = 0x01  # data ready
LSR_OE = 0x02  # overrun
LSR_PE = 0x04
LSR_FE = 0x08
LSR_BI = 0x10  # break
LSR_THRE = 0x20
LSR_TEMT = 0x40
LSR_FIFO_ERROR = 0x80  # a character in the receiver FIFO came with an error
LSR_ERRORS = LSR_OE | LSR_PE | LSR_FE | LSR_BI
LSR_TX_EMPTY = LSR_THRE | LSR_TEMT

# Modem Status Register
MSR_DCTS = 0x01
MSR_DDSR = 0x02
MSR_TERI = 0x04
MSR_DDCD = 0x08
MSR_DELTAS = 0x0F
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
CONNECTED = MSR_DCD | MSR_DSR | MSR_CTS  # what the host's side shows: somebody is there and listens

REGISTERS = 8
FIFO_BYTES = 16
GATHER_BYTES = 1024  # of output, at most
DIVISOR_9600 = 12
NS_PER_DIVIDED_BIT = 1_000_000_000 * 16 / 1_843_200  # the usual crystal; a bit takes 16 divided clocks
TIMEOUT_CHARS = 4  # section 8.6, character timeout indication

BYTES = tuple(bytes((value,)) for value in range(256))


class Serial(Device):
    """Output goes to ``chardev`` on the vCPU's thread, input comes from it on the event loop's thread.

    Guests poll LSR and write THR for every character of a console: both are served first, from one
    precomputed attribute each. ``region`` is the eight ports, for the bus: mapped there, it serves them by itself.
    """

    impl_sizes = (1, 1)

    __slots__ = (
        "_char_ns",
        "_chardev",
        "_clock",
        "_divisor",
        "_fcr",
        "_gather_ns",
        "_gather_timer",
        "_ier",
        "_iir",
        "_irq",
        "_last_put_ns",
        "_lcr",
        "_lsr",
        "_mcr",
        "_msr",
        "_rbr",
        "_refused",
        "_rx",
        "_scr",
        "_thr_open",
        "_thr_pending",
        "_timeout",
        "_timeout_pending",
        "_trigger",
        "_tx",
        "_word_mask",
        "region",
    )

    def __init__(self, irq: IrqLine, chardev: Chardev, clock: Clock, *, gather_ns: int = 0) -> None:
        self.region = RegisterRegion(REGISTERS, self, name="serial", capacity=GATHER_BYTES)
        self._gather_ns = gather_ns
        self._gather_timer = clock.timer(self._on_gather_timer)
        self._last_put_ns = -gather_ns
        self._irq = irq
        self._chardev = chardev
        self._thr_open = False
        self._clock = clock
        self._timeout = clock.timer(self._on_timeout)
        self._refused = False  # input waits at the chardev for room here
        self._rx: deque[int] = deque()  # receiver FIFO: byte | its LSR error bits << 8
        self._tx: deque[int] = deque()  # transmitter FIFO, or the holding register
        self._power_on()
        chardev.set_receiver(self._receive, self._room, self._receive_break)
        chardev.set_writable(self._on_writable)

    def _power_on(self) -> None:
        self._rx.clear()
        self._tx.clear()
        self._rbr = 0
        self._ier = 0
        self._fcr = 0
        self._trigger = 1
        self._lcr = 0
        self._word_mask = 0xFF
        self._mcr = MCR_OUT2
        self._lsr = LSR_TX_EMPTY
        self._msr = CONNECTED
        self._scr = 0
        self._divisor = DIVISOR_9600
        self._thr_pending = False  # the THRE interrupt condition
        self._timeout_pending = False
        self._timeout.disarm()
        self._derive()

    # -- the guest's side -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == 5:  # LSR: as numbers here, each global is a cold line of cache
            lsr = self._lsr
            if lsr & 0x1E:  # LSR_ERRORS
                self._clear_errors()
            return lsr
        if offset == IIR:
            return self._read_iir()
        if offset == RBR:
            return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._read_rbr()
        if offset == MSR:
            return self._read_msr()
        if offset == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        return self._scr

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:  # THR
            if self._thr_open:
                if self._gather_ns:
                    self._put_gathered(value)
                else:
                    self._chardev.write(BYTES[value])
                    if not self._chardev.can_write:
                        self._thr_open = False
            elif self._lcr & LCR_DLAB:
                self._set_divisor(self._divisor & 0xFF00 | value)
            else:
                self._write_thr(value)
        elif offset == IER:
            if self._lcr & LCR_DLAB:
                self._set_divisor(self._divisor & 0xFF | value << 8)
            else:
                self._write_ier(value & 0x0F)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._write_lcr(value)
        elif offset == MCR:
            self._write_mcr(value & MCR_BITS)
        elif offset == SCR:
            self._scr = value
        # LSR and MSR are for factory tests only: writes are dropped.

    def _read_rbr(self) -> int:
        if not self._fcr & FCR_ENABLE:
            self._lsr &= ~LSR_DR
            value = self._rbr
        else:
            value = self._rx.popleft() & 0xFF if self._rx else 0
            self._timeout_pending = False
            if self._rx:
                self._reveal_errors()
                self._arm_timeout()
            else:
                self._lsr &= ~LSR_DR
                self._timeout.disarm()
        self._update_irq()
        self._accept_input()
        return value

    def _read_iir(self) -> int:
        iir = self._iir
        if iir == IIR_THRI:
            self._thr_pending = False
            self._update_irq()
        return iir | IIR_FIFO if self._fcr & FCR_ENABLE else iir

    def _read_msr(self) -> int:
        msr = self._msr
        if msr & MSR_DELTAS:
            self._msr = msr & ~MSR_DELTAS
            self._update_irq()
        return msr

    def _clear_errors(self) -> None:
        """LSR was read: it has shown the errors of the character on top, not yet those of characters behind it."""
        self._lsr &= ~LSR_ERRORS
        self._show_fifo_error()
        self._update_irq()

    def _write_thr(self, value: int) -> None:
        """A byte that needs more than to be sent on: there is a THRE interrupt, loopback, a short word or a slow host.
        """
        if not self._fcr & FCR_ENABLE:
            self._tx.clear()
        elif len(self._tx) == FIFO_BYTES:
            self._tx.popleft()
        self._tx.append(value)
        self._lsr &= ~LSR_TX_EMPTY
        self._thr_pending = False
        self._update_irq()
        self._transmit()

    def _write_ier(self, value: int) -> None:
        changed = self._ier ^ value
        self._ier = value
        if changed & IER_THRI:
            self._thr_pending = bool(value & IER_THRI and self._lsr & LSR_THRE)
            self._find_thr_open()
        if changed:
            self._update_irq()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RX | FCR_CLEAR_TX
        if value & FCR_CLEAR_RX:
            self._rx.clear()
            self._lsr &= ~(LSR_DR | LSR_BI | LSR_FIFO_ERROR)
            self._timeout_pending = False
            self._timeout.disarm()
        if value & FCR_CLEAR_TX:
            self._tx.clear()
            self._lsr |= LSR_TX_EMPTY
            self._thr_pending = True
        self._fcr = value & FCR_KEPT
        self._trigger = TRIGGER_LEVELS[value >> 6] if value & FCR_ENABLE else 1
        self._find_thr_open()
        self._update_irq()
        self._accept_input()

    def _write_lcr(self, value: int) -> None:
        break_begins = value & ~self._lcr & LCR_BREAK
        self._lcr = value
        self._word_mask = WORD_MASKS[value & LCR_WORD]
        self._set_divisor(self._divisor)
        self._find_thr_open()
        if break_begins and self._mcr & MCR_LOOP:
            self._take_break()

    def _write_mcr(self, value: int) -> None:
        self._mcr = value
        if value & MCR_LOOP:  # section 8.7: the four outputs are the four inputs
            self._set_modem_lines(
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        else:
            self._set_modem_lines(CONNECTED)
        self._find_thr_open()
        self._transmit()
        self._accept_input()

    def _set_modem_lines(self, lines: int) -> None:
        changed = (self._msr ^ lines) & ~MSR_DELTAS
        if changed:
            deltas = changed >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
            if changed & MSR_RI and not lines & MSR_RI:
                deltas |= MSR_TERI  # the trailing edge only
            self._msr = lines | self._msr & MSR_DELTAS | deltas
            self._update_irq()

    def _set_divisor(self, divisor: int) -> None:
        self._divisor = divisor
        bits = 1 + 5 + (self._lcr & LCR_WORD) + 1  # start, data, stop
        bits += bool(self._lcr & LCR_STOP) + bool(self._lcr & LCR_PARITY)
        self._char_ns = int(bits * (divisor or 0x10000) * NS_PER_DIVIDED_BIT)

    # -- gathered output ------------------------------------------------------------------------------------

    def _put_gathered(self, value: int) -> None:
        """Send a byte that the region has not kept, behind those it has. Where it comes soon after another one, the
        region keeps bytes from now on.
        """
        region = self.region
        self._put_all(region.take() + BYTES[value])
        if not region.gathering:
            now_ns = self._clock.now_ns()
            # Not while time stands still, and the timer with it.
            if self._thr_open and 0 < now_ns - self._last_put_ns < self._gather_ns:
                region.gather(THR)
                self._gather_timer.arm(now_ns + self._gather_ns)
            self._last_put_ns = now_ns

    def _put_all(self, data: bytes) -> None:
        self._chardev.write(data)
        if not self._chardev.can_write:
            self._thr_open = False
            self.region.release()

    def _on_gather_timer(self) -> None:
        with self.lock:
            if not self.region.gathering:
                return
            now_ns = self._clock.now_ns()
            if data := self.region.take():
                self._last_put_ns = now_ns
                self._gather_timer.arm(now_ns + self._gather_ns)
                self._put_all(data)
            else:
                self.region.release()

    def flush(self) -> None:
        """Let out what was gathered, and begin anew."""
        with self.lock:
            self.region.release()
            if data := self.region.take():
                self._put_all(data)

    # -- both sides -----------------------------------------------------------------------------------------

    def _derive(self) -> None:
        """Everything that follows from the registers."""
        self._set_divisor(self._divisor)
        self._find_thr_open()
        self._update_irq()

    def _find_thr_open(self) -> None:
        """Whether a byte written to THR may go straight to the chardev and leave no trace in any register."""
        self._thr_open = (
            not self._lcr & LCR_DLAB
            and self._word_mask == 0xFF
            and not self._mcr & MCR_LOOP
            and not self._ier & IER_THRI
            and not self._tx
            and self._chardev.can_write
        )
        if not self._thr_open and self.region.gathering:
            self.flush()

    def _update_irq(self) -> None:
        ier = self._ier
        lsr = self._lsr
        if ier & IER_RLSI and lsr & LSR_ERRORS:
            iir = IIR_RLSI
        elif ier & IER_RDI and self._timeout_pending:
            iir = IIR_CTI
        elif ier & IER_RDI and self._received_enough():
            iir = IIR_RDI
        elif ier & IER_THRI and self._thr_pending:
            iir = IIR_THRI
        elif ier & IER_MSI and self._msr & MSR_DELTAS:
            iir = IIR_MSI
        else:
            iir = IIR_NO_INT
        self._iir = iir
        self._irq.set(0 if iir == IIR_NO_INT else 1)
        # Reading LSR changes nothing but where it shows errors.
        if lsr & LSR_ERRORS:
            self.region.unlatch(LSR)
        else:
            self.region.latch(LSR, lsr)

    def _received_enough(self) -> bool:
        if self._fcr & FCR_ENABLE:
            return len(self._rx) >= self._trigger
        return self._lsr & LSR_DR != 0

    def _transmit(self) -> None:
        """Send what waits, as far as the chardev takes it."""
        tx = self._tx
        if not tx:
            return
        # Section 8.1, LCR bits 0 and 1: the upper bits of a shorter word never leave the shift register.
        if self._mcr & MCR_LOOP:
            while tx:
                self._take(tx.popleft() & self._word_mask)
        elif self._chardev.can_write:
            self._chardev.write(bytes(byte & self._word_mask for byte in tx))
            tx.clear()
        else:
            return
        self._lsr |= LSR_TX_EMPTY
        self._thr_pending = True
        self._find_thr_open()
        self._update_irq()

    def _take(self, entry: int) -> None:
        """A character came in, over the line or in loopback. The caller updates the interrupt."""
        if not self._fcr & FCR_ENABLE:
            if self._lsr & LSR_DR:
                self._lsr |= LSR_OE  # the unread character is lost
            self._rbr = entry & 0xFF
            self._lsr |= LSR_DR | entry >> 8
            return
        if len(self._rx) == FIFO_BYTES:
            self._lsr |= LSR_OE  # the new one is lost, the FIFO stays as it is
        else:
            self._rx.append(entry)
            self._lsr |= LSR_DR
            if len(self._rx) == 1:
                self._reveal_errors()
            else:
                self._show_fifo_error()
        self._arm_timeout()

    def _take_break(self) -> None:
        self._take(LSR_BI << 8)  # one zero character (section 8.4, bit 4)
        self._update_irq()

    def _reveal_errors(self) -> None:
        """Errors show in LSR when their character is on top of the FIFO."""
        top = self._rx[0]
        if top >> 8:
            self._lsr |= top >> 8
            self._rx[0] = top & 0xFF
        self._show_fifo_error()

    def _show_fifo_error(self) -> None:
        """LSR bit 7: an error in the FIFO, shown already or not, that no read of LSR has cleared."""
        in_fifo = self._lsr & (LSR_PE | LSR_FE | LSR_BI) or any(entry >> 8 for entry in self._rx)
        if in_fifo and self._fcr & FCR_ENABLE:
            self._lsr |= LSR_FIFO_ERROR
        else:
            self._lsr &= ~LSR_FIFO_ERROR

    def _arm_timeout(self) -> None:
        self._timeout.arm(self._clock.now_ns() + TIMEOUT_CHARS * self._char_ns)

    def _accept_input(self) -> None:
        if self._refused and self._free():
            self._refused = False
            self._chardev.accept_input()

    def _free(self) -> int:
        """How many bytes to ask for: up to the trigger level, so that a guest's choice of it means something.
        """
        if self._mcr & MCR_LOOP:
            return 0  # section 8.7: the input is disconnected
        if self._fcr & FCR_ENABLE:
            return max(0, self._trigger - len(self._rx))
        return 0 if self._lsr & LSR_DR else 1

    # -- the host's side, on the event loop's thread --------------------------------------------------------

    def _room(self) -> int:
        with self.lock:
            free = self._free()
            self._refused = not free
            return free

    def _receive(self, data: bytes) -> None:
        with self.lock:
            for byte in data:
                self._take(byte & self._word_mask)
            self._update_irq()

    def _receive_break(self) -> None:
        with self.lock:
            if not self._mcr & MCR_LOOP:
                self._take_break()

    def _on_writable(self) -> None:
        with self.lock:
            self._transmit()
            self._find_thr_open()

    def _on_timeout(self) -> None:
        with self.lock:
            # The timer was armed again, or the FIFO emptied, between its expiry and the lock: nothing has timed out
            # then.
            if self._rx and not self._timeout.armed:
                self._timeout_pending = True
                self._update_irq()

    # -- the machine's side ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """As by the MR pin (section 8.0, table I), with the values QEMU starts with. What was queued is lost.
        """
        with self.lock:
            self.flush()
            self._power_on()
            self._accept_input()

    STATE = {
        "_rbr": 8,
        "_ier": 4,
        "_fcr": 8,
        "_lcr": 8,
        "_word_mask": 8,
        "_mcr": 5,
        "_lsr": 8,
        "_msr": 8,
        "_scr": 8,
        "_divisor": 16,
        "_rx": ("list", 16, 0, FIFO_BYTES),
        "_tx": ("list", 8, 0, FIFO_BYTES),
        "_thr_pending": "flag",
        "_timeout_pending": "flag",
        "_timeout": "timer",
        "_gathering": "flag",
        "_gathered": ("bytes", 0, GATHER_BYTES),
        "_gather_timer": "timer",
        "_last_put_ns": "moment",
    }

    @property
    def _gathered(self) -> bytes:
        return self.region.kept

    @_gathered.setter
    def _gathered(self, data: bytes) -> None:
        self.region.kept = data

    @property
    def _gathering(self) -> bool:
        return self.region.gathering

    @_gathering.setter
    def _gathering(self, on: bool) -> None:
        if on:
            self.region.gather(THR)
        else:
            self.region.release()

    def after_load(self) -> None:
        with self.lock:
            self._trigger = TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            self._timeout.go_on()
            self._gather_timer.go_on()
            self._derive()
