"""What kind of KVM this host has: the first thing to know about any number measured on it."""

from __future__ import annotations

import os

# Modules that give KVM its way of running guests; kvm itself is only the frame.
BACKENDS = {
    "kvm_intel": "hardware virtualization, Intel VMX",
    "kvm_amd": "hardware virtualization, AMD SVM",
    "kvm_pvm": "software virtualization, PVM: kernels unaware of it run partly in an instruction emulator",
}


def kvm_kind(sys_module: str = "/sys/module", cpuinfo: str = "/proc/cpuinfo") -> str:
    """In words: the module, what it does, and whether this host is itself a guest, where exits cost more."""
    loaded = [name for name in BACKENDS if os.path.isdir(os.path.join(sys_module, name))]
    flags = cpu_flags(cpuinfo)
    # A module may be loaded and have found nothing to drive; the processor's flags tell which one does.
    if len(loaded) > 1:
        loaded = [n for n in loaded if {"kvm_intel": "vmx", "kvm_amd": "svm"}.get(n, "") in flags] or loaded
    text = f"{loaded[0]}: {BACKENDS[loaded[0]]}" if loaded else "KVM of an unknown kind"
    return text + (" (this host is a virtual machine itself)" if "hypervisor" in flags else "")


def cpu_flags(cpuinfo: str) -> set[str]:
    try:
        with open(cpuinfo) as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()
