"""ci/lab from outside: what goes in, what comes out, and that nothing is left running."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from console import Console
from lab import CI_LAB, Lab

pytestmark = pytest.mark.emulator
LIMIT_S = 300.0  # a time limit for what hangs: the lab's commands take a second or two


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("shared"))
    yield made
    made.close()


def run(lab: Lab, *argv: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"capture_output": True, "timeout": LIMIT_S, **options}
    return subprocess.run(lab.command(*argv), check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_a_command_sees_a_full_kvm_and_its_results_come_back(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        "ls /dev/kvm /dev/net/tun /dev/ptmx && pwd && nproc\n"
        "echo \"$PYVMM_HERE\"; echo complaint >&2; cat\n"
        "head -c 3000000 /dev/zero | tr '\\0' x >$LAB_SCRATCH/many; touch /here-and-gone\n"
        "exit 7\n"
    )
    scratch = tmp_path / "scratch"
    ran = subprocess.run(
        [CI_LAB, "run", "--cpus", "2", "--scratch", scratch, "--", "sh", script],
        cwd=tmp_path,
        env={**os.environ, "PYVMM_HERE": "two  'words'"},
        input="what came in\n",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ran.stdout.splitlines() == [
        "/dev/kvm", "/dev/net/tun", "/dev/ptmx", str(tmp_path), "2", "two  'words'", "what came in",
    ]  # fmt: skip
    assert "complaint" in ran.stderr.splitlines()
    assert ran.returncode == 7
    assert (scratch / "many").read_bytes() == b"x" * 3_000_000
    assert not Path("/here-and-gone").exists()


@pytest.mark.parametrize("parameter", ["vls", "vgif"])
def test_what_the_emulator_does_wrong_is_off(parameter: str, lab: Lab) -> None:
    """docs/lab.md. The module is kvm-amd, its parameters on the command line are kvm_amd's."""
    assert run(lab, "cat", f"/sys/module/kvm_amd/parameters/{parameter}").stdout == b"0\n"


def test_no_command_gets_to_processor_0(lab: Lab) -> None:
    """docs/lab.md, "A word of processor 0". Nor does one that asks for it."""
    said = run(lab, "sh", "-c", "taskset -pc $$").stdout
    assert said.decode().split()[-1] in ("1,2", "1-2")
    assert run(lab, "taskset", "-c", "0", "true").returncode == 1


def test_a_command_may_make_a_user_namespace(lab: Lab) -> None:
    """As passt does, which needs no root. Its root is no chroot: in one nobody may (unshare(2))."""
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    assert run(lab, *nobody, "unshare", "--user", "true").returncode == 0


