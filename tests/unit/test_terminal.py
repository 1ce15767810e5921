"""The terminal: keys, consoles that share it, raw mode, and a reader that leaves. Keys are QEMU's (-nographic)."""

from __future__ import annotations

import os
import posix
import subprocess
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chardev_port import LIMIT_S, Port, read_exactly, settle, turns_of

from pyvmm.chardev import READ_BYTES, FileChardev
from pyvmm.event_loop import EventLoop
from pyvmm.terminal import TYPED_LIMIT_BYTES, Console, Screen, Terminal


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    errors: list[BaseException] = []
    loop = EventLoop(errors.append)
    yield loop
    loop.close()
    assert errors == []


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    close(*ends)


@pytest.fixture
def pseudo_terminal() -> Iterator[tuple[int, int]]:
    """(user's end, program's end) of a terminal in its usual cooked mode."""
    master, slave = os.openpty()
    yield master, slave
    close(master, slave)


def close(*fds: int) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


class User:
    """A terminal on two pipes: what is typed into it, what it shows, what it called."""

    def __init__(self, loop: EventLoop) -> None:
        in_read, self.keyboard = os.pipe()
        self.display, out_write = os.pipe()
        self.fds = [in_read, self.keyboard, self.display, out_write]
        self.calls: list[str] = []
        self.called = threading.Event()
        self.terminal = Terminal(
            loop,
            in_fd=in_read,
            out_fd=out_write,
            on_quit=lambda: self.call("quit"),
            on_gone=lambda: self.call("gone"),
        )

    def call(self, what: str) -> None:
        self.calls.append(what)
        self.called.set()

    def console(self, name: str = "serial", room: int = 4096) -> tuple[Console, Port]:
        console = self.terminal.console(name)
        port = Port(room).attach(console)
        return console, port

    def type(self, data: bytes) -> None:
        self.terminal.start()
        while data:
            data = data[os.write(self.keyboard, data) :]

    def hang_up(self, fd: int) -> None:
        self.fds.remove(fd)
        os.close(fd)

    def expect(self, text: bytes) -> None:
        assert read_exactly(self.display, len(text)) == text


@pytest.fixture
def user(loop: EventLoop) -> Iterator[User]:
    user = User(loop)
    yield user
    user.terminal.close()
    close(*user.fds)


def test_both_ways(user: User) -> None:
    console, port = user.console()
    user.type(b"ls\n")
    port.wait_for(b"ls\n")
    console.write(b"file")
    user.expect(b"file")


def test_nothing_is_read_before_the_start(loop: EventLoop, user: User) -> None:
    _, port = user.console()
    os.write(user.keyboard, b"early")
    settle(loop)
    assert port.data == b""
    user.terminal.start()
    user.terminal.start()
    port.wait_for(b"early")


def test_input_waits_until_there_is_room(loop: EventLoop, user: User) -> None:
    console, port = user.console(room=3)
    user.type(b"0123456789")
    port.wait(lambda: port.refused)
    settle(loop)
    assert port.data == b"012"
    port.take(4)
    console.accept_input()
    port.wait(lambda: port.refused)
    assert port.data == b"0123456"
    port.take(100)
    console.accept_input()
    port.wait_for(b"0123456789")


