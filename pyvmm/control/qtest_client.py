"""QtestClient: the other end of a qtest server, of ours (qtest.py) and of QEMU's. QEMU docs/devel/testing/qtest.rst.

    with QtestClient.connect("/run/board.qtest") as q:
        q.outl(0xCF8, 0x8000_0000)
        print(hex(q.inl(0xCFC)), q.clock_step())
"""

from __future__ import annotations

from pyvmm.errors import ConfigError, KindError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    import socket

TIMEOUT_S = 20.0
RECEIVE_BYTES = 1 << 16


class QtestError(VmmError):
    """The server has refused a command: its words."""


class QtestClient:
    """``end`` is a connected socket; ``connect`` makes one. EOFError where the server hangs up, TimeoutError after
    ``timeout_s`` seconds without a reply, QtestError for what it refuses.

    ``irqs`` gathers the lines about interrupts as they come, "IRQ raise 4", and ``levels`` the pins' last.
    """

    def __init__(self, end: socket.socket, timeout_s: float = TIMEOUT_S) -> None:
        self.end = end
        self.end.settimeout(timeout_s)
        self.irqs: list[str] = []
        self.levels: dict[int, int] = {}
        self._pending = bytearray()

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout_s: float = TIMEOUT_S) -> QtestClient:
        """To the server that listens at ``path``. ConfigError where there is none."""
        import socket

        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(str(path))
        except OSError as error:
            end.close()
            raise ConfigError(f"socket {path}: {error.strerror or error}: start the server first") from None
        return cls(end, timeout_s)

    def hang_up(self) -> None:
        """Close the socket. The server keeps its board."""
        self.end.close()

    def __enter__(self) -> QtestClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.hang_up()

    # -- lines -------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.end.sendall(data)

    def line(self) -> str:
        """The next line, whatever it is."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            data = self.end.recv(RECEIVE_BYTES)
            if not data:
                raise EOFError(f"the server has hung up; last it said {bytes(self._pending)!r}")
            self._pending += data
        line = self._pending[:end].decode("latin-1")
        del self._pending[: end + 1]
        return line

    def reply(self) -> str:
        """The next line that is not about an interrupt."""
        while (line := self.line()).startswith("IRQ "):
            self.irqs.append(line)
            _, verb, pin = line.split()
            self.levels[int(pin)] = int(verb == "raise")
        return line

    def ask(self, line: str) -> str:
        """Send one command; the reply, whole."""
        if "\n" in line:
            raise ConfigError(f"{line!r} is more than one command: ask() one at a time")
        self.send(line.encode("latin-1") + b"\n")
        return self.reply()

    def command(self, *words: object) -> str:
        """Send the words as one command; what the reply says after OK. QtestError where it says something else."""
        reply = self.ask(" ".join(str(word) for word in words))
        verdict, _, rest = reply.partition(" ")
        if verdict != "OK":
            raise QtestError(reply)
        return rest

    # -- ports and memory --------------------------------------------------------------------------------------

    def inb(self, port: int) -> int:
        return int(self.command("inb", hex(port)), 16)

    def inw(self, port: int) -> int:
        return int(self.command("inw", hex(port)), 16)

    def inl(self, port: int) -> int:
        return int(self.command("inl", hex(port)), 16)

    def outb(self, port: int, value: int) -> None:
        self.command("outb", hex(port), hex(value))

    def outw(self, port: int, value: int) -> None:
        self.command("outw", hex(port), hex(value))

    def outl(self, port: int, value: int) -> None:
        self.command("outl", hex(port), hex(value))

    def readb(self, gpa: int) -> int:
        return int(self.command("readb", hex(gpa)), 16)

    def readw(self, gpa: int) -> int:
        return int(self.command("readw", hex(gpa)), 16)

    def readl(self, gpa: int) -> int:
        return int(self.command("readl", hex(gpa)), 16)

    def readq(self, gpa: int) -> int:
        return int(self.command("readq", hex(gpa)), 16)

    def writeb(self, gpa: int, value: int) -> None:
        self.command("writeb", hex(gpa), hex(value))

    def writew(self, gpa: int, value: int) -> None:
        self.command("writew", hex(gpa), hex(value))

    def writel(self, gpa: int, value: int) -> None:
        self.command("writel", hex(gpa), hex(value))

    def writeq(self, gpa: int, value: int) -> None:
        self.command("writeq", hex(gpa), hex(value))

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes as a processor would read them."""
        return bytes.fromhex(self.command("read", hex(gpa), hex(size)).removeprefix("0x")) if size else b""

    def write(self, gpa: int, data: bytes) -> None:
        """Write ``data`` as a processor would."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise KindError(f"write({gpa:#x}, {data!r}): give bytes")
        if data:
            self.command("write", hex(gpa), hex(len(data)), "0x" + bytes(data).hex())

    def memset(self, gpa: int, size: int, value: int) -> None:
        """``size`` times the byte ``value``."""
        self.command("memset", hex(gpa), hex(size), hex(value))

    # -- time and interrupts -----------------------------------------------------------------------------------

    def clock_step(self, ns: int | None = None) -> int:
        """Move guest time on by ``ns`` nanoseconds, or to the next timer's deadline: the time it is then."""
        return int(self.command("clock_step", *(() if ns is None else (ns,))))

    def clock_set(self, ns: int) -> int:
        """Move guest time on to ``ns``: the time it is then."""
        return int(self.command("clock_set", ns))

    def irq_intercept_in(self, path: str) -> None:
        """Hear of the inputs of one interrupt controller, by ``irqs`` and ``levels``, from now on."""
        self.command("irq_intercept_in", path)

    def irq_intercept_out(self, path: str) -> None:
        """Hear of its outputs."""
        self.command("irq_intercept_out", path)

    def set_irq_in(self, path: str, name: str, pin: int, level: int) -> None:
        """Drive an input of an interrupt controller."""
        self.command("set_irq_in", path, name, pin, level)
