"""The other side of a supervisor's socket: is there a lab, what time is it there, run this command in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from nested_lab import wire
from nested_lab.emulator import unix_connection
from nested_lab.supervisor import say

STATUS_TIMEOUT, STATUS_LAB_FAILED = 124, 125
# poll(2) promises that much for a pipe or a terminal which others read: no write of it waits.
PIPE_BUF = 4096
# A command that its time limit ends gets SIGTERM, and SIGKILL if it still runs after that.
GRACE_S = 5.0

PASSED_VARIABLES = ("HOME", "LANG", "LOGNAME", "PATH", "TERM", "USER", "VIRTUAL_ENV")
PASSED_PREFIXES = ("LC_", "PYVMM_", "PYTEST_", "PYTHON", "HYPOTHESIS_")

# What a terminal sends goes to its whole foreground group, what kill(1) sends to the process alone.
TO_GROUP = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
TO_PROCESS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


class LabBrokenError(Exception):
    """The lab stood still or ended under a command; it boots anew by itself."""


class NoLabError(Exception):
    """No lab is up in this directory."""


class LabConnection:
    """To the supervisor of the lab in `directory`. Raises NoLabError if there is none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.socket = unix_connection(directory / "socket")
        except OSError:
            raise NoLabError("no lab is up here: start one with `ci/lab up`") from None
        self._data = b""

    def ask(self, **what: Any) -> dict[str, Any]:
        """Waits while the lab boots. Raises NoLabError if the supervisor ends meanwhile."""
        try:
            self.socket.sendall(json.dumps(what).encode() + b"\n")
            while b"\n" not in self._data:
                self._receive()
        except OSError:
            raise NoLabError(f"the lab ended: see {self.directory / 'supervisor.log'}") from None
        line, _, self._data = self._data.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def told(self) -> str | None:
        """What has come unasked: "limit"; None for nothing. Raises LabBrokenError when the lab broke."""
        try:
            self._receive()
        except OSError:
            raise LabBrokenError("the lab ended") from None
        line, found, rest = self._data.partition(b"\n")
        if not found:
            return None
        self._data = rest
        told = json.loads(line)
        if told["end"] == "broken":
            raise LabBrokenError(told["why"])
        return str(told["end"])

    def status(self) -> dict[str, Any]:
        """clock_s, boot, breaks (boot, why, log of each), the emulator's pid, cpus, memory_mib, scratch."""
        return self.ask(ask="status")

    def clock_s(self) -> float:
        return float(self.status()["clock_s"])

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        self._data += data

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> LabConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteCommand:
    """A command in the lab whose standard streams are those of this process."""

    def __init__(self, lab: LabConnection, argv: list[str], limit_s: float | None, on_terminal: bool) -> None:
        self.lab = lab
        self.status: int | None = None
        self._limit_s = limit_s
        session = lab.ask(ask="session", limit_s=limit_s)
        self._token = session["token"]
        self._address = ("127.0.0.1", session["port"])
        self._command: int | None = None
        self._signals: list[int] = []
        self._timed_out = False
        self._kill_at = float("inf")
        self._on_terminal = on_terminal
        start = {
            "token": self._token, "argv": argv, "cwd": os.getcwd(), "env": environment(session["scratch"]),
            "terminal": terminal_size() if on_terminal else None, "binds": needed_of_tmp(argv),
        }  # fmt: skip
        self._connection = self._connect()
        self._connection.sendall(wire.frame(wire.START, json.dumps(start).encode()))
        self._connection.setblocking(False)
        self._to_agent = wire.Outlet(self._connection.fileno(), wire.CHUNK_BYTES)
        self._outlets = {wire.STDOUT: wire.Outlet(1, PIPE_BUF), wire.STDERR: wire.Outlet(2, PIPE_BUF)}
        self._frames = wire.Frames()
        self._input = True

    def run(self) -> int:
        """Until it has ended and all its output is out: its status. Raises LabBrokenError."""
        with passed_on_signals(self._signals) as wake:
            while self.status is None or any(outlet.waiting for outlet in self._outlets.values()):
                self._step(wake)
        return STATUS_TIMEOUT if self._timed_out else self.status

    def _step(self, wake: int) -> None:
        connection, supervisor = self._connection.fileno(), self.lab.socket.fileno()
        wanted = {wake: select.POLLIN}
        if self.status is None:
            wanted[supervisor] = select.POLLIN
            wanted[connection] = select.POLLOUT if self._to_agent.waiting else 0
            if not any(outlet.full for outlet in self._outlets.values()):
                wanted[connection] |= select.POLLIN
            if self._input and not self._to_agent.full:
                wanted[0] = select.POLLIN
        for outlet in self._outlets.values():
            if outlet.waiting:
                wanted[outlet.fd] = select.POLLOUT
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        left_s = self._kill_at - time.monotonic()
        ready = dict(poll.poll(max(0.0, left_s) * 1000 if left_s != float("inf") else None))
        if wake in ready:
            os.read(wake, 4096)
        self._send_signals()
        if 0 in ready and 0 in wanted:
            self._read_input()
        if ready.get(connection, 0) & select.POLLOUT:
            self._to_agent.flush()
        if ready.get(connection, 0) & ~select.POLLOUT:
            self._hear_agent()
        for outlet in self._outlets.values():
            if outlet.fd in ready and outlet.waiting:
                outlet.flush()
                if outlet.broken:
                    self._to_agent.put(wire.frame(wire.CLOSE, b"%d" % outlet.fd))
        if supervisor in ready and self.status is None:
            self._hear_supervisor()
        if time.monotonic() > self._kill_at:
            self._kill_at = float("inf")
            self._signal(signal.SIGKILL, group=True)

    def _read_input(self) -> None:
        try:
            data = os.read(0, wire.CHUNK_BYTES)
        except OSError:  # EIO: a terminal that has been hung up
            data = b""
        self._input = bool(data)
        self._to_agent.put(wire.frame(wire.STDIN, data))

    def _hear_agent(self) -> None:
        try:
            data = self._connection.recv(wire.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
        for kind, payload in self._frames.feed(data):
            if kind == wire.STARTED:
                self._command = json.loads(payload)["command"]
            elif kind == wire.EXIT:
                self.status = int(payload)
            elif kind in self._outlets:
                self._outlets[kind].put(payload)

    def _lost(self) -> None:
        """The connection ended without a status: the supervisor knows why, or the agent's process was killed."""
        if select.select([self.lab.socket], [], [], 5)[0]:
            self._hear_supervisor()
        raise LabBrokenError("the connection into the lab ended")

    def _hear_supervisor(self) -> None:
        if self.lab.told() == "limit":
            say(f"time limit: the command was ended after {self._limit_s:g} s")
            self._timed_out = True
            self._signal(signal.SIGTERM, group=True)
            self._kill_at = time.monotonic() + GRACE_S

    def _send_signals(self) -> None:
        if self._command is None:
            return
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGWINCH:
                if self._on_terminal:
                    self._ask_agent(wire.RESIZE, terminal=terminal_size())
                continue
            self._signal(number, group=number in TO_GROUP)
            if number == signal.SIGTSTP:
                os.kill(os.getpid(), signal.SIGSTOP)

    def _signal(self, number: int, group: bool) -> None:
        if self._command is None:  # not even started: then this end is the end
            raise SystemExit(STATUS_TIMEOUT if self._timed_out else 128 + number)
        self._ask_agent(wire.SIGNAL, number=number, group=group)

    def _ask_agent(self, kind: int, **what: Any) -> None:
        what |= {"token": self._token, "command": self._command}
        with contextlib.suppress(OSError), self._connect() as connection:
            connection.sendall(wire.frame(kind, json.dumps(what).encode()))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # until the agent has done it

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def passed_on_signals(into: list[int]) -> Iterator[int]:
    """Signals to this process are put into the list; the descriptor becomes readable for each."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def take(number: int, _frame: FrameType | None) -> None:
        into.append(number)

    numbers = (*TO_GROUP, *TO_PROCESS, signal.SIGWINCH)
    previous_fd = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, take) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield readable
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(readable)
        os.close(writable)


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Standard input, if it is a terminal, passes every key on; as it was afterwards."""
    if not os.isatty(0):
        yield
        return
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)  # not what drops what has been typed already
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def terminal_size() -> list[int]:
    """Rows and columns of the terminal on standard input; 24 and 80 if it is none, or does not know."""
    try:
        rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    except OSError:
        rows = columns = 0
    return [rows or 24, columns or 80]


