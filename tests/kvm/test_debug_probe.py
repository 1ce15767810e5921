"""What of guest debugging this KVM does: it is asked, and a machine finds the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import Guest

from pyvmm.debug_probe import INT1, probe
from pyvmm.kvm.kind import kvm_kind
from pyvmm.kvm.system import Kvm
from pyvmm.x86.paging import translate


def test_it_says_the_same_each_time() -> None:
    with Kvm() as kvm:
        found = [probe(kvm) for _ in range(3)]
    assert len({each.describe() for each in found}) == 1
    assert found[0].steps
    assert "steps with" in found[0].describe()


@pytest.mark.native
def test_software_kvm() -> None:
    """Its emulator: no int3 outside of real mode, no data breakpoints, but code ones."""
    with Kvm() as kvm:
        found = probe(kvm)
    assert found.breakpoints
    if "software" in kvm_kind():
        assert (found.byte, found.watchpoints) == (INT1, False)


def test_long_mode_agrees_with_kvms(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    memory, vcpu = guest.machine.memory, guest.machine.cpus[0].vcpu
    for address in (0, 0x1234, guest.program.address, 0x20_0000, 0xFEE0_0000, 1 << 32, 1 << 46, (1 << 64) - 4096):
        assert translate(address, vcpu.sregs, memory.read) == vcpu.translate(address), hex(address)
