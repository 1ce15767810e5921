"""A Dialog with a real shell on a pseudo-terminal, which echoes and prompts as a guest's does."""

from __future__ import annotations

import os
import pty
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm import Machine
from pyvmm.dialog import KEPT_CHARACTERS, Dialog
from pyvmm.errors import ConfigError

LIMIT_S = 60.0


@pytest.fixture
def shell() -> Iterator[Dialog]:
    """/bin/sh at its prompt."""
    pid, terminal = pty.fork()
    if not pid:
        os.execve("/bin/sh", ["sh", "-i"], {"PS1": "# ", "PATH": os.environ["PATH"]})
    line = Dialog()

    def type_in(data: bytes) -> None:
        os.write(terminal, data)

    line.chardev.set_receiver(type_in)

    def pump() -> None:
        while True:
            try:
                line.chardev.write(os.read(terminal, 4096))
            except OSError:  # EIO: it has ended
                return

    thread = threading.Thread(target=pump)
    thread.start()
    line.expect("# ", LIMIT_S)
    yield line
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    thread.join()
    os.close(terminal)


def test_a_command_has_a_status_and_an_output(shell: Dialog) -> None:
    assert shell.run("echo one; echo two") == (0, "one\ntwo\n")
    assert shell.run("false") == (1, "")
    assert shell.run("printf 'no end'; sh -c 'exit 7'") == (7, "no end")
    assert shell.run("cd /; pwd") == (0, "/\n")
    assert shell.run("pwd") == (0, "/\n")


def test_a_command_may_have_quotes_and_lines(shell: Dialog) -> None:
    assert shell.run("for n in 1 2; do\n  echo \"it's $n\"\ndone") == (0, "it's 1\nit's 2\n")


def test_a_line_too_long_for_a_terminal_is_refused(shell: Dialog) -> None:
    with pytest.raises(ConfigError, match="too long for one line"):
        shell.run("echo " + "x" * 5000)
    assert shell.run("echo\n" * 1000)[0] == 0


def test_what_was_before_and_what_was_found() -> None:
    line = Dialog()
    line.chardev.write(b"abc 12 def 34\xc3")
    assert line.expect(r"(\d+) ", 0) == "abc "
    assert line.match is not None and line.match[1] == "12"
    assert line.expect(re.compile("[0-9]+")) == "def "
    line.chardev.write(b"\xa9")  # the other half of a character
    assert line.expect("é", 0) == ""


def test_what_does_not_come_is_told_with_what_did() -> None:
    line = Dialog()
    line.chardev.write(b"panic: at the disco\n")
    with pytest.raises(AssertionError, match=r"within 0 s no 'login:'; .*\npanic: at the disco"):
        line.expect("login:", 0)


def test_what_comes_is_heard_while_one_waits() -> None:
    line = Dialog()
    threading.Timer(0.05, line.chardev.write, [b"login: "]).start()
    assert line.expect("login: ", LIMIT_S) == ""


def test_the_end_of_the_machine_ends_the_wait() -> None:
    line = Dialog()
    with Machine(accel="qtest", serial=line.chardev) as m:
        line.machine = m
        m.stop(3, "had enough")
        with pytest.raises(AssertionError, match=r"the machine ended \(had enough\) without 'login:'"):
            line.expect("login:", LIMIT_S)


def test_what_prints_for_ever_is_kept_in_part() -> None:
    line = Dialog()
    for _ in range(5):
        line.chardev.write(b"x" * (KEPT_CHARACTERS // 4))
        line.expect("x+$", 0)
    line.chardev.write(b"end")
    assert len(line.output) <= KEPT_CHARACTERS
    assert line.expect("end", 0) == ""


def test_a_guest_that_prints_a_character_at_a_time_is_not_slowed_down_by_what_it_has_printed() -> None:
    """Each piece is copied a few times, whatever came before it."""
    line = Dialog()
    line.chardev.write(b"x" * KEPT_CHARACTERS)
    begin = time.thread_time()
    for _ in range(100000):
        line.chardev.write(b"y")
    assert time.thread_time() - begin < 1.5  # that many copies of all of it: 4 s and more
    assert line.output.endswith("y" * 100000)
    assert line.expect("y{100000}$", 0)[-1] == "x"
