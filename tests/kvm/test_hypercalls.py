"""KVM_EXIT_HYPERCALL: with KVM_CAP_EXIT_HYPERCALL a KVM_HC_MAP_GPA_RANGE of the guest reaches on_hypercall.

Software KVM hangs at a hypercall from CPL 0 without an exit, so this runs in the lab only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from guests import PASSED, Guest

from pyvmm.kvm.system import CAPABILITIES

MAP_GPA_RANGE = 12

SOURCE = """
    mov     $12, %eax               # KVM_HC_MAP_GPA_RANGE
    mov     $0x200000, %ebx         # address
    mov     $3, %ecx                # pages
    mov     $1 << 4, %edx           # attributes: encrypted
    vmmcall
    mov     %rax, %rdi
    finish
"""


@pytest.mark.lab
def test_the_arguments_and_the_answer(boot: Callable[..., Guest]) -> None:
    guest = boot(SOURCE)
    calls: list[tuple[int, list[int]]] = []

    def on_hypercall(number: int, args: list[int]) -> int:
        calls.append((number, args))
        return -7

    guest.machine.vm.enable_cap(CAPABILITIES["KVM_CAP_EXIT_HYPERCALL"], 1 << MAP_GPA_RANGE)
    guest.machine.cpus[0].exec.on_hypercall = on_hypercall
    assert guest.run() == PASSED
    assert [(number, args[:3]) for number, args in calls] == [(MAP_GPA_RANGE, [0x20_0000, 3, 1 << 4])]
    assert guest.regs()["rdi"] == (1 << 64) - 7
    assert guest.exits("HYPERCALL") == 1


@pytest.mark.lab
def test_nobody_answers(boot: Callable[..., Guest]) -> None:
    guest = boot(SOURCE)
    guest.machine.vm.enable_cap(CAPABILITIES["KVM_CAP_EXIT_HYPERCALL"], 1 << MAP_GPA_RANGE)
    assert guest.run() == PASSED
    assert guest.regs()["rdi"] == (1 << 64) - 1000
