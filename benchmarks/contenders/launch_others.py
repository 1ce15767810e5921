"""kvmtool, Firecracker and cloud-hypervisor from the shell, where they are installed.

Their command lines are taken from their documentation, for want of packages of them: a version that differs says so in
its own words, as the reason in the report.
"""

from __future__ import annotations

import json
from pathlib import Path

from pyvmm.kvm.kind import cpu_flags
from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.launch_guests import Guest

# They have no ACPI power-off, or none that ends them; a reset by the keyboard controller does.
RESET_ENDS = "reboot=k ending=reboot"


class Kvmtool(Launcher):
    """Refuses a processor without VMX and SVM."""

    name = "kvmtool"
    programs = ("lkvm", "kvmtool")
    variable = "PYVMM_KVMTOOL"

    def why_not(self, guest: Guest) -> str:
        reason = super().why_not(guest)
        if not reason and not cpu_flags("/proc/cpuinfo") & {"vmx", "svm"}:
            reason = "refuses a processor without VMX and SVM"
        return reason

    def command(self, guest: Guest) -> list[str]:
        assert self.program is not None
        command = [self.program, "run", "--mem", str(guest.memory_mib), "--cpus", "1", "--network", "mode=none"]
        command += ["--console", "serial"]
        if guest.linux is None:
            return [*command, "--firmware", guest.file("rom")]
        linux = guest.linux
        params = f"{linux.append} {RESET_ENDS}"
        return [*command, "--kernel", linux.kernel, "--initrd", linux.initrd, "--params", params]


class Firecracker(Launcher):
    """Takes an ELF and enters it in long mode; a configuration file says the rest."""

    name = "firecracker"
    programs = ("firecracker",)
    variable = "PYVMM_FIRECRACKER"

    def command(self, guest: Guest) -> list[str]:
        assert self.program is not None
        if guest.linux is None:
            source = {"kernel_image_path": guest.file("elf"), "boot_args": ""}
        else:
            source = {
                "kernel_image_path": guest.linux.vmlinux,
                "initrd_path": guest.linux.initrd,
                "boot_args": f"{guest.linux.append} {RESET_ENDS}",
            }
        machine = {"vcpu_count": 1, "mem_size_mib": guest.memory_mib}
        config = Path(guest.file("firecracker.json"))
        config.write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
        return [self.program, "--no-api", "--config-file", str(config)]


class CloudHypervisor(Launcher):
    """Takes an ELF with a PVH note."""

    name = "cloud-hypervisor"
    programs = ("cloud-hypervisor",)
    variable = "PYVMM_CLOUD_HYPERVISOR"

    def command(self, guest: Guest) -> list[str]:
        assert self.program is not None
        command = [self.program, "--memory", f"size={guest.memory_mib}M", "--cpus", "boot=1"]
        command += ["--serial", "tty", "--console", "off"]
        if guest.linux is None:
            return [*command, "--kernel", guest.file("pvh")]
        linux = guest.linux
        command += ["--kernel", linux.vmlinux, "--initramfs", linux.initrd]
        return [*command, "--cmdline", linux.append]
