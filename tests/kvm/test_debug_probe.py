"""What of guest debugging this KVM does: it is asked, and a machine finds the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import Guest

from pyvmm.breakpoints import where
from pyvmm.debug_probe import INT1, probe
from pyvmm.kvm.kind import kvm_kind
from pyvmm.kvm.system import Kvm


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


TABLES = """
        .align  4096
root:   .fill   512, 8, 0
second: .fill   512, 8, 0
third:  .fill   512, 8, 0
"""


@pytest.mark.lab
@pytest.mark.parametrize(
    ("cr4", "efer", "entry_bytes", "linear"),
    [(0x10, 0, 4, 0x0040_3123), (0, 0, 4, 0x0040_3123), (0x20, 0, 8, 0xC020_3123)],
    ids=["32-bit with PSE", "32-bit", "PAE"],
)
def test_walks_agree_with_kvms(
    boot: Callable[..., Guest], cr4: int, efer: int, entry_bytes: int, linear: int
) -> None:
    """Tables for KVM_TRANSLATE alone, the guest never runs. (Software KVM does not take CR0.PG without EFER.LME.)"""
    guest = boot("finish\n" + TABLES, mode="protected32")
    root, second, third = (guest.program.symbols[name] for name in ("root", "second", "third"))
    memory, vcpu = guest.machine.memory, guest.machine.cpus[0].vcpu

    def put(table: int, index: int, entry: int) -> None:
        memory.write(table + entry_bytes * index, entry.to_bytes(entry_bytes, "little"))

    if entry_bytes == 4:
        put(root, 1, second | 1)
        put(second, 3, 0x7000 | 1)
        put(root, 2, 0x0080_0000 | 0x81)
    else:
        put(root, 3, second | 1)
        put(second, 1, third | 1)
        put(third, 3, 0x7000 | 1)
        put(second, 2, 0x0040_0000 | 0x81)
    guest.machine.cpus[0].sregs = {"cr3": root, "cr4": cr4, "efer": efer, "cr0": 0x8000_0011}
    large = 0x0080_1234 if entry_bytes == 4 else 0xC040_1234
    for address in (linear, linear + 0x1000, large, 0x1000, 0xFFFF_FFFF):
        ours = where(address, vcpu, guest.machine.memory_map)
        assert ours == vcpu.translate(address), hex(address)
    assert where(linear, vcpu, guest.machine.memory_map) == 0x7123


def test_long_mode_agrees_with_kvms(boot: Callable[..., Guest]) -> None:
    guest = boot("finish")
    vcpu = guest.machine.cpus[0].vcpu
    for address in (0, 0x1234, guest.program.address, 0x20_0000, 0xFEE0_0000, 1 << 32, 1 << 46, (1 << 64) - 4096):
        assert where(address, vcpu, guest.machine.memory_map) == vcpu.translate(address), hex(address)