def test_input_waits_for_a_receiver(loop: EventLoop, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    console, port = user.console()
    console.set_receiver(None)
    user.type(b"kept")
    assert turns_of(loop, monkeypatch) <= 10
    assert port.data == b""
    port.attach(console)
    port.wait_for(b"kept")


def test_end_of_input_just_ends_it(loop: EventLoop, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    console, port = user.console()
    user.type(b"last")
    user.hang_up(user.keyboard)
    port.wait_for(b"last")
    assert turns_of(loop, monkeypatch) <= 10
    console.write(b"ok")
    user.expect(b"ok")
    assert user.calls == []


# -- keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "arrives", "called"),
    [
        (b"\x01x", b"", ["quit"]),
        (b"\x01X", b"", ["quit"]),
        (b"ab\x01xcd", b"abcd", ["quit"]),
        (b"\x01\x01", b"\x01", []),
        (b"\x01a", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),
        (b"x\x01q!", b"x!", []),
        (b"\x01\xff\x01x", b"", ["quit"]),
    ],
)
def test_escapes(user: User, typed: bytes, arrives: bytes, called: list[str]) -> None:
    _, port = user.console()
    user.type(typed + b"$")
    port.wait_for(arrives + b"$")
    assert user.calls == called


def test_an_escape_may_come_in_two_pieces(loop: EventLoop, user: User) -> None:
    _, port = user.console()
    user.type(b"\x01")
    settle(loop)
    user.type(b"x.")
    port.wait_for(b".")
    assert user.calls == ["quit"]


def test_b_sends_a_break_and_h_shows_help(user: User) -> None:
    _, port = user.console()
    user.type(b"\x01b\x01h.")
    port.wait_for(b".")
    assert port.breaks == 1
    shown = os.read(user.display, 1000)
    assert b"Ctrl-A x" in shown and b"Ctrl-A Ctrl-A" in shown
    assert b"Ctrl-A c" not in shown  # there is one console only
    assert shown.count(b"\n") == shown.count(b"\r\n")


@pytest.mark.parametrize("before", [1, 17, 5000, 100_000])
def test_a_guest_that_reads_nothing_does_not_keep_the_escape_away(user: User, before: int) -> None:
    _, port = user.console(room=0)
    user.type(b"y" * before + b"\x01x")
    assert user.called.wait(LIMIT_S)
    assert user.calls == ["quit"]
    assert port.data == b""


def test_a_console_without_a_receiver_does_not_keep_the_escape_away(user: User) -> None:
    user.terminal.console("debugcon")
    user.type(b"y" * 100 + b"\x01x")
    assert user.called.wait(LIMIT_S)


def test_what_nobody_reads_is_bounded_and_the_first_of_it_kept(user: User) -> None:
    console, port = user.console(room=0)
    user.type(b"first" + bytes(TYPED_LIMIT_BYTES) + b"\x01x")
    assert user.called.wait(LIMIT_S)
    port.take(2 * TYPED_LIMIT_BYTES)
    console.accept_input()
    assert len(port.data) == TYPED_LIMIT_BYTES
    assert port.data.startswith(b"first\0")


# -- several consoles ---------------------------------------------------------------------------------------


def test_all_consoles_are_heard_and_one_is_typed_to(user: User) -> None:
    serial, to_serial = user.console("serial")
    debugcon, to_debugcon = user.console("debugcon")
    serial.write(b"one ")
    debugcon.write(b"two")
    user.expect(b"one two")
    user.type(b"a\x01cb\x01Cc")  # in one piece
    to_serial.wait_for(b"ac")
    to_debugcon.wait_for(b"b")
    user.expect(b"\r\n[the keyboard is on debugcon]\r\n\r\n[the keyboard is on serial]\r\n")


def test_a_break_goes_where_the_keyboard_is(user: User) -> None:
    _, first = user.console("first")
    _, second = user.console("second")
    _, third = user.console("third")
    user.type(b"\x01c\x01c\x01b\x01c\x01b.")
    first.wait_for(b".")
    assert (first.breaks, second.breaks, third.breaks) == (1, 0, 1)


def test_a_full_terminal_holds_all_consoles_back(loop: EventLoop, user: User) -> None:
    one, _ = user.console("one")
    two, _ = user.console("two")
    told = [threading.Event(), threading.Event()]
    one.set_writable(told[0].set)
    two.set_writable(told[1].set)
    while one.can_write:
        one.write(bytes(1000))
    assert not two.can_write
    assert not user.terminal.console("a third").can_write
    while not (told[0].is_set() and told[1].is_set()):
        assert os.read(user.display, 65536)
        settle(loop)
    assert one.can_write and two.can_write


# -- a screen -----------------------------------------------------------------------------------------------


class Picture(Screen):
    def __init__(self) -> None:
        self.typed = b""

    def show(self, write: Callable[[bytes], None]) -> None:
        self.write = write
        write(b"<picture")

    def hide(self) -> None:
        self.write(b">")

    def type(self, data: bytes) -> None:
        self.typed += data


def test_a_screen_takes_the_terminal_and_gives_it_back(loop: EventLoop, user: User) -> None:
    console, port = user.console()
    picture = Picture()
    user.terminal.set_screen(picture)
    user.type(b"a\x01vb")
    user.expect(b"<picture")
    settle(loop)
    console.write(b" behind it")
    picture.write(b".")
    user.type(b"\x01h\x01vc")
    port.wait_for(b"ac")
    assert picture.typed == b"b"
    user.expect(b".> behind it\r\nCtrl-A h")


def test_a_screen_that_is_shown_at_the_end_is_hidden(loop: EventLoop, user: User) -> None:
    console, _ = user.console()
    user.terminal.set_screen(Picture())
    user.type(b"\x01v\x01x")
    assert user.called.wait(LIMIT_S)
    console.write(b"last words")
    user.terminal.close()
    user.expect(b"<picture>last words")


def test_quitting_works_while_a_screen_is_shown(user: User) -> None:
    user.console()
    user.terminal.set_screen(Picture())
    user.type(b"\x01v\x01x")
    assert user.called.wait(LIMIT_S)


# -- no terminal: pipes and files ---------------------------------------------------------------------------


def test_without_escape_control_a_is_a_byte_like_any_other(loop: EventLoop, pipe: tuple[int, int]) -> None:
    terminal = Terminal(loop, escape=False, in_fd=pipe[0], out_fd=pipe[1])
    console = terminal.console("serial")
    port = Port().attach(console)
    terminal.start()
    console.write(b"\x01x")
    port.wait_for(b"\x01x")
    terminal.close()


def test_without_escape_no_more_is_read_than_there_is_room_for(loop: EventLoop, pipe: tuple[int, int]) -> None:
    """What the guest leaves of a pipe is there for the next program that reads it."""
    terminal = Terminal(loop, escape=False, in_fd=pipe[0], out_fd=-1)
    port = Port(room=3).attach(terminal.console("serial"))
    terminal.console("debugcon")
    os.write(pipe[1], b"012345")
    terminal.start()
    port.wait(lambda: port.refused)
    settle(loop)
    terminal.close()
    assert port.data == b"012"
    assert os.read(pipe[0], 100) == b"345"


def test_standard_input_from_a_file(loop: EventLoop, tmp_path: Path, pipe: tuple[int, int]) -> None:
    (tmp_path / "script").write_bytes(b"uname\npoweroff\n")
    fd = os.open(tmp_path / "script", os.O_RDONLY)
    terminal = Terminal(loop, escape=False, in_fd=fd, out_fd=pipe[1])
    console = terminal.console("serial")
    port = Port(room=6).attach(console)
    terminal.start()
    port.wait(lambda: port.refused)
    port.take(100)
    console.accept_input()
    port.wait_for(b"uname\npoweroff\n")
    terminal.close()
    os.close(fd)


def test_closed_standard_input_and_output_do_no_harm(loop: EventLoop) -> None:
    gone: list[str] = []
    terminal = Terminal(loop, in_fd=1_000_000, out_fd=1_000_001, on_gone=lambda: gone.append("gone"))
    console = terminal.console("serial")
    Port().attach(console)
    terminal.start()
    console.write(b"lost")
    assert console.can_write
    terminal.close()
    assert gone == []


def test_a_reader_that_leaves_is_noticed_without_a_write(loop: EventLoop, user: User) -> None:
    user.console()
    user.terminal.start()
    settle(loop)
    assert user.calls == []
    user.hang_up(user.display)
    assert user.called.wait(LIMIT_S)
    assert user.calls == ["gone"]


def test_a_reader_that_left_before_the_start_is_noticed(user: User) -> None:
    user.console()
    user.hang_up(user.display)
    user.terminal.start()
    assert user.called.wait(LIMIT_S)


@pytest.mark.parametrize("path", ["/dev/null", "file", "/dev/full"])
def test_what_has_no_reader_never_loses_it(
    loop: EventLoop, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(tmp_path / path, os.O_WRONLY | os.O_CREAT)
    gone: list[str] = []
    terminal = Terminal(loop, in_fd=-1, out_fd=fd, on_gone=lambda: gone.append("gone"))
    console = terminal.console("serial")
    terminal.start()
    console.write(b"lost" * READ_BYTES)
    assert turns_of(loop, monkeypatch) <= 10
    terminal.close()
    os.close(fd)
    assert gone == []
    assert (terminal.write_error is not None) == (path == "/dev/full")


# -- raw mode -----------------------------------------------------------------------------------------------


def test_raw_mode_only_when_asked_for_and_restored_on_close(
    loop: EventLoop, pseudo_terminal: tuple[int, int]
) -> None:
    user, program = pseudo_terminal
    before = termios.tcgetattr(program)
    cooked = Terminal(loop, in_fd=program, out_fd=program)
    cooked.enter_raw()
    assert termios.tcgetattr(program) == before
    cooked.close()
    terminal = Terminal(loop, raw=True, in_fd=program, out_fd=program)
    console = terminal.console("serial")
    assert termios.tcgetattr(program) == before
    terminal.enter_raw()
    lflag = termios.tcgetattr(program)[tty.LFLAG]
    assert not lflag & (termios.ECHO | termios.ICANON | termios.ISIG)
    port = Port().attach(console)
    terminal.start()
    os.write(user, b"\x03\r")  # Ctrl-C and Return go to the guest as they are
    port.wait_for(b"\x03\r")
    console.write(b"shown")
    assert read_exactly(user, 5) == b"shown"
    terminal.close()
    assert termios.tcgetattr(program) == before
    terminal.leave_raw()
    terminal.enter_raw()  # a signal that comes late
    assert termios.tcgetattr(program) == before


def test_two_consoles_save_the_modes_once(loop: EventLoop, pseudo_terminal: tuple[int, int]) -> None:
    _, program = pseudo_terminal
    before = termios.tcgetattr(program)
    terminal = Terminal(loop, raw=True, in_fd=program, out_fd=program)
    for name in ("serial", "debugcon"):
        Port().attach(terminal.console(name))
    for _ in range(2):
        terminal.enter_raw()
    terminal.close()
    assert termios.tcgetattr(program) == before


def test_modes_that_changed_while_it_was_given_back_are_those_to_restore(
    loop: EventLoop, pseudo_terminal: tuple[int, int]
) -> None:
    _, program = pseudo_terminal
    terminal = Terminal(loop, raw=True, in_fd=program, out_fd=program)
    terminal.enter_raw()
    terminal.leave_raw()
    modes = termios.tcgetattr(program)
    modes[tty.LFLAG] &= ~termios.ECHOE
    termios.tcsetattr(program, termios.TCSANOW, modes)
    modes = termios.tcgetattr(program)
    terminal.enter_raw()
    assert termios.tcgetattr(program) != modes
    terminal.close()
    assert termios.tcgetattr(program) == modes


def test_raw_mode_without_a_terminal_does_nothing(loop: EventLoop, pipe: tuple[int, int]) -> None:
    terminal = Terminal(loop, raw=True, in_fd=pipe[0], out_fd=pipe[1])
    terminal.enter_raw()
    terminal.close()


def test_terminal_is_restored_when_the_process_ends_without_close(pseudo_terminal: tuple[int, int]) -> None:
    program = pseudo_terminal[1]
    before = termios.tcgetattr(program)
    code = (
        "import sys, termios\n"
        "from pyvmm.event_loop import EventLoop\n"
        "from pyvmm.terminal import Terminal\n"
        "terminal = Terminal(EventLoop(print), raw=True)\n"
        "terminal.enter_raw()\n"
        "assert not termios.tcgetattr(0)[3] & termios.ECHO\n"
        "sys.exit('and out')\n"
    )
    command = [sys.executable, "-c", code]
    status = subprocess.run(command, stdin=program, stderr=subprocess.PIPE, check=False)
    assert (status.returncode, status.stderr) == (1, b"and out\n")
    assert termios.tcgetattr(program) == before


def test_in_the_background_the_terminal_is_left_alone(
    loop: EventLoop, pseudo_terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell tells nobody that it has brought a running job to the foreground: what is typed next does."""
    user, program = pseudo_terminal
    before = termios.tcgetattr(program)
    monkeypatch.setattr("pyvmm.terminal.in_foreground", lambda fd: False)
    terminal = Terminal(loop, raw=True, in_fd=program, out_fd=program)
    port = Port().attach(terminal.console("serial"))
    terminal.enter_raw()
    terminal.start()
    assert termios.tcgetattr(program) == before
    monkeypatch.setattr("pyvmm.terminal.in_foreground", lambda fd: True)
    os.write(user, b"first\n")
    port.wait_for(b"first\n")
    raw = termios.tcgetattr(program)
    assert not raw[tty.LFLAG] & (termios.ECHO | termios.ICANON | termios.ISIG)
    monkeypatch.setattr("pyvmm.terminal.in_foreground", lambda fd: False)
    terminal.close()  # the shell has set the modes it wants
    assert termios.tcgetattr(program) == raw
    termios.tcsetattr(program, termios.TCSANOW, before)


# -- a descriptor of its own -------------------------------------------------------------------------------------------


def test_a_terminal_takes_many_bytes_at_a_time(
    loop: EventLoop, pseudo_terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a descriptor that does not block; the one that others share stays as it is."""
    master, slave = pseudo_terminal
    tty.setraw(slave)
    terminal = Terminal(loop, in_fd=slave, out_fd=slave)
    console = terminal.console("serial")
    sizes: list[int] = []
    write = os.write

    def counted(fd: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(posix, "write", counted)
    console.write(b"x" * 2000)
    monkeypatch.undo()
    assert sizes == [2000]
    assert read_exactly(master, 2000) == b"x" * 2000
    assert os.get_blocking(slave)
    terminal.close()
    assert os.get_blocking(slave)
    os.write(slave, b"still there")


def test_a_terminal_that_is_stopped_holds_output_back(loop: EventLoop, pseudo_terminal: tuple[int, int]) -> None:
    master, slave = pseudo_terminal
    tty.setraw(slave)
    terminal = Terminal(loop, in_fd=slave, out_fd=slave)
    console = terminal.console("hvc0")
    told = threading.Event()
    console.set_writable(told.set)
    termios.tcflow(slave, termios.TCOOFF)
    sent = b""
    while console.can_write:
        data = b"%07d\n" % len(sent) * 500
        console.write(data)
        sent += data
    termios.tcflow(slave, termios.TCOON)
    assert read_exactly(master, len(sent)) == sent
    assert told.wait(LIMIT_S)
    terminal.close()


def test_the_other_end_of_a_pseudo_terminal_is_written_to_as_it_is(pseudo_terminal: tuple[int, int]) -> None:
    """Its name, /dev/ptmx, would make a new one."""
    master, slave = pseudo_terminal
    tty.setraw(slave)
    before = len(os.listdir("/dev/pts"))
    chardev = FileChardev(master)
    chardev.write(b"in")
    assert len(os.listdir("/dev/pts")) == before
    assert read_exactly(slave, 2) == b"in"
    chardev.close()


# -- its size ----------------------------------------------------------------------------------------------------------


def test_consoles_have_its_size(loop: EventLoop, pseudo_terminal: tuple[int, int]) -> None:
    _, slave = pseudo_terminal
    termios.tcsetwinsize(slave, (25, 80))
    terminal = Terminal(loop, in_fd=slave, out_fd=slave)
    console, other = terminal.console("hvc0"), terminal.console("serial")
    assert console.size is None  # nobody has asked
    heard = threading.Event()
    console.set_resized(heard.set)
    assert console.size == other.size == terminal.console("hvc1").size == (80, 25)
    terminal.resized()
    settle(loop)
    assert not heard.is_set()  # it is what it was
    termios.tcsetwinsize(slave, (50, 132))
    terminal.resized()
    assert heard.wait(LIMIT_S)
    assert console.size == (132, 50)
    terminal.close()
    terminal.resized()
    console.set_resized(heard.set)


def test_no_terminal_has_no_size(loop: EventLoop, pipe: tuple[int, int]) -> None:
    in_fd, out_fd = pipe
    terminal = Terminal(loop, in_fd=in_fd, out_fd=out_fd)
    console = terminal.console("hvc0")
    console.set_resized(lambda: None)
    terminal.resized()
    settle(loop)
    assert console.size is None
    terminal.close()
