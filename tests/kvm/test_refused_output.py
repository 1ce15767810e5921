"""What the command says goes nowhere: a reader that has left, a full disk, closed descriptors. No traceback, a status.

141 is what a shell says of a program that SIGPIPE has ended (128 + 13).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import TIMEOUT_S

LIMIT_S = TIMEOUT_S
LINE = "ba f8 03 b0 2e ee b0 0a ee"  # mov $0x3f8, %dx; mov $'.', %al; out; mov $'\n', %al; out
SPIN, DEBUG_EXIT = "eb fe", "b0 15 e6 f4 f4"
STATUS = 0x15 << 1 | 1
VERBS = [["--help"], ["--version"], ["run", "--help"], ["demo"], ["doctor"], ["qtest", "--help"], ["bench", "--help"]]


@pytest.fixture
def broken_pipe() -> Iterator[int]:
    """A pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "pyvmm", *args]


def flat(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex(code))
    return ["run", "--flat", str(path), "--timeout", str(LIMIT_S)]


def ended(stdout: int, args: list[str]) -> tuple[int, str]:
    """Status, and what it said on standard error."""
    done = subprocess.run(
        command(*args), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=2 * LIMIT_S
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("args", VERBS, ids=" ".join)
def test_a_reader_that_has_left(broken_pipe: int, args: list[str]) -> None:
    assert ended(broken_pipe, args) == (141, "")


@pytest.mark.parametrize("args", VERBS, ids=" ".join)
def test_a_full_disk(args: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        status, error = ended(full.fileno(), args)
    assert status == 2
    assert error.startswith("pyvmm: standard output: No space left on device: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("args", VERBS, ids=" ".join)
def test_closed_descriptors(args: list[str]) -> None:
    shell = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command(*args)]
    assert subprocess.run(shell, timeout=LIMIT_S).returncode in (0, 2)  # 2: what doctor says of this machine


def test_a_run_ends_when_the_reader_of_its_console_leaves(tmp_path: Path) -> None:
    """Although the guest never writes again."""
    args = flat(tmp_path, LINE + SPIN)
    with subprocess.Popen(command(*args), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b".\n"
        process.stdout.close()
        assert process.wait(LIMIT_S) == 141


def test_a_run_whose_console_nobody_has_ever_read(tmp_path: Path, broken_pipe: int) -> None:
    assert ended(broken_pipe, flat(tmp_path, SPIN)) == (141, "")


def test_a_run_on_a_full_disk_ends_as_its_guest_does_and_says_what_is_lost(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        status, error = ended(full.fileno(), flat(tmp_path, LINE + DEBUG_EXIT))
    assert status == STATUS
    assert "standard output: a part of the guest's output is lost: No space left on device" in error
    status, error = ended(subprocess.DEVNULL, [*flat(tmp_path, LINE + DEBUG_EXIT), "--serial", "file:/dev/full"])
    assert status == STATUS
    assert "/dev/full: a part of the guest's output is lost: No space left on device" in error


def test_a_file_larger_than_the_limit(tmp_path: Path) -> None:
    """ulimit -f 0: SIGXFSZ is ignored by Python, the write fails with EFBIG."""
    log = tmp_path / "log"
    args = [*flat(tmp_path, LINE + DEBUG_EXIT), "--serial", f"file:{log}"]
    shell = ["sh", "-c", 'ulimit -f 0; "$@" 2>&1 | cat', "sh", *command(*args)]
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
    assert f"{log}: a part of the guest's output is lost: File too large: raise `ulimit -f`" in done.stdout


@pytest.mark.parametrize("target", ["/dev/full", "closed", "pipe"])
def test_standard_error_that_takes_nothing(tmp_path: Path, broken_pipe: int, target: str) -> None:
    """What can't be told is not told; the status stays."""
    redirect = {"closed": "2>&-", "pipe": f"2>&{broken_pipe}"}.get(target, f"2>{target}")
    for args, status in ((["run", "/nosuch"], 2), ([*flat(tmp_path, LINE + DEBUG_EXIT), "--exit-stats"], STATUS)):
        shell = ["bash", "-c", f'"$@" {redirect}', "bash", *command(*args)]
        done = subprocess.run(shell, stdout=subprocess.PIPE, pass_fds=[broken_pipe], timeout=LIMIT_S)
        assert done.returncode == status
        assert b"pyvmm" not in done.stdout


def test_a_closed_standard_output_is_no_disk(tmp_path: Path) -> None:
    """The number of a closed standard output goes to no file that is opened later: its content would be ruined."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    args = [*flat(tmp_path, LINE * 20 + DEBUG_EXIT), str(disk)]
    shell = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command(*args)]
    assert subprocess.run(shell, timeout=LIMIT_S).returncode == STATUS
    assert disk.read_bytes() == bytes(4096)
    guest = "import os, sys; print(os.readlink('/proc/self/fd/1'), file=open(sys.argv[1], 'w'))"
    main = f"import sys; import pyvmm.cli; pyvmm.cli.main(['--version']); {guest}"
    shell = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", main, str(tmp_path / "fd1")]
    subprocess.run(shell, timeout=LIMIT_S, check=True)
    assert (tmp_path / "fd1").read_text() == "/dev/null\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_exit_stats_after_a_signal(tmp_path: Path, number: signal.Signals, status: int) -> None:
    args = [*flat(tmp_path, LINE + SPIN), "--exit-stats"]
    with subprocess.Popen(
        command(*args), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == ".\n"
        process.send_signal(number)
        error = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == status
    row = next(line for line in error.splitlines() if " 0x3f8 " in line)
    assert row.split()[:4] == ["IO", "0x3f8", "out", "2"]
    assert "Traceback" not in error
