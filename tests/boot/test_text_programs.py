"""Programs by others for VGA's text screen, shown by --vga text, on both boards; and what is said without it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import boot_assets
import pytest

import pyvmm

MACHINES = ["microvm", "pc"]
LIMIT_S = 60.0
NOTICE = b"pyvmm: the guest writes to VGA's text memory, which is not shown: --vga text shows it"


def until(machine: pyvmm.Machine, *wanted: str) -> list[str]:
    """Run until all of these are on the screen."""
    assert machine.vga is not None
    end = time.monotonic() + LIMIT_S
    machine.resume()
    while not all(text in "\n".join(machine.vga.lines()) for text in wanted):
        assert time.monotonic() < end, machine.vga.lines()
        assert not machine.wait(0.02)
    machine.pause()
    return machine.vga.lines()


@pytest.mark.parametrize("machine", MACHINES)
def test_the_multiboot_example(multiboot_kernel: Path, machine: str) -> None:
    with pyvmm.Machine(machine=machine, kernel=multiboot_kernel, append="of this test", memory_mib=16, vga="text") as m:
        lines = until(m, "Halted.")
        assert lines[0].startswith("flags = 0x")
        # The command line is longer than a line of the screen, and may have a blank at the end of one.
        assert " of this test" in "".join(line.ljust(80) for line in lines)
        assert lines[lines.index("Halted.") + 1 :] == [""] * (24 - lines.index("Halted."))


@pytest.mark.parametrize("machine", MACHINES)
def test_grub_invaders(machine: str) -> None:
    with pyvmm.Machine(machine=machine, kernel=boot_assets.invaders(), memory_mib=16, vga="text") as m:
        until(m, "-*-", "/ \\")
        # The invaders move: the program's waits for the next frame come to an end.
        assert m.vga is not None
        before = m.vga.lines()
        m.resume()
        end = time.monotonic() + LIMIT_S
        while m.vga.lines() == before:
            assert time.monotonic() < end
            assert not m.wait(0.02)


def run(*args: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pyvmm", "run", *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=2 * LIMIT_S)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_command_without_a_screen_says_so_once(multiboot_kernel: Path, machine: str) -> None:
    ended = run("--machine", machine, "--kernel", str(multiboot_kernel), "--timeout", "4")
    assert ended.stderr.count(NOTICE) == 1
    assert ended.stdout == b""


@pytest.mark.parametrize("machine", MACHINES)
def test_a_guest_that_writes_and_ends_at_once(tmp_path: Path, machine: str) -> None:
    """mov ax, 0xb800; mov ds, ax; mov word [0], 0x0741; mov al, 3; out 0xf4, al"""
    guest = tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("b800b88ed8c70600004107b003e6f4f4"))
    ended = run("--machine", machine, "--flat", str(guest))
    assert (ended.returncode, ended.stderr.strip()) == (7, NOTICE)
    ended = run("--machine", machine, "--flat", str(guest), "--vga", "text")
    assert (ended.returncode, ended.stderr) == (7, b"")
    assert ended.stdout.endswith(b"A\n")  # whether or not the screen was drawn before
    quiet = tmp_path / "quiet.bin"
    quiet.write_bytes(bytes.fromhex("b003e6f4f4"))
    ended = run("--machine", machine, "--flat", str(quiet))
    assert (ended.returncode, ended.stderr) == (7, b"")


class Terminal:
    """A terminal with ``pyvmm run`` on it, and all that it has shown."""

    def __init__(self, *args: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "pyvmm", "run", *args])
        self.shown = b""  # since what was expected last
        self.everything = b""

    def expect(self, wanted: bytes) -> None:
        """Read on until it has come; what came before it is left behind."""
        while wanted not in self.shown:
            try:
                self._read()
            except OSError:  # EIO: the command is gone
                raise AssertionError(f"no {wanted!r} in {self.shown!r}") from None
        self.shown = self.shown.partition(wanted)[2]

    def _read(self) -> None:
        data = os.read(self._fd, 65536)
        self.shown += data
        self.everything += data

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def end(self) -> int:
        while True:
            try:
                self._read()
            except OSError:
                os.close(self._fd)
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_a_v_changes_between_screen_and_serial_console(tmp_path: Path) -> None:
    """The guest writes "S" to COM1, "V" to text memory, and halts."""
    guest = tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("baf803 b053 ee b800b8 8ed8 c70600005607 f4 ebfd"))
    terminal = Terminal("--flat", str(guest), "--vga", "text")
    terminal.expect(b"\x1b[?1049h")  # the screen is shown first
    terminal.expect(b"V")
    terminal.type(b"\x01v")
    terminal.expect(b"\x1b[?1049l")
    terminal.type(b"\x01v")
    terminal.expect(b"\x1b[?1049h")
    terminal.expect(b"V")
    terminal.type(b"\x01h")
    terminal.type(b"\x01x")
    terminal.expect(b"\x1b[?1049l")
    assert terminal.end() == 0
    assert b"V\r\n" in terminal.shown
    assert terminal.everything.count(b"S") == 1  # before the screen was shown, or when it was left


def test_ctrl_a_w_wakes_a_suspended_guest(tmp_path: Path) -> None:
    """In real mode, without a waking vector: it suspends, and the second time it comes by it ends with 3 << 1 | 1."""
    guest = tmp_path / "guest.bin"
    # cmp byte [0x500], 1; je end; mov byte [0x500], 1; out "S" to COM1; outw 0x2400 to 0x604; hlt. end: out 3 to 0xf4
    code = "803e000501 7412 c606000501 baf803 b053 ee ba0406 b80024 ef f4 ebfd"
    code = code.replace("7412", f"74{len(bytes.fromhex(code)) - 7:02x}") + "b003e6f4f4"
    guest.write_bytes(bytes.fromhex(code))
    terminal = Terminal("--flat", str(guest))
    terminal.expect(b"S")
    terminal.type(b"\x01w" * 3)
    while b"quit" not in terminal.shown:  # until then one of them may have come too early
        terminal.type(b"\x01w\x01h")
        try:
            terminal.expect(b"quit")
        except AssertionError:
            break
    assert terminal.end() == 7
