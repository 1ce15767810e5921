"""Session: what gdb and a machine say to each other. All-stop: one vCPU stops, all stop.

gdb's documentation, "Remote Serial Protocol"; where that leaves it open, what QEMU's gdbstub does: a debugger that
comes stops the machine, ``?`` takes breakpoints away that somebody has left, and so on. Packets that are not known get
an empty reply, which tells gdb to do without.
"""

from __future__ import annotations

import binascii

from pyvmm.breakpoints import NoMore
from pyvmm.control.gdb import monitor
from pyvmm.control.gdb.packets import (
    DAMAGED,
    INTERRUPT,
    NACK,
    PACKET_BYTES,
    PacketReader,
    escape,
    frame,
)
from pyvmm.control.gdb.target import Unsteppable, Unsupported
from pyvmm.errors import BusError, StateError, VmmError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.control.gdb.target import Stop, Target

    class Peer(Protocol):
        """The way back to the client (control/socket.py)."""

        closed: bool
        held: bool

        @property
        def crowded(self) -> bool: ...
        def send(self, data: bytes) -> None: ...
        def close(self) -> None: ...
        def hold(self) -> None: ...
        def go_on(self) -> None: ...

# What E packets say; the numbers are errno's, as in QEMU.
NO_SUCH, FAULT, INVALID = b"E01", b"E14", b"E22"
OK = b"OK"
# How many bytes of memory a reply has room for, in hexadecimal.
MEMORY_BYTES = PACKET_BYTES // 2 - 16
THREADS_A_PACKET = 256
MONITOR_BYTES = 1 << 17  # of what one command may say
# Qqemu.sstep: bits of how a step is done (QEMU include/hw/core/cpu.h, SSTEP_*).
STEP_ENABLE, STEP_NO_IRQ = 1, 2
# By what Breakpoints.judge calls a stop.
REASONS = {"write": b"watch:%x;", "access": b"awatch:%x;"}


class Refused(Exception):
    """The command can't be carried out; ``reply`` is what the client hears."""

    def __init__(self, reply: bytes) -> None:
        super().__init__(reply)
        self.reply = reply


def hexadecimal(word: bytes, most_digits: int = 16) -> int:
    if not word or len(word) > most_digits or word.strip(b"0123456789abcdefABCDEF"):
        raise Refused(INVALID)
    return int(word, 16)


def from_hex(word: bytes) -> bytes:
    try:
        return binascii.unhexlify(word)
    except ValueError:
        raise Refused(INVALID) from None


def to_hex(data: bytes) -> bytes:
    return binascii.hexlify(data)


