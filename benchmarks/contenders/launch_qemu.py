"""QEMU from the shell, its pc and its microvm, without any device that was not asked for."""

from __future__ import annotations

from pyvmm_benchmarks.contenders.launch_contender import Launcher
from pyvmm_benchmarks.launch_guests import SOFTWARE_HIDDEN, Guest


class Qemu(Launcher):
    """``machine`` is pc or microvm."""

    programs = ("qemu-system-x86_64",)
    variable = "PYVMM_QEMU"

    def __init__(self, machine: str) -> None:
        super().__init__()
        self.machine = machine
        self.name = f"qemu-{machine}"

    def why_not(self, guest: Guest) -> str:
        return "" if self.program else f"not installed (Debian: qemu-system-x86; or name it in {self.variable})"

    def command(self, guest: Guest) -> list[str]:
        assert self.program is not None
        command = [self.program, "-accel", "kvm", "-machine", self.machine, "-m", str(guest.memory_mib)]
        command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]
        if guest.linux is None:
            # The CPU is QEMU's default: software KVM refuses some of what `-cpu host` wants.
            return [*command, "-bios", guest.file("rom"), "-device", "isa-debug-exit,iobase=0xf4"]
        linux = guest.linux
        if linux.full:
            cpu = "host"
        else:
            cpu = ",".join(["host,-arch-capabilities", *(f"-{name}" for name in SOFTWARE_HIDDEN)])
            # Made up for lost ticks, a PIT would keep software KVM from ever taking another interrupt.
            command += ["-global", "kvm-pit.lost_tick_policy=discard"]
        return [*command, "-cpu", cpu, "-kernel", linux.kernel, "-initrd", linux.initrd, "-append", linux.append]
