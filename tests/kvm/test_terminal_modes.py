"""The terminal of ``pyvmm run``: raw while the guest has it, cooked before, after, and while the process is stopped."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
from console import Console, pyvmm_run
from guests import TIMEOUT_S

LIMIT_S = TIMEOUT_S
# mov $0x3f8, %dx; mov $'.', %al; out %al, %dx; jmp .
SAY_AND_SPIN = "ba f8 03 b0 2e ee eb fe"
# The same, and a line on the debug console first: mov $0x402, %dx; mov $'!', %al; out; mov $'\n', %al; out
SAY_ON_BOTH = "ba 02 04 b0 21 ee b0 0a ee" + SAY_AND_SPIN
# 1: in LSR; test $1, %al; jz 1b; in RBR; add $1, %al; out %al, %dx; jmp 1b
ECHO_PLUS_ONE = "ba fd 03 ec a8 01 74 f8 ba f8 03 ec fe c0 ee eb f0"
COOKED = termios.ICANON | termios.ECHO | termios.ISIG


@pytest.fixture
def guest(tmp_path: Path) -> str:
    return flat(tmp_path, SAY_AND_SPIN)


def flat(tmp_path: Path, code: str) -> str:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex(code))
    return str(path)


def cooked(console: Console) -> bool:
    flags = termios.tcgetattr(console.master)[3]
    assert isinstance(flags, int)
    assert flags & COOKED in (0, COOKED)
    return bool(flags & COOKED)


def until_cooked(console: Console, wanted: bool) -> None:
    end = time.monotonic() + LIMIT_S
    while cooked(console) != wanted:
        assert time.monotonic() < end
        os.sched_yield()


def until_state(console: Console, wanted: str) -> None:
    """Wait for the process's state as /proc/pid/stat has it (proc_pid_stat(5)): T is stopped."""
    end = time.monotonic() + LIMIT_S
    while (state := Path(f"/proc/{console.process.pid}/stat").read_text().rpartition(")")[2].split()[0]) != wanted:
        assert time.monotonic() < end, state
        os.sched_yield()


# What ends a process by default and is not a fault (signal(7)).
ENDING = ("HUP", "INT", "QUIT", "TRAP", "ABRT", "USR1", "USR2", "ALRM", "TERM", "STKFLT", "XCPU", "VTALRM", "PROF")


@pytest.mark.parametrize("name", [*ENDING, "IO", "PWR", "SYS"])
def test_a_signal_that_ends_it_gives_the_terminal_back(guest: str, name: str) -> None:
    number = getattr(signal, f"SIG{name}")
    with pyvmm_run("--flat", guest) as console:
        console.expect(".", LIMIT_S)
        assert not cooked(console)
        console.process.send_signal(number)
        assert console.wait(LIMIT_S) == 128 + number
        assert cooked(console)
    assert "Traceback" not in console.output


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP])
def test_a_stop_and_the_way_back(guest: str, number: signal.Signals) -> None:
    with pyvmm_run("--flat", guest) as console:
        console.expect(".", LIMIT_S)
        before_cont = number is signal.SIGTSTP
        for _ in range(2):
            console.process.send_signal(number)
            until_state(console, "T")
            assert cooked(console) == before_cont
            if not before_cont:  # nobody can catch SIGSTOP; a shell sets the modes it wants itself
                modes = termios.tcgetattr(console.master)
                assert isinstance(modes[3], int)
                modes[3] |= COOKED
                termios.tcsetattr(console.master, termios.TCSANOW, modes)
            console.process.send_signal(signal.SIGCONT)
            until_cooked(console, False)
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0
        assert cooked(console)


def test_what_was_ignored_stays_ignored(guest: str) -> None:
    """As nohup(1) has it."""
    ignoring = "import os, sys; from signal import *; signal(SIGHUP, SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-m", "pyvmm", "run", "--flat", guest]
    with Console(sys.executable, "-c", ignoring, *command) as console:
        console.expect(".", LIMIT_S)
        console.process.send_signal(signal.SIGHUP)
        console.send("\x01h")
        console.expect("Ctrl-A x", LIMIT_S)
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0


def test_serial_and_debug_console_share_it(tmp_path: Path) -> None:
    with pyvmm_run("--flat", flat(tmp_path, SAY_ON_BOTH), "--debugcon", "stdio") as console:
        console.expect("!", LIMIT_S)
        console.expect(".", LIMIT_S)
        assert not cooked(console)
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0
        assert cooked(console)


def test_the_debug_console_alone(tmp_path: Path) -> None:
    with pyvmm_run("--flat", flat(tmp_path, SAY_ON_BOTH), "--serial", "none", "--debugcon", "stdio") as console:
        console.expect("!", LIMIT_S)
        assert not cooked(console)
        console.send("nobody reads this\x01x")
        assert console.wait(LIMIT_S) == 0
        assert cooked(console)


