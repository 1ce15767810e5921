"""``pyvmm run`` as a command: its exit statuses, its terminal, its tables."""

from __future__ import annotations

import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from asm import assemble
from console import Console, pyvmm_run
from guests import TIMEOUT_S

LIMIT_S = TIMEOUT_S
DEBUG_EXIT = "b0 15 e6 f4 f4"  # mov $0x15, %al; out %al, $0xf4; hlt
POWER_OFF = "ba 04 06 b8 00 20 ef f4"  # mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx; hlt
RESET = "b0 fe e6 64 f4"  # mov $0xfe, %al; out %al, $0x64; hlt
# mov $0x3f8, %dx; 1: mov $'.', %al; out %al, %dx; 2: jmp 2b
SAY_AND_SPIN = "ba f8 03 b0 2e ee eb fe"


@pytest.fixture
def flat(tmp_path: Path) -> Callable[[str], str]:
    def make(code: str) -> str:
        path = tmp_path / "guest.bin"
        path.write_bytes(bytes.fromhex(code))
        return str(path)

    return make


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyvmm", "run", *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize(("code", "status"), [(DEBUG_EXIT, 0x15 << 1 | 1), (POWER_OFF, 0)])
def test_the_guest_says_how_it_ends(flat: Callable[[str], str], code: str, status: int) -> None:
    done = run("--flat", flat(code))
    assert (done.returncode, done.stderr) == (status, "")


def test_a_machine_in_a_file(flat: Callable[[str], str], tmp_path: Path) -> None:
    machine = tmp_path / "machine.toml"
    machine.write_text(f'flat = "{flat(RESET)}"\nno_reboot = true\nmemory_mib = "16M"\n[run]\nexit_stats = true\n')
    done = run(str(machine))
    assert done.returncode == 6
    assert "0x64" in done.stderr  # the table of exits
    assert run(str(machine), "--flat", flat(DEBUG_EXIT)).returncode == 0x15 << 1 | 1


def test_a_reset_with_no_reboot(flat: Callable[[str], str]) -> None:
    assert run("--flat", flat(RESET), "--no-reboot").returncode == 6


WRITE_A_SECTOR = """
        mov     $0x1f2, %dx
        mov     $1, %al                 # one sector, number 0
        outb    %al, %dx
        xor     %al, %al
1:      inc     %dx
        outb    %al, %dx
        cmp     $0x1f5, %dx
        jne     1b
        mov     $0x1f6, %dx
        mov     $0xe0, %al
        outb    %al, %dx
        inc     %dx
        mov     $0x30, %al              # WRITE SECTORS
        outb    %al, %dx
2:      inb     %dx, %al
        test    $8, %al                 # DRQ
        jz      2b
        mov     $0x1f0, %dx
        mov     $256, %cx
        mov     $0x7c00, %si
        rep outsw
        mov     $0x1f7, %dx
3:      inb     %dx, %al
        test    $0x80, %al              # BSY
        jnz     3b
        mov     $0x15, %al
        outb    %al, $0xf4
"""


def test_what_did_not_reach_the_disk_at_the_end_is_told(tmp_path: Path) -> None:
    """The guest was told that it is written, and asked for no flush; that comes with the end, and finds no room."""
    guest, disk, rules = tmp_path / "guest.bin", tmp_path / "disk.img", tmp_path / "rules"
    guest.write_bytes(assemble(WRITE_A_SECTOR, "real16").image)
    disk.write_bytes(bytes(1 << 20))
    rules.write_text('[inject-error]\nevent = "flush_to_disk"\nerrno = "ENOSPC"\n')
    arguments = ("--machine", "pc", "--flat", str(guest), "--flat-mode", "real16", "--drive")
    assert run(*arguments, f"file={disk},format=raw").returncode == 0x15 << 1 | 1
    done = run(*arguments, f"file=blkdebug:{rules}:{disk},format=raw,id=disk")
    assert done.returncode == 10
    assert done.stderr == (
        f"pyvmm: drive disk: not all that was written is in blkdebug:{rules}:{disk}: No space left on device: free some"
        " space there, or write elsewhere\n"
    )


def test_an_internal_error_dumps(flat: Callable[[str], str]) -> None:
    # Entered at 1 MiB: jmp 0xd0000000. No RAM is there, and an instruction can't be fetched by an MMIO exit.
    done = run("--flat", flat("e9 fb ff ef cf"), "--flat-mode", "protected32", "--timeout", "30")
    assert done.returncode == 4
    assert "KVM_EXIT_INTERNAL_ERROR, suberror 1 (EMULATION)" in done.stderr
    assert "rip" in done.stderr and "cr0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_time_limit(flat: Callable[[str], str]) -> None:
    done = run("--flat", flat("eb fe"), "--timeout", "0.2")
    assert done.returncode == 124
    assert "still running" in done.stderr


def test_exit_stats_name_the_regions(flat: Callable[[str], str]) -> None:
    done = run("--flat", flat(DEBUG_EXIT), "--exit-stats")
    row = next(line for line in done.stderr.splitlines() if " 0xf4 " in line)
    assert row.split()[:4] == ["IO", "0xf4", "out", "1"]
    assert row.endswith("isa-debug-exit")


def local_flags(console: Console) -> int:
    flags = termios.tcgetattr(console.master)[3]
    assert isinstance(flags, int)
    return flags


def test_the_terminal_is_raw_while_the_guest_runs_and_given_back(flat: Callable[[str], str]) -> None:
    with pyvmm_run("--flat", flat(SAY_AND_SPIN)) as console:
        console.expect(".", LIMIT_S)
        assert not local_flags(console) & (termios.ICANON | termios.ECHO | termios.ISIG)
        console.send("\x01h")
        console.expect("Ctrl-A x", LIMIT_S)
        console.send("\x01x")
        assert console.wait(LIMIT_S) == 0
        assert local_flags(console) & termios.ICANON
        assert local_flags(console) & termios.ECHO


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_gives_the_terminal_back(flat: Callable[[str], str], number: signal.Signals) -> None:
    with pyvmm_run("--flat", flat(SAY_AND_SPIN)) as console:
        console.expect(".", LIMIT_S)
        assert not local_flags(console) & termios.ICANON
        console.process.send_signal(number)
        assert console.wait(LIMIT_S) == 128 + number
        assert local_flags(console) & termios.ICANON


def test_serial_to_a_file(flat: Callable[[str], str], tmp_path: Path) -> None:
    hello = "ba f8 03 b0 48 ee b0 69 ee" + DEBUG_EXIT
    assert run("--flat", flat(hello), "--serial", f"file:{tmp_path / 'log'}").returncode == 0x15 << 1 | 1
    assert (tmp_path / "log").read_bytes() == b"Hi"
