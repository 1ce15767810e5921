"""A machine that is traced: the trace has what happened, whatever becomes of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path

import pytest
from guests import PASSED, TIMEOUT_S, Guest
from trace_processor import trace_processor

from pyvmm import ConfigError, Machine, StateError
from pyvmm.cli import main
from pyvmm.cli.log import begin as begin_log
from pyvmm.errors import HostError
from pyvmm.region import LatchRegion
from pyvmm.trace.events import Exit
from pyvmm.trace.export import everything, export
from pyvmm.trace.format import EXIT, LINE, TraceFile
from pyvmm.trace.summary import Summary

# 3,000 exits of three kinds: a port that nobody has, one that is read, memory that is none; then the end.
SOURCE = """
    mov $1000, %ecx
    mov $DEVICE_MMIO, %ebx
1:  mov %ecx, %eax
    outl %eax, $0x84
    inb $0x80, %al
    movw %cx, 0x10(%rbx)
    loop 1b
    finish
"""
BOTH_EXIT = """
    .include "interrupts64.inc"
    .include "smp64.inc"
    start_others
1:  outb %al, $0x84
    jmp 1b
other_main:
2:  outb %al, $0x84
    jmp 2b
"""
# mov $0x80, %dx; 1: out %al, %dx; jmp 1b
SPIN = bytes.fromhex("ba8000 ee ebfd")


def sums(machine: Machine) -> dict[tuple[str, int | None, str], tuple[int, int]]:
    return {(row.reason, row.address, row.direction): (row.count, row.sum_ns) for row in machine.exit_stats()}


def test_the_sums_are_those_of_the_exit_stats(boot: Callable[..., Guest], tmp_path: Path) -> None:
    path = tmp_path / "trace"
    guest = boot(SOURCE)
    guest.machine.start_trace(path)
    assert guest.run() == PASSED
    assert guest.machine.stop_trace() == 0
    trace = TraceFile(str(path))
    assert (trace.ended, trace.damage, trace.dropped, trace.names.cpus) == (True, "", 0, 1)
    told = sums(guest.machine)
    found = {row: (times.count, times.total) for row, times in Summary(trace).exits.items()}
    assert found.keys() == told.keys()
    for row, (count, total) in told.items():
        assert found[row][0] == count
        assert abs(found[row][1] - total) <= count  # each of ours is a whole number of ns
    exits = [Exit(record) for record in trace.records() if record.kind == EXIT]
    writes = [each for each in exits if (each.reason, each.address) == ("IO", 0x84)]
    assert [(each.value, each.size) for each in writes] == [(n, 4) for n in range(1000, 0, -1)]
    memory = [each for each in exits if each.reason == "MMIO"]
    assert [(each.address, each.value) for each in memory] == [(0xD0000010, n) for n in range(1000, 0, -1)]
    assert all(each.size == 2 for each in memory)
    check_export(trace, path, told)


SUMS = "select name, count(*) as count, sum(dur) as total from slice where category = 'exit' group by name"


def check_export(trace: TraceFile, path: Path, told: dict[tuple[str, int | None, str], tuple[int, int]]) -> None:
    """Perfetto's trace processor finds as many exits of each kind, and that they take as long (docs/trace.md)."""
    out = path.with_suffix(".pftrace")
    export(trace, str(out), everything)
    with trace_processor(out) as perfetto:
        found = {row.name: (row.count, row.total) for row in perfetto.query(SUMS)}
    assert len(found) == len(told)
    for (reason, address, direction), (count, total) in told.items():
        name = " ".join(filter(None, (reason, direction, "" if address is None else f"{address:#x}")))
        ((of_name, of_time),) = (each for key, each in found.items() if f"{key} ".startswith(f"{name} "))
        assert of_name == count
        assert abs(of_time - total) <= count  # whole ns each