def test_an_interrupt_ends_qemu_too(tmp_path: Path) -> None:
    command = [CI_LAB, "run", "--", "sh", "-c", "echo begun; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline() == b"begun\n"
        (supervisor,) = Path(f"/proc/{ran.pid}/task/{ran.pid}/children").read_text().split()
        ran.send_signal(signal.SIGINT)
        assert ran.wait(LIMIT_S) == 128 + signal.SIGINT
    assert not Path(f"/proc/{supervisor}").exists()


def test_a_lab_for_one_command_that_breaks_leaves_its_diagnosis() -> None:
    command = [CI_LAB, "run", "--", "sh", "-c", "echo begun; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stdout is not None
        assert ran.stdout.readline() == "begun\n"
        (supervisor,) = Path(f"/proc/{ran.pid}/task/{ran.pid}/children").read_text().split()
        (emulator,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        os.kill(int(emulator), signal.SIGSTOP)
        _, complaint = ran.communicate(timeout=LIMIT_S)
    assert ran.returncode == 125
    found = re.search(r"it has not beaten for 15 s; (\S+) tells", complaint)
    assert found is not None, complaint
    log = Path(found[1])
    assert "---- threads of QEMU" in log.read_text()
    log.unlink()


def test_the_time_limit_ends_a_command_that_ignores_it(lab: Lab) -> None:
    command = lab.command("sh", "-c", "trap '' TERM; echo begun; while :; do sleep 1; done")
    command[command.index("--") : command.index("--")] = ["--timeout", "3"]
    ended = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    assert (ended.returncode, ended.stdout) == (124, b"begun\n")
    assert b"time limit" in ended.stderr
    processes = run(lab, "sh", "-c", "for each in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$each; echo; done").stdout
    assert b"agent" in processes
    assert b"sleep 1" not in processes


def test_many_commands_side_by_side(lab: Lab) -> None:
    """Four at a time, each with its own megabyte and status: bytes equal, nothing left of any of them."""
    # How many programs there are (the kernel's own threads, which come and go, are none), and files of commands.
    look = "set -- $(readlink /proc/[0-9]*/exe | wc -l; ls /sys/fs/cgroup/commands /run/lab/commands | wc -l)"
    programs, files = run(lab, "sh", "-c", f"{look}; echo $*").stdout.split()

    def one(number: int) -> bool:
        data = random.Random(number).randbytes(1 << 20)
        script = f"tee /dev/stderr; exit {number % 256}"
        ran = run(lab, "sh", "-c", script, input=data)
        return (ran.stdout, ran.stderr, ran.returncode) == (data, data, number % 256)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(12)))
    # A command's process in the agent ends a little later than the command.
    as_before = f"while {look}; [ $1 -gt {int(programs)} ] || [ $2 != {int(files)} ]; do sleep 0.1; done"
    assert run(lab, "sh", "-c", as_before).returncode == 0


def test_input_waits_for_who_reads_it(lab: Lab) -> None:
    """More input than any buffer on the way holds; the command reads it late, and only then it all arrives."""
    data = random.Random(0).randbytes(8 << 20)
    ran = run(lab, "sh", "-c", "sleep 1; sha256sum", input=data)
    assert ran.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_output_that_nobody_reads_ends_the_command(lab: Lab) -> None:
    """As `yes | head -1`: the command meets the closed pipe."""
    with lab.popen("sh", "-c", "yes; echo $? >&2", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.read(2) == b"y\n"
        command.stdout.close()
        assert command.stderr.read() == b"141\n"  # 128 + SIGPIPE
        assert command.wait(LIMIT_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_arrive(number: signal.Signals, lab: Lab) -> None:
    script = f"trap 'echo got it; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.1; done"
    with lab.popen("sh", "-c", script, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"ready\n"
        command.send_signal(number)
        assert command.stdout.read() == b"got it\n"
        assert command.wait(LIMIT_S) == 9


def test_a_signal_that_ends_the_command(lab: Lab) -> None:
    assert run(lab, "sh", "-c", "kill -SEGV $$").returncode == 128 + signal.SIGSEGV


def test_a_client_that_vanishes_takes_its_command_along(lab: Lab) -> None:
    with lab.popen("sh", "-c", "setsid sleep 4321 & echo ready; wait", stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"ready\n"
        command.kill()
    gone = "while pgrep -f 'sleep 432[1]'; do sleep 0.1; done"
    assert run(lab, "sh", "-c", gone).returncode == 0


def test_a_terminal(lab: Lab) -> None:
    """Typed keys, the size, and Ctrl-C are the command's."""
    with Console(*lab.command("sh", "-i", tty=True), clock=lab.clock) as console:
        console.send("stty size; tty; echo so''far\r")
        console.expect("24 80", LIMIT_S)
        console.expect("/dev/pts/", LIMIT_S)
        console.expect("sofar", LIMIT_S)
        # Said by the process that Ctrl-C is for: before the shell has put that into the foreground, nobody hears it.
        console.send("sh -c 'echo here''after; exec sleep 1000'\r")
        console.expect("hereafter", LIMIT_S)
        console.send("\x03")
        console.send("echo $((6 * 7)); exit 5\r")
        console.expect("42", LIMIT_S)
        assert console.wait(LIMIT_S) == 5


@pytest.mark.parametrize(
    ("argv", "status"), [(["no-such-command"], 127), (["/etc/hostname"], 126)], ids=["missing", "no program"]
)
def test_what_cannot_be_started(argv: list[str], status: int, lab: Lab) -> None:
    ran = run(lab, *argv)
    assert ran.returncode == status
    assert ran.stderr.startswith(b"lab: " + argv[0].encode())


def test_a_checkout_that_changes_while_the_lab_is_up(lab: Lab) -> None:
    """Not what was there when somebody first looked."""
    path = Path(__file__).parent / "changes-now"
    try:
        for text in (b"first", b"second"):
            path.write_bytes(text)
            assert run(lab, "cat", str(path)).stdout == text
            path.unlink()
            assert run(lab, "test", "-e", str(path)).returncode == 1
    finally:
        path.unlink(missing_ok=True)


def test_no_lab(tmp_path: Path) -> None:
    ran = subprocess.run([CI_LAB, "exec", "--at", tmp_path, "--", "true"], capture_output=True, text=True, check=False)
    assert ran.returncode == 125
    assert ran.stderr == "ci/lab: no lab is up here: start one with `ci/lab up`\n"
