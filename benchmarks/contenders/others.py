"""kvmtool, Firecracker and cloud-hypervisor, where they are installed.

Their command lines and what they expect of a guest are taken from their documentation and sources, for want of packages
of them: a version that differs says so in its own words, as the reason in the report. None of them has a device with a
register at a place of ours: cases with one are not theirs, but COM1 is.
"""

from __future__ import annotations

import json
from pathlib import Path

from pyvmm.kvm.kind import cpu_flags
from pyvmm_benchmarks import environment, exit_guests
from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import Kind
from pyvmm_benchmarks.mailbox import MEMORY_MIB


class Other(Kind):
    """``programs``: its names, ``variable``: the environment variable that names it."""

    programs: tuple[str, ...] = ()
    variable = ""

    def __init__(self) -> None:
        found = (environment.find(program, self.variable) for program in self.programs)
        self.program = next((path for path in found if path), None)

    def version(self) -> str | None:
        return environment.version(self.program, "--version") if self.program else "not installed"

    def why_not(self, case: ExitCase) -> str:
        if self.program is None:
            return f"not installed (or name it in {self.variable})"
        if case.kick:
            return "a kick of its vCPU can't be timed from outside"
        if case.doorbell:
            return "no doorbell that a guest could ring without a driver"
        if case.coalesce:
            return "no device whose writes it has KVM gather"
        if case.device or case.irqs:
            return "no device at the guest's place (see outb_to_uart for one that it has)"
        return ""


class Kvmtool(Other):
    """Boots a bzImage in real mode (its x86/kvm.c); refuses a processor without VMX and SVM."""

    name = "kvmtool"
    programs = ("lkvm", "kvmtool")
    variable = "PYVMM_KVMTOOL"

    def why_not(self, case: ExitCase) -> str:
        reason = super().why_not(case)
        if not reason and not cpu_flags("/proc/cpuinfo") & {"vmx", "svm"}:
            reason = "refuses a processor without VMX and SVM"
        return reason

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        assert self.program is not None
        image = directory / f"{case.guest}.bzimage"
        image.write_bytes(exit_guests.bzimage(case.guest))
        command = [self.program, "run", "--kernel", str(image), "--mem", str(MEMORY_MIB), "--cpus", str(case.cpus)]
        return [*command, "--network", "mode=none", "--console", "serial"]


class Firecracker(Other):
    """Takes an ELF and enters it in long mode."""

    name = "firecracker"
    programs = ("firecracker",)
    variable = "PYVMM_FIRECRACKER"

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        assert self.program is not None
        image, config = directory / f"{case.guest}.elf", directory / f"{case.guest}.firecracker.json"
        image.write_bytes(exit_guests.elf(case.guest, pvh=False))
        machine = {"vcpu_count": case.cpus, "mem_size_mib": MEMORY_MIB}
        source = {"kernel_image_path": str(image), "boot_args": ""}
        config.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
        return [self.program, "--no-api", "--config-file", str(config)]


class CloudHypervisor(Other):
    """Takes an ELF with a PVH note."""

    name = "cloud-hypervisor"
    programs = ("cloud-hypervisor",)
    variable = "PYVMM_CLOUD_HYPERVISOR"

    def why_not(self, case: ExitCase) -> str:
        reason = super().why_not(case)
        if not reason and case.name in ("inl_from_kernel", "outl_to_kernel"):
            reason = "has no PIC in KVM (split irqchip)"
        return reason

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        assert self.program is not None
        image = directory / f"{case.guest}.pvh"
        image.write_bytes(exit_guests.elf(case.guest, pvh=True))
        command = [self.program, "--kernel", str(image), "--memory", f"size={MEMORY_MIB}M"]
        return [*command, "--cpus", f"boot={case.cpus}", "--serial", "null", "--console", "off"]
