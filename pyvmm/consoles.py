"""Consoles: the host's ends of a machine's serial port and debug console, and the terminal that they may share."""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.chardev import Chardev
    from pyvmm.closers import Closers
    from pyvmm.console_words import HostEnd
    from pyvmm.event_loop import EventLoop
    from pyvmm.screen import Frame
    from pyvmm.terminal import Terminal
    from pyvmm.terminal_screen import TerminalScreen

    # Of the terminal: a letter, its line of help, and what it does; that gets a function which shows text.
    Key = tuple[str, str, Callable[[Callable[[str], object]], object]]


def nobody(name: str, size: int) -> None:
    """In place of who hears of losses."""


class Consoles:
    """``open`` makes a console's host side from the words of MachineConfig.serial; ``by_name`` has all of them.

    ``command``: this process is `pyvmm run`. Its terminal is raw, has Ctrl-A as an escape with ``keys`` beside its own,
    shows a screen where there is one, ``on_quit()`` is Ctrl-A x, and ``on_gone()`` hears that nobody reads any more.
    """

    def __init__(
        self,
        loop: EventLoop,
        closers: Closers,
        *,
        command: bool = False,
        on_quit: Callable[[], None] | None = None,
        on_gone: Callable[[], None] | None = None,
        on_lost: Callable[[str, int], object] = nobody,
        keys: Sequence[Key] = (),
    ) -> None:
        self._on_lost = on_lost
        self._loop = loop
        self._closers = closers
        self._command = command
        self._on_quit = on_quit
        self._on_gone = on_gone
        self._keys = keys
        self._flushes: list[Callable[[], object]] = []
        self._last_flushes: list[Callable[[], object]] = []
        self.by_name: dict[str, Chardev] = {}
        self.made: list[Chardev] = []
        """Those that were made here; the embedder's own are the embedder's to close."""
        self.terminal: Terminal | None = None
        self.screen: TerminalScreen | None = None

    def open(self, spec: HostEnd, name: str) -> Chardev:
        """The host's side of the console ``name``. ConfigError for words that mean nothing."""
        opened = self.by_name[name] = self._open(spec, name)
        if opened is not spec:
            self.made.append(self._closers.add(opened))
        opened.on_lost = lambda: self._on_lost(name, opened.lost_bytes)
        return opened

    def let_go(self) -> None:
        """All is closed: the machine's own consoles have no device any more, and nobody to tell."""
        for chardev in self.made:
            chardev.set_receiver(None)
            chardev.on_lost = None
        self._flushes.clear()
        self._last_flushes.clear()
        self._on_lost = nobody
        self._on_quit = self._on_gone = None
        self._keys = ()

    def tell_losses(self) -> None:
        """At the end: how much output of each console was lost, where any was."""
        for name, opened in self.by_name.items():
            if opened.lost_bytes:
                self._on_lost(name, opened.lost_bytes)

    def _open(self, spec: HostEnd, name: str) -> Chardev:
        # By the module's name: a package that is asked for a module in it takes four times as long to answer.
        from pyvmm.chardev import CallableChardev, Chardev, FileChardev, NullChardev, PtyChardev

        if spec is None or spec == "none":
            return NullChardev()
        if isinstance(spec, Chardev):
            return spec
        if callable(spec):
            return CallableChardev(spec)
        if spec == "stdio":
            return self._the_terminal().console(name)
        if spec == "pty":
            return PtyChardev(self._loop)
        if spec.startswith("file:") and len(spec) > len("file:"):
            return FileChardev(spec[len("file:") :], self._loop)
        raise ConfigError(f"{name} {spec!r}: use none, stdio, pty or file:PATH")

    # -- the terminal ------------------------------------------------------------------------------------------

    def _the_terminal(self) -> Terminal:
        """The one owner of standard input and output."""
        if self.terminal is None:
            from posix import isatty

            from pyvmm.terminal import Terminal

            raw = self._command and isatty(0)
            made = self.terminal = Terminal(
                self._loop,
                raw=raw,
                escape=raw,
                on_quit=self._on_quit,
                on_gone=self._on_gone if self._command else None,
            )
            self._closers.call(self._close_terminal, made.abandon)
            for letter, what, pressed in self._keys:
                made.add_key(letter, what, lambda pressed=pressed: pressed(self._show_text))  # type: ignore[misc]
        return self.terminal

    def _show_text(self, text: str) -> None:
        if self.terminal is not None:
            self.terminal.show(f"\n{text}".replace("\n", "\r\n").encode())

    def add_screen(self, look: Callable[[], Frame]) -> None:
        """What ``look()`` gives is on a command's terminal, from the start; Ctrl-A v changes to the consoles."""
        if self._command:
            from pyvmm.terminal_screen import TerminalScreen

            line = self._the_terminal()
            self.screen = TerminalScreen(look, self._loop.clock, line.type_to_console, lambda: line.can_write)
            line.set_screen(self.screen, first=True)

    def take_terminal(self) -> None:
        """Keys only, no lines, from now on: before the guest's first character, and when there is a run to quit."""
        if self.terminal is not None:
            self.terminal.enter_raw()

    def start(self) -> None:
        """Begin to read what is typed. Once: a later call does nothing."""
        if self.terminal is not None:
            self.terminal.start()

    def _close_terminal(self) -> None:
        """The consoles again; what was on the screen stays to be read, as lines of text."""
        assert self.terminal is not None
        try:
            if self.screen is not None and self.terminal.leave_screen():
                self.terminal.show(self.screen.last_words())
        finally:
            self.terminal.close()

    # -- what the guest has said -------------------------------------------------------------------------------

    def add_flush(self, flush: Callable[[], object], *, in_a_pause: bool = True) -> None:
        """A device that keeps characters back for a while hands them on when ``flush()`` is called; one that keeps them
        longer than a pause takes, only before it is saved.
        """
        (self._flushes if in_a_pause else self._last_flushes).append(flush)

    def flush(self, *, saved: bool = False) -> None:
        """What the guest has said is out when this returns; all of it where the machine is being ``saved``."""
        if self.screen is not None:
            self.screen.refresh()
        for flush in (*self._flushes, *(self._last_flushes if saved else ())):
            flush()
