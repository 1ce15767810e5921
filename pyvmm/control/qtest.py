"""qtest: a board driven from outside by lines of text, with no processor. QEMU docs/devel/testing/qtest.rst.

A client writes a command a line and reads a line for each; ``IRQ raise N`` and ``IRQ lower N`` may come before any
reply. Guest time stands still but for clock_step and clock_set. Replies are QEMU's to the letter where it has one;
where QEMU ends with a failed assertion (a missing argument, a port past 0xffff) it is ``FAIL`` and the reason.
"""

from __future__ import annotations

import binascii
import os
import select

from pyvmm.clock import VirtualClock
from pyvmm.errors import ConfigError, StateError
from pyvmm.guest_memory import GPA_END
from pyvmm.light import SIGNAL_CHECK_S, Lock, Thread, on_main_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping
    from typing import Protocol

    from pyvmm.address_space import AddressSpace
    from pyvmm.clock import Clock
    from pyvmm.devices.irq_pins import ControllerPins, IrqPins

    class Memory(Protocol):
        """What a processor meets at a guest-physical address."""

        def read(self, gpa: int, size: int) -> bytes: ...
        def write(self, gpa: int, data: bytes) -> None: ...

    class Board(Protocol):
        """What is driven: Machine(accel="qtest") is one."""

        @property
        def pio(self) -> AddressSpace: ...
        @property
        def memory_map(self) -> Memory: ...
        @property
        def clock(self) -> Clock: ...  # a VirtualClock
        @property
        def irq_controllers(self) -> Mapping[str, ControllerPins]: ...


MAX_BYTES = 64 << 20  # of one read, write or memset
LINE_MAX_BYTES = 2 * MAX_BYTES + 4096  # such a write in hexadecimal, and its command
CHUNK_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 16
PORTS = 1 << 16
UINT64_MAX = (1 << 64) - 1
INT64_MAX = (1 << 63) - 1
INT32_MAX = (1 << 31) - 1
ECHO_CHARS = 80

# What clients call the controllers: the last part of their QOM paths, and QEMU's type names.
ALIASES = {"i8259": "pic", "isa-i8259": "pic", "isa-pic": "pic"}
UNNAMED_PINS = "unnamed-gpio-in"


class Refused(Exception):
    """The command can't be carried out; the text is the reply."""


def number(word: str, what: str) -> int:
    """A whole number as strtoull reads it with base 0: decimal, 0x and hexadecimal, 0 and octal; -1 is 2**64 - 1."""
    value = signed(word, what)
    if abs(value) > UINT64_MAX:
        raise Refused(f"FAIL {what} {echo(word)} is too large")
    return value & UINT64_MAX


def signed(word: str, what: str) -> int:
    sign, digits = (word[0], word[1:]) if word[:1] in ("+", "-") else ("", word)
    base, alphabet = 10, "0123456789"
    if digits[:2] in ("0x", "0X"):
        base, alphabet, digits = 16, "0123456789abcdefABCDEF", digits[2:]
    elif digits[:1] == "0":
        base, alphabet = 8, "01234567"
    # Without leading zeros, and no longer than 2**64 is: Python refuses very long decimal numbers.
    digits = digits.lstrip("0") or digits[:1]
    if not digits or digits.strip(alphabet):
        raise Refused(f"FAIL {what} {echo(word)} is no number")
    if len(digits) > 22:
        raise Refused(f"FAIL {what} {echo(word)} is too large")
    return -int(digits, base) if sign == "-" else int(digits, base)


def echo(word: str) -> str:
    """A client's word in a message."""
    return repr(word if len(word) <= ECHO_CHARS else word[:ECHO_CHARS] + "...")


