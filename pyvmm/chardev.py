"""The host's end of a byte stream (a serial port, a debug console): pty, file, Python callable; terminal.py has the
terminal.

Two threads meet here. A vCPU thread writes, with its device's lock held, and must never wait for whoever reads at the
other end: what a descriptor does not take at once is queued, and the event loop sends it on. The event loop's thread
brings input, and only as much as the device has room for.

Lock order: device, then chardev, then event loop. A chardev calls its device with none of its own locks held.
"""

from __future__ import annotations

import posix
import select
import stat
from errno import EIO, EPIPE
from time import monotonic

from pyvmm.errors import ConfigError, KindError, StateError, remedy
from pyvmm.light import Lock
from pyvmm.options import is_int, path_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike
    from typing import Any

    from typing_extensions import Buffer

    from pyvmm.event_loop import EventLoop

QUEUE_LIMIT_BYTES = 65536
FLUSH_LIMIT_S = 1.0  # how long close() waits for a reader
READ_BYTES = 4096
LONGEST_INPUT_BYTES = 1 << 30  # of a saved state
PTMX = posix.makedev(5, 2)  # Linux Documentation/admin-guide/devices.txt
LARGEST_SCREEN = 0xFFFF  # columns, or lines, as virtio and the kernel's struct winsize have them

BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL  # nobody reads at the other end (any more, or yet)


