"""The process's terminal, or whatever its standard input and output are: one owner, whatever shows on it.

Consoles (the serial port, the debug console) share it. All of them write to it, one of them has what is typed, and
Ctrl-A is an escape as in QEMU. It is looked for here, before anybody asks whether a guest has room for a character.
A ``Screen`` takes the whole of it while it is shown.
"""

from __future__ import annotations

import posix

from pyvmm.chardev import READ_BYTES, CallableChardev, FdChardev
from pyvmm.errors import StateError
from pyvmm.light import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.event_loop import EventLoop

CTRL_A = 0x01
# Of what was typed or pasted and no guest has read; more is lost. Reading goes on, so that the escape is seen.
TYPED_LIMIT_BYTES = 1 << 20
HELD_LIMIT_BYTES = 65536  # what consoles wrote behind a screen


class Console(CallableChardev):
    """One device's stream on a terminal; ``Terminal.console`` makes it. ``feed`` is typed input."""

    def __init__(self, name: str, terminal: Terminal) -> None:
        super().__init__(terminal.show)
        self.name = name
        self._terminal = terminal

    def type(self, data: bytes) -> None:
        """Input from the keyboard: no end of it may pile up."""
        self.feed(data[: max(0, TYPED_LIMIT_BYTES - self.fed_bytes)])

    def set_receiver(
        self,
        receive: Callable[[bytes], None] | None,
        room: Callable[[], int] | None = None,
        on_break: Callable[[], None] | None = None,
    ) -> None:
        super().set_receiver(receive, room, on_break)
        self._terminal.accept_input()

    def accept_input(self) -> None:
        super().accept_input()
        self._terminal.accept_input()

    def set_resized(self, callback: Callable[[], None] | None) -> None:
        super().set_resized(callback)
        self._terminal.watch_size()

    def room(self) -> int:
        """How many more bytes its device takes now."""
        return 0 if self._receive is None or self.fed_bytes else self._room()

    def tell_writable(self) -> None:
        """The terminal takes output again."""
        if self._on_writable is not None:
            self._on_writable()


class Screen:
    """What can take the whole terminal in place of the consoles; Ctrl-A v changes between them. Called on the event
    loop's thread, with no lock held.
    """

    def show(self, write: Callable[[bytes], None]) -> None:
        """Draw everything; from now until ``hide`` returns ``write`` sends bytes to the terminal, from any thread."""

    def hide(self) -> None:
        """Leave the terminal as it was found. What consoles wrote meanwhile comes after it."""

    def type(self, data: bytes) -> None:
        """Take what is typed while it is shown."""