def environment(scratch: str) -> dict[str, str]:
    """What of this process's environment goes along."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES)
    }
    return passed | {"PYVMM_LAB": "1", "LAB_SCRATCH": scratch}


def needed_of_tmp(argv: list[str]) -> list[str]:
    """The names right under the host's /tmp that the command may need: of its directory and of its words."""
    paths = [Path.cwd(), *(Path(word) for word in argv if word.startswith("/tmp/"))]
    return sorted({f"/tmp/{path.parts[2]}" for path in paths if len(path.parts) > 2 and path.parts[1] == "tmp"})


def execute(directory: Path, argv: list[str], limit_s: float | None, on_terminal: bool) -> int:
    """`ci/lab exec`: the command's exit status, STATUS_TIMEOUT, or STATUS_LAB_FAILED, said on standard error."""
    try:
        with LabConnection(directory) as lab:
            command = RemoteCommand(lab, argv, limit_s, on_terminal)
            try:
                with raw_terminal() if on_terminal else contextlib.nullcontext():
                    return command.run()
            finally:
                command.close()
    except (LabBrokenError, NoLabError) as error:
        say(str(error))
    except OSError as error:
        say(f"no connection into the lab: {error}")
    return STATUS_LAB_FAILED


def remove_if_empty(path: Path) -> None:
    """A scratch directory that nobody gave a name goes away again if nothing was put into it."""
    if any(path.iterdir()):
        say(f"the command left files in {path}")
    else:
        shutil.rmtree(path)