class Chardev:
    """Base, and the contract. One device is at the other side; one thread at a time calls ``write``.

    ``can_write`` turns False when the queue is full: a device that can hold back does so until it is told by the
    callback of ``set_writable``; what is written all the same may be lost. A write that finds it True is kept whole.
    """

    can_write = True
    lost_bytes = 0
    """Output dropped because the queue was full."""
    on_lost: Callable[[], object] | None = None
    """Called when the first of it is, on any thread and with the chardev's lock held."""
    size: tuple[int, int] | None = None
    """Columns and lines of the screen at the other end, where that is one and its size is known."""
    _fed: Feed | None = None
    _listeners: tuple[Callable[[bytes], object], ...] = ()
    _on_resize: Callable[[], None] | None = None

    def __init__(self) -> None:
        self._receive: Callable[[bytes], None] | None = None
        self._room: Callable[[], int] = lambda: READ_BYTES
        self._on_break: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None

    def write(self, data: bytes) -> None:
        """Send ``data`` to the host's side. Never blocks."""
        raise NotImplementedError

    def listen(self, heard: Callable[[bytes], object]) -> None:
        """Have ``heard(data)`` called too, with all that the device writes from now on: with the device's lock held, so
        it must not wait. Where nobody listens ``write`` is as if there were no such thing.
        """
        with _feed_lock:
            if not self._listeners:
                vars(self)["write"] = self._tell
            self._listeners = (*self._listeners, heard)

    def forget(self, heard: Callable[[bytes], object]) -> None:
        """One call may still be under way."""
        with _feed_lock:
            self._listeners = tuple(each for each in self._listeners if each != heard)
            if not self._listeners:
                vars(self).pop("write", None)

    def _tell(self, data: bytes) -> None:
        type(self).write(self, data)
        for heard in self._listeners:
            heard(data)

    def set_receiver(
        self,
        receive: Callable[[bytes], None] | None,
        room: Callable[[], int] | None = None,
        on_break: Callable[[], None] | None = None,
    ) -> None:
        """Send input to ``receive(data)``, never more than ``room()`` bytes (default: any amount) at a time.

        After ``room()`` gave 0 no input comes until the device calls ``accept_input``. ``on_break`` is called
        for a break condition on the line. None as receiver stops the input.
        """
        self._receive = receive
        self._room = room or (lambda: READ_BYTES)
        self._on_break = on_break
        if self._fed is not None:
            self._fed.deliver()

    def accept_input(self) -> None:
        """The device said it had no room, and has some again. It may hold its lock."""
        if self._fed is not None:
            self._fed.deliver()

    def feed(self, data: Buffer) -> None:
        """Input for the guest, any amount, from any thread, beside what comes from the other end.

        The device takes it at its own pace: ``fed_bytes`` says how much it has not taken yet. ConfigError for what are
        no bytes.
        """
        try:
            fed = memoryview(data).cast("B")
        except TypeError:
            raise KindError(f"feed({data!r}): give bytes, as by encode()") from None
        with _feed_lock:
            if self._fed is None:
                self._fed = Feed(self)
        self._fed.add(fed)

    @property
    def fed_bytes(self) -> int:
        """How much of what was fed the device has not taken yet."""
        return 0 if self._fed is None else len(self._fed.data)

    # Input that the guest has not taken is state; output is the host's as soon as it is written.
    STATE = {"_waiting": ("bytes", 0, LONGEST_INPUT_BYTES)}
    STATE_VERSION = 1

    @property
    def _waiting(self) -> bytes:
        return b"" if self._fed is None else bytes(self._fed.data)

    @_waiting.setter
    def _waiting(self, data: bytes) -> None:
        with _feed_lock:
            if self._fed is None:
                self._fed = Feed(self)
        self._fed.data[:] = data

    def save(self) -> dict[str, Any]:
        """What was fed and not taken (state.pyx has the contract)."""
        from pyvmm.state import save_fields

        return save_fields(self, self.STATE)

    def load(self, state: dict[str, Any]) -> None:
        from pyvmm.state import load_fields

        load_fields(self, self.STATE, state)

    def after_load(self) -> None:
        """The device may have output that this host takes, and room for input."""
        if self.can_write and self._on_writable is not None:
            self._on_writable()
        self.accept_input()

    def send_break(self) -> None:
        """A break condition on the line (Linux: the next character is a SysRq command)."""
        if self._on_break is not None:
            self._on_break()

    def resize(self, columns: int, lines: int) -> None:
        """The screen at the other end has this size now: a device that can tells its guest. From any thread."""
        if not all(is_int(number) and 0 < number <= LARGEST_SCREEN for number in (columns, lines)):
            raise KindError(f"resize({columns!r}, {lines!r}): give columns and lines, from 1 to {LARGEST_SCREEN}")
        self.size = columns, lines
        if self._on_resize is not None:
            self._on_resize()

    def set_resized(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when ``size`` has changed: with no lock held."""
        self._on_resize = callback

    def set_writable(self, callback: Callable[[], None] | None) -> None:
        """Call ``callback`` when ``can_write`` turned True again: on the loop's thread, with no lock held."""
        self._on_writable = callback

    def close(self) -> None:
        """Send the queue, if somebody takes it within a second, and give everything back. Idempotent."""

    def abandon(self) -> None:
        """In a child of fork: close what this process has, and touch nothing that the parent has too. Takes no lock."""


_feed_lock = Lock()  # of making Chardev._fed, and of who listens


class Feed:
    """What a program has fed to a console, on its way to the device."""

    def __init__(self, chardev: Chardev) -> None:
        self.data = bytearray()
        self._chardev = chardev
        self._lock = Lock()
        self._delivering = False
        self._look_again = False

    def add(self, data: memoryview) -> None:
        with self._lock:
            self.data += data
        self.deliver()

    def deliver(self) -> None:
        """Hand over as much as there is room for.

        One thread at a time does it, and holds no lock meanwhile; others only note that there may be more. So bytes
        keep their order, and no lock is taken under another.
        """
        with self._lock:
            self._look_again = True
            if self._delivering:
                return
            self._delivering = True
        try:
            while True:
                with self._lock:
                    if not self._look_again:
                        self._delivering = False
                        return
                    self._look_again = False
                self._deliver_while_room()
        except BaseException:
            with self._lock:
                self._delivering = False
            raise

    def _deliver_while_room(self) -> None:
        chardev = self._chardev
        while self.data and (receive := chardev._receive) is not None and (room := chardev._room()) > 0:
            with self._lock:
                data = bytes(self.data[:room])
                del self.data[:room]
            receive(data)


class NullChardev(Chardev):
    """Nobody there: output is lost, input comes from ``feed`` only."""

    def write(self, data: bytes) -> None:
        pass


class CallableChardev(Chardev):
    """Output goes to a Python callable, on the vCPU's thread; input comes from ``feed``.

    What the callable raises stops the machine as any error of a device does.
    """

    def __init__(self, fn: Callable[[bytes], object]) -> None:
        super().__init__()
        self._fn = fn

    def write(self, data: bytes) -> None:
        self._fn(data)


class FdChardev(Chardev):
    """Common to those on descriptors: the output queue, reading with room in mind, an orderly end.

    A descriptor may be shared with other processes, so it stays blocking: before each write it is asked
    whether it takes some, and never gets more than a write is then sure to take. Of a terminal that is one byte: so a
    terminal is opened once more, where it can be, by a descriptor of its own that does not block.
    """

    def __init__(self, loop: EventLoop | None, *, in_fd: int = -1, out_fd: int = -1) -> None:
        """Without a loop the queue is sent on at the next write and on close. -1: no such side."""
        super().__init__()
        self._loop = loop
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._lock = Lock()
        self._queue = bytearray()
        self._closed = False
        self._out_poll: select.poll | None = None  # None: a regular file, which takes everything
        self._chunk = QUEUE_LIMIT_BYTES
        self._own_fd = -1  # of a terminal
        self._edge = False
        self.write_error: OSError | None = None
        """Why output was dropped first, where the descriptor refused it: a full disk, say. Not where a reader left."""
        if out_fd >= 0:
            try:
                mode = posix.fstat(out_fd).st_mode
            except OSError:
                self._out_fd = -1
            else:
                if not stat.S_ISREG(mode):
                    self._out_fd, self._own_fd = own_terminal(out_fd)
                    self._out_poll = select.poll()
                    self._out_poll.register(self._out_fd, select.POLLOUT)
                    # POLLOUT promises PIPE_BUF bytes on a pipe, but on a terminal no more than one.
                    shared_terminal = posix.isatty(out_fd) and posix.get_blocking(self._out_fd)
                    self._chunk = 1 if shared_terminal else select.PIPE_BUF

    # -- output ---------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._queue:
                self._enqueue(data)
                self._send_queue()
                return
            sent = self._send(data)
            if sent < len(data):
                self._enqueue(data[sent:])
                if self._loop is not None and not self._closed:
                    try:
                        self._loop.add_writer(self._out_fd, self._on_writable_fd)
                    except StateError:
                        pass  # the machine is on its way out: close() sends it

    def _enqueue(self, data: bytes) -> None:
        if not self.can_write:
            kept = data[: max(0, QUEUE_LIMIT_BYTES - len(self._queue))]
            before, self.lost_bytes = self.lost_bytes, self.lost_bytes + len(data) - len(kept)
            if self.lost_bytes and not before and self.on_lost is not None:
                self.on_lost()
            data = kept
        self._queue += data
        if len(self._queue) >= QUEUE_LIMIT_BYTES:
            self._set_can_write(False)

    def _send(self, data: bytes | bytearray) -> int:
        """How many bytes the descriptor took, or swallowed for want of a reader, without waiting."""
        sent = 0
        fd, poll, chunk = self._out_fd, self._out_poll, self._chunk
        if fd < 0:
            return len(data)
        while sent < len(data):
            if poll is not None:
                ready = poll.poll(0)
                if not ready:
                    break
                if ready[0][1] & BROKEN:
                    return len(data)  # a write would fail, and kill a process with the default SIGPIPE
            try:
                sent += posix.write(fd, data[sent : sent + chunk])
            except BlockingIOError:
                break
            except OSError as exc:
                # A reader that left, or a terminal that vanished (EIO), is no fault of the host's.
                left = exc.errno == EPIPE or (exc.errno == EIO and poll is not None)
                if not left and self.write_error is None:
                    self.write_error = exc
                return len(data)
        return sent

    def _send_queue(self) -> bool:
        """Whether ``can_write`` turned True. The lock is held."""
        del self._queue[: self._send(self._queue)]
        if not self._queue and self._loop is not None:
            self._loop.remove_writer(self._out_fd)
        if not self.can_write and len(self._queue) <= QUEUE_LIMIT_BYTES // 2:
            self._set_can_write(True)
            return True
        return False

    def _set_can_write(self, value: bool) -> None:
        self.can_write = value

    def _on_writable_fd(self) -> None:
        with self._lock:
            if self._closed or not self._send_queue():
                return
        self._tell_writable()

    def _tell_writable(self) -> None:
        if self._on_writable is not None:
            self._on_writable()

    def _flush(self, limit_s: float) -> None:
        """Wait until the queue is sent, nobody reads it any more, or the time is over. The lock is held."""
        end = monotonic() + limit_s
        while self._queue:
            self._send_queue()
            left_s = end - monotonic()
            if left_s <= 0:
                self._queue.clear()
            elif self._queue and self._out_poll is not None:
                self._out_poll.poll(left_s * 1000)

    # -- input ----------------------------------------------------------------------------------------------

    def set_receiver(
        self,
        receive: Callable[[bytes], None] | None,
        room: Callable[[], int] | None = None,
        on_break: Callable[[], None] | None = None,
    ) -> None:
        super().set_receiver(receive, room, on_break)
        if self._loop is not None and self._in_fd >= 0:
            if receive is None:
                self._loop.remove_reader(self._in_fd)
            else:
                self._watch_input()

    def accept_input(self) -> None:
        super().accept_input()
        # On the loop's thread, so that it comes after the removal of the reader that made it necessary.
        if self._loop is not None:
            self._loop.call_soon(self._watch_input)

    def _watch_input(self) -> None:
        with self._lock:
            if self._loop is None or self._in_fd < 0 or self._closed or self._receive is None:
                return
            try:
                self._loop.add_reader(self._in_fd, self._on_readable, edge=self._edge)
            except StateError:
                pass  # the loop closes: no more input
            except OSError:
                self._in_fd = -1  # a process may be started with its standard input closed

    def _on_readable(self) -> None:
        """On the loop's thread: take in what there is room for; all of it where only an edge is reported."""
        while self._take_in() and self._edge:
            pass

    def _take_in(self) -> bool:
        receive = self._receive
        if receive is None or self._loop is None:
            return False
        room = self._room()
        if room <= 0:
            self._loop.remove_reader(self._in_fd)  # until accept_input
            return False
        with self._lock:
            data = None if self._closed else self._read(min(room, READ_BYTES))
            if data == b"":
                self._loop.remove_reader(self._in_fd)
        if data == b"":
            self._input_ended()
        if not data:
            return False
        receive(data)
        return True

    def _input_ended(self) -> None:
        """Nothing more is typed. On the event loop's thread."""

    def _read(self, size_bytes: int) -> bytes | None:
        """None where there is nothing now; empty at the end."""
        poll = select.poll()
        poll.register(self._in_fd, select.POLLIN)
        if not poll.poll(0):
            return None  # somebody who shares the descriptor was faster
        try:
            return posix.read(self._in_fd, size_bytes)
        except BlockingIOError:
            return None
        except OSError:  # EIO: the terminal went away
            return b""

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._loop is not None:
                self._loop.remove_reader(self._in_fd)
                self._loop.remove_writer(self._out_fd)
            self._flush(FLUSH_LIMIT_S)
            self._end()

    def abandon(self) -> None:
        if not self._closed:
            self._closed = True
            self._end()

    def _end(self) -> None:
        self._release()
        if self._own_fd >= 0:
            posix.close(self._own_fd)
        self._in_fd = self._out_fd = self._own_fd = -1

    def _release(self) -> None:
        """Close what is the chardev's own. The lock is held; no callback uses the descriptors any more."""


def own_terminal(fd: int) -> tuple[int, int]:
    """(the descriptor to write to, the same again where it is to be closed): where ``fd`` is a terminal, and may block,
    another descriptor of it that does not, and that nobody shares. There is none, and that is -1, of another user's
    terminal, of one in another mount namespace, and of the other end of a pseudo-terminal: that one's name makes a new
    one.
    """
    if not posix.isatty(fd) or not posix.get_blocking(fd) or posix.fstat(fd).st_rdev == PTMX:
        return fd, -1
    try:
        own = posix.open(posix.ttyname(fd), posix.O_WRONLY | posix.O_NOCTTY | posix.O_NONBLOCK | posix.O_CLOEXEC)
    except OSError:
        return fd, -1
    if posix.fstat(own).st_rdev != posix.fstat(fd).st_rdev:  # its name is another's here
        posix.close(own)
        return fd, -1
    return own, own


class PtyChardev(FdChardev):
    """A pseudo-terminal: a client (screen, minicom, socat) opens ``path``, goes away and comes back as it likes.

    While no client has it open, output is lost, as on an unplugged line.
    """

    def __init__(self, loop: EventLoop) -> None:
        import tty

        try:
            master_fd, slave_fd = posix.openpty()
        except OSError as exc:
            raise ConfigError(
                f"no pseudo-terminal to be had: {remedy(exc, 'mount devpts, or use a file')}"
            ) from exc
        self.path = posix.ttyname(slave_fd)
        """The device file for the client."""
        tty.setraw(slave_fd)
        # With our own end open the kernel would never report a client's absence (POLLHUP).
        posix.close(slave_fd)
        posix.set_blocking(master_fd, False)  # nobody shares it
        super().__init__(loop, in_fd=master_fd, out_fd=master_fd)
        self._chunk = select.PIPE_BUF
        # A hang-up lasts until the next client: level-triggered, it would keep the loop spinning.
        self._edge = True

    def _read(self, size_bytes: int) -> bytes | None:
        try:
            return posix.read(self._in_fd, size_bytes)
        except OSError:  # EIO: no client; it is no end, there may come another
            return None

    def _release(self) -> None:
        posix.close(self._out_fd)


class FileChardev(FdChardev):
    """Output is appended to a file, a FIFO or a device by path, or goes to an open descriptor, which stays open.

    ConfigError where the path can't be opened. A FIFO must have its reader already.
    """

    def __init__(self, target: str | PathLike[str] | int, loop: EventLoop | None = None) -> None:
        self.path = f"descriptor {target}" if isinstance(target, int) else path_text(target)
        self._owned = not isinstance(target, int)
        if isinstance(target, int):
            fd = target
            try:
                posix.fstat(fd)
            except OSError as exc:
                raise ConfigError(f"descriptor {fd} is not open: give one that is, or a path") from exc
        else:
            flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND
            flags |= posix.O_CLOEXEC | posix.O_NOCTTY | posix.O_NONBLOCK
            try:
                fd = posix.open(target, flags, 0o666)
            except OSError as exc:
                raise ConfigError(
                    f"can't write to {posix.fspath(target)!r}: "
                    + remedy(exc, "give the path of a file that may be created or appended to")
                ) from exc
            except ValueError:
                raise ConfigError(f"can't write to {self.path!r}: no file has such a name: give another path") from None
        super().__init__(loop, out_fd=fd)

    def _release(self) -> None:
        if self._owned:
            posix.close(self._out_fd)
