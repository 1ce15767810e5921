"""More vCPUs than an APIC id of eight bits can tell apart: x2APIC ids (SDM vol. 3, 11.12), as far as KVM has vCPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest

import pyvmm
from pyvmm import ConfigError
from pyvmm.x86 import acpi

CPUS = 300
LAST = CPUS - 1

# INIT and SIPI to the last one by its x2APIC id; it leaves a mark in RBX and in memory.
WAKE_THE_LAST = f"""
    .set    ICR, 0x830
    mov     $trampoline, %esi
    mov     $0x9000, %edi
    mov     $trampoline_end - trampoline, %ecx
    rep movsb
    mov     $0x1b, %ecx                 # IA32_APIC_BASE: x2APIC mode
    rdmsr
    or      $0xc00, %eax
    wrmsr
    mov     $ICR, %ecx
    mov     ${LAST}, %edx
    mov     $0x4500, %eax               # INIT
    wrmsr
    mov     $0x4609, %eax               # SIPI, page 9
    wrmsr
1:  pause
    cmpw    $0x5a5a, 0x9800
    jne     1b
    finish

    .code16
trampoline:
    cli
    mov     $0x1234, %ebx
    movw    $0x5a5a, %cs:0x800
1:  hlt
    jmp     1b
trampoline_end:
"""


@pytest.mark.parametrize("machine", ["microvm", "pc"])
def test_the_last_of_many_is_woken(boot: Callable[..., Guest], machine: str) -> None:
    guest = boot(WAKE_THE_LAST, cpus=CPUS, machine=machine)
    assert guest.run() == PASSED
    assert guest.regs(LAST)["rbx"] == 0x1234
    assert guest.regs(LAST & 0xFF)["rbx"] == 0, "the one whose id has the same eight bits was woken"
    guest.machine.reset()
    assert guest.run() == PASSED


def test_what_a_guest_is_told_of_many(boot: Callable[..., Guest]) -> None:
    """fw_cfg counts in 16 bits (docs/specs/fw_cfg.rst); CMOS 0x5f holds one less, and no more than a byte."""
    guest = boot(
        """
        mov     $0x510, %edx
        mov     $5, %eax                    # FW_CFG_NB_CPUS
        outw    %ax, %dx
        inc     %edx
        xor     %eax, %eax
        inb     %dx, %al
        mov     %eax, %ebx
        inb     %dx, %al
        mov     %al, %bh
        mov     $0x5f, %al
        outb    %al, $0x70
        inb     $0x71, %al
        movzbl  %al, %esi
        finish
        """,
        cpus=CPUS,
    )
    assert guest.run() == PASSED
    assert guest.regs()["rbx"] == CPUS
    assert guest.regs()["rsi"] == 0xFF


def test_a_kernel_finds_all_of_them_in_the_madt() -> None:
    """ACPI 6.5, 5.2.12.12: ids of 255 and up are Processor Local x2APIC structures."""
    madt = acpi.madt(CPUS)
    at, ids = 44, []
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        if kind == 0:
            ids.append(madt[at + 3])
        elif kind == 9:
            ids.append(int.from_bytes(madt[at + 4 : at + 8], "little"))
        at += length
    assert ids == list(range(CPUS))
    assert acpi.build(CPUS).tables["APIC"][1] == madt


@pytest.mark.parametrize("cpus", [0x1001, 1 << 20])
def test_our_limit_is_one_sentence(cpus: int) -> None:
    with pytest.raises(ConfigError, match=r"ACPI's tables name 4096 processors"):
        pyvmm.Machine(cpus=cpus, flat=b"\xf4")


@pytest.mark.parametrize("cpus", [256, 257])
def test_where_the_ids_get_longer(boot: Callable[..., Guest], cpus: int) -> None:
    assert boot("finish", cpus=cpus).run() == PASSED
