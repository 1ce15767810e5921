"""What embedders use is public and typed: names, options, consoles with feed, exits by region in whole nanoseconds."""

from __future__ import annotations

import pickle
import pydoc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from guests import MMIO, PASSED, PORT, Guest, Recorder

import pyvmm
from pyvmm import config

ECHO = """
    mov     $0x3f8, %edx
1:  add     $5, %edx                # LSR
    inb     %dx, %al
    sub     $5, %edx
    test    $1, %al
    jz      1b
    inb     %dx, %al
    outb    %al, %dx
    cmp     $'.', %al
    jne     1b
    finish
"""

USER = """
import pyvmm

class Counter(pyvmm.Device):
    line: pyvmm.IrqLine
    timer: pyvmm.Timer

    def __init__(self, m: pyvmm.Machine) -> None:
        self.line = m.irq_line(5)
        self.clock: pyvmm.Clock = m.clock
        self.timer = self.clock.timer(self.line.pulse)
        self.memory: pyvmm.GuestMemory = m.memory

    def read(self, offset: int, size: int) -> int:
        self.timer.arm(self.clock.now_ns() + 10)
        return self.memory.view(0, 4)[0]

options: pyvmm.MachineOptions = {"memory_mib": 4, "flat": b"\\xf4", "serial": print}
with pyvmm.Machine(**options) as m:
    m.pio.map(0x700, 1, Counter(m))
    m.consoles["serial"].feed(b"x")
    status: pyvmm.ExitStatus = m.run(timeout_s=5)
    cpu: pyvmm.Cpu = m.cpus[0]
    cpu.breakpoints |= {0x1000}
    total: int = sum(row.sum_ns for row in m.exit_stats() if row.region == "it")
    rows: list[pyvmm.ExitStat] = m.exit_stats()
    if m.status is not None and m.error is None:
        print(m.status.reason, total)
"""
WRONG = """
import pyvmm

pyvmm.Machine(memory_mib="4")
pyvmm.Machine(memroy_mib=4)
"""


def test_mypy_s_word_about_a_user_s_program(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    root = Path(pyvmm.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file", "/dev/null"]
    run = subprocess.run(
        [*command, str(tmp_path / "user.py"), str(tmp_path / "wrong.py")],
        capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(root), "PATH": ""},
    )  # fmt: skip
    errors = [line.split(": ", 1)[0] for line in run.stdout.splitlines() if ": error: " in line]
    assert errors == ["wrong.py:4", "wrong.py:5"], run.stdout + run.stderr


def test_options_are_those_of_the_configuration() -> None:
    assert set(pyvmm.MachineOptions.__annotations__) == set(pyvmm.MachineConfig.rows)
    assert pyvmm.MachineOptions.__total__ is False
    # What type checkers see is written out in config.py: it must not lag behind.
    text = Path(config.__file__).read_text().split("class MachineOptions(TypedDict, total=False):")[1]
    fields = [line.split(": ", 1) for line in text.split("\n\n")[1].splitlines()]
    rows = pyvmm.MachineConfig.rows
    assert {name.strip(): kind for name, kind in fields} == {n: pyvmm.MachineConfig.__annotations__[n] for n in rows}


def test_every_public_name_is_there_and_listed() -> None:
    wanted = {"Clock", "Timer", "GuestMemory", "IrqLine", "ExitStat", "MachineOptions", "Cpu", "Chardev"}
    assert wanted <= set(pyvmm.__all__) <= set(dir(pyvmm))
    namespace: dict[str, Any] = {}
    exec("from pyvmm import *", namespace)
    assert set(pyvmm.__all__) <= set(namespace)


def test_help_is_about_devices() -> None:
    text = pydoc.render_doc(pyvmm, renderer=pydoc.plaintext)  # type: ignore[attr-defined]  # it is there
    for word in ("class Device(", "read(self, offset, size)", "class IrqLine", "class Timer", "map(base, size"):
        assert word in text, word
    for noise in ("with_traceback", "add_note", "bit_length", "inherited from builtins.BaseException"):
        assert noise not in text, noise
    words = pydoc.render_doc(pyvmm.GuestError, renderer=pydoc.plaintext)  # type: ignore[attr-defined]  # it is there
    assert len(words.splitlines()) < 40
    assert "status" in words


def test_an_error_is_still_what_it_was() -> None:
    error = pyvmm.GuestError("why", "the dump")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.dump, again.status) == ("why", "the dump", 4)
    assert "with_traceback" in dir(error)

    class Mine(pyvmm.VmmError):
        extra = 5

    with pytest.raises(pyvmm.VmmError):
        raise Mine("mine")
    assert "extra" in dir(Mine)


