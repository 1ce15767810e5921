"""``pyvmm attach``: a console of a running machine on this terminal (control/console.py is the other end)."""

from __future__ import annotations

import socket

from pyvmm.cli.options import Option, parse, usage
from pyvmm.cli.say import STATUS_INTERRUPTED, say
from pyvmm.cli.signals import Signals
from pyvmm.control.registry import Registry
from pyvmm.errors import ConfigError, describe
from pyvmm.event_loop import EventLoop
from pyvmm.light import Lock, patient_acquire
from pyvmm.terminal import Terminal

TITLE = """\
usage: pyvmm attach NAME [CONSOLE]

A console of a running machine: its serial port, or the one that is named (serial, hvc0, ...). Ctrl-A x leaves it, and
the machine runs on; Ctrl-A h tells the other keys. Others may be attached at the same time, and the console is also
where it was."""
OPTIONS = (Option("--help -h", "", "this"),)
READ_BYTES = 4096
LIMIT_S = 10.0
ANSWER_MOST_BYTES = 512


def attach(args: list[str]) -> int:
    words = [word for word in args if not word.startswith("-")]
    if parse(OPTIONS, [word for word in args if word.startswith("-")], verb="attach") or not words:
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if len(words) > 2:
        raise ConfigError("pyvmm attach NAME [CONSOLE]: give a machine's name, and which of its consoles")
    if any(not (word.isascii() and word.isprintable() and word.split() == [word]) for word in words[1:]):
        raise ConfigError(f"there is no console {words[1]!r}: a name is one word")  # nor another line to the machine
    registry = Registry()
    registry.find(words[0])
    path = registry.console_path(words[0])
    console, end, first = say_line(path, "attach " + "".join(words[1:]))
    with Signals() as signals:
        attached = Attached(end, path, console, first)
        signals.terminal = attached.terminal
        try:
            return attached.stay()
        except SystemExit as ended:  # by a signal (cli/signals.py)
            return int(ended.code or 0)
        except KeyboardInterrupt:
            return STATUS_INTERRUPTED
        finally:
            attached.close()
            say(f"pyvmm: {attached.why}")


def say_line(path: str, line: str) -> tuple[str, socket.socket, bytes]:
    """One of the lines that ConsoleServer takes: the console it is about, the socket, and what came after the answer.
    ConfigError where it is refused.
    """
    end = socket.socket(socket.AF_UNIX)
    try:
        end.settimeout(LIMIT_S)
        end.connect(path)
        end.sendall(line.encode() + b"\n")
        answer = b""
        while b"\n" not in answer and len(answer) < ANSWER_MOST_BYTES:
            data = end.recv(ANSWER_MOST_BYTES)
            if not data:
                raise ConfigError("the machine has ended")
            answer += data
    except TimeoutError:
        end.close()
        raise ConfigError(f"{path}: no answer: its guest has not begun, or its process is stopped") from None
    except OSError as error:
        end.close()
        raise ConfigError(f"{path}: {describe(error)}: its guest may not have begun") from None
    except BaseException:
        end.close()
        raise
    told, _, rest = answer.partition(b"\n")
    verdict, _, text = told.decode("utf-8", "replace").partition(" ")
    if verdict != "ok":
        end.close()
        raise ConfigError(text)
    return text, end, rest


class Attached:
    """This terminal and that console: one thread, the event loop's, moves bytes both ways. What the terminal does not
    take is not read from the machine, and what the machine does not take is not read from the keyboard.
    """

    def __init__(self, end: socket.socket, path: str, console: str, first: bytes) -> None:
        self.why = f"left {console}, the machine runs on"
        self._path = path
        self._name = console
        self._over = Lock()
        self._over.acquire()
        self._unsent = b""
        self._input_over = False
        self._end = end
        end.setblocking(False)
        self._loop = EventLoop(self._failed)
        self.terminal = Terminal(
            self._loop,
            raw=True,
            escape=self._escapes(),
            on_quit=self._finish,
            on_gone=self._finish,
            on_end=self._input_ended,
        )
        self._console = self.terminal.console(console)
        self._console.set_receiver(self._typed, self._room, self._break)
        self._console.set_writable(self._read_on)
        self._console.set_resized(self._resized)
        self._console.write(first)

    @staticmethod
    def _escapes() -> bool:
        from posix import isatty

        return isatty(0)

    def stay(self) -> int:
        """Until somebody has enough."""
        self.terminal.enter_raw()
        if self._escapes():
            say(f"pyvmm: attached to {self._name}, Ctrl-A x leaves it")
        self.terminal.start()
        self._resized()
        self._loop.call_soon(self._read_on)
        patient_acquire(self._over, None)
        return 0

    def close(self) -> None:
        self.terminal.close()
        self._loop.close()
        self._end.close()

    def _finish(self, why: str = "") -> None:
        self.why = why or self.why
        if self._over.locked():
            self._over.release()

    def _failed(self, error: BaseException) -> None:
        self._finish(f"left {self._name}: {describe(error)}")

    # -- from the machine --------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        self._loop.add_reader(self._end.fileno(), self._readable)

    def _readable(self) -> None:
        if not self._console.can_write:
            self._loop.remove_reader(self._end.fileno())
            return
        try:
            data = self._end.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._console.write(data)
            return
        self._loop.remove_reader(self._end.fileno())
        self._finish(f"{self._name} has hung up: the machine has ended, or this end read too slowly")

    # -- to the machine ----------------------------------------------------------------------------------------------

    def _typed(self, data: bytes) -> None:
        self._unsent += data
        self._send()

    def _input_ended(self) -> None:
        """Of a pipe, or a terminal that went away: nobody is left who could leave."""
        self._input_over = True
        if not self._unsent:
            self._finish(f"left {self._name}, its input has ended, the machine runs on")

    def _room(self) -> int:
        return 0 if self._unsent else READ_BYTES

    def _send(self) -> None:
        try:
            sent = self._end.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return  # the reader hears of it
        self._unsent = self._unsent[sent:]
        if self._unsent:
            self._loop.add_writer(self._end.fileno(), self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._end.fileno())
        self._send()
        if not self._unsent:
            self._console.accept_input()
            if self._input_over:
                self._input_ended()

    def _break(self) -> None:
        self._aside("break")

    def _resized(self) -> None:
        if self._console.size is not None:
            self._aside("resize", *self._console.size)

    def _aside(self, verb: str, *more: int) -> None:
        """By another connection: on this one all is typed."""
        try:
            _, end, _ = say_line(self._path, " ".join([verb, self._name, *map(str, more)]))
            end.close()
        except ConfigError as error:
            self._finish(f"left {self._name}: {error}")
