"""A stock Debian kernel with two vCPUs under gdb: stopped and let go again and again, memory by symbol, each vCPU's
registers, steps. (The lab's emulated processor knows no breakpoints of its guests' guests: tests/kvm has those.)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from boot_assets import Kernel
from console import SerialLine
from debian_gdb import gdb
from gdb_client import GdbClient

import pyvmm

BOOT_S = 300.0
ROUNDS = 200
KERNEL = 0xFFFF_8000_0000_0000  # where its half of the address space begins
INIT = """\
exec </dev/ttyS0 >/dev/ttyS0 2>&1
grep -E ' (linux_banner)$' /proc/kallsyms
echo CPUs=$(nproc) ready
read word
echo heard=$word
read word
"""


@pytest.mark.lab
@pytest.mark.after_consoles
def test_a_kernel_is_looked_into(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path
) -> None:
    line = SerialLine()
    path = tmp_path / "gdb"
    with pyvmm.Machine(
        cpus=2, memory_mib=256, kernel=str(cloud_kernel.vmlinux), initrd=str(make_initrd(INIT)),
        append="console=ttyS0 panic=-1 loglevel=4 nokaslr", serial=line.chardev,
    ) as machine:  # fmt: skip
        machine.serve_gdb(path)
        running = threading.Thread(target=run_to_the_end, args=(machine,))
        running.start()
        line.expect("CPUs=2 ready", BOOT_S)
        found = re.findall(r"^([0-9a-f]{16}) \w (\w+)\r?$", line.output, re.MULTILINE)
        symbols = {name: int(address, 16) for address, name in found}
        use_a_client(path, symbols)
        # It has lost nothing by that.
        line.send("six\n")
        line.expect("heard=six", BOOT_S)
        use_gdb(path, symbols)
        running.join(BOOT_S)
        assert machine.status == 0


def run_to_the_end(machine: pyvmm.Machine) -> None:
    try:
        machine.run()
    except pyvmm.StateError:
        pass  # closed by a test that has failed


def use_a_client(path: Path, symbols: dict[str, int]) -> None:
    with GdbClient(path) as client:
        client.no_ack()
        for _ in range(ROUNDS):
            client.send("vCont;c")
            client.interrupt()
            assert client.reply().startswith("T02")
        # By the kernel's own tables: its text, in large pages.
        assert client.memory(symbols["linux_banner"], 14) == b"Linux version "
        for thread in (1, 2):
            assert client.ask(f"Hg{thread}") == "OK"
            for _ in range(20):
                assert client.ask(f"vCont;s:{thread}") == f"T05thread:{thread};"
        assert client.ask("D") == "OK"


def use_gdb(path: Path, symbols: dict[str, int]) -> None:
    said = gdb(
        path,
        [
            f'printf "%.14s\\n", (char *){symbols["linux_banner"]:#x}',
            "info threads",
            "thread 1",
            r'printf "one %lx %lx %lx\n", $pc, $gs_base, $cr3',
            "thread 2",
            r'printf "two %lx %lx %lx\n", $pc, $gs_base, $cr3',
            "stepi 5",
            "info registers efer cr4",
            "kill",
        ],
    )
    assert "Linux version " in said, said
    assert "CPU#0 [" in said, said
    assert "CPU#1 [" in said, said
    assert "LME LMA" in said, said
    # Each vCPU has its own data, in the kernel's half; idle, both are in the kernel.
    one, two = (re.search(rf"{name} (\w+) (\w+) (\w+)", said) for name in ("one", "two"))
    assert one is not None, said
    assert two is not None, said
    assert one[2] != two[2], said
    assert all(int(each[n], 16) >= KERNEL for each in (one, two) for n in (1, 2)), said
