"""Debian's vmlinux by PVH on the KVM of this machine, software as it may be: what it prints, and how far it gets."""

from __future__ import annotations

import pytest
from boot_assets import Kernel
from console import pyvmm_run

from pyvmm.kvm.kind import kvm_kind

LIMIT_S = 240.0


@pytest.mark.native
def test_vmlinux_prints_its_memory_and_ends_decoded(cloud_kernel: Kernel) -> None:
    # What software KVM's instruction emulator lacks is hidden, so that the kernel does not use it.
    append = "console=ttyS0 earlyprintk=serial noxsave panic=-1"
    args = ("--memory", "256", "--cpu", "host,-cx16,-xsave", "--append", append, "--no-reboot")
    with pyvmm_run("--kernel", str(cloud_kernel.vmlinux), *args, "--timeout", str(LIMIT_S)) as console:
        console.expect(f"Linux version {cloud_kernel.release}", LIMIT_S)
        console.expect("BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable", LIMIT_S)
        # Linux before 6.12 also says "Memory: " before it is at an int3 of its own; later ones, after that.
        console.expect("Initmem setup node 0 [mem 0x0000000000001000-0x000000000fffffff]", LIMIT_S)
        if "software" not in kvm_kind():
            # A complete KVM goes on to look for a root file system, finds none and panics: panic=-1 resets.
            assert console.wait(LIMIT_S) == 6
            return
        assert console.wait(LIMIT_S) == 4
    dump = console.output[console.output.rindex("vCPU 0: ") :]
    assert "KVM_EXIT_INTERNAL_ERROR, suberror 1 (EMULATION), instruction cc" in dump
    assert "long mode" in dump
    assert "<cc>" in dump
