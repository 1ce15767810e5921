"""What the scripts here share: host facts, guests, child processes; statistics by sampling. Standard library only.

A benchmark is run as ``python benchmarks/NAME.py``. Every contender runs in a process of its own: the script
starts itself with ``--child`` and the work as JSON; the child prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sampling import histogram_quantile, interval, median, quantile

__all__ = ["histogram_quantile", "interval", "median", "quantile"]  # and all below

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

GATE_PORT = 0x12  # floor.c has it too
BUSY_PORT = 0x14  # no PC has anything there that KVM or pyvmm would answer by itself
END_PORT = 0xF4  # isa-debug-exit

SAMPLES_AT = 0x1_0000
MOST_SAMPLES = 0x4000  # of 4 bytes: one real-mode segment; floor.c has these three as well
MEMORY_MIB = 64
US_PER_NS = 1e-3


# -- the host ------------------------------------------------------------------------------------------------


def kvm_kind() -> str:
    """Whose virtualization /dev/kvm is: no figure means anything without it."""
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", name).exists()]
    flags = cpuinfo("flags").split()
    hardware = "VMX" if "vmx" in flags else "SVM" if "svm" in flags else None
    if hardware is None:
        return "software (PVM)" if "kvm_pvm" in modules else "unknown: neither VMX nor SVM"
    nested = ", nested: this host is a guest itself" if "hypervisor" in flags else ""
    return f"hardware ({hardware}){nested}"


def cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def print_host(pin: int | None) -> None:
    print(f"KVM      {kvm_kind()}")
    print(f"kernel   {os.uname().release}")
    pinned = "not pinned" if pin is None else f"pinned to {pin}"
    print(f"CPU      {cpuinfo('model name')}, {len(os.sched_getaffinity(0))} usable, {pinned}")
    print(f"Python   {sys.version.split()[0]}, {sys.implementation.name}")
    print(f"load     {os.getloadavg()[0]:.2f} at the start")
    print()


# -- processes -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """For children: pyvmm is found where it is built in place and not installed."""
    env = dict(os.environ)
    if importlib.util.find_spec("pyvmm") is None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def child(script: str, work: dict[str, Any], pin: int | None) -> Any:
    """Do ``work`` in a fresh interpreter, and give back what it found."""
    with Contender(child_command(script, work), pin) as process:
        return json.loads(process.end())


def child_command(script: str, work: dict[str, Any]) -> list[str]:
    return [sys.executable, script, "--child", json.dumps(work)]


class Contender:
    """A process that takes turns: it waits for a line on its standard input and answers with one."""

    def __init__(self, command: list[str], pin: int | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=None if pin is None else lambda: os.sched_setaffinity(0, {pin}),
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def numbers(self) -> list[int]:
        """Its next line, of numbers."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} ended early, with status {self.process.wait()}")
        return [int(word) for word in line.split()]

    def end(self) -> str:
        """Nothing more to do: its last words."""
        words, _ = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"{self.process.args!r} ended with status {self.process.returncode}")
        return words

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()


def build_floor(directory: str) -> str:
    """floor.c, compiled into ``directory``."""
    binary = os.path.join(directory, "floor")
    subprocess.run(["gcc", "-O2", "-Wall", "-o", binary, str(HERE / "floor.c")], check=True)
    return binary


def main(
    children: Callable[[dict[str, Any]], Any],
    benchmark: Callable[[argparse.Namespace, str], None],
    parser: argparse.ArgumentParser,
) -> None:
    """Either side of a benchmark: ``children(work)``, or ``benchmark(options, temporary directory)``."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(children(json.loads(sys.argv[2]))))
        return
    allowed = sorted(os.sched_getaffinity(0))
    where = "the CPU contenders run on that need only one (default: the last one)"
    parser.add_argument("--pin", metavar="CPU|none", default=str(allowed[-1]), help=where)
    args = parser.parse_args()
    args.pin = None if args.pin == "none" else int(args.pin)
    print_host(args.pin)
    with tempfile.TemporaryDirectory() as directory:
        benchmark(args, directory)


# -- guests --------------------------------------------------------------------------------------------------

FIRST_EXIT = bytes([0xE6, END_PORT, 0xF4])  # out END_PORT, al; hlt


def word(value: int) -> bytes:
    return value.to_bytes(2, "little")


def busy_guest(access: bytes, blocks: int, block_exits: int, singles: int) -> bytes:
    """Real-mode code for 0x7c00 that does ``access`` over and over and times it by RDTSC, in two ways.

    A turn begins with a write to GATE_PORT, where the host may let it wait. Then ``blocks`` of
    ``block_exits`` accesses in the tightest loop there is, each block timed as a whole; then ``singles``, each
    timed by itself. The 32-bit tick counts go to SAMPLES_AT. There is no end: the host stops it at the gate.
    """
    block = timed(repeat(block_exits, access)) + b"\x4d"  # ...; dec bp
    turn = (
        bytes([0xE6, GATE_PORT])  # out GATE_PORT, al
        + store_at(SAMPLES_AT)
        + b"\xbd" + word(blocks)  # mov bp, blocks
        + block + bytes([0x75, 0x100 - len(block) - 2])  # jnz block
        + repeat(singles, timed(access))
    )  # fmt: skip
    return turn + b"\xe9" + word(0x1_0000 - len(turn) - 3)  # jmp turn


def store_at(address: int) -> bytes:
    """Let timed() store its samples from ``address`` (a multiple of 16) on."""
    # mov ax, address >> 4; mov es, ax; xor di, di; cld
    return b"\xb8" + word(address >> 4) + b"\x8e\xc0\x31\xff\xfc"


def timed(code: bytes) -> bytes:
    """Read the TSC, run ``code``, read it again, store the difference at es:di."""
    # rdtsc; mov ebx, eax; code; rdtsc; sub eax, ebx; stosd
    return b"\x0f\x31\x66\x89\xc3" + code + b"\x0f\x31\x66\x29\xd8\x66\xab"


def repeat(count: int, code: bytes) -> bytes:
    # mov cx, count; code; loop code
    return b"\xb9" + word(count) + code + bytes([0xE2, 0x100 - len(code) - 2])


def access(direction: str, port: int) -> bytes:
    """One byte out of, or into, AL."""
    return bytes([0xE6 if direction == "out" else 0xE4, port])


def samples_of(memory: bytes) -> list[int]:
    """The guest's tick counts out of the bytes it stored them in."""
    return memoryview(memory).cast("I").tolist()