class Session:
    """One client's end. ``receive`` takes its bytes, ``look`` is called where the machine may have stopped, ``gone``
    when the client is not there any more; all on one thread. ``finish`` may be called from any.
    """

    def __init__(self, peer: Peer, target: Target, ended: Callable[[], None] = lambda: None) -> None:
        self._peer = peer
        self._ended = ended
        self._target = target
        self._reader = PacketReader()
        self._acknowledged = True
        self._last = b""  # what was sent last, for a client that did not get it
        self._index = 0  # the vCPU that registers and memory are of
        self._waits = False  # for the machine to stop
        self._lock = Lock()  # of that
        self._detached = False
        self._physical = False
        self._tells: set[bytes] = set()  # of swbreak and hwbreak, what the client wants to hear
        self._step_bits = STEP_ENABLE | STEP_NO_IRQ
        self._next_thread = 0
        target.attach()

    # -- bytes -------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        if self._detached:
            # It has yet to acknowledge that, and to hang up; one that wants more comes again.
            if data.strip(b"+"):
                self._peer.close()
            return
        self._reader.feed(data)
        self.roomy()

    def roomy(self) -> None:
        """Go on with what has come, as long as the client reads what it is told."""
        while not (self._detached or self._peer.closed):
            if self._peer.crowded:
                self._peer.hold()
                return
            item = self._reader.next()
            if item is None:
                break
            self._take(item)
        if self._peer.held:
            self._peer.go_on()

    def _take(self, item: bytes | str) -> None:
        if isinstance(item, bytes):
            if self._acknowledged:
                self._peer.send(b"+")
            reply = self._answer(item)
            if reply is not None:
                self._send(reply)
        elif item is DAMAGED and self._acknowledged:
            self._peer.send(b"-")
        elif item is NACK and self._acknowledged and self._last:
            self._peer.send(self._last)
        elif item is INTERRUPT and self._target.runs:
            self._target.interrupt()
            self.look()

    def _send(self, reply: bytes) -> None:
        self._last = frame(reply)
        self._peer.send(self._last)

    def _answer(self, packet: bytes) -> bytes | None:
        """The reply; None where there is none, or not yet."""
        handler = HANDLERS.get(packet[:1])
        if handler is None:
            return b""
        try:
            return handler(self, packet)
        except Refused as refused:
            return refused.reply
        except Unsupported:
            return b""
        except (NoMore, Unsteppable) as error:
            return b"E." + str(error).encode("ascii", "replace")
        except BusError:
            return FAULT
        except StateError:
            return NO_SUCH
        except VmmError:
            return INVALID

    # -- stops -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """The machine may have stopped: tell the client, where it waits for that."""
        with self._lock:
            stop = self._target.stop() if self._waits else None
            if stop is None:
                return
            self._waits = False
            self._target.no_steps()
            if stop.cpu is not None:
                self._index = stop.cpu
            self._send(self._stop_reply(stop))

    def finish(self) -> None:
        """The machine is about to be closed."""
        self.look()

    def _stop_reply(self, stop: Stop) -> bytes:
        if stop.status is not None:
            return b"W%02x" % stop.status
        reply = b"T%02xthread:%x;" % (stop.signal, self._index + 1)
        told = {"software": b"swbreak", "hardware": b"hwbreak"}.get(stop.kind)
        if told in self._tells:
            return reply + told + b":;"
        reason = REASONS.get(stop.kind)
        return reply + (reason % stop.address if reason is not None else b"")

    def _halt_reason(self, packet: bytes) -> bytes:
        """?: the client has just come, and knows of no breakpoint that was there before."""
        stop = self._target.stop()
        if stop is None:
            self._target.interrupt()
            stop = self._target.stop()
        elif stop.status is not None:
            return self._stop_reply(stop)
        self._target.remove_all()
        signal = 5 if stop is None or stop.signal == 2 else stop.signal
        return b"T%02xthread:%x;" % (signal, self._index + 1)

    # -- going on ----------------------------------------------------------------------------------------------

    def _go(self, steps: dict[int, bool]) -> bytes | None:
        self._waits = True
        step = bool(self._step_bits & STEP_ENABLE)
        try:
            self._target.resume({n: one and step for n, one in steps.items()}, bool(self._step_bits & STEP_NO_IRQ))
        except StateError:
            pass  # it has ended, and so stands
        except BaseException:
            self._waits = False
            raise
        self.look()
        return None

    def _continue(self, packet: bytes) -> bytes | None:
        """c [address], C signal[;address]: a signal means nothing to a guest."""
        self._jump(packet)
        return self._go({cpu.index: False for cpu in self._target.cpus})

    def _step(self, packet: bytes) -> bytes | None:
        """s, S: one instruction of the vCPU that was asked about last, the others stand."""
        self._jump(packet)
        return self._go({self._index: True})

    def _jump(self, packet: bytes) -> None:
        address = packet[1:] if packet[:1] in b"cs" else packet.partition(b";")[2]
        if address:
            self._target.write_registers(self._index, {self._number("rip"): hexadecimal(address)})

    def _number(self, name: str) -> int:
        return next(n for n, register in enumerate(self._target.registers.table) if register.name == name)

    def _v(self, packet: bytes) -> bytes | None:
        name, _, rest = packet.partition(b";")
        if packet == b"vCont?":
            return b"vCont;c;C;s;S"
        if name == b"vCont":
            return self._go(self._actions(rest))
        if name == b"vKill":
            return self._kill(packet)
        return b""

    def _actions(self, words: bytes) -> dict[int, bool]:
        """vCont: of each vCPU the first action that names it, or all; those without one stay where they are."""
        steps: dict[int, bool] = {}
        for word in words.split(b";"):
            action, colon, thread = word.partition(b":")
            if action[:1] not in (b"c", b"C", b"s", b"S") or not action:
                raise Refused(INVALID)
            index = self._thread(thread) if colon else None
            for n in range(len(self._target.cpus)) if index is None else (index,):
                steps.setdefault(n, action[:1] in b"sS")
        return steps

    def _detach(self, packet: bytes) -> bytes:
        """D: the machine goes on, and this is the end."""
        self._detached = True
        self._target.detach()
        return OK

    def _kill(self, packet: bytes) -> bytes | None:
        """k, vKill."""
        self._detached = True
        self._target.kill()
        if packet[:1] == b"v":
            return OK
        self._peer.close()
        return None

    def gone(self) -> None:
        """The client has left. Without a word, where it has neither detached nor killed."""
        self._ended()
        if not self._detached:
            self._detached = True
            self._target.leave()

    # -- threads -----------------------------------------------------------------------------------------------

    def _thread(self, word: bytes) -> int | None:
        """A vCPU's index by gdb's number; None for any, or all."""
        if word in (b"-1", b"0", b""):
            return None
        number = hexadecimal(word)
        if not 1 <= number <= len(self._target.cpus):
            raise Refused(INVALID)
        return number - 1

    def _choose(self, packet: bytes) -> bytes:
        """Hg, Hc: the vCPU that is meant from here on."""
        if packet[1:2] not in (b"g", b"c"):
            raise Refused(INVALID)
        index = self._thread(packet[2:])
        if index is not None:
            self._index = index
        return OK

    def _is_alive(self, packet: bytes) -> bytes:
        self._thread(packet[1:])
        return OK

    def _threads_from(self, first: int) -> bytes:
        last = min(first + THREADS_A_PACKET, len(self._target.cpus))
        self._next_thread = last
        return b"m" + b",".join(b"%x" % (n + 1) for n in range(first, last)) if first < last else b"l"

    # -- registers ---------------------------------------------------------------------------------------------

    def _read_all(self, packet: bytes) -> bytes:
        values = self._target.read_registers(self._index)
        table = self._target.registers.table
        return to_hex(b"".join(v.to_bytes(r.size_bytes, "little") for r, v in zip(table, values, strict=True)))

    def _write_all(self, packet: bytes) -> bytes:
        data = from_hex(packet[1:])
        registers = self._target.registers
        if len(data) != registers.size_bytes:
            raise Refused(INVALID)
        before, changed, at = self._target.read_registers(self._index), {}, 0
        for n, register in enumerate(registers.table):
            value = int.from_bytes(data[at : at + register.size_bytes], "little")
            at += register.size_bytes
            if value != before[n]:
                changed[n] = value
        if changed:
            self._target.write_registers(self._index, changed)
        return OK

    def _read_one(self, packet: bytes) -> bytes:
        number = self._register(packet[1:])
        value = self._target.read_registers(self._index)[number]
        return to_hex(value.to_bytes(self._target.registers.table[number].size_bytes, "little"))

    def _write_one(self, packet: bytes) -> bytes:
        word, _, digits = packet[1:].partition(b"=")
        number, data = self._register(word), from_hex(digits)
        if len(data) != self._target.registers.table[number].size_bytes:
            raise Refused(INVALID)
        self._target.write_registers(self._index, {number: int.from_bytes(data, "little")})
        return OK

    def _register(self, word: bytes) -> int:
        number = hexadecimal(word)
        if number >= len(self._target.registers.table):
            raise Refused(INVALID)
        return number

    # -- memory ------------------------------------------------------------------------------------------------

    def _range(self, words: bytes) -> tuple[int, int]:
        address, comma, size = words.partition(b",")
        if not comma:
            raise Refused(INVALID)
        return hexadecimal(address), hexadecimal(size)

    def _read_memory(self, packet: bytes) -> bytes:
        address, size = self._range(packet[1:])
        if size > MEMORY_BYTES:
            raise Refused(INVALID)
        data = self._target.read(self._index, address, size, physical=self._physical)
        if size and not data:
            raise Refused(FAULT)
        return to_hex(data)

    def _write_memory(self, packet: bytes) -> bytes:
        """M in hexadecimal, X as it is."""
        words, colon, content = packet[1:].partition(b":")
        address, size = self._range(words)
        data = from_hex(content) if packet[:1] == b"M" else content
        if not colon or len(data) != size:
            raise Refused(INVALID)
        if data:
            self._target.write(self._index, address, data, physical=self._physical)
        return OK

    def _breakpoint(self, packet: bytes) -> bytes:
        """Z, z: type, address, kind."""
        words = packet[1:].split(b";")[0].split(b",")
        if len(words) != 3:
            raise Refused(INVALID)
        kind, address, length = (hexadecimal(word) for word in words)
        if packet[:1] == b"Z":
            self._target.insert(self._index, kind, address, length)
        else:
            self._target.remove(kind, address, length)
        return OK

    # -- questions ---------------------------------------------------------------------------------------------

    def _query(self, packet: bytes) -> bytes | None:
        end = next((n for n, byte in enumerate(packet) if byte in b":,;="), len(packet))
        handler = QUERIES.get(packet[:end])
        return b"" if handler is None else handler(self, packet[end + 1 :])

    def _supported(self, words: bytes) -> bytes:
        self._tells = {word[:-1] for word in words.split(b";") if word in (b"swbreak+", b"hwbreak+")}
        return (
            b"PacketSize=%x;qXfer:features:read+;QStartNoAckMode+;vContSupported+;swbreak+;hwbreak+" % PACKET_BYTES
        )

    def _no_ack(self, words: bytes) -> bytes:
        self._acknowledged = False
        return OK

    def _description(self, words: bytes) -> bytes:
        """qXfer:features:read:ANNEX:OFFSET,LENGTH."""
        parts = words.split(b":")
        if parts[:2] != [b"features", b"read"] or len(parts) != 4:
            return b""
        if parts[2] != b"target.xml":
            raise Refused(b"E00")
        offset, size = self._range(parts[3])
        xml = self._target.registers.xml().encode()
        # An escape may double what is sent.
        part = xml[offset : offset + min(size, PACKET_BYTES // 2 - 16)]
        return (b"m" if offset + len(part) < len(xml) else b"l") + escape(part)

    def _name_thread(self, words: bytes) -> bytes:
        index = self._thread(words)
        return to_hex(self._target.describe_cpu(self._index if index is None else index).encode())

    def _possible_step_bits(self) -> int:
        return STEP_ENABLE | (STEP_NO_IRQ if self._target.holds_interrupts else 0)

    def _step_bits_known(self, words: bytes) -> bytes:
        """qqemu.sstepbits: what Qqemu.sstep may be made of."""
        text = b"ENABLE=%x" % STEP_ENABLE
        return text + (b",NOIRQ=%x" % STEP_NO_IRQ if self._possible_step_bits() & STEP_NO_IRQ else b"")

    def _step_bits_now(self, words: bytes) -> bytes:
        return b"0x%x" % (self._step_bits & self._possible_step_bits())

    def _set_step_bits(self, words: bytes) -> bytes:
        bits = hexadecimal(words.removeprefix(b"0x"))
        if bits & ~self._possible_step_bits():
            raise Refused(INVALID)
        self._step_bits = bits
        return OK

    def _set_physical(self, words: bytes) -> bytes:
        if words not in (b"0", b"1"):
            raise Refused(INVALID)
        self._physical = words == b"1"
        return OK

    def _command(self, words: bytes) -> bytes:
        """qRcmd: what a person has typed behind ``monitor``."""
        line = from_hex(words).decode("latin-1")
        text = monitor.answer(self._target, self._index, line).encode("utf-8", "replace")[:MONITOR_BYTES]
        room = PACKET_BYTES // 2 - 16
        for at in range(0, len(text), room):
            self._send(b"O" + to_hex(text[at : at + room]))
        return OK


HANDLERS: dict[bytes, Callable[[Session, bytes], bytes | None]] = {
    b"?": Session._halt_reason,
    b"c": Session._continue,
    b"C": Session._continue,
    b"s": Session._step,
    b"S": Session._step,
    b"v": Session._v,
    b"D": Session._detach,
    b"k": Session._kill,
    b"H": Session._choose,
    b"T": Session._is_alive,
    b"g": Session._read_all,
    b"G": Session._write_all,
    b"p": Session._read_one,
    b"P": Session._write_one,
    b"m": Session._read_memory,
    b"M": Session._write_memory,
    b"X": Session._write_memory,
    b"Z": Session._breakpoint,
    b"z": Session._breakpoint,
    b"q": Session._query,
    b"Q": Session._query,
}
QUERIES: dict[bytes, Callable[[Session, bytes], bytes | None]] = {
    b"qSupported": Session._supported,
    b"QStartNoAckMode": Session._no_ack,
    b"qXfer": Session._description,
    b"qAttached": lambda session, words: b"1",
    b"qC": lambda session, words: b"QC%x" % (session._index + 1),
    b"qfThreadInfo": lambda session, words: session._threads_from(0),
    b"qsThreadInfo": lambda session, words: session._threads_from(session._next_thread),
    b"qThreadExtraInfo": Session._name_thread,
    b"qRcmd": Session._command,
    b"qqemu.sstepbits": Session._step_bits_known,
    b"qqemu.sstep": Session._step_bits_now,
    b"Qqemu.sstep": Session._set_step_bits,
    b"qqemu.PhyMemMode": lambda session, words: b"1" if session._physical else b"0",
    b"Qqemu.PhyMemMode": Session._set_physical,
    b"qqemu.Supported": lambda session, words: b"sstepbits;sstep;PhyMemMode",
}
