"""What the figures were taken on: kernel, CPU, KVM, mitigations, governor, load, versions. Also pinning.

``describe()`` gives plain data for the JSON, ``lines()`` the same for people.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyvmm
from pyvmm.kvm.kind import kvm_kind

VULNERABILITIES = Path("/sys/devices/system/cpu/vulnerabilities")
CPU_DIRECTORY = Path("/sys/devices/system/cpu")
# How long a program may take to say its version.
VERSION_S = 5.0

# Of the environment: where these differ, two runs are of different hosts or set-ups.
IDENTITY = ("kvm", "kernel", "cpu", "cpus_usable", "python", "pinned_cpu")


def describe(pin: int | None, programs: dict[str, str] | None = None) -> dict[str, Any]:
    """Plain data. ``programs`` are the other VMMs found: {name: version}."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kvm": kvm_kind(),
        "kernel": platform.release(),
        "cpu": cpuinfo("model name"),
        "cpu_mhz": cpuinfo("cpu MHz"),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "pinned_cpu": pin,
        "governor": governor(),
        "turbo": turbo(),
        "smt": first_line("/sys/devices/system/cpu/smt/control"),
        "mitigations": mitigations(),
        "kernel_command_line": first_line("/proc/cmdline"),
        "clocksource": first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "transparent_hugepages": first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "memory_mib": memory_mib(),
        "load": os.getloadavg()[0],
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "free_threaded": not getattr(sys, "_is_gil_enabled", lambda: True)(),
        "pyvmm": pyvmm.__version__,
        "in_lab": "PYVMM_LAB" in os.environ,
        "programs": dict(programs or {}),
    }


def lines(described: dict[str, Any]) -> list[str]:
    """For the top of a report."""
    e = described
    pinned = "not pinned" if e["pinned_cpu"] is None else f"pinned to {e['pinned_cpu']}"
    text = [
        ("KVM", e["kvm"]),
        ("kernel", e["kernel"]),
        ("CPU", f"{e['cpu']}, {e['cpu_mhz']} MHz, {e['cpus_usable']} usable, {pinned}"),
        ("governor", f"{e['governor']}; turbo {e['turbo']}; SMT {e['smt']}"),
        ("mitigations", summary(e["mitigations"])),
        ("clock", f"{e['clocksource']}; transparent huge pages {e['transparent_hugepages']}"),
        ("software", f"pyvmm {e['pyvmm']}, {e['python']}{', free-threaded' if e['free_threaded'] else ''}"),
        *(("", f"{name}: {version}") for name, version in e["programs"].items()),
        ("load", f"{e['load']:.2f} at the start, {e['time']}"),
    ]
    return [f"{name:<12}{value}" for name, value in text]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two environments different ones, in words."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in IDENTITY if old.get(key) != new.get(key)]


def summary(found: dict[str, str]) -> str:
    """The mitigations that cost something, and what is left open."""
    if not found:
        return "not told by this kernel"
    active = [name for name, text in found.items() if text.startswith("Mitigation")]
    open_ = [name for name, text in found.items() if text.startswith("Vulnerable")]
    text = f"on for {', '.join(active) or 'nothing'}"
    return text + (f"; vulnerable to {', '.join(open_)}" if open_ else "")


def mitigations() -> dict[str, str]:
    """{vulnerability: the kernel's words}."""
    if not VULNERABILITIES.is_dir():
        return {}
    return {path.name: first_line(path) for path in sorted(VULNERABILITIES.iterdir())}


def governor() -> str:
    """Of the CPUs that scale their clock."""
    found = {first_line(path) for path in CPU_DIRECTORY.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return ", ".join(sorted(found)) or "none visible"


def turbo() -> str:
    if (intel := first_line(CPU_DIRECTORY / "intel_pstate/no_turbo")) != "unknown":
        return "off" if intel == "1" else "on"
    return {"1": "on", "0": "off"}.get(first_line(CPU_DIRECTORY / "cpufreq/boost"), "unknown")


def memory_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def first_line(path: str | Path) -> str:
    try:
        return Path(path).read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"


# -- programs ----------------------------------------------------------------------------------------------------


def find(program: str, variable: str = "") -> str | None:
    """Its path: what the environment variable ``variable`` names, or on PATH."""
    if variable and os.environ.get(variable):
        return os.environ[variable]
    return shutil.which(program)


def version(*command: str) -> str:
    """The first line it says about its version."""
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=VERSION_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown version"
    said = (ran.stdout or ran.stderr).strip().splitlines()
    return said[0].strip() if said else "unknown version"


# -- pinning -----------------------------------------------------------------------------------------------------


def choose_pin(asked: str | None) -> int | None:
    """The CPU that contenders are pinned to: the last one allowed; None for "none", or where pinning is refused.

    ValueError for what is neither a number nor "none".
    """
    if asked == "none":
        return None
    allowed = sorted(os.sched_getaffinity(0))
    cpu = allowed[-1] if asked is None else int(asked)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
        os.sched_setaffinity(0, before)
    except OSError:
        return None
    return cpu


@contextlib.contextmanager
def left_to_contenders(pin: int | None) -> Iterator[None]:
    """Keep this process off the CPU its contenders are pinned to, where there is another."""
    before = os.sched_getaffinity(0)
    if pin is not None and before - {pin}:
        os.sched_setaffinity(0, before - {pin})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
