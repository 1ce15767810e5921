"""ci/lab from outside: what goes in, what comes out, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

LAB = Path(__file__).resolve().parents[2] / "ci" / "lab"
BOOT_S = 200.0  # two tries on a busy machine


def test_a_command_sees_a_full_kvm_and_its_results_come_back(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        "ls /dev/kvm /dev/net/tun /dev/ptmx && pwd && grep -c -w svm /proc/cpuinfo\n"
        "echo \"$PYVMM_HERE\"; echo complaint >&2; cat\n"
        "head -c 3000000 /dev/zero | tr '\\0' x >$LAB_SCRATCH/many; touch /here-and-gone\n"
        "exit 7\n"
    )
    scratch = tmp_path / "scratch"
    ran = subprocess.run(
        [LAB, "run", "--cpus", "2", "--scratch", scratch, "--", "sh", script],
        cwd=tmp_path,
        env={**os.environ, "PYVMM_HERE": "two  'words'"},
        capture_output=True,
        text=True,
        timeout=BOOT_S,
    )
    assert ran.stdout.splitlines() == [
        "/dev/kvm", "/dev/net/tun", "/dev/ptmx", str(tmp_path), "2", "two  'words'",
    ]  # fmt: skip
    assert "complaint" in ran.stderr.splitlines()
    assert ran.returncode == 7
    assert (scratch / "many").read_bytes() == b"x" * 3_000_000
    assert not Path("/here-and-gone").exists()


def test_the_time_limit_ends_the_command() -> None:
    ran = subprocess.run(
        [LAB, "run", "--timeout", "10", "--", "sh", "-c", "echo begun; sleep 1000"],
        capture_output=True,
        text=True,
        timeout=BOOT_S,
    )
    assert (ran.returncode, ran.stdout) == (124, "begun\n")
    assert "time limit" in ran.stderr


def test_an_interrupt_ends_qemu_too() -> None:
    with subprocess.Popen([LAB, "run", "--", "sh", "-c", "echo begun; sleep 1000"], stdout=subprocess.PIPE) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"begun\n"
        children = Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()
        assert children
        lab.send_signal(signal.SIGINT)
        assert lab.wait(30) == 128 + signal.SIGINT
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