# -- consoles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["callable", "none", "file", "pty", "chardev"])
def test_a_console_is_fed_by_name(boot: Callable[..., Guest], tmp_path: Path, kind: str) -> None:
    heard = bytearray()
    serial: Any = {
        "callable": heard.extend,
        "none": None,
        "file": f"file:{tmp_path / 'log'}",
        "pty": "pty",
        "chardev": pyvmm.chardev.CallableChardev(heard.extend),  # type: ignore[attr-defined]  # a module
    }[kind]
    guest = boot(ECHO, serial=serial)
    console = guest.machine.consoles["serial"]
    words = b"more than a FIFO of sixteen holds: " * 8 + b"."
    console.feed(memoryview(words)[:40])
    guest.start()
    console.feed(bytearray(words[40:]))
    guest.wait()
    assert guest.machine.status == PASSED
    assert console.fed_bytes == 0
    if kind == "file":
        guest.machine.close()
        heard += (tmp_path / "log").read_bytes()
    if kind in ("callable", "chardev", "file"):
        assert heard == words


def test_what_is_fed_while_nobody_reads_waits(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    guest.machine.consoles["serial"].feed(b"x" * 100)
    assert guest.run() == PASSED
    assert 0 < guest.machine.consoles["serial"].fed_bytes <= 100


def test_what_can_t_be_fed(boot: Callable[..., Guest]) -> None:
    console = boot("finish").machine.consoles["serial"]
    wrong: list[Any] = [5, "text", None, [1, 2]]
    for value in wrong:
        with pytest.raises(pyvmm.ConfigError, match="give bytes"):
            console.feed(value)
    assert console.fed_bytes == 0
    assert set(boot("finish", debugcon=print).machine.consoles) == {"serial", "debugcon"}


def test_many_feed_at_once(boot: Callable[..., Guest]) -> None:
    heard = bytearray()
    guest = boot(ECHO, serial=heard.extend)
    console = guest.machine.consoles["serial"]
    guest.start()
    threads = [threading.Thread(target=lambda: [console.feed(b"ab") for _ in range(50)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    console.feed(b".")
    guest.wait()
    assert bytes(heard) == b"ab" * 150 + b"."


# -- exits -----------------------------------------------------------------------------------------------------


def test_rows_name_their_region_in_whole_nanoseconds(boot: Callable[..., Guest]) -> None:
    guest = boot(
        """
        mov     $DEVICE_PORT, %edx
        inb     %dx, %al
        inb     $0x99, %al
        mov     $DEVICE_MMIO + 0x20, %edi
        mov     (%rdi), %eax
        finish
        """
    )
    guest.machine.pio.map(PORT, 1, Recorder(), name="it")
    guest.machine.mmio.map(MMIO + 0x20, 4, Recorder(), name="there")
    guest.machine.mmio.map(MMIO + 0x40, 4, Recorder(), name="beside")
    assert guest.run() == PASSED
    rows = {(row.reason, row.address): row for row in guest.machine.exit_stats()}
    assert rows["IO", PORT].region == "it"
    assert rows["IO", 0x99].region is None
    assert rows["MMIO", MMIO].region == "there, beside"
    for row in rows.values():
        bounds = [bound for bound, _ in row.histogram_ns]
        numbers = [row.count, row.sum_ns, row.min_ns, row.max_ns, row.mean_ns, *bounds]
        assert all(type(number) is int for number in numbers)
        assert row.min_ns <= row.mean_ns <= row.max_ns <= row.sum_ns
        assert sum(count for _, count in row.histogram_ns) == row.count
    table = guest.machine.exit_stats_table()
    assert "(nobody)" in table
    assert "there, beside" in table


def test_when_the_first_exit_came(boot: Callable[..., Guest]) -> None:
    guest = boot("1: inb $0x99, %al\n finish")
    assert guest.machine.first_exit_ns is None
    assert "first KVM_RUN" not in guest.machine.exit_stats_table()
    before_ns = time.monotonic_ns()
    assert guest.run() == PASSED
    first_ns = guest.machine.first_exit_ns
    assert first_ns is not None
    assert 0 < first_ns < time.monotonic_ns() - before_ns
    assert guest.machine.exit_stats_table().endswith(f"\nthe first one {first_ns / 1e6:.2f} ms after the first KVM_RUN")
    guest.machine.reset()
    guest.run()
    assert guest.machine.first_exit_ns == first_ns


def test_hints_of_public_classes_can_be_read() -> None:
    assert get_type_hints(pyvmm.ExitStatus)["reason"] is str
