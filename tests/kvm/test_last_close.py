"""What is left of a VM after its last descriptor: nothing, and nobody waits for it (pyvmm/kvm/last_close.pxd)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyvmm.kvm.system import Kvm

# Linux <linux/seccomp.h>, <linux/filter.h>: io_uring_setup (425) kills the process, all else is allowed.
KILLS_AT_IO_URING = """
import ctypes, struct
def bpf(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = bpf(0x20, 0, 0, 0) + bpf(0x15, 0, 1, 425) + bpf(0x06, 0, 0, 0x80000000) + bpf(0x06, 0, 0, 0x7FFF0000)
filters = ctypes.create_string_buffer(program)
head = struct.pack("HxxxxxxQ", 4, ctypes.addressof(filters))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, head, 0, 0) == 0
"""


def threads_of_pits() -> list[str]:
    """KVM has a thread for each PIT, with the number of the process in its name, until the VM has gone."""
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            continue
    return [name for name in names if name == f"kvm-pit/{os.getpid()}"[:15]]


def test_the_vm_goes() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vm.create_irqchip()
        vm.create_pit()
        assert threads_of_pits()
        vm.close()
    assert set(os.listdir("/proc/self/fd")) == before
    while threads_of_pits():
        os.sched_yield()


def test_a_filter_that_kills_is_not_tried() -> None:
    script = f"{KILLS_AT_IO_URING}\nfrom pyvmm.kvm.system import Kvm\nKvm().create_vm().close()\nprint('lives')"
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (0, "lives\n"), made.stderr