def test_on_and_off_while_it_runs(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot(BOTH_EXIT, cpus=2)
    guest.start()
    with pytest.raises(StateError, match="no trace is being written"):
        guest.machine.stop_trace()
    for number in range(3):
        path = tmp_path / str(number)
        guest.machine.start_trace(path)
        with pytest.raises(StateError, match="stop that one first"):
            guest.machine.start_trace(tmp_path / "another")
        wait_for(lambda path=path: len(vcpus(path)) == 2)
        guest.machine.stop_trace()
        size = path.stat().st_size
        before = guest.exits("IO")
        wait_for(lambda before=before: guest.exits("IO") > before + 10)
        assert path.stat().st_size == size and TraceFile(str(path)).ended
    guest.machine.start_trace(tmp_path / "last")
    guest.close()  # with a trace on
    assert TraceFile(str(tmp_path / "last")).ended


def vcpus(path: Path) -> Counter[int]:
    """Of a trace that is being written: whose exits there are, and how many."""
    return Counter(record.source for record in TraceFile(str(path)).records() if record.kind == EXIT)


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    image, path = tmp_path / "guest.bin", tmp_path / "trace"
    image.write_bytes(SPIN)
    command = [sys.executable, "-m", "pyvmm", "run", "--flat", str(image), "--serial", "none", "--trace", str(path)]
    process = subprocess.Popen([*command, "--timeout", str(TIMEOUT_S)], stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: path.exists() and path.stat().st_size > 1 << 16)
        assert vcpus(path)[0] > 1000  # it can be read by now
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    trace = TraceFile(str(path))
    assert not trace.ended
    records = list(trace.records())
    assert all(Exit(record).address in (0x80, None) for record in records if record.kind == EXIT)
    assert 32 * len(records) > path.stat().st_size * 0.9


def test_lines_of_devices(boot: Callable[..., Guest], tmp_path: Path) -> None:
    guest = boot("finish")
    path = tmp_path / "trace"
    guest.machine.start_trace(path)
    line = guest.machine.irq_line(5)
    guest.machine.stop_trace()
    guest.machine.start_trace(path)
    line.pulse()
    guest.machine.stop_trace()
    lines = [(record.source, record.a) for record in TraceFile(str(path)).records() if record.kind == LINE]
    assert lines == [(5, 1), (5, 0)]


def test_a_file_that_there_can_be_none_of(boot: Callable[..., Guest], tmp_path: Path) -> None:
    machine = boot("finish").machine
    none = "no file has such a name"
    for path, words in ((tmp_path, "give a file that can be written"), ("/dev/null", "this is no regular file"),
                        ("a\0b", none), ("\ud800", none)):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            machine.start_trace(path)
    for name in ("a\0b", "\ud800"):
        for serve in (machine.serve_qmp, lambda path: machine.serve_metrics(f"unix:{path}")):
            with pytest.raises(ConfigError, match=none):
                serve(name)
        with pytest.raises(ConfigError, match="is no address of a host, give one"):
            machine.serve_metrics(f"{name}:0")
        with pytest.raises(ConfigError, match=none):
            begin_log(f"info,file={name}", machine)
    machine.start_trace(tmp_path / "trace")
    machine.stop_trace()


FULL = """
import resource, signal, sys
import pyvmm
from pyvmm.errors import HostError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
with pyvmm.Machine(flat=bytes.fromhex("ba8000 ee ebfd"), memory_mib=4, serial="none") as machine:
    machine.start_trace(sys.argv[1])
    machine.resume()
    while not machine._tracing.error:
        pass
    try:
        machine.stop_trace()
    except HostError as error:
        print(error)
    machine.start_trace(sys.argv[2])
    machine.pause()
    machine.resume()
"""


def test_a_host_that_takes_no_more_ends_the_trace_and_not_the_guest(tmp_path: Path) -> None:
    paths = str(tmp_path / "one"), str(tmp_path / "two")
    done = subprocess.run([sys.executable, "-c", FULL, *paths], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"trace {paths[0]} ends early: ")
    assert list(TraceFile(paths[0]).records())


def test_a_file_system_that_tells_at_the_end_that_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with Machine(flat=bytes.fromhex("f4"), memory_mib=4, serial="none") as machine:
        machine.start_trace(tmp_path / "trace")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(HostError, match="ends early: No space left on device: free some space there"):
            machine.stop_trace()


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image, path = tmp_path / "guest.bin", tmp_path / "trace"
    image.write_bytes(bytes.fromhex("b0 15 e6 f4 f4"))  # mov $0x15, %al; out %al, $0xf4; hlt
    assert main(["run", "--flat", str(image), "--trace", str(path)]) == 43
    assert main(["trace", str(path), "--device", "debug-exit"]) == 0
    out, error = capfd.readouterr()
    assert "exit IO out 0xf4 1 0x15 isa-debug-exit" in out
    assert error == ""


def test_a_bus_with_more_regions_than_names_are_told_of(boot: Callable[..., Guest], tmp_path: Path) -> None:
    machine = boot("finish").machine
    path = tmp_path / "trace"
    machine.mmio.add_all([(0xD8000000 + n, LatchRegion(1, name="x" * 1000)) for n in range(5000)])
    machine.start_trace(path)
    machine.stop_trace()
    trace = TraceFile(str(path))
    assert (trace.damage, trace.ended) == ("", True)
    assert trace.names.region("IO", 0x3F8) == "serial"


def test_what_somebody_has_for_a_drive_or_a_trace_is_not_emptied(boot: Callable[..., Guest], tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", tmp_path / "trace"
    disk.write_bytes(bytes(1 << 20))
    machine = boot("finish", drives=[f"file={disk},format=raw"]).machine
    with pytest.raises(ConfigError, match="the image of a drive"):
        machine.start_trace(disk)
    assert disk.stat().st_size == 1 << 20
    machine.start_trace(path)
    other = boot("finish").machine
    with pytest.raises(ConfigError, match="somebody's trace"):
        other.start_trace(path)
    machine.stop_trace()
    other.start_trace(path)
    assert TraceFile(str(path)).names.cpus == 1


def test_a_trace_is_not_exported_over_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image, path, link = tmp_path / "guest.bin", tmp_path / "trace", tmp_path / "link"
    image.write_bytes(bytes.fromhex("b0 15 e6 f4 f4"))
    assert main(["run", "--flat", str(image), "--trace", str(path)]) == 43
    link.symlink_to(path)
    whole = path.read_bytes()
    for out in (path, link):
        assert main(["trace", str(path), "--export", str(out)]) == 2
        assert "that is the trace itself" in capfd.readouterr().err
    assert path.read_bytes() == whole


def test_one_that_is_begun_while_the_machine_is_closed(
    boot: Callable[..., Guest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of QMP has come as far as asking whether the machine is usable: close() waits for its thread."""
    machine = boot("finish").machine
    late = threading.Thread(target=machine.start_trace, args=(tmp_path / "trace",), daemon=True)

    def wait_for_it() -> None:
        late.start()
        late.join(TIMEOUT_S)
        assert not late.is_alive()

    machine._chassis.closers.call(wait_for_it)
    monkeypatch.setattr(Machine, "_usable", lambda machine, call: None)
    machine.close()
    assert TraceFile(str(tmp_path / "trace")).ended
    monkeypatch.undo()
    assert machine._tracing is not None
    with pytest.raises(StateError, match="closed"):
        machine._tracing.start(str(tmp_path / "another"))
    assert not (tmp_path / "another").exists()
