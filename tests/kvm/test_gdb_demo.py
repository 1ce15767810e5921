"""Debian's gdb and the guest of `pyvmm demo`: real, protected and long mode, from its first instruction to its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import asm
import pytest
from debian_gdb import gdb
from guests import TIMEOUT_S

import pyvmm
from pyvmm.cli.demo import GUEST_ADDRESS, NOTEBOOK_BYTES, NOTEBOOK_IRQ, NOTEBOOK_MMIO, NOTEBOOK_PORT, Notebook
from pyvmm.guests import image

SOURCE = Path(pyvmm.__file__).parent / "guests" / "demo.S"


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest as an ELF file, for its labels."""
    folder = tmp_path_factory.mktemp("demo")
    asm.tool("as", "--64", "-o", str(folder / "demo.o"), str(SOURCE))
    asm.tool("objcopy", "--redefine-sym", "long=long_mode", str(folder / "demo.o"))  # a type's name, for gdb
    elf = folder / "demo.elf"
    asm.tool(
        "ld", "-melf_x86_64", "-N", "-e0", "--no-warn-rwx-segments", f"-Ttext={GUEST_ADDRESS:#x}", "-o", str(elf),
        str(folder / "demo.o"),
    )  # fmt: skip
    return elf


class Demo:
    """The machine of `pyvmm demo`, which waits for gdb."""

    def __init__(self, path: Path) -> None:
        self.said = bytearray()
        self.path = path
        self.machine = pyvmm.Machine(
            flat=image("demo"), flat_address=GUEST_ADDRESS, flat_mode="real16", memory_mib=2, serial=self.said.extend
        )
        cpu = self.machine.cpus[0]
        notebook = Notebook(self.machine.irq_line(NOTEBOOK_IRQ), cpu.vcpu.tsc_khz)
        self.machine.pio.map(NOTEBOOK_PORT, NOTEBOOK_BYTES, notebook)
        self.machine.mmio.map(NOTEBOOK_MMIO, NOTEBOOK_BYTES, notebook)
        self.machine.serve_gdb(path, wait=True)
        self.statuses: list[int] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.statuses.append(self.machine.run(TIMEOUT_S))
        except pyvmm.StateError:
            pass  # closed by a test that has failed

    def status(self) -> int:
        self.thread.join(TIMEOUT_S)
        return self.statuses[0]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    made = Demo(tmp_path / "gdb")
    yield made
    made.machine.close()
    made.thread.join(TIMEOUT_S)


@pytest.mark.native
def test_three_modes_and_a_reset(demo: Demo, symbols: Path) -> None:
    """The lab's emulated processor stops at no breakpoint of its guests' guests."""
    said = gdb(
        demo.path,
        [
            r'printf "first %x\n", $pc',
            "break *compare_words",
            "continue",
            r'printf "real PE=%d\n", $cr0 & 1',
            "stepi",
            "stepi",
            "x/i $pc - 3",
            "delete",
            # Changed by `rep insw` of the second round, and by nothing before it.
            "watch *(short *)&buffer",
            "continue",
            r'printf "buffer %x\n", *(short *)&buffer',
            "delete",
            "break *protected",
            "break *long_mode",
            "continue",
            r'printf "protected PE=%d PG=%d\n", $cr0 & 1, $cr0 >> 31 & 1',
            "stepi 5",
            r'printf "steps %d esp %x\n", $pc - (long)&protected, $rsp',
            "continue",
            r'printf "long LMA=%d CS=%x CR3=%x\n", $efer >> 10 & 1, $cs, $cr3',
            "delete",
            "hbreak *on_timer",
            "continue",
            r'printf "timer %d IF=%d\n", *(int *)&ticks, $eflags >> 9 & 1',
            "delete",
            "watch *(char *)&seen_self",
            "continue",
            r'printf "self %d\n", *(char *)&seen_self',
            "delete",
            # It crashes on purpose, and finds itself reset.
            "break *second_boot",
            "continue",
            r'printf "again PE=%d\n", $cr0 & 1',
            "delete",
            "continue",
        ],
        symbols,
    )
    for line in (
        "first 7c00",
        "real PE=0",
        "buffer ",
        "protected PE=1 PG=0",
        "long LMA=1 CS=",
        "CR3=10000",
        "timer 0 IF=0",
        "self 1",
        "again PE=0",
        "[Inferior 1 (Remote target) exited normally]",
    ):
        assert line in said, said
    assert demo.status() == 0
    assert b"failed" not in demo.said
    assert b"Power off through ACPI" in demo.said


@pytest.mark.native
def test_detach_and_kill(demo: Demo, symbols: Path) -> None:
    """Its breakpoints go with it; the next one finds the machine where it is."""
    stay_here = "set *(short *)$pc = 0xfeeb"  # a jump to itself
    said = gdb(demo.path, ["break *long_mode", "continue", "delete", stay_here, "break *on_timer", "detach"], symbols)
    assert "Breakpoint 1, " in said
    said = gdb(demo.path, ["info registers rip", "kill"], symbols)
    assert "<long_mode>" in said
    assert "[Inferior 1 (Remote target) killed]" in said
    assert demo.status() == 0
    assert b"Power off" not in demo.said


def test_it_is_interrupted(demo: Demo, symbols: Path) -> None:
    """gdb's own Ctrl-C, while it waits for the guest."""
    said = gdb(
        demo.path,
        [
            "set *(short *)&stop16 = 0xfeeb",  # a jump to itself
            "set $pc = (long)&stop16",
            "python import threading, os, signal; threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()",
            "continue",
            r'printf "at stop16+%d\n", $pc - (long)&stop16',
            "info threads",
            "monitor kvm",
            "monitor help",
            "detach",
        ],
        symbols,
    )
    assert "Program received signal SIGINT" in said
    assert "at stop16+0" in said
    assert "(CPU#0 [running])" in said
    assert "software breakpoints: " in said
    assert "non-maskable" in said
