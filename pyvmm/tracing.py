"""Tracing: a machine's trace, from its beginning to its end: who is traced, the thread that writes, the file.

Vcpus, queues, drives and interrupt inputs have a tap each while a trace is on, by which they leave records in the rings
of a Recorder (trace/recorder.pyx). The writer's thread empties those into the file, fifty times a second; whatever is
lost by a kill is younger than that. It also looks, once a second, for what has come meanwhile: another medium's drive,
a device that the guest has moved. Rings and taps are kept for the machine's next trace.
"""

from __future__ import annotations

import os
from stat import S_ISREG

from pyvmm.block.protocols.locking import lock_image, unlock_image
from pyvmm.errors import ConfigError, HostError, StateError, remedy
from pyvmm.light import Lock, Thread
from pyvmm.trace.format import END, LONGEST_NAME, MOST_REGIONS, NAMES, chunk_bytes, header_bytes
from pyvmm.trace.recorder import Recorder, clock_pair

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.boards.board import Board
    from pyvmm.chassis import Chassis
    from pyvmm.platform import Platform
    from pyvmm.trace.recorder import Tap

PERIOD_S = 0.02
LOOK_EVERY = 50  # periods
# Beside the vCPUs: queues' threads, workers of drives, the event loop, the embedder's own.
OTHER_THREADS = 64