class Session:
    """One client's end: ``answer(line)`` carries a command out and gives the reply, without its newline.

    ``send(text)`` is called with IRQ lines, by whatever thread drives the pin. ``over()``, where it turns True, cuts
    long commands short.
    """

    def __init__(
        self, board: Board, send: Callable[[str], None], over: Callable[[], bool] = lambda: False
    ) -> None:
        self._board = board
        if not isinstance(board.clock, VirtualClock):
            raise StateError("qtest moves guest time by hand: make the machine with accel='qtest'")
        self._clock = board.clock
        self._send = send
        self._over = over
        self._watched: str | None = None  # the one controller whose pins are reported
        self._pins: IrqPins | None = None
        self._levels: list[int] = []
        self._lock = Lock()

    def answer(self, line: str) -> str:
        # Split as QEMU does: at each single blank.
        words = line.split(" ")
        entry = COMMANDS.get(words[0])
        try:
            if entry is None:
                raise Refused(f"FAIL Unknown command '{words[0][:ECHO_CHARS]}'")
            handler, arguments = entry
            if len(words) - 1 < len(arguments):
                raise Refused(f"FAIL {words[0]} takes {' '.join(arguments)}")
            return handler(self, words)
        except Refused as refused:
            return str(refused)
        except Exception as error:
            # A device that raises is wrong; the client learns of it, and goes on if it likes.
            import sys
            import traceback

            traceback.print_exc(file=sys.stderr)
            return f"FAIL {words[0]}: {type(error).__name__}: {' '.join(str(error).split())}"

    def close(self) -> None:
        """Watch no pins any more."""
        with self._lock:
            if self._pins is not None:
                self._pins.watch = None
                self._pins = None

    # -- ports and memory ----------------------------------------------------------------------------------------

    def _port(self, word: str) -> int:
        port = number(word, "ADDR")
        if port >= PORTS:
            raise Refused(f"FAIL ADDR {echo(word)} is no port")
        return port

    def _in(self, words: list[str]) -> str:
        size, port = SIZES[words[0][-1]], self._port(words[1])
        if port + size <= PORTS:
            return f"OK 0x{self._board.pio.read(port, size):04x}"
        # Past the last port there is nobody.
        data = bytes(self._board.pio.read(at, 1) for at in range(port, PORTS)).ljust(size, b"\xff")
        return f"OK 0x{int.from_bytes(data, 'little'):04x}"

    def _out(self, words: list[str]) -> str:
        size = SIZES[words[0][-1]]
        port, value = self._port(words[1]), number(words[2], "VALUE")
        if port + size <= PORTS:
            self._board.pio.write(port, size, value & (1 << 8 * size) - 1)
            return "OK"
        for at in range(port, PORTS):
            self._board.pio.write(at, 1, value >> 8 * (at - port) & 0xFF)
        return "OK"

    def _read_value(self, words: list[str]) -> str:
        data = self._load(number(words[1], "ADDR"), SIZES[words[0][-1]])
        return f"OK 0x{int.from_bytes(data, 'little'):016x}"

    def _write_value(self, words: list[str]) -> str:
        size = SIZES[words[0][-1]]
        address, value = number(words[1], "ADDR"), number(words[2], "VALUE")
        self._store(address, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
        return "OK"

    def _range(self, words: list[str]) -> tuple[int, int]:
        """ADDR and SIZE of a command that moves many bytes."""
        address, size = number(words[1], "ADDR"), number(words[2], "SIZE")
        if size > MAX_BYTES:
            raise Refused(f"FAIL SIZE {echo(words[2])} is more than {MAX_BYTES} bytes at once")
        return address, size

    def _read(self, words: list[str]) -> str:
        address, size = self._range(words)
        if not size:
            raise Refused("FAIL SIZE is 0")  # "0x" alone is no DATA
        return f"OK 0x{self._load(address, size).hex()}"

    def _write(self, words: list[str]) -> str:
        address, size = self._range(words)
        if len(words[3]) < 3:
            raise Refused("ERR invalid argument size")
        prefix, digits = words[3][:2], words[3][2:]
        if prefix not in ("0x", "0X") or digits.strip("0123456789abcdefABCDEF"):
            raise Refused("FAIL DATA is no hexadecimal number that starts with 0x")
        # Whole bytes: what is missing is zeros, what is too much is left out, as an odd digit.
        data = binascii.unhexlify(digits[: min(2 * size, len(digits) & ~1)])
        self._store(address, data.ljust(size, b"\0"))
        return "OK"

    def _b64read(self, words: list[str]) -> str:
        data = self._load(*self._range(words))
        return f"OK {binascii.b2a_base64(data, newline=False).decode()}"

    def _b64write(self, words: list[str]) -> str:
        address, size = self._range(words)
        if len(words[3]) < 3:
            raise Refused("ERR invalid argument size")
        try:
            data = binascii.a2b_base64(words[3], strict_mode=True)
        except ValueError:
            raise Refused("FAIL B64_DATA is not base64") from None
        self._store(address, data[:size])
        return "OK"

    def _memset(self, words: list[str]) -> str:
        address, size = self._range(words)
        self._store(address, bytes([number(words[3], "VALUE") & 0xFF]) * size)
        return "OK"

    def _load(self, address: int, size: int) -> bytes:
        """What the processor would read; past the last address there is nobody, and nobody reads as ones."""
        data = bytearray()
        for at, n in self._chunks(address, size):
            data += self._board.memory_map.read(at, n)
        return bytes(data.ljust(size, b"\xff"))

    def _store(self, address: int, data: bytes) -> None:
        for at, n in self._chunks(address, len(data)):
            self._board.memory_map.write(at, data[at - address : at - address + n])

    def _chunks(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        end = min(address + size, GPA_END)
        for at in range(address, end, CHUNK_BYTES):
            if self._over():
                return
            yield at, min(CHUNK_BYTES, end - at)

    # -- time ----------------------------------------------------------------------------------------------------

    def _clock_step(self, words: list[str]) -> str:
        clock = self._clock
        if len(words) > 1:
            return self._advance(clock.now_ns() + self._nanoseconds(words[1]))
        deadline_ns = clock.next_deadline_ns
        return self._advance(clock.now_ns() if deadline_ns is None else deadline_ns)

    def _clock_set(self, words: list[str]) -> str:
        return self._advance(self._nanoseconds(words[1]))

    def _nanoseconds(self, word: str) -> int:
        ns = signed(word, "NS")
        if abs(ns) > INT64_MAX:
            raise Refused(f"FAIL NS {echo(word)} is too large")
        return ns

    def _advance(self, to_ns: int) -> str:
        """Move guest time to ``to_ns``, from deadline to deadline; it never goes back."""
        clock = self._clock
        if to_ns > INT64_MAX:
            raise Refused("FAIL guest time ends at 2**63 - 1 ns")
        while not self._over():
            now_ns, deadline_ns = clock.now_ns(), clock.next_deadline_ns
            if deadline_ns is None or deadline_ns >= to_ns:
                clock.step(max(0, to_ns - now_ns))
                break
            clock.step(max(0, deadline_ns - now_ns))
        return f"OK {clock.now_ns()}"

    # -- interrupts ----------------------------------------------------------------------------------------------

    def _controller(self, path: str) -> tuple[str, ControllerPins]:
        name = path.rpartition("/")[2]
        name = ALIASES.get(name, name)
        pins = self._board.irq_controllers.get(name)
        if pins is None:
            raise Refused("FAIL Unknown device")
        return name, pins

    def _intercept(self, words: list[str]) -> str:
        name, controller = self._controller(words[1])
        if self._watched is not None:
            # One device, in the direction asked for first: the numbers would not tell one from the other.
            if self._watched != name:
                raise Refused("FAIL IRQ intercept already enabled")
            return "OK"
        pins = controller.inputs if words[0] == "irq_intercept_in" else controller.outputs
        self._watched = name
        if pins is not None:
            self._levels = [0] * pins.count
            self._pins = pins
            pins.watch = self._on_pin
        return "OK"

    def _on_pin(self, n: int, level: int) -> None:
        with self._lock:
            # A pin that was being driven while the client hung up is no news for the next one.
            if self._pins is not None and self._levels[n] != level:
                self._levels[n] = level
                self._send(f"IRQ {'raise' if level else 'lower'} {n}\n")

    def _set_irq_in(self, words: list[str]) -> str:
        _, controller = self._controller(words[1])
        pin, level = signed(words[3], "NUM"), signed(words[4], "LEVEL")
        if words[2] != UNNAMED_PINS or not 0 <= pin < controller.inputs.count:
            raise Refused(f"FAIL there is no pin {echo(words[2])} {echo(words[3])}")
        if abs(level) > INT32_MAX:
            raise Refused(f"FAIL LEVEL {echo(words[4])} is too large")
        controller.inputs.set(pin, int(level != 0))
        return "OK"

    # -- the rest ------------------------------------------------------------------------------------------------

    def _endianness(self, words: list[str]) -> str:
        return "OK little"

    def _module_load(self, words: list[str]) -> str:
        return "FAIL"


SIZES = {"b": 1, "w": 2, "l": 4, "q": 8}
COMMANDS: dict[str, tuple[Callable[[Session, list[str]], str], tuple[str, ...]]] = {
    **{f"in{size}": (Session._in, ("ADDR",)) for size in "bwl"},
    **{f"out{size}": (Session._out, ("ADDR", "VALUE")) for size in "bwl"},
    **{f"read{size}": (Session._read_value, ("ADDR",)) for size in SIZES},
    **{f"write{size}": (Session._write_value, ("ADDR", "VALUE")) for size in SIZES},
    "read": (Session._read, ("ADDR", "SIZE")),
    "write": (Session._write, ("ADDR", "SIZE", "DATA")),
    "b64read": (Session._b64read, ("ADDR", "SIZE")),
    "b64write": (Session._b64write, ("ADDR", "SIZE", "B64_DATA")),
    "memset": (Session._memset, ("ADDR", "SIZE", "VALUE")),
    "clock_step": (Session._clock_step, ()),
    "clock_set": (Session._clock_set, ("NS",)),
    "irq_intercept_in": (Session._intercept, ("QOM-PATH",)),
    "irq_intercept_out": (Session._intercept, ("QOM-PATH",)),
    "set_irq_in": (Session._set_irq_in, ("QOM-PATH", "NAME", "NUM", "LEVEL")),
    "endianness": (Session._endianness, ()),
    "module_load": (Session._module_load, ("TYPE", "NAME")),
}


class QtestServer:
    """Serves ``board`` on Unix sockets, one client at a time; what a client has done to the board stays for the next.

    ``listen(path)`` then ``serve()``, or ``connect(path)`` as QEMU does for libqtest, whose test has the listening
    end; ``talk(socket)`` serves one that is there already. They return when it is over; ``start()`` serves on a thread
    instead. ``close()``, from any thread, ends all.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._path = ""
        self._closed = False
        self._lock = Lock()  # of the four above
        self._send_lock = Lock()
        self._thread: Thread | None = None

    def listen(self, path: str) -> None:
        """Make the socket: a client can connect from now on. ConfigError where there can't be one."""
        import socket

        take_path(path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(path)
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise ConfigError(f"socket {path}: {error.strerror or error}: give a path that can be made") from None
        self._listener, self._path = listener, path

    def serve(self) -> None:
        """One client after the other, until ``close``."""
        if self._listener is None:
            raise StateError("there is no socket to serve: call listen() first")
        while not self._closed:
            try:
                wait_for_input(self._listener)
                client, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                raise
            self.talk(client)

    def start(self) -> None:
        """``serve`` on a thread of its own, until ``close``."""
        self._thread = Thread(self.serve)
        self._thread.start()

    def connect(self, path: str) -> None:
        """Serve whoever listens at ``path`` until it hangs up. ConfigError where nobody does."""
        import socket

        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError as error:
            client.close()
            raise ConfigError(f"socket {path}: {error.strerror or error}: start what listens there first") from None
        self.talk(client)

    def close(self) -> None:
        """Hang up, listen no more, take the socket's path away. Calling it again is fine."""
        with self._lock:
            self._closed = True
            for each in (self._listener, self._client):
                if each is not None:
                    hang_up(each)
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
                try:
                    os.unlink(self._path)
                except FileNotFoundError:
                    pass

    def talk(self, client: socket.socket) -> None:
        """Serve the client at the other end of ``client`` until it hangs up, and close it."""
        with self._lock:
            self._client = client
        session = Session(self._board, self._send, lambda: self._closed)
        try:
            if not self._closed:
                self._converse(client, session)
        except ConnectionError:
            pass  # gone without a word
        finally:
            # First of all: a thread that waits for the client to read waits no more.
            hang_up(client)
            session.close()
            with self._lock, self._send_lock:
                self._client = None
                client.close()

    def _converse(self, client: socket.socket, session: Session) -> None:
        pending = bytearray()
        while data := receive(client):
            searched = len(pending)
            pending += data
            while (end := pending.find(b"\n", searched)) >= 0:
                line = pending[:end].decode("latin-1").removesuffix("\r")
                del pending[: end + 1]
                searched = 0
                self._send(session.answer(line) + "\n")
            if len(pending) > LINE_MAX_BYTES:
                self._send(f"FAIL a line is longer than {LINE_MAX_BYTES} bytes\n")
                return

    def _send(self, text: str) -> None:
        """To the client there is. Waits while it does not read, as QEMU does."""
        with self._send_lock:
            client = self._client
            if client is not None:
                try:
                    client.sendall(text.encode("latin-1", "replace"))
                except OSError:  # it has hung up: the next recv() says so
                    pass


def receive(client: socket.socket) -> bytes:
    wait_for_input(client)
    return client.recv(RECEIVE_BYTES)


def wait_for_input(end: socket.socket) -> None:
    """On the main thread, which runs signal handlers: of two signals that come at once (those of timeout(1): SIGTERM,
    SIGCONT) another thread may take both, and no system call here ends for that. So look again now and then.
    """
    if on_main_thread():
        poll = select.poll()
        poll.register(end, select.POLLIN)
        while not poll.poll(SIGNAL_CHECK_S * 1000):
            pass


def hang_up(end: socket.socket) -> None:
    """Whoever waits on it, on any thread, goes on."""
    import socket

    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other end was first
        pass


def take_path(path: str) -> None:
    """Remove a socket that a server which is gone has left there. ConfigError where somebody still serves it."""
    import socket
    import stat

    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"{path} is there, and no socket: give another path")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"socket {path}: {error.strerror}: give a path that can be made") from None
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError as error:
            raise ConfigError(f"socket {path}: {error.strerror}: give another path") from None
        else:
            raise ConfigError(f"socket {path} is being served already: give another path")
