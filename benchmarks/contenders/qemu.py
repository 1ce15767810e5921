"""QEMU, its pc and its microvm: the guest is the firmware ROM, devices are those that kvm-unit-tests uses.

pc-testdev has a register at port 0xe0, memory at 0xff000000 and interrupt lines at port 0x2000; on the pc pci-testdev
in slot 4 has doorbells. The CPU is QEMU's default: software KVM refuses some of what `-cpu host` wants.
"""

from __future__ import annotations

from pathlib import Path

from pyvmm_benchmarks import environment
from pyvmm_benchmarks.cases import ExitCase
from pyvmm_benchmarks.contenders.exit_contender import Kind
from pyvmm_benchmarks.mailbox import MEMORY_MIB

# With an RTC, which KVM's being there would keep away: it is the device whose writes are gathered.
MACHINES = {"pc": "pc", "microvm": "microvm,rtc=on,kernel-irqchip=on"}


class Qemu(Kind):
    """``machine`` is pc or microvm."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.name = f"qemu-{machine}"
        self.program = environment.find("qemu-system-x86_64", "PYVMM_QEMU")

    def version(self) -> str | None:
        return environment.version(self.program, "--version") if self.program else "not installed"

    def why_not(self, case: ExitCase) -> str:
        if self.program is None:
            return "not installed (Debian: qemu-system-x86; or name it in PYVMM_QEMU)"
        if case.kick:
            return "a kick of its vCPU can't be timed from outside"
        if case.answer:
            return "no device that answers a doorbell without a driver"
        if case.doorbell and self.machine != "pc":
            return "no doorbell that a guest could ring without a driver: pci-testdev needs PCI"
        if case.coalesce and case.coalesce.space == "mmio":
            return "has KVM gather writes only to a VGA card's memory, and to the RTC's port"
        return ""

    def command(self, case: ExitCase, directory: Path) -> list[str]:
        assert self.program is not None
        command = [self.program, "-machine", MACHINES[self.machine], "-accel", "kvm", "-m", str(MEMORY_MIB)]
        command += ["-smp", str(case.cpus), "-bios", str(directory / f"{case.guest}.rom")]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "null", "-device", "pc-testdev"]
        command += ["-name", "guest,debug-threads=on"]
        if case.doorbell:
            command += ["-device", "pci-testdev,addr=04.0"]
        return command
