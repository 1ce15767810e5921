"""Debian's vmlinux by PVH on the KVM of this machine, software as it may be: its memory, and its end."""

from __future__ import annotations

import pytest
from boot_assets import Kernel
from console import pyvmm_run

from pyvmm.kvm.kind import kvm_kind

LIMIT_S = 240.0


@pytest.mark.native
def test_vmlinux_prints_its_memory(cloud_kernel: Kernel) -> None:
    # What software KVM's instruction emulator lacks is hidden, so that the kernel does not use it.
    append = "console=ttyS0 earlyprintk=serial noxsave panic=-1"
    args = ("--memory", "256", "--cpu", "host,-cx16,-xsave", "--append", append, "--no-reboot")
    with pyvmm_run("--kernel", str(cloud_kernel.vmlinux), *args, "--timeout", str(LIMIT_S)) as console:
        console.expect(f"Linux version {cloud_kernel.release}", LIMIT_S)
        console.expect("BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable", LIMIT_S)
        if "software" in kvm_kind():
            # A minute later it is at an int3 of its own, which software KVM does not emulate; the lab boots it whole.
            return
        console.expect("Initmem setup node 0 [mem 0x0000000000001000-0x000000000fffffff]", LIMIT_S)
        # It goes on to look for a root file system, finds none and panics: panic=-1 resets.
        assert console.wait(LIMIT_S) == 6
