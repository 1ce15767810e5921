"""CPU features hidden by name are hidden from the guest too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest

LEAF1 = "mov $1, %eax\n cpuid\n mov %ecx, %esi\n mov %edx, %edi\n finish"
CX16, XSAVE, AVX = 1 << 13, 1 << 26, 1 << 28  # leaf 1, ECX


def test_a_hidden_feature(boot: Callable[..., Guest]) -> None:
    plain, masked = boot(LEAF1), boot(LEAF1, cpu="host,-cx16")
    assert plain.run() == PASSED
    assert masked.run() == PASSED
    assert plain.regs()["rsi"] ^ masked.regs()["rsi"] == CX16
    assert plain.regs()["rdi"] == masked.regs()["rdi"]


@pytest.mark.lab
def test_with_what_depends_on_it(boot: Callable[..., Guest]) -> None:
    """Without XSAVE there is no AVX. Software KVM shows these bits of the host's whatever it is told."""
    guest = boot(LEAF1, cpu="host,-xsave")
    assert guest.run() == PASSED
    assert not guest.regs()["rsi"] & (XSAVE | AVX)


def test_hypervisor_leaves(boot: Callable[..., Guest]) -> None:
    source = """
        mov     $0x40000000, %eax
        cpuid
        mov     %ebx, out
        mov     %ecx, out + 4
        mov     %edx, out + 8
        finish
    out: .fill 12
    """
    guest = boot(source)
    assert guest.run() == PASSED
    assert guest.bytes_at("out", 12) == b"KVMKVMKVM\0\0\0"
    hidden = boot(source, cpu="host,kvm=off")
    assert hidden.run() == PASSED
    assert hidden.bytes_at("out", 12) != b"KVMKVMKVM\0\0\0"


@pytest.mark.parametrize("cpus", [1, 4])
def test_number_of_processors(boot: Callable[..., Guest], cpus: int) -> None:
    guest = boot("mov $1, %eax\n cpuid\n finish", cpus=cpus)
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] >> 16 & 0xFF == cpus


def host_s_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))


def test_the_processor_s_name(boot: Callable[..., Guest]) -> None:
    """Leaves 0x80000002 to 4, as the guest's kernel shows them in /proc/cpuinfo: never empty on a host that has one."""
    guest = boot(
        """
        mov     $0x80000002, %esi
        mov     $out, %edi
    1:  mov     %esi, %eax
        cpuid
        mov     %eax, (%rdi)
        mov     %ebx, 4(%rdi)
        mov     %ecx, 8(%rdi)
        mov     %edx, 12(%rdi)
        add     $16, %edi
        inc     %esi
        cmp     $0x80000005, %esi
        jne     1b
        finish
    out: .fill 48
        """
    )
    assert guest.run() == PASSED
    assert guest.bytes_at("out", 48).rstrip(b"\0").decode().strip() == host_s_name()
    # Software KVM may answer with the host's own CPUID whatever it is told: what it was told.
    leaves = [entry[3:] for entry in guest.machine.cpus[0].cpuid if 0x80000002 <= entry[0] <= 0x80000004]
    told = b"".join(word.to_bytes(4, "little") for leaf in leaves for word in leaf)
    assert told.rstrip(b"\0").decode().strip() == host_s_name()
