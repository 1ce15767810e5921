"""Owns the emulator of one lab: boots it, watches its beat, boots it anew when it stands still, keeps its clock.

A lab is a directory: `socket` (clients ask here), `supervisor.log`, and `boot-N/` with the console and the log of each
emulator. The process holds a lock on `lock` while it lives. What clients ask is a line of JSON, and so is each answer:

    {"ask": "session", "limit_s": S or null}   -> {"port", "token", "boot", "scratch"}; the connection stays open, and
                                                  {"end": "limit"} or {"end": "broken", "why"} may follow
    {"ask": "status"}                          -> {"clock_s", "boot", "breaks", "pid", ...}

Limits are in seconds of the lab's clock (emulator.LabClock).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nested_lab import image
from nested_lab.emulator import Emulator, EmulatorError, LabClock

# On the lab's clock. A boot says something on its console every two seconds; a beat comes every second.
BOOT_SILENCE_S = 15.0
BOOT_LIMIT_S = 90.0
BEAT_SILENCE_S = 15.0
BOOT_TRIES = 3
TICK_S = 0.25
DIAGNOSES_KEPT = 8
REQUEST_BYTES = 1 << 16
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LabError(Exception):
    """The lab cannot be had; the sentence is for the user."""


class StandStillError(Exception):
    """The emulated machine does nothing any more."""


class Client:
    """A connection to the supervisor, and when its command's time is up."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.data = b""
        self.deadline: float | None = None
        self.in_session = False

    def tell(self, **what: Any) -> None:
        """Never waits: a client that does not read a line has gone wrong."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(what).encode() + b"\n", socket.MSG_DONTWAIT)


class Supervisor:
    def __init__(self, directory: Path, cpus: int, memory_mib: int, scratch: Path, owner: int | None) -> None:
        self.directory = directory
        self.cpus, self.memory_mib = cpus, memory_mib
        self.scratch = scratch
        self.clock = LabClock()
        self.boot = 0
        self.breaks: list[dict[str, Any]] = []
        self.token = ""
        self.port = 0
        self._owner = os.pidfd_open(owner) if owner is not None else None
        self._emulator: Emulator | None = None
        self._clients: dict[int, Client] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._beat_at = 0.0

    # ---- the life of a lab ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the owner ends or a signal comes (SystemExit). Raises LabError if the lab does not come up again."""
        os.chdir(self.directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("socket")
        previous = os.umask(0o177)
        self._listener.bind("socket")
        os.umask(previous)
        try:
            while True:
                self._bring_up()
                self._listener.listen(64)
                why = self._watch()
                self._broken(why)
        finally:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink("socket")
            self._end_emulator()

    def _bring_up(self) -> None:
        """A boot that works, of at most three."""
        for last in (*[False] * (BOOT_TRIES - 1), True):
            self.boot += 1
            started = time.monotonic()
            try:
                self._boot()
                say(f"boot {self.boot} is up after {time.monotonic() - started:.1f} s")
                return
            except (StandStillError, EmulatorError) as error:
                self._note_break(str(error), f"boot {self.boot} failed: {error}", diagnosis_path())
                if last:
                    raise LabError(f"the lab does not come up: {error}; its logs are in {self.directory}") from None
        raise AssertionError("unreachable: the last try returns or raises")

    def _boot(self) -> None:
        arguments = Emulator.arguments(self.cpus, self.memory_mib)
        state = image.saved_state(arguments)
        directory = Path(f"boot-{self.boot}").resolve()
        directory.mkdir()
        saved = state.exists()
        self._emulator = emulator = Emulator(directory, arguments, self.scratch, state if saved else None)
        self.clock.watch(emulator.pid)
        until = self.clock.tick() + BOOT_LIMIT_S
        while not emulator.connect():
            self._pause(until)
        if saved:
            emulator.resume(lambda: self._pause(until))
        else:
            self._wait_ready(until)
            part = state.with_name(f"{state.name}.{os.getpid()}.part")
            try:
                emulator.save(part, lambda: self._pause(until))
                image.keep_state(part, state)
            finally:
                part.unlink(missing_ok=True)
        self.port = emulator.agent_port()
        self._send_settings()
        self._beat_at = self.clock.tick()
        while not self._hear_beat():
            self._pause(until)
            if self.clock.now - self._beat_at > BOOT_SILENCE_S:
                raise StandStillError("it stood still on the way to its agent")

    def _wait_ready(self, until: float) -> None:
        assert self._emulator is not None
        console, size, grown_at = self._emulator.console, 0, self.clock.tick()
        while image.READY not in console.read_bytes():
            self._pause(until)
            if console.stat().st_size != size:
                size, grown_at = console.stat().st_size, self.clock.now
            if self.clock.now - grown_at > BOOT_SILENCE_S:
                raise StandStillError("its kernel stood still")

    def _send_settings(self) -> None:
        """What the initial RAM disk reads: assignments, on one line."""
        assert self._emulator is not None
        assert self._emulator.control is not None
        self.token = secrets.token_hex(16)
        venv = Path(os.environ.get("PYVMM_VENV", image.ROOT / ".venv"))
        values = {
            "LAB_TIME": str(int(time.time())),
            "LAB_SEED": secrets.token_hex(64),
            "LAB_TOKEN": self.token,
            "LAB_CHECKOUT": str(image.ROOT),
            "LAB_VENV": str(venv.resolve()),
            "LAB_CACHE": str(image.CACHE),
            "LAB_SCRATCH": str(self.scratch),
            "LAB_PYTHON": str(venv / "bin" / "python"),
        }
        line = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
        if "\n" in line:
            raise LabError("a path with a line feed in it cannot be told to the lab")
        self._emulator.control.sendall(line.encode() + b"\n")

    def _watch(self) -> str:
        """Serves clients until the lab breaks: why."""
        assert self._emulator is not None
        self._beat_at = self.clock.tick()
        while True:
            try:
                self._serve(TICK_S)
                if self._hear_beat():
                    self._beat_at = self.clock.now
            except EmulatorError as error:
                return str(error)
            if self.clock.now - self._beat_at > BEAT_SILENCE_S:
                return f"it has not beaten for {BEAT_SILENCE_S:.0f} s"

    def _broken(self, why: str) -> None:
        """Clients first: they need not wait for the diagnosis."""
        say(f"boot {self.boot} broke: {why}")
        # The end of its client ends a lab of `ci/lab run`: it waits until the diagnosis is written.
        with ends_wait():
            log = diagnosis_path()
            for client in list(self._clients.values()):
                if client.in_session:
                    client.tell(end="broken", why=f"{why}; {log} tells what could be seen")
                    self._forget(client)
            self._note_break(why, f"boot {self.boot} broke: {why}", log)

    def _note_break(self, why: str, head: str, path: Path) -> None:
        """Writes down what can be seen, and ends the emulator."""
        self.breaks.append({"boot": self.boot, "why": why, "log": str(path)})
        emulator = self._emulator
        if emulator is not None:
            seen = "QEMU has ended" if emulator.ended() else emulator.diagnose()
            console = emulator.console.read_text("utf-8", "replace")
            said = (emulator.directory / "qemu.log").read_text()
            path.write_text(f"{head}\n{seen}\n---- console\n{console}\n---- QEMU\n{said}")
            for old in sorted(image.LAB.glob("stood-still-*.log"))[:-DIAGNOSES_KEPT]:
                old.unlink(missing_ok=True)
        self._end_emulator()

    def _end_emulator(self) -> None:
        self.clock.watch(None)
        if self._emulator is not None:
            self._emulator.close()
            with contextlib.suppress(OSError):
                shutil.copyfile(self._emulator.console, image.LAB / "console.log")
            self._emulator = None

    # ---- one step ------------------------------------------------------------------------------------------------

    def _pause(self, until: float) -> None:
        """A moment of waiting during a boot."""
        self._check()
        if self.clock.tick() > until:
            raise StandStillError(f"it was not up after {BOOT_LIMIT_S:.0f} s")
        time.sleep(0.01)

    def _check(self) -> None:
        assert self._emulator is not None
        if self._owner is not None and select.select([self._owner], [], [], 0)[0]:
            raise SystemExit(0)
        if self._emulator.ended():
            raise EmulatorError("QEMU ended")

    def _hear_beat(self) -> bool:
        """Whether a beat has come since the last look."""
        assert self._emulator is not None
        assert self._emulator.control is not None
        try:
            heard = self._emulator.control.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not heard:
            raise EmulatorError("QEMU ended")
        return True

    def _serve(self, wait_s: float) -> None:
        """Requests of clients and ends of their time, for at most `wait_s`."""
        assert self._emulator is not None
        assert self._emulator.control is not None
        poll = select.poll()
        for fd in (self._listener.fileno(), self._emulator.control.fileno(), *self._clients):
            poll.register(fd, select.POLLIN)
        if self._owner is not None:
            poll.register(self._owner, select.POLLIN)
        ready = poll.poll(wait_s * 1000)
        self.clock.tick()
        self._check()
        for fd, _ in ready:
            if fd == self._listener.fileno():
                connection = self._listener.accept()[0]
                self._clients[connection.fileno()] = Client(connection)
            elif fd in self._clients:
                self._hear(self._clients[fd])
        for client in list(self._clients.values()):
            if client.deadline is not None and self.clock.now > client.deadline:
                client.tell(end="limit")
                client.deadline = None

    def _hear(self, client: Client) -> None:
        try:
            data = client.connection.recv(REQUEST_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            data = b""
        client.data += data
        if not data or len(client.data) > REQUEST_BYTES:
            self._forget(client)
            return
        *lines, client.data = client.data.split(b"\n")
        for line in lines:
            try:
                self._answer(client, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self._forget(client)
                return

    def _answer(self, client: Client, request: dict[str, Any]) -> None:
        if request["ask"] == "session":
            limit_s = request["limit_s"]
            client.deadline = self.clock.now + float(limit_s) if limit_s is not None else None
            client.in_session = True
            client.tell(port=self.port, token=self.token, boot=self.boot, scratch=str(self.scratch))
        else:
            assert self._emulator is not None
            client.tell(
                clock_s=self.clock.now, boot=self.boot, breaks=self.breaks, pid=self._emulator.pid,
                cpus=self.cpus, memory_mib=self.memory_mib, scratch=str(self.scratch),
            )  # fmt: skip

    def _forget(self, client: Client) -> None:
        del self._clients[client.connection.fileno()]
        client.connection.close()


def diagnosis_path() -> Path:
    return Path(image.LAB, f"stood-still-{int(time.time() * 1000)}.log")


@contextlib.contextmanager
def ends_wait() -> Iterator[None]:
    """Signals that end the supervisor do so only after this."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def say(text: str) -> None:
    print(f"ci/lab: {text}", file=sys.stderr, flush=True)


def stop_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Ends by way of every `finally`, with the status a shell gives for the signal."""
    raise SystemExit(128 + number)


def locked(directory: Path) -> int | None:
    """The lock of the lab in `directory`, as a descriptor to keep; None if a supervisor holds it."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def supervise(directory: Path, cpus: int, memory_mib: int, scratch: Path, owner: int | None) -> int:
    """The life of a lab in this process; its exit status."""
    for number in ENDING:
        signal.signal(number, stop_on_signal)
    for old in directory.glob("boot-*"):
        shutil.rmtree(old)
    (directory / "pid").write_text(f"{os.getpid()}\n")
    (directory / "failure").unlink(missing_ok=True)
    try:
        Supervisor(directory, cpus, memory_mib, scratch, owner).run()
    except (LabError, OSError) as error:
        (directory / "failure").write_text(f"{error}\n")
        say(str(error))
        return 1
    return 0