class Terminal(FdChardev):
    """Standard input and output, shared by consoles.

    Ctrl-A x calls ``on_quit``, Ctrl-A h tells the other keys; both work whatever the guest does. With ``escape`` False
    Ctrl-A is a character like any other, and input is read only as the first console's device has room for it.
    ``raw``: a terminal on standard input gives every key as it is, Ctrl-C included, from ``enter_raw`` to ``close``.
    ``on_gone`` hears that nobody reads the output any more, ``on_end`` that there is no more input. Callbacks come
    on the event loop's thread.
    """

    def __init__(
        self,
        loop: EventLoop,
        *,
        raw: bool = False,
        escape: bool = True,
        on_quit: Callable[[], None] | None = None,
        on_gone: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
        in_fd: int = 0,
        out_fd: int = 1,
    ) -> None:
        self.consoles: list[Console] = []
        super().__init__(loop, in_fd=in_fd, out_fd=out_fd)
        self._event_loop = loop
        self._escape = escape
        self._escaped = False  # the last byte was the escape
        self._keys: dict[str, tuple[str, Callable[[], None]]] = {}
        self._focus = 0  # which console has the keyboard
        self._on_gone = on_gone
        self._on_end = on_end
        self._tty_fd = in_fd
        self._raw = raw and posix.isatty(in_fd)
        self._cooked: list[int | list[bytes | int]] | None = None  # the terminal's own modes, while it is raw
        self._lent = True  # somebody else has it: until the run begins, and while the process is stopped
        self._pid = posix.getpid()
        self._screen: Screen | None = None
        self._screen_first = False
        self._shown = False  # the screen is
        self._show_lock = Lock()
        self._held = bytearray()
        self._size_fd = -1  # an eventfd: somebody is to look at the size
        self.add_key("h", "this help", lambda: self.show(self._help()))
        self.add_key("x", "quit", on_quit or (lambda: None))
        self.add_key("b", "send a break", self._send_break)

    def console(self, name: str) -> Console:
        """One more console. The first has the keyboard, until Ctrl-A c gives it to the next."""
        made = Console(name, self)
        made.can_write = self.can_write
        made.size = self._size() if self._size_fd >= 0 else None
        self.consoles.append(made)
        if len(self.consoles) == 2:
            self.add_key("c", "give the keyboard to the next console", self._next_console)
        return made

    def set_screen(self, screen: Screen, *, first: bool = False) -> None:
        """Have Ctrl-A v change between the consoles and ``screen``; ``first``: it is shown from ``start`` on."""
        self._screen = screen
        self._screen_first = first
        self.add_key("v", "change between the consoles and the screen", self.toggle_screen)

    def add_key(self, key: str, what: str, pressed: Callable[[], None]) -> None:
        """Call ``pressed()`` when Ctrl-A and ``key``, a small letter, are typed; ``what`` is its line of help."""
        self._keys[key] = (what, pressed)

    def start(self) -> None:
        """Begin to read what is typed. Once: a later call does nothing."""
        if self._receive is not None or self._closed:
            return
        self.set_receiver(self._typed, self._typed_room)
        if self._screen_first:
            self._event_loop.call_soon(self._show_first)
        if self._on_gone is not None and self._out_fd >= 0:
            try:
                self._event_loop.add_hang_up(self._out_fd, self._on_gone)
            except (OSError, StateError):
                pass  # closed from the start: nobody has ever listened

    # -- output ---------------------------------------------------------------------------------------------

    def show(self, data: bytes) -> None:
        """Output of a console: kept back while a screen is shown, the last of it."""
        with self._show_lock:
            if self._shown:
                self._held += data
                del self._held[:-HELD_LIMIT_BYTES]
            else:
                self.write(data)

    def _set_can_write(self, value: bool) -> None:
        super()._set_can_write(value)
        for console in self.consoles:
            console.can_write = value

    def _tell_writable(self) -> None:
        for console in self.consoles:
            console.tell_writable()

    # -- what is typed, on the loop's thread ----------------------------------------------------------------

    def _typed_room(self) -> int:
        if self._raw and self._cooked is None and not self._lent:
            self.enter_raw()  # a shell has brought us to the foreground, and told nobody
        if self._escape:
            return READ_BYTES
        return self.consoles[0].room() if self.consoles else 0

    def accept_input(self) -> None:
        if not self._escape and self._receive is not None:
            super().accept_input()

    def _input_ended(self) -> None:
        if self._on_end is not None:
            self._on_end()

    def _typed(self, data: bytes) -> None:
        if not self._escape or (CTRL_A not in data and not self._escaped):
            self._hand_over(data)
            return
        plain = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte in b"\x01aA":
                    plain.append(CTRL_A)
                    continue
                self._hand_over(bytes(plain))
                plain.clear()
                self._press(chr(byte).lower())
            elif byte == CTRL_A:
                self._escaped = True
            else:
                plain.append(byte)
        self._hand_over(bytes(plain))

    def leave_screen(self) -> bool:
        """The consoles again, for good. Whether the screen was shown, or was going to be."""
        first, self._screen_first = self._screen_first, False
        shown = self._shown
        if shown:
            self.toggle_screen()
        return first or shown

    def type_to_console(self, data: bytes) -> None:
        """As typed while the consoles are shown."""
        if self.consoles:
            self.consoles[self._focus].type(data)

    def _hand_over(self, data: bytes) -> None:
        if not data:
            return
        if self._shown and self._screen is not None:
            self._screen.type(data)
        else:
            self.type_to_console(data)

    def _press(self, key: str) -> None:
        _, pressed = self._keys.get("h" if key == "?" else key, ("", None))
        if pressed is not None:
            pressed()

    def _help(self) -> bytes:
        lines = [f"Ctrl-A {key}       {what}" for key, (what, _) in self._keys.items()]
        return "\r\n".join(["", *lines, "Ctrl-A Ctrl-A  send Ctrl-A", ""]).encode()

    def _send_break(self) -> None:
        if self.consoles:
            self.consoles[self._focus].send_break()

    def _next_console(self) -> None:
        self._focus = (self._focus + 1) % len(self.consoles)
        self.show(f"\r\n[the keyboard is on {self.consoles[self._focus].name}]\r\n".encode())

    def _show_first(self) -> None:
        if self._screen_first and not self._shown and not self._closed:
            self.toggle_screen()
        self._screen_first = False

    def toggle_screen(self) -> None:
        """As Ctrl-A v, on the loop's thread."""
        if self._screen is None:
            return
        if self._shown:
            self._screen.hide()
            with self._show_lock:
                self._shown = False
                self.write(bytes(self._held))
                self._held.clear()
        else:
            with self._show_lock:
                self._shown = True
            self._screen.show(self.write)

    # -- its size -------------------------------------------------------------------------------------------

    def watch_size(self) -> None:
        """Consoles have its size from now on, where it is a terminal: what it is, and after each ``resized``."""
        if self._size_fd >= 0 or self._closed:
            return
        for console in self.consoles:
            console.size = self._size()
        self._size_fd = posix.eventfd(0, posix.EFD_CLOEXEC | posix.EFD_NONBLOCK)
        self._event_loop.add_reader(self._size_fd, self._look_at_size, edge=True)

    def resized(self) -> None:
        """It may have another size (SIGWINCH). Takes no lock: a signal handler may call it."""
        if self._size_fd >= 0:
            posix.eventfd_write(self._size_fd, 1)

    def _size(self) -> tuple[int, int] | None:
        for fd in (self._out_fd, self._tty_fd):
            try:
                columns, lines = posix.get_terminal_size(fd)
            except OSError:
                continue
            if columns and lines:  # some have none, as a serial line
                return columns, lines
        return None

    def _look_at_size(self) -> None:
        size = self._size()
        for console in self.consoles:
            if size is not None and console.size != size:
                console.resize(*size)

    # -- raw mode -------------------------------------------------------------------------------------------

    def enter_raw(self) -> None:
        """Take keys as they are, where that was asked for and the terminal is ours: not in the background, where the
        kernel would stop the process for it (termios(3), job control). Takes no lock: a signal handler may call it.
        """
        self._lent = False
        if not self._raw or self._closed or not in_foreground(self._tty_fd):
            return
        import atexit
        import termios as t

        try:
            if self._cooked is None:
                self._cooked = t.tcgetattr(self._tty_fd)
                atexit.register(self.leave_raw)
            iflag, oflag, cflag, lflag, ispeed, ospeed, chars = t.tcgetattr(self._tty_fd)
            iflag &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL | t.IXON)
            oflag |= t.OPOST  # what this process prints itself still needs its line ends
            cflag = cflag & ~(t.CSIZE | t.PARENB) | t.CS8
            lflag &= ~(t.ECHO | t.ECHONL | t.ICANON | t.IEXTEN | t.ISIG)
            chars[t.VMIN], chars[t.VTIME] = 1, 0
            t.tcsetattr(self._tty_fd, t.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, chars])
        except (OSError, t.error):
            pass  # hung up: there is nothing to take

    def leave_raw(self) -> None:
        """Give the terminal back as it was. In the background it is not ours to give: a shell has set the modes it
        wants. Idempotent; takes no lock: a signal handler may call it.
        """
        self._lent = True
        cooked, self._cooked = self._cooked, None
        if cooked is None or posix.getpid() != self._pid:
            return  # a child of fork: the terminal is its parent's
        import atexit
        import termios

        atexit.unregister(self.leave_raw)
        if in_foreground(self._tty_fd):
            try:
                termios.tcsetattr(self._tty_fd, termios.TCSANOW, cooked)
            except (OSError, termios.error):
                pass  # hung up: nothing to restore

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._shown:
            self.toggle_screen()
        self._event_loop.remove_hang_up(self._out_fd)
        self._event_loop.remove_reader(self._size_fd)
        super().close()

    def _release(self) -> None:
        self.leave_raw()
        fd, self._size_fd = self._size_fd, -1
        if fd >= 0:
            posix.close(fd)


def in_foreground(fd: int) -> bool:
    """Whether this process may change the terminal's modes: it is in the foreground, or knows no job control there."""
    try:
        return posix.tcgetpgrp(fd) == posix.getpgrp()
    except OSError:
        return True