class Tracing:
    """Of one machine; one trace at a time. ``error`` is a sentence where the last one ended before it was stopped."""

    def __init__(self, chassis: Chassis, board: Board, platform: Platform) -> None:
        self._chassis = chassis
        self._board = board
        self._platform = platform
        self._lock = Lock()  # one start or stop at a time
        self._stop = Lock()  # held while the writer is to go on
        self._recorder = Recorder(len(platform.cpus) + OTHER_THREADS)
        self._taps: dict[tuple[str, int], Tap] = {}
        self._drives: dict[str, int] = {}
        self._thread: Thread | None = None
        self._fd = -1
        self._over = False  # the machine is closed
        self._told = b""
        self.path = ""
        self.error = ""

    @property
    def on(self) -> bool:
        """Whether a trace is being written."""
        return self._thread is not None and not self.error

    @property
    def dropped(self) -> int:
        """Records of the last trace that found no room."""
        return self._recorder.dropped

    def start(self, path: str) -> None:
        """Begin a trace, in place of what the file has. ConfigError where there can be none, StateError where one is
        on.
        """
        with self._lock:
            if self._over:
                raise StateError("the machine is closed")
            if self._thread is not None:
                if not self.error:
                    raise StateError(f"a trace is being written to {self.path}: stop that one first")
                self._end_locked()
            fd = open_file(path)
            try:
                tsc, monotonic_ns = clock_pair()
                from time import time_ns

                os.write(fd, header_bytes(self._platform.tsc_khz, tsc, monotonic_ns, time_ns()))
                self._fd, self.path, self.error, self._told = fd, path, "", b""
                self._recorder.start()
                self._look()
                self._stop.acquire()
                thread = Thread(self._write)
                thread.start()
            except BaseException as error:
                self._let_go()
                if self._stop.locked():
                    self._stop.release()
                self._fd = -1
                close_file(fd)
                if isinstance(error, OSError):
                    raise ConfigError(f"trace {path}: {remedy(error, 'write elsewhere')}") from None
                raise
            self._thread = thread
        self._chassis.events.tell("trace", path=path, on=True, dropped=0, error="")

    def stop(self) -> int:
        """End it; all that was recorded is in the file. How many records were dropped. StateError where none is on,
        HostError where it has ended early.
        """
        with self._lock:
            if self._thread is None:
                raise StateError("no trace is being written")
            self._end_locked()
            if self.error:
                raise HostError(self.error)
            return self._recorder.dropped

    def _end_locked(self) -> None:
        thread, self._thread = self._thread, None
        self._recorder.stop()
        self._stop.release()
        assert thread is not None
        thread.join()  # before taps are taken away: it may be giving them out
        self._let_go()
        fd, self._fd = self._fd, -1
        try:
            if not self.error:
                os.fsync(fd)  # some file systems tell only now that there is no room
        except OSError as error:
            self._ends_early(error)
        close_file(fd)
        dropped = self._recorder.dropped
        self._chassis.events.tell("trace", path=self.path, on=False, dropped=dropped, error=self.error)

    def close(self) -> None:
        """The machine ends."""
        with self._lock:
            self._over = True
            if self._thread is not None:
                self._end_locked()

    def abandon(self) -> None:
        """In a child of fork: only the descriptor."""
        fd, self._fd, self._thread = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    # -- who is traced ---------------------------------------------------------------------------------------------

    def _tap(self, kind: str, source: int) -> Tap:
        if (kind, source) not in self._taps:
            self._taps[kind, source] = self._recorder.tap(source)
        return self._taps[kind, source]

    def _let_go(self) -> None:
        """Nobody is traced any more."""
        self._recorder.stop()
        for cpu in self._platform.cpus:
            cpu.exec.trace_to(None)
        for _, queue in self._queues():
            queue.trace_to(None)
        for backend in list(self._chassis.drives.backends.values()):
            backend.trace_to(None)
        for _, wire, _ in self._platform.irqchip.wires_by_gsi():
            wire.trace_to(None)
        self._platform.irqchip.tap = None

    def _queues(self) -> Iterator[tuple[str, Any]]:
        """Of all virtio devices, with the names that they have in a trace."""
        for name, device in list(self._board.parts):
            for queue in getattr(device, "queues", ()):
                yield f"{name}.{queue.index}", queue

    def _look(self) -> None:
        """Whoever is there is traced, and the file says what the numbers stand for."""
        queues, gsis = {}, {}
        for cpu in self._platform.cpus:
            cpu.exec.trace_to(self._tap("cpu", cpu.index))
        for number, (name, queue) in enumerate(self._queues()):
            queue.trace_to(self._tap("queue", number))
            queues[number] = name
        for name, backend in list(self._chassis.drives.backends.items()):
            number = self._drives.setdefault(name, len(self._drives))
            backend.trace_to(self._tap("drive", number))
        for gsi, wire, users in self._platform.irqchip.wires_by_gsi():
            wire.trace_to(self._tap("gsi", gsi))
            gsis[gsi] = ", ".join(dict.fromkeys(users))
        self._platform.irqchip.tap = self._tap("msi", 0)
        regions = [
            (space, region.base, region.size, region.name[:LONGEST_NAME])
            for space, of in (("IO", self._chassis.pio), ("MMIO", self._chassis.mmio))
            for region in of.regions
            if region.base is not None
        ]
        drives = {number: name for name, number in self._drives.items()}
        regions = regions[:MOST_REGIONS]
        self._tell(NAMES, cpus=len(self._platform.cpus), queues=queues, drives=drives, gsis=gsis, regions=regions)

    # -- the file --------------------------------------------------------------------------------------------------

    def _tell(self, kind: int, **what: Any) -> None:
        """A chunk of names, where they are others than before; or the end."""
        import json

        data = json.dumps(what, separators=(",", ":")).encode()
        if data != self._told:
            write_whole(self._fd, chunk_bytes(kind, data, *clock_pair()))
            self._told = data

    def _write(self) -> None:
        """The writer's thread."""
        periods = 0
        try:
            while not self._stop.acquire(timeout=PERIOD_S):
                self._recorder.drain(self._fd)
                periods += 1
                if periods % LOOK_EVERY == 0:
                    self._look()
            self._stop.release()
            self._recorder.drain(self._fd)
            self._tell(END, recorded=self._recorder.recorded, dropped=self._recorder.dropped)
        except OSError as error:
            self._let_go()
            self._ends_early(error)
        except BaseException as error:
            self._let_go()
            self.error = f"trace {self.path} ends early"
            self._chassis.outcomes.callback_raised(error)

    def _ends_early(self, error: OSError) -> None:
        self.error = f"trace {self.path} ends early: {remedy(error, 'write it elsewhere')}"


def open_file(path: str) -> int:
    """A regular file, empty, and nobody else's: what can make its writer wait is none, and what a machine has for a
    disk is not emptied. ConfigError.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    except OSError as error:
        raise ConfigError(f"trace {path}: {remedy(error, 'give a file that can be written')}") from None
    except ValueError:
        raise ConfigError(f"trace {path!r}: no file has such a name, give a file that can be written") from None
    if not S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"trace {path}: this is no regular file, give one")
    if not lock_image(fd, writes=True):
        os.close(fd)
        raise ConfigError(f"trace {path}: it is the image of a drive, or somebody's trace: give another file")
    os.ftruncate(fd, 0)
    return fd


def close_file(fd: int) -> None:
    """A child of fork may have a copy of the descriptor: the lock goes all the same."""
    unlock_image(fd)
    os.close(fd)


def write_whole(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
