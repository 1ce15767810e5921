"""``pyvmm bench net``: what a frame of a network card on virtio takes, in pyvmm and in QEMU without vhost.

One guest with a driver of its own (guests/net/virtio_net.S) is the firmware of a pc with one virtio-net-pci card at a
tap of its own, in a network namespace of this process. What it sends, the host's kernel lets go at once; what it
receives waited at the tap before the turn began; an ARP request is answered by the kernel as it is sent. So what is
measured is the way between guest and tap. Contenders take turns, A B C C B A, as in ``pyvmm bench disk``.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError
from pyvmm_benchmarks import environment
from pyvmm_benchmarks.contenders.net_contenders import ROM, NetKind, OwnKind, QemuKind, ip
from pyvmm_benchmarks.exits import chosen
from pyvmm_benchmarks.net_cases import CASES, rom
from pyvmm_benchmarks.report import TOLERANCE, Report, case_lines, print_comparison
from pyvmm_benchmarks.request_turns import Found, one_set

REFERENCE = "qemu"
SETS, ROUNDS = 3, 10
QUICK_SETS, QUICK_ROUNDS = 1, 4
CLONE_NEWNET = 0x4000_0000

OPTIONS = (
    Option("--quick", "", "fewer sets of processes, fewer rounds"),
    Option("--cases", "A,B", "only these (see --list)"),
    Option("--contenders", "A,B", f"only these; {REFERENCE} is the reference"),
    Option("--sets", "N", f"sets of fresh processes (default {SETS})", int),
    Option("--rounds", "N", f"rounds a set (default {ROUNDS})", int),
    Option("--scale", "N", "frames a turn, times this (default 1)", float),
    Option("--pin", "CPU|none", "where the vCPU runs; all other threads run elsewhere (default: the last one)"),
    Option("--json", "FILE", "write everything found to FILE"),
    Option("--compare", "OLD.json", "print what changed beyond noise; exit status 1 on a regression of pyvmm"),
    Option("--tolerance", "PART", f"changes up to this part are noise (default {TOLERANCE})", float),
    Option("--list", "", "the cases and the contenders"),
    Option("--help -h", "", "this"),
)

TITLE = """\
usage: pyvmm bench net [OPTIONS]

What a frame of a network card on virtio takes, in pyvmm and in QEMU: time, system calls, wake-ups, calls of Python.
It needs root: each has a tap of its own, in a network namespace that is made for it."""


def kinds() -> list[NetKind]:
    """Every contender there may be, the reference first."""
    return [QemuKind(REFERENCE, 1), OwnKind("pyvmm", 2)]


def main(args: Sequence[str]) -> int:
    given = parse(OPTIONS, args, verb="bench net")
    if given.get("help"):
        print(usage(TITLE, OPTIONS), end="")
        return 0
    if given.get("list"):
        print("cases:", *(f"  {case.name:<20}{case.title}" for case in CASES), sep="\n")
        print("contenders:", *(f"  {k.name:<20}{k.version() or 'comes with pyvmm'}" for k in kinds()), sep="\n")
        return 0
    old = Report.read(given["compare"], "net") if "compare" in given else None
    report = measured(given)
    if "json" in given:
        report.write(given["json"])
    return 0 if old is None else print_comparison(old, report, given.get("tolerance", TOLERANCE))


def measured(given: dict[str, object]) -> Report:
    cases = chosen(str(given.get("cases", "")), CASES, "case")
    contenders = chosen(str(given.get("contenders", "")), kinds(), "contender")
    quick = bool(given.get("quick"))
    sets = int(str(given.get("sets", QUICK_SETS if quick else SETS)))
    rounds = int(str(given.get("rounds", QUICK_ROUNDS if quick else ROUNDS)))
    scale = float(str(given.get("scale", 1)))
    if sets < 1 or rounds < 1:
        raise ConfigError("--sets and --rounds: give at least 1")
    try:
        pin = environment.choose_pin(str(given["pin"]) if "pin" in given else None)
    except ValueError:
        raise ConfigError(f"--pin {given['pin']}: give the number of a CPU, or none") from None
    programs = {kind.name: version for kind in contenders if (version := kind.version()) is not None}
    settings = {"sets": sets, "rounds": rounds, "scale": scale, "pin": pin}
    report = Report("net", environment.describe(pin, programs), settings)
    print("\n".join(environment.lines(report.host)) + "\n", flush=True)
    enter_namespace()
    with tempfile.TemporaryDirectory() as name, environment.left_to_contenders(pin):
        (Path(name) / ROM).write_bytes(rom())
        found = {case.name: Found(case, contenders, REFERENCE, "frame") for case in cases}
        for _ in range(sets):
            one_set(cases, contenders, Path(name), found, rounds, scale, pin)
        for one in found.values():
            report.cases.append(one.case_report())
            print("\n".join([*case_lines(report.cases[-1]), *one.count_lines(), ""]), flush=True)
    return report


def enter_namespace() -> None:
    """A network namespace for this process and its children (unshare(2)), in which nobody speaks of himself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        why = os.strerror(ctypes.get_errno())
        raise ConfigError(f"a network namespace: {why}: run it as root (CAP_SYS_ADMIN)")
    for place in ("all", "default"):
        path = Path("/proc/sys/net/ipv6/conf", place, "disable_ipv6")
        if path.exists():
            path.write_text("1")
    ip("link", "set", "lo", "up")
