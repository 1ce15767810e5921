"""The environment that is printed, pinning, and the memory of another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.cli.bench import PACKAGE, load
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment, mailbox
from pyvmm_benchmarks.contenders import exit_contender
from pyvmm_benchmarks.contenders.others import CloudHypervisor, Firecracker, Kvmtool
from pyvmm_benchmarks.contenders.qemu import Qemu


def test_the_environment_is_plain_data_and_readable() -> None:
    described = environment.describe(1, {"qemu-pc": "QEMU emulator version 7.2"})
    assert json.loads(json.dumps(described)) == described
    text = "\n".join(environment.lines(described))
    assert described["kvm"] in text and "pinned to 1" in text and "qemu-pc: QEMU emulator" in text
    assert set(environment.IDENTITY) <= set(described)
    assert environment.differences(described, described) == []
    assert environment.differences(described, {**described, "kernel": "7.0"}) == [
        f"kernel: {os.uname().release} -> 7.0"
    ]


def test_mitigations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "meltdown": "Not affected",
        "retbleed": "Mitigation: untrained return thunk",
        "tsa": "Vulnerable",
    }.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(environment, "VULNERABILITIES", tmp_path)
    found = environment.mitigations()
    assert found["retbleed"] == "Mitigation: untrained return thunk"
    assert environment.summary(found) == "on for retbleed; vulnerable to tsa"
    assert environment.summary({}) == "not told by this kernel"


def test_governor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CPU_DIRECTORY", tmp_path)
    assert environment.governor() == "none visible"
    for cpu, governor in enumerate(("performance", "powersave")):
        directory = tmp_path / f"cpu{cpu}" / "cpufreq"
        directory.mkdir(parents=True)
        (directory / "scaling_governor").write_text(f"{governor}\n")
    assert environment.governor() == "performance, powersave"


def test_versions() -> None:
    assert environment.version(sys.executable, "--version") == f"Python {sys.version.split()[0]}"
    assert environment.version("/nonexistent/program", "--version") == "unknown version"


def test_pinning() -> None:
    allowed = os.sched_getaffinity(0)
    assert environment.choose_pin(None) == max(allowed)
    assert environment.choose_pin("none") is None
    assert environment.choose_pin(str(min(allowed))) == min(allowed)
    assert environment.choose_pin("4095") is None  # refused
    with pytest.raises(ValueError):
        environment.choose_pin("last")
    with environment.left_to_contenders(max(allowed)):
        assert os.sched_getaffinity(0) == (allowed - {max(allowed)} or allowed)
    assert os.sched_getaffinity(0) == allowed


def test_a_program_by_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYVMM_KVMTOOL", "/opt/lkvm")
    assert Kvmtool().program == "/opt/lkvm"
    monkeypatch.delenv("PYVMM_KVMTOOL")
    monkeypatch.setenv("PATH", "/nonexistent")
    for kind in (Kvmtool(), Firecracker(), CloudHypervisor(), Qemu("pc")):
        assert kind.version() == "not installed"


# -- the memory of another process -------------------------------------------------------------------------------

# Guest RAM at a place that only the magic number tells, beside a decoy of the same size.
HOLDER = """
import mmap, struct, sys
decoy = mmap.mmap(-1, 80 << 20)
memory = mmap.mmap(-1, (64 << 20) + (4 << 20))
import ctypes
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
at = -base % (2 << 20) if sys.argv[1] == "aligned" else 0
struct.pack_into("<Q", memory, at + 0x180000, 0x316D6D7679702121)
print(base + at, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("where", ["aligned", "first"])
def test_guest_memory_is_found_by_its_magic_number(where: str) -> None:
    command = [sys.executable, "-S", "-c", HOLDER, where]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        expected = int(process.stdout.readline())
        memory = mailbox.Memory(process.pid)
        assert memory.find_guest() == expected
        box = mailbox.Mailbox(memory, expected)
        assert box.ready
        box.put(mailbox.TURN, b"\x07\0\0\0")
        assert box.word(mailbox.TURN) == 7
        memory.close()
        process.communicate()


def test_candidates() -> None:
    mib = 1 << 20
    assert mailbox.candidates(0x1000, 5 * mib) == [0x1000, 2 * mib, 4 * mib]
    assert mailbox.candidates(4 * mib, 4 * mib) == [4 * mib, 4 * mib]


# -- the command -------------------------------------------------------------------------------------------------


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "there is no benchmark ''" in capsys.readouterr().err
    assert main(["bench", "disks"]) == 2
    assert "say `pyvmm bench exits`, `launch`, `disk`, `net` or `snapshot`" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "usage: pyvmm bench exits|launch|disk" in capsys.readouterr().out
    assert main(["bench", "exits", "--help"]) == 0
    assert "--compare OLD.json" in capsys.readouterr().out
    assert main(["bench", "exits", "--list"]) == 0
    said = capsys.readouterr().out
    assert main(["bench", "disk", "--list"]) == 0
    assert "read_4k_qd32" in capsys.readouterr().out
    assert "inl_from_qemu" in said and "python-ctypes" in said and "cloud-hypervisor" in said


def test_where_the_benchmarks_are_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyvmm.cli import bench

    monkeypatch.delitem(sys.modules, PACKAGE)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "pyvmm" / "cli" / "bench.py"))
    with pytest.raises(ConfigError, match="the benchmarks are not installed here: pip install"):
        load()


NAMED_THREADS = """
import ctypes, threading
def body(name):
    ctypes.CDLL(None).prctl(15, name)
    named.release()
    threading.Event().wait()
named = threading.Semaphore(0)
for name in (b"CPU 0/KVM", b"vcpu1", b"worker"):
    threading.Thread(target=body, args=(name,), daemon=True).start()
    named.acquire()
print("ready", flush=True)
input()
"""


def test_vcpus_get_a_cpu_each_and_other_threads_keep_off_the_measured_one() -> None:
    pin = max(exit_contender.ALLOWED)
    beside = exit_contender.ALLOWED - {pin} or {pin}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NAMED_THREADS], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        exit_contender.place_threads(process.pid, pin)
        placed = {
            (task / "comm").read_text().strip(): os.sched_getaffinity(int(task.name))
            for task in Path(f"/proc/{process.pid}/task").iterdir()
        }
        process.kill()
    assert placed.pop("CPU 0/KVM") == {pin}
    assert placed.pop("vcpu1") == {max(beside)}
    assert set(map(frozenset, placed.values())) == {frozenset(beside)}