def test_the_keyboard_goes_round(tmp_path: Path) -> None:
    with pyvmm_run("--flat", flat(tmp_path, ECHO_PLUS_ONE), "--debugcon", "stdio") as console:
        console.send("A")
        console.expect("B", LIMIT_S)
        console.send("\x01cG\x01cY")
        between = console.expect("Z", LIMIT_S)
        assert "debugcon" in between and "serial" in between
        assert "H" not in between.replace("\r\n", "")
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0


@pytest.mark.parametrize("typed", ["y", "y" * 17, "y" * 5000, "\x03\x1a\x1c", "\x01", "\x01q"])
def test_ctrl_a_x_works_where_the_guest_reads_nothing(guest: str, typed: str) -> None:
    with pyvmm_run("--flat", guest) as console:
        console.expect(".", LIMIT_S)
        console.send(typed)
        if typed == "\x01":  # it would be the escape's own escape: end it
            console.send("h")
            console.expect("Ctrl-A x", LIMIT_S)
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0


# READ SECTORS of LBA 0 by PIO, wait for BSY to go, isa-debug-exit 0x15.
READ_A_SECTOR = """
    ba f6 01 b0 e0 ee  ba f2 01 b0 01 ee  ba f3 01 b0 00 ee  ba f4 01 ee  ba f5 01 ee  ba f7 01 b0 20 ee
    ec a8 80 75 fb  b0 15 e6 f4 f4
"""
FAIL_ONCE = '[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce = "on"\n'


@pytest.mark.parametrize(("go_on", "status"), [(True, 0x15 << 1 | 1), (False, 0)])
def test_a_guest_that_a_drive_has_stopped(tmp_path: Path, go_on: bool, status: int) -> None:
    """SIGCONT tries the request again; Ctrl-A x ends the run there too."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "rules").write_text(FAIL_ONCE)
    drive = f"file=blkdebug:{tmp_path / 'rules'}:{tmp_path / 'disk.img'},rerror=stop"
    with pyvmm_run("--flat", flat(tmp_path, READ_A_SECTOR), "--drive", drive) as console:
        console.expect("the guest is stopped", LIMIT_S)
        if go_on:
            console.process.send_signal(signal.SIGCONT)
        else:
            console.send("\x01x")
        assert console.wait(LIMIT_S) == status
        assert cooked(console)


class Shell(Console):
    """bash with job control, its terminal the controlling one; the prompt is <>. The guest is its job."""

    def __init__(self, tmp_path: Path) -> None:
        guest = flat(tmp_path, SAY_AND_SPIN.replace("2e", "25"))  # '%': there is none in the prompt or the command
        own_terminal = "import os, sys; from fcntl import *; ioctl(0, 0x540E); os.execvp(sys.argv[1], sys.argv[1:])"
        super().__init__(sys.executable, "-c", own_terminal, "bash", "--norc", "--noediting", "-i")
        self.send(f"PS1='<>' ; {sys.executable} -m pyvmm run --flat {guest}\n")
        self.expect("%", LIMIT_S)
        until_cooked(self, False)
        shell = self.process.pid
        self.job = int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def kill(self, number: int) -> None:
        os.kill(self.job, number)

    def until_gone(self) -> None:
        end = time.monotonic() + LIMIT_S
        while Path(f"/proc/{self.job}").exists():
            assert time.monotonic() < end, Path(f"/proc/{self.job}/status").read_text()
            os.sched_yield()

    def prompt(self) -> None:
        self.expect("<>", LIMIT_S)
        until_cooked(self, True)

    def finish(self) -> None:
        self.send("exit 7\n")
        assert self.wait(LIMIT_S) == 7


def test_under_a_shell_with_job_control(tmp_path: Path) -> None:
    """The shell has the terminal while the guest is stopped; in the background the guest leaves it alone."""
    with Shell(tmp_path) as shell:
        shell.kill(signal.SIGTSTP)
        shell.expect("Stopped", LIMIT_S)
        shell.prompt()
        shell.send("fg\n")
        until_cooked(shell, False)
        shell.send("\x01h")
        shell.expect("Ctrl-A x", LIMIT_S)
        shell.send("\x01x")
        shell.prompt()
        shell.finish()


def test_an_end_in_the_background(tmp_path: Path) -> None:
    """It does not wait for the terminal: SIGTTOU would stop it."""
    with Shell(tmp_path) as shell:
        shell.kill(signal.SIGSTOP)
        shell.expect("Stopped", LIMIT_S)
        shell.prompt()
        shell.send("bg\n")
        shell.prompt()
        shell.kill(signal.SIGTERM)
        shell.until_gone()
        shell.send("\n")
        shell.expect("Exit 143", LIMIT_S)
        shell.prompt()
        shell.finish()
